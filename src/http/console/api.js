// The admin API: one function per method, and one kind of error whatever went wrong.
// Paths are relative to the page, so that the console works below a prefix too.

/** What the server refused, or why it could not be asked (`status` 0). */
export class ApiError extends Error {
    constructor(status, message, body = {}, retryAfter = null) {
        super(message);
        this.name = 'ApiError';
        this.status = status;
        /** `{ message, path }` for each field that is wrong. */
        this.details = Array.isArray(body?.details) ? body.details.filter((it) => it?.message) : [];
        this.permissions = Array.isArray(body?.permissions) ? body.permissions : [];
        this.retryAfter = retryAfter;
    }
}

/** Told, as an event of `document`, when the server no longer knows the session. */
export const SIGNED_OUT = 'signedout';

export const get = (path, options) => request('GET', path, options);
export const post = (path, body, options) => request('POST', path, { ...options, body });
export const put = (path, body, options) => request('PUT', path, { ...options, body });
export const remove = (path, options) => request('DELETE', path, options);

/** What `get` answers, or `otherwise` where the server has no such thing or does not let us see it. */
export async function getIfThere(path, options, otherwise = null) {
    try {
        return await get(path, { ...options, quiet: true });
    } catch (error) {
        if (error instanceof ApiError && [401, 403, 404, 405, 501].includes(error.status)) return otherwise;
        throw error;
    }
}

/** Whether browsers take a part of a path for a step, which `%2E` is as well: no address has it for a name. */
export const isStep = (part) => part === '.' || part === '..';

/** A path from parts that may hold anything but a step: each is encoded. */
export function path(...parts) {
    const step = parts.find(isStep);
    if (step !== undefined) throw new ApiError(404, `No address can have the name “${step}”.`);
    return parts.map((part, n) => (n === 0 ? part : encodeURIComponent(part))).join('/');
}

/**
 * Asks, and gives the parsed JSON (or the text where the answer is no JSON; `null` where it is empty).
 * `query` leaves out what is empty. A 401 ends the session; a `quiet` one only where that is over indeed, and one that an
 * `anonymous` request is given never. What no person caused is told apart as `background`, so that a page that is left open
 * does not keep its session alive.
 */
async function request(method, where, { body, query, signal, quiet = false, anonymous = false, background = false } = {}) {
    const url = new URL(where, document.baseURI);
    for (const [name, value] of Object.entries(query ?? {})) {
        if (value !== null && value !== undefined && value !== '') url.searchParams.set(name, value);
    }
    url.hash = '';
    const init = { method, signal, credentials: 'same-origin', headers: { Accept: 'application/json, text/plain;q=0.9' } };
    if (background) init.headers['Parapet-Background'] = '1';
    if (body !== undefined) {
        init.headers['Content-Type'] = 'application/json';
        init.body = JSON.stringify(body);
    }
    let response;
    try {
        response = await fetch(url, init);
    } catch (error) {
        if (error.name === 'AbortError') throw error;
        throw new ApiError(0, 'The server cannot be reached. Is it running, and is the network up?');
    }
    const answer = await parsed(response);
    if (response.ok) return answer;
    const told = Number(response.headers.get('Retry-After'));
    const retryAfter = Number.isFinite(told) && told > 0 ? told : null;
    const error = new ApiError(response.status, messageOf(response, answer), answer, retryAfter);
    if (response.status === 401 && !anonymous && (!quiet || await isOver())) document.dispatchEvent(new Event(SIGNED_OUT));
    throw error;
}

/** The question whether the session is over, while it is on its way: all that is refused at once waits for one answer. */
let question = null;

/** Whether the session is over, by who knows it: what is an edge's own may refuse a session of its Unleash's that is good. */
function isOver() {
    question ??= get('api/admin/user', { anonymous: true, background: true })
        .then(() => false, (error) => error.status === 401)
        .finally(() => {
            question = null;
        });
    return question;
}

async function parsed(response) {
    const text = await response.text();
    if (text === '') return null;
    if (!(response.headers.get('Content-Type') ?? '').includes('json')) return text;
    try {
        return JSON.parse(text);
    } catch {
        return text;
    }
}

function messageOf(response, answer) {
    if (typeof answer?.message === 'string' && answer.message !== '') return sentence(answer.message);
    return `The server answered ${response.status} ${response.statusText}`.trim() + '.';
}

/** A text that begins small and ends without a full stop, as errors of the API do, as a sentence. */
export function sentence(text) {
    const begun = text[0].toUpperCase() + text.slice(1);
    return /[.!?]$/.test(begun) ? begun : `${begun}.`;
}
