// Drives OpenFeature's official OFREP providers: `node ofrep.mjs '{"url": …, "frontend": token, "client": token}'`. The web
// provider streams if there is an `EventSource` (`node --experimental-eventsource`), and polls otherwise.
import { OFREPProvider } from '@openfeature/ofrep-provider';
import { OFREPWebProvider } from '@openfeature/ofrep-web-provider';
import { OpenFeature as Server } from '@openfeature/server-sdk';
import { OpenFeature as Web, ProviderEvents } from '@openfeature/web-sdk';
import { serve } from './jsonl.mjs';

const { url, frontend, client } = JSON.parse(process.argv[2]);

// Requests and responses, in order.
const traffic = [];
const watched = async (...request) => {
    const response = await fetch(...request);
    const text = await response.clone().text();
    traffic.push({ url: response.url, status: response.status, body: text && JSON.parse(text) });
    return response;
};
const reach = (headers) => ({ baseUrl: url, headers, fetchImplementation: watched });

await Server.setProviderAndWait(new OFREPProvider(reach([['X-API-Key', client]])));
const server = Server.getClient();

await Web.setContext({ targetingKey: '7' });
const provider = new OFREPWebProvider({ ...reach([['Authorization', `Bearer ${frontend}`]]), pollInterval: globalThis.EventSource ? 0 : 100 });
await Web.setProviderAndWait(provider);
const web = Web.getClient();
let changes = 0;
web.addHandler(ProviderEvents.ConfigurationChanged, () => (changes += 1));

const ask = { boolean: 'getBooleanDetails', string: 'getStringDetails', number: 'getNumberDetails', object: 'getObjectDetails' };
await serve({
    server: ({ type, flag, fallback, context }) => server[ask[type]](flag, fallback, context),
    web: ({ type, flag, fallback }) => web[ask[type]](flag, fallback),
    context: ({ context }) => Web.setContext(context),
    changes: () => ({ changes }),
    // Since the last call.
    traffic: () => ({ traffic: traffic.splice(0) }),
    close: () => Promise.all([Server.close(), Web.close()]),
});
