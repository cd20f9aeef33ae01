// Starts a real Unleash server: `node unleash.mjs PACKAGE '{"db": {…}, "server": {…}}'`.
// Migrates the database first if necessary. Tokens and experiments are set in the environment, as in production.
const [pkg, options] = process.argv.slice(2);
const { start } = await import(pkg);
await start({
    ...JSON.parse(options),
    versionCheck: { enable: false },
    telemetry: false,
    logLevel: 'warn',
});
