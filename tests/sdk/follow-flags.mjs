// Drives the example of a streaming frontend client: `node follow-flags.mjs '{"url": …/api/frontend, "token": …, "context": …}'`.
import { followFlags } from '../../config/examples/follow-flags.mjs';
import { serve } from './jsonl.mjs';

const changes = [];
const flags = followFlags({
    ...JSON.parse(process.argv[2]),
    onChange: ({ changed, removed }) => changes.push([changed.map((it) => it.name), removed]),
    onError: console.error,
});

await serve({
    toggles: () => ({ toggles: Object.fromEntries(flags.toggles) }),
    // Since the last call.
    changes: () => ({ changes: changes.splice(0) }),
    close: () => flags.stop(),
});
