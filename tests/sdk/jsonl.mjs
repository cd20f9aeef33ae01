// JSON lines over standard input and output: one command in, one answer out, in order; ends when input ends.
import { createInterface } from 'node:readline';

const say = (answer) => process.stdout.write(`${JSON.stringify(answer)}\n`);

// The SDKs log to the console; standard output is for answers only.
console.log = console.info = console.debug = console.error;

/** Says `{"ready":true}`, then answers each `{name: argument}` line with what `commands[name](argument)` resolves to. */
export async function serve(commands) {
    say({ ready: true });
    for await (const line of createInterface({ input: process.stdin })) {
        const [[name, argument]] = Object.entries(JSON.parse(line));
        try {
            say((await commands[name](argument)) ?? { ok: true });
        } catch (error) {
            say({ error: String(error?.stack ?? error) });
        }
    }
    process.exit(0);
}
