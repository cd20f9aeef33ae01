// Modal dialogs: the browser's own, which keep the focus inside and give it back to where it was.

import { h, refocus, uniqueId } from './dom.js';
import { form } from './form.js';

/** The dialogs that only their own buttons close. */
const unanswered = new Set();

/** Browsers ask before they leave the page then. */
const stay = (event) => event.preventDefault();

/**
 * Opens a dialog with `body` (an element, or a function that is given `close`).
 * `mustAnswer` is for what would be lost: neither Escape closes it nor another page, to which Back leads.
 */
export function open(title, body, { mustAnswer = false, wide = false, onclose } = {}) {
    const titleId = uniqueId('dialog');
    const dialog = h(wide ? 'dialog.wide' : 'dialog', { 'aria-labelledby': titleId, closedby: mustAnswer ? 'none' : null });
    const close = () => dialog.close();
    dialog.append(h('h2', { id: titleId }, title), typeof body === 'function' ? body(close) : body);
    if (mustAnswer) {
        dialog.addEventListener('cancel', (event) => event.preventDefault());
        // Browsers close at a second Escape, whatever is made of the first, unless they never see it.
        dialog.addEventListener('keydown', (event) => event.key === 'Escape' && event.preventDefault());
        unanswered.add(dialog);
        addEventListener('beforeunload', stay);
    }
    const before = document.activeElement;
    dialog.addEventListener('close', () => {
        dialog.remove();
        unanswered.delete(dialog);
        if (unanswered.size === 0) removeEventListener('beforeunload', stay);
        onclose?.();
        // What opened it may have been drawn anew since.
        if (!before?.isConnected && !document.querySelector('dialog[open]')) refocus(before);
    });
    document.body.append(dialog);
    dialog.showModal();
    return dialog;
}

/** Closes the dialogs of a page that is left. */
export function closeAll() {
    for (const dialog of document.querySelectorAll('dialog')) if (!unanswered.has(dialog)) dialog.close();
}

/** Asks before something that cannot be undone; `act` is what happens on yes. */
export function confirm({ title, text, yes, act }) {
    open(title, (close) => form({
        parts: [h('p', text)],
        buttons: [
            h('button.button', { type: 'button', onclick: close, autofocus: true }, 'Cancel'),
            h('button.button.danger', { type: 'submit' }, yes),
        ],
        submit: async () => {
            await act();
            close();
        },
    }));
}

/** The buttons at the foot of a form in a dialog. */
export function buttons(close, yes) {
    return [
        h('button.button', { type: 'button', onclick: close }, 'Cancel'),
        h('button.button.primary', { type: 'submit' }, yes),
    ];
}
