// Follows the flags that are on for one user, by `GET /api/frontend/streaming`: a module for browsers and for Node 18 and
// later, without dependencies. Copy it, or read it as a description of the protocol:
//
//   import { followFlags } from './follow-flags.mjs';
//
//   const flags = followFlags({
//       url: 'https://flags.example.com/api/frontend', // the URL of frontend SDKs
//       token: '*:production.…', // a frontend token
//       context: { userId: '7', properties: { plan: 'gold' } },
//       onChange: ({ changed, removed }) => render(flags.toggles),
//   });
//   flags.toggles.get('new-checkout')?.variant.name;
//   flags.stop();

/**
 * Keeps `toggles`, a map from name to toggle, current until `stop()`.
 *
 * Calls `onChange` with each change: the toggles that are new or different, and the names of those that are no longer on.
 * Calls `onError` with the reason when a connection ends, and reconnects after a pause that grows to half a minute. Stops
 * if the token is rejected, because a retry would be rejected too.
 */
export function followFlags({ url, token, context = {}, onChange = () => {}, onError = () => {} }) {
    const toggles = new Map();
    const stopped = new AbortController();
    let last; // the id of the state in `toggles`
    let failures = 0; // since the last event
    let pause; // in milliseconds, if the server has sent one

    const apply = ({ event, id, data }) => {
        const { toggles: told, removed = [] } = JSON.parse(data);
        // The first event of a connection contains all toggles, unless `last` was still current.
        const gone = event === 'unleash-connected' ? [...toggles.keys()].filter((name) => !told.some((it) => it.name === name)) : removed;
        for (const name of gone) toggles.delete(name);
        for (const toggle of told) toggles.set(toggle.name, toggle);
        last = id;
        failures = 0;
        if (told.length || gone.length) onChange({ changed: told, removed: gone });
    };

    const connect = async () => {
        const response = await fetch(`${url}/streaming`, {
            method: 'POST', // GET works as well, with the context in the query
            headers: { authorization: token, 'content-type': 'application/json', ...(last && { 'last-event-id': last }) },
            body: JSON.stringify({ context }),
            signal: stopped.signal,
        });
        if (!response.ok) {
            const error = new Error(`${response.status} ${await response.text()}`);
            if (response.status === 401 || response.status === 403) stopped.abort();
            if (response.headers.has('retry-after')) pause = 1_000 * Number(response.headers.get('retry-after'));
            throw error;
        }
        const told = response.body.pipeThrough(new TextDecoderStream()).getReader();
        let text = '';
        for (;;) {
            const { done, value } = await told.read();
            if (done) return;
            const events = (text + value).split('\n\n');
            text = events.pop();
            for (const event of events) {
                const fields = Object.fromEntries(event.split('\n').map((line) => line.split(/: (.*)/s)));
                if (fields.retry) pause = Number(fields.retry);
                if (fields.event?.startsWith('unleash-')) apply(fields);
            }
        }
    };

    const run = async () => {
        while (!stopped.signal.aborted) {
            pause = undefined;
            try {
                await connect();
            } catch (error) {
                if (error.name !== 'AbortError') onError(error);
            }
            const wait = pause ?? Math.min(30_000, 1_000 * 2 ** failures++) * (0.5 + Math.random() / 2);
            await new Promise((resolve) => {
                const timer = setTimeout(resolve, wait);
                stopped.signal.addEventListener('abort', () => (clearTimeout(timer), resolve()), { once: true });
            });
        }
    };
    run();
    return { toggles, stop: () => stopped.abort() };
}
