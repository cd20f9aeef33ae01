// Code snippets that connect an application: the first lines of each SDK's own documentation.

/** `[title, text]` for each way to use a token of this kind. */
export function snippets(kind, secret, dataUrl) {
    if (kind === 'admin') return [['curl', `curl -H "Authorization: ${secret}" ${location.origin}/api/admin/api-tokens`]];
    if (kind === 'frontend') return [['Frontend SDK', browser(secret, dataUrl)], ['curl', `curl -H "Authorization: ${secret}" ${dataUrl}/api/frontend`]];
    return [
        ['curl', `curl -H "Authorization: ${secret}" ${dataUrl}/api/client/features`],
        ['Node', node(secret, dataUrl)],
        ['Python', python(secret, dataUrl)],
    ];
}

const node = (secret, dataUrl) => `// npm install unleash-client
import { initialize } from 'unleash-client';

const unleash = initialize({
    url: '${dataUrl}/api/',
    appName: 'my-service',
    customHeaders: { Authorization: '${secret}' },
});

unleash.on('synchronized', () => {
    console.log(unleash.isEnabled('my-flag', { userId: '42' }));
});`;

const python = (secret, dataUrl) => `# pip install UnleashClient
from UnleashClient import UnleashClient

client = UnleashClient(
    url="${dataUrl}/api",
    app_name="my-service",
    custom_headers={"Authorization": "${secret}"},
)
client.initialize_client()

print(client.is_enabled("my-flag", {"userId": "42"}))`;

const browser = (secret, dataUrl) => `// npm install unleash-proxy-client
import { UnleashClient } from 'unleash-proxy-client';

const unleash = new UnleashClient({
    url: '${dataUrl}/api/frontend',
    clientKey: '${secret}',
    appName: 'my-site',
});

unleash.on('ready', () => {
    console.log(unleash.isEnabled('my-flag'));
});
unleash.start();`;
