// Labelled controls, and forms that say beside each field what the server found wrong with it.

import { ApiError, sentence } from './api.js';
import { h, fill, uniqueId } from './dom.js';
import { message } from './notice.js';

/** A control under its label, with a hint and a place for what is wrong with it. */
export function field(label, control, { hint, names = [] } = {}) {
    const id = control.id || uniqueId('field');
    control.id = id;
    const hintId = `${id}-hint`;
    const wrong = h('p.wrong', { id: `${id}-wrong` });
    control.setAttribute('aria-describedby', hint ? `${hintId} ${wrong.id}` : wrong.id);
    const box = h('div.field', h('label', { for: id }, label), control, hint && h('p.hint', { id: hintId }, hint), wrong);
    return tellable(box, control, wrong, names);
}

/** Several controls under one legend. */
export function group(legend, controls, { hint, names = [] } = {}) {
    const wrong = h('p.wrong');
    const box = h('fieldset.field', h('legend', legend), hint && h('p.hint', hint), controls, wrong);
    return tellable(box, box.querySelector('input, select'), wrong, names);
}

/** A checkbox or radio with its label behind it. */
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
 * A form: what `submit` throws is shown, fields' mistakes beside the fields.
 * `fields` are those of `field` and `group`; `parts` what stands in the form, `buttons` at its foot.
 */
export function form({ fields = [], parts = fields, buttons, submit }) {
    const trouble = h('div.form-trouble', { role: 'alert' });
    const box = h('form', { novalidate: true, onsubmit: async (event) => {
        event.preventDefault();
        if (box.getAttribute('aria-busy') === 'true') return;
        fields.forEach((it) => it.tell(''));
        fill(trouble);
        const invalid = box.querySelector(':invalid:not(fieldset)');
        if (invalid) {
            const owner = fields.find((it) => it.contains(invalid));
            owner?.tell(invalid.validationMessage);
            invalid.focus();
            return;
        }
        box.setAttribute('aria-busy', 'true');
        try {
            await submit();
        } catch (error) {
            // Whoever has left for another page waits for nothing here any more.
            if (error.name !== 'AbortError') show(error, fields, trouble);
        } finally {
            box.removeAttribute('aria-busy');
        }
    } }, parts, trouble, h('div.actions', buttons));
    return box;
}

/** A mistake of one field that is found here: throw it in `submit`. */
export class FieldError extends Error {
    constructor(name, text) {
        super(text);
        this.field = name;
    }
}

function tellable(box, control, wrong, names) {
    box.names = names;
    box.tell = (text) => {
        wrong.textContent = text;
        if (text === '') control?.removeAttribute('aria-invalid');
        else control?.setAttribute('aria-invalid', 'true');
    };
    box.focusControl = () => control?.focus();
    return box;
}

/** The API begins with its own name of the field, which stands there in words already. */
function besideField({ path, message: text }) {
    return path && text.startsWith(`${path} `) ? sentence(text.slice(path.length + 1)) : text;
}

function show(error, fields, trouble) {
    const ofField = (name) => fields.find((it) => it.names.includes(name));
    const mistakes = error instanceof FieldError
        ? [{ path: error.field, message: error.message }]
        : error instanceof ApiError ? error.details : [];
    let told = null;
    for (const mistake of mistakes) {
        const owner = ofField(String(mistake.path ?? '').replace(/^[/.]/, '').split(/[/.[]/)[0]);
        if (!owner) continue;
        owner.tell(besideField(mistake));
        told ??= owner;
    }
    if (told) told.focusControl();
    else fill(trouble, h('p', error instanceof FieldError ? error.message : message(error)));
}
