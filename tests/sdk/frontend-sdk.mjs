// Drives the official frontend SDK: `node frontend-sdk.mjs '{"url": …/api/frontend, "token": …, "appName": …}'`.
import { EVENTS, InMemoryStorageProvider, UnleashClient } from 'unleash-proxy-client';
import { serve } from './jsonl.mjs';

const { url, token, appName, post } = JSON.parse(process.argv[2]);
const client = new UnleashClient({
    url,
    clientKey: token,
    appName,
    disableRefresh: true,
    metricsInterval: 3600,
    metricsIntervalInitial: 0,
    storageProvider: new InMemoryStorageProvider(),
    fetch,
    usePOSTrequests: post ?? false,
});
client.on(EVENTS.ERROR, console.error);
await client.start();

await serve({
    // A frontend SDK gets evaluated flags from the server, and only enabled ones. Listing them is not counted as usage.
    evaluate: async ({ context }) => {
        await client.updateContext(context ?? {});
        return {
            flags: Object.fromEntries(
                client.getAllToggles().map(({ name, enabled, variant }) => [name, { enabled, variant }]),
            ),
        };
    },
    count: ({ flag, times }) => {
        for (let i = 0; i < times; i += 1) client.isEnabled(flag);
    },
    count_variant: ({ flag, times }) => {
        for (let i = 0; i < times; i += 1) client.getVariant(flag);
    },
    flush: () => client.sendMetrics(),
    close: () => client.stop(),
});
