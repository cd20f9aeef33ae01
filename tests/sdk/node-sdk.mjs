// Drives the official Node SDK: `node node-sdk.mjs '{"url": …, "token": …, "appName": …, "environment"?: …, "streaming"?: …}'`.
import unleash from 'unleash-client';
import { serve } from './jsonl.mjs';

const { url, token, appName, environment, streaming } = JSON.parse(process.argv[2]);
const client = new unleash.Unleash({
    url,
    appName,
    environment,
    customHeaders: { Authorization: token },
    refreshInterval: 200,
    metricsInterval: 3_600_000,
    ...(streaming && { experimentalMode: { type: 'streaming' } }),
    storageProvider: new unleash.InMemStorageProvider(),
});
client.on('error', console.error);
client.on('warn', console.error);
client.on('mode', console.error);
await new Promise((resolve) => client.once('synchronized', resolve));

await serve({
    // The inner client evaluates without counting usage.
    evaluate: ({ context }) => ({
        flags: Object.fromEntries(
            client.getFeatureToggleDefinitions().map(({ name }) => [
                name,
                {
                    enabled: client.client.isEnabled(name, inEnvironment(context), () => false),
                    variant: client.client.getVariant(name, inEnvironment(context)),
                },
            ]),
        ),
    }),
    count: ({ flag, times, context }) => {
        for (let i = 0; i < times; i += 1) client.isEnabled(flag, context);
    },
    count_variant: ({ flag, times, context }) => {
        for (let i = 0; i < times; i += 1) client.getVariant(flag, context);
    },
    /** Records impact metrics: adds to a counter, sets a gauge, and observes a value in a histogram. */
    impact: ({ name, add, set, observe }) => {
        const { impactMetrics } = client;
        impactMetrics.defineCounter(`${name}_counter`, 'a counter');
        impactMetrics.incrementCounter(`${name}_counter`, add);
        impactMetrics.defineGauge(`${name}_gauge`, 'a gauge');
        impactMetrics.updateGauge(`${name}_gauge`, set);
        impactMetrics.defineHistogram(`${name}_histogram`, 'a histogram', [10, 100]);
        impactMetrics.observeHistogram(`${name}_histogram`, observe);
    },
    flush: () => client.flushMetrics(),
    close: () => client.destroy(),
});

function inEnvironment(context) {
    return { appName, ...(environment && { environment }), ...context };
}
