// Modal dialogs, built on the browser's `<dialog>`, which traps the focus and restores it on close.

import { h, refocus, uniqueId } from './dom.js';
import { form } from './form.js';

/** Open dialogs that only their own buttons can close. */
const unanswered = new Set();

/** Makes the browser ask before it leaves the page. */
const confirmLeaving = (event) => event.preventDefault();

/**
 * Opens a dialog with `body` (an element, or a function that receives `close` and returns one).
 * `mustAnswer` is for content that would be lost: neither Escape nor navigation closes the dialog.
 */
export function open(title, body, { mustAnswer = false, wide = false, onclose } = {}) {
    const titleId = uniqueId('dialog');
    const dialog = h(wide ? 'dialog.wide' : 'dialog', { 'aria-labelledby': titleId, closedby: mustAnswer ? 'none' : null });
    const close = () => dialog.close();
    dialog.append(h('h2', { id: titleId }, title), typeof body === 'function' ? body(close) : body);
    if (mustAnswer) {
        dialog.addEventListener('cancel', (event) => event.preventDefault());
        // Browsers close on a second Escape even if the first was cancelled, unless the key event is prevented.
        dialog.addEventListener('keydown', (event) => event.key === 'Escape' && event.preventDefault());
        unanswered.add(dialog);
        addEventListener('beforeunload', confirmLeaving);
    }
    const before = document.activeElement;
    dialog.addEventListener('close', () => {
        dialog.remove();
        unanswered.delete(dialog);
        if (unanswered.size === 0) removeEventListener('beforeunload', confirmLeaving);
        onclose?.();
        // The element that opened the dialog may have been replaced since.
        if (!before?.isConnected && !document.querySelector('dialog[open]')) refocus(before);
    });
    document.body.append(dialog);
    dialog.showModal();
    return dialog;
}

/** Closes the dialogs of a page that is being left, except those that must be answered. */
export function closeAll() {
    for (const dialog of document.querySelectorAll('dialog')) if (!unanswered.has(dialog)) dialog.close();
}

/** Asks for confirmation of an irreversible action; `act` runs on yes. */
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

/** The buttons of a form in a dialog. */
export function buttons(close, yes) {
    return [
        h('button.button', { type: 'button', onclick: close }, 'Cancel'),
        h('button.button.primary', { type: 'submit' }, yes),
    ];
}
