// Labelled controls, and forms that show the server's validation errors beside the fields.

import { ApiError, sentence } from './api.js';
import { h, fill, uniqueId } from './dom.js';
import { message } from './messages.js';

/** A control with a label, a hint and an error message. */
export function field(label, control, { hint, names = [] } = {}) {
    const id = control.id || uniqueId('field');
    control.id = id;
    const hintId = `${id}-hint`;
    const wrong = h('p.wrong', { id: `${id}-wrong` });
    control.setAttribute('aria-describedby', hint ? `${hintId} ${wrong.id}` : wrong.id);
    const box = h('div.field', h('label', { for: id }, label), control, hint && h('p.hint', { id: hintId }, hint), wrong);
    return withError(box, control, wrong, names);
}

/** A group of controls with a legend. */
export function group(legend, controls, { hint, names = [] } = {}) {
    const wrong = h('p.wrong');
    const box = h('fieldset.field', h('legend', legend), hint && h('p.hint', hint), controls, wrong);
    return withError(box, box.querySelector('input, select'), wrong, names);
}

/** A checkbox or radio button followed by its label. */
export function choice(type, name, value, label, { checked = false, hint, onchange, disabled } = {}) {
    const input = h('input', { type, name, value, checked, onchange, disabled });
    return h('label.choice', input, h('span', label, hint && h('span.hint', hint)));
}

/** A drop-down of `[value, label]`. */
export function select(options, value, attributes = {}) {
    const list = options.map((option) => {
        const [key, label] = Array.isArray(option) ? option : [option, option];
        return h('option', { value: key, selected: key === value }, label);
    });
    return h('select', attributes, list);
}

/**
 * A form that shows the errors thrown by `submit`, field errors beside their fields.
 * `fields` are the results of `field` and `group`; `parts` is the content of the form, and `buttons` follow it.
 */
export function form({ fields = [], parts = fields, buttons, submit }) {
    const trouble = h('div.form-trouble', { role: 'alert' });
    const box = h('form', { novalidate: true, onsubmit: async (event) => {
        event.preventDefault();
        if (box.getAttribute('aria-busy') === 'true') return;
        fields.forEach((it) => it.setError(''));
        fill(trouble);
        const invalid = box.querySelector(':invalid:not(fieldset)');
        if (invalid) {
            const owner = fields.find((it) => it.contains(invalid));
            owner?.setError(invalid.validationMessage);
            invalid.focus();
            return;
        }
        box.setAttribute('aria-busy', 'true');
        try {
            await submit();
        } catch (error) {
            // Aborted because the user has left the page: there is nothing to show.
            if (error.name !== 'AbortError') show(error, fields, trouble);
        } finally {
            box.removeAttribute('aria-busy');
        }
    } }, parts, trouble, h('div.actions', buttons));
    return box;
}

/** A client-side validation error of one field, for `submit` to throw. */
export class FieldError extends Error {
    constructor(name, text) {
        super(text);
        this.field = name;
    }
}

function withError(box, control, wrong, names) {
    box.names = names;
    box.setError = (text) => {
        wrong.textContent = text;
        if (text === '') control?.removeAttribute('aria-invalid');
        else control?.setAttribute('aria-invalid', 'true');
    };
    box.focusControl = () => control?.focus();
    return box;
}

/** Removes the API's name of the field from a message, because the label already shows it. */
function withoutFieldName({ path, message: text }) {
    return path && text.startsWith(`${path} `) ? sentence(text.slice(path.length + 1)) : text;
}

function show(error, fields, trouble) {
    const ofField = (name) => fields.find((it) => it.names.includes(name));
    const errors = error instanceof FieldError
        ? [{ path: error.field, message: error.message }]
        : error instanceof ApiError ? error.details : [];
    let first = null;
    for (const fieldError of errors) {
        const owner = ofField(String(fieldError.path ?? '').replace(/^[/.]/, '').split(/[/.[]/)[0]);
        if (!owner) continue;
        owner.setError(withoutFieldName(fieldError));
        first ??= owner;
    }
    if (first) first.focusControl();
    else fill(trouble, h('p', error instanceof FieldError ? error.message : message(error)));
}
