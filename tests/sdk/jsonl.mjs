// JSON lines over standard input and output: one command in, one response out, in order; exits when the input ends.
import { createInterface } from 'node:readline';

const say = (answer) => process.stdout.write(`${JSON.stringify(answer)}\n`);

// The SDKs log to the console; standard output is for responses only.
console.log = console.info = console.debug = console.error;

/** Writes `{"ready":true}`, then responds to each `{name: argument}` line with the result of `commands[name](argument)`. */
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
