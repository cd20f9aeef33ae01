// Client of the admin API: one function per HTTP method, and one error type for every failure.
// Paths are relative to the page, so that the console also works below a path prefix.

/** An error response, or a failed request (`status` 0). */
export class ApiError extends Error {
    constructor(status, message, body = {}, retryAfter = null) {
        super(message);
        this.name = 'ApiError';
        this.status = status;
        /** `{ message, path }` for each invalid field. */
        this.details = Array.isArray(body?.details) ? body.details.filter((it) => it?.message) : [];
        this.permissions = Array.isArray(body?.permissions) ? body.permissions : [];
        this.retryAfter = retryAfter;
    }
}

/** Event on `document` when the session is no longer valid. */
export const SIGNED_OUT = 'signedout';

export const get = (path, options) => request('GET', path, options);
export const post = (path, body, options) => request('POST', path, { ...options, body });
export const put = (path, body, options) => request('PUT', path, { ...options, body });
export const remove = (path, options) => request('DELETE', path, options);

/** Like `get`, but returns `otherwise` if the resource does not exist or the account may not read it. */
export async function getIfThere(path, options, otherwise = null) {
    try {
        return await get(path, { ...options, quiet: true });
    } catch (error) {
        if (error instanceof ApiError && [401, 403, 404, 405, 501].includes(error.status)) return otherwise;
        throw error;
    }
}

/** Whether browsers resolve a path segment as `.` or `..`, which includes `%2E`: no URL can have it as a name. */
export const isStep = (part) => part === '.' || part === '..';

/** A path from segments, each percent-encoded except the first. `.` and `..` are an error. */
export function path(...parts) {
    const step = parts.find(isStep);
    if (step !== undefined) throw new ApiError(404, `No URL can contain the name “${step}”.`);
    return parts.map((part, n) => (n === 0 ? part : encodeURIComponent(part))).join('/');
}

/**
 * Sends a request and returns the parsed JSON (the text if the response is not JSON, `null` if it is empty).
 * Empty values of `query` are omitted. A 401 ends the session. With `quiet` it does so only after a check that the session
 * has really ended; with `anonymous` never. `background` marks requests without a user action, so that an open page does
 * not extend its session.
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
    const seconds = Number(response.headers.get('Retry-After'));
    const retryAfter = Number.isFinite(seconds) && seconds > 0 ? seconds : null;
    const error = new ApiError(response.status, messageOf(response, answer), answer, retryAfter);
    if (response.status === 401 && !anonymous && (!quiet || await hasSessionEnded())) document.dispatchEvent(new Event(SIGNED_OUT));
    throw error;
}

/** The pending check of the session; requests that are rejected at the same time share it. */
let check = null;

/** Checks with the server that issued it whether the session has ended: an edge may reject a valid session of its Unleash server. */
function hasSessionEnded() {
    check ??= get('api/admin/user', { anonymous: true, background: true })
        .then(() => false, (error) => error.status === 401)
        .finally(() => {
            check = null;
        });
    return check;
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

/** Turns an error text of the API, which has no capital and no full stop, into a sentence. */
export function sentence(text) {
    const capitalized = text[0].toUpperCase() + text.slice(1);
    return /[.!?]$/.test(capitalized) ? capitalized : `${capitalized}.`;
}
