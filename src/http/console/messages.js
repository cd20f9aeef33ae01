// Messages to the user: empty states, errors and confirmations.

import { ApiError } from './api.js';
import { h } from './dom.js';

/** An empty state, with what to do about it. */
export function empty(title, text, ...actions) {
    return h('div.empty', h('p.empty-title', title), text && h('p', text), actions.length > 0 && h('div.actions', actions));
}

/** An error with a button to retry. */
export function failure(error, retry) {
    const button = retry && h('button.button', { type: 'button', onclick: retry }, 'Try again');
    return h('div.failure', { role: 'alert' }, h('p.failure-title', headline(error)), h('p', message(error)), button);
}

/** The text of an error: the server's message, its details, and when to retry. */
export function message(error) {
    if (!(error instanceof ApiError)) {
        console.error(error);
        return 'Something in this page failed. The browser’s console has the details.';
    }
    const summary = error.message.toLowerCase();
    const more = error.details.map((it) => it.message).filter((it) => !summary.includes(it.toLowerCase()));
    const wait = error.retryAfter && `Try again in ${error.retryAfter} ${error.retryAfter === 1 ? 'second' : 'seconds'}.`;
    return [error.message, ...more, wait].filter(Boolean).join(' ');
}

/** Shows a confirmation for six seconds, and announces it to screen readers. */
export function announce(text) {
    const announcer = document.getElementById('announcer');
    announcer.textContent = text;
    clearTimeout(announcer.timer);
    announcer.timer = setTimeout(() => {
        announcer.textContent = '';
    }, 6_000);
}

function headline(error) {
    if (!(error instanceof ApiError)) return 'This page could not be shown';
    if (error.status === 0) return 'No response';
    if (error.status === 403) return 'Not permitted';
    if (error.status === 404) return 'Not found';
    if (error.status === 429) return 'Too many attempts';
    return error.status >= 500 ? 'The server failed' : 'The server refused';
}
