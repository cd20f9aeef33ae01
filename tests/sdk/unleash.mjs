// Starts a real Unleash server: `node unleash.mjs PACKAGE '{"db": {…}, "server": {…}}'`.
// The database is migrated first if need be. Tokens and experiments come from the environment, as in production.
const [pkg, options] = process.argv.slice(2);
const { start } = await import(pkg);
await start({
    ...JSON.parse(options),
    versionCheck: { enable: false },
    telemetry: false,
    logLevel: 'warn',
});
