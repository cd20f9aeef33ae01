// Clients that poll over connections which they keep: `node poll.mjs '{"url": ..., "token": ...}'`.
import { Agent, get } from 'node:http';
import { setTimeout as sleep } from 'node:timers/promises';
import { serve } from './jsonl.mjs';

const { url, token } = JSON.parse(process.argv[2]);

/** The status, and whether the request went over a connection that had been used before. */
function ask(agent) {
    return new Promise((resolve, reject) => {
        const request = get(url, { agent, headers: { authorization: token } }, (answer) => {
            const whole = () => resolve({ status: answer.statusCode, reused: request.reusedSocket });
            answer.on('end', whole).on('error', reject).resume();
        });
        request.on('error', reject);
    });
}

/** One client: `polls` requests, `interval` ms after each answer; the first at any time within that. */
async function client(interval, polls, told) {
    const agent = new Agent({ keepAlive: true });
    await sleep(Math.random() * interval);
    for (let nth = 0; nth < polls; nth += 1) {
        if (nth > 0) await sleep(interval);
        try {
            const { status, reused } = await ask(agent);
            told.statuses.push(status);
            told.reused += Number(reused);
        } catch (error) {
            told.failures.push(`after ${interval} ms: ${error.code}, ${error.message}`);
        }
    }
    agent.destroy();
}

await serve({
    async poll({ clients, intervals, polls }) {
        const told = { statuses: [], reused: 0, failures: [] };
        const all = intervals.flatMap((interval) => Array.from({ length: clients }, () => client(interval, polls, told)));
        await Promise.all(all);
        return told;
    },
    async close() {},
});
