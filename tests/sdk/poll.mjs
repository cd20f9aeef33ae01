// Clients that poll over keep-alive connections: `node poll.mjs '{"url": ..., "token": ...}'`.
import { Agent, get } from 'node:http';
import { setTimeout as sleep } from 'node:timers/promises';
import { serve } from './jsonl.mjs';

const { url, token } = JSON.parse(process.argv[2]);

/** The status, and whether the request reused a connection. */
function ask(agent) {
    return new Promise((resolve, reject) => {
        const request = get(url, { agent, headers: { authorization: token } }, (answer) => {
            const whole = () => resolve({ status: answer.statusCode, reused: request.reusedSocket });
            answer.on('end', whole).on('error', reject).resume();
        });
        request.on('error', reject);
    });
}

/** One client: `polls` requests, each `interval` ms after the last response; the first at a random time within that. */
async function client(interval, polls, results) {
    const agent = new Agent({ keepAlive: true });
    await sleep(Math.random() * interval);
    for (let nth = 0; nth < polls; nth += 1) {
        if (nth > 0) await sleep(interval);
        try {
            const { status, reused } = await ask(agent);
            results.statuses.push(status);
            results.reused += Number(reused);
        } catch (error) {
            results.failures.push(`after ${interval} ms: ${error.code}, ${error.message}`);
        }
    }
    agent.destroy();
}

await serve({
    async poll({ clients, intervals, polls }) {
        const results = { statuses: [], reused: 0, failures: [] };
        const all = intervals.flatMap((interval) => Array.from({ length: clients }, () => client(interval, polls, results)));
        await Promise.all(all);
        return results;
    },
    async close() {},
});
