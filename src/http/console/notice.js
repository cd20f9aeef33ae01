// What is said to people beside the data: nothing here yet, something failed, something is done.

import { ApiError } from './api.js';
import { h } from './dom.js';

/** A place that has nothing to show, and what to do about it. */
export function empty(title, text, ...actions) {
    return h('div.empty', h('p.empty-title', title), text && h('p', text), actions.length > 0 && h('div.actions', actions));
}

/** What went wrong, with a way to try again. */
export function failure(error, retry) {
    const button = retry && h('button.button', { type: 'button', onclick: retry }, 'Try again');
    return h('div.failure', { role: 'alert' }, h('p.failure-title', headline(error)), h('p', message(error)), button);
}

/** A line at the foot of a form that says why the server refused; empty for fields' own mistakes, which stand beside them. */
export function message(error) {
    if (!(error instanceof ApiError)) {
        console.error(error);
        return 'Something in this page failed. The browser’s console has the details.';
    }
    const told = error.message.toLowerCase();
    const more = error.details.map((it) => it.message).filter((it) => !told.includes(it.toLowerCase()));
    const wait = error.retryAfter && `Try again in ${error.retryAfter} ${error.retryAfter === 1 ? 'second' : 'seconds'}.`;
    return [error.message, ...more, wait].filter(Boolean).join(' ');
}

/** Says aloud and shows for a while that something was done. */
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
    if (error.status === 0) return 'No answer';
    if (error.status === 403) return 'Not yours to see';
    if (error.status === 404) return 'Not found';
    if (error.status === 429) return 'Too many attempts';
    return error.status >= 500 ? 'The server could not do that' : 'The server refused';
}
