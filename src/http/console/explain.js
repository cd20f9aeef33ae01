// The explanation of a flag for a context: the result, and each part that contributed to it.

import { post } from './api.js';
import { fill, h, uniqueId } from './dom.js';
import { FieldError, field, form } from './form.js';

const FIELDS = [
    ['userId', 'User ID'],
    ['sessionId', 'Session ID'],
    ['remoteAddress', 'Remote address'],
    ['appName', 'Application'],
    ['environment', 'Environment'],
];

const HINTS = {
    sessionId: 'Random if empty, as for a frontend request without one.',
    environment: 'As the SDK sends it. The environment of a token is not part of the context.',
};

/** The context form, and the region for the result below it. */
export function explainForm({ flag, environment, signal }) {
    const inputs = FIELDS.map(([name]) => h('input', { name, autocomplete: 'off', spellcheck: 'false' }));
    const time = h('input', { type: 'datetime-local', name: 'currentTime', step: '1' });
    const controls = [
        ...FIELDS.map(([name, label], n) => field(label, inputs[n], { names: [name, 'context'], hint: HINTS[name] })),
        field('Current time', time, { names: ['currentTime'], hint: 'Now if empty.' }),
    ];
    const rows = h('div.properties');
    const add = h('button.button', { type: 'button', onclick: () => {
        rows.append(propertyRow());
        rows.lastChild.querySelector('input').focus();
    } }, 'Add property');
    const result = h('div.explained', { role: 'region', 'aria-live': 'polite', 'aria-label': 'Explanation' });
    const box = form({
        fields: controls,
        parts: [h('div.context', controls), h('fieldset.field', h('legend', 'Properties'), rows, add)],
        buttons: [h('button.button.primary', { type: 'submit' }, 'Explain')],
        submit: async () => {
            const context = {};
            inputs.forEach((input) => {
                if (input.value !== '') context[input.name] = input.value;
            });
            if (time.value !== '') context.currentTime = new Date(time.value).toISOString();
            const properties = readProperties(rows);
            if (Object.keys(properties).length > 0) context.properties = properties;
            const response = await post('api/admin/explain', { environment, flag, context }, { signal, quiet: true });
            fill(result, verdict(response.explanation ?? response));
        },
    });
    return [box, result];
}

function propertyRow() {
    const [name, value] = ['name', 'value'].map((key) => h('input', { name: `property-${key}`, id: uniqueId('property'), autocomplete: 'off', spellcheck: 'false' }));
    const row = h('div.property',
        h('div.field', h('label', { for: name.id }, 'Name'), name),
        h('div.field', h('label', { for: value.id }, 'Value'), value),
        h('button.quiet', { type: 'button', onclick: () => {
            const next = row.nextElementSibling?.querySelector('input') ?? row.parentElement.nextElementSibling;
            row.remove();
            next?.focus();
        } }, 'Remove'));
    return row;
}

function readProperties(rows) {
    const properties = {};
    for (const row of rows.children) {
        const [name, value] = row.querySelectorAll('input');
        if (name.value === '' && value.value === '') continue;
        if (name.value === '') throw new FieldError('properties', 'A property has a value but no name.');
        properties[name.value] = value.value;
    }
    return properties;
}

function verdict(explanation) {
    const variant = explanation.variant && [h('span.badge.kind', `Variant ${explanation.variant.name}`), explanation.variant.payload && h('code.payload', explanation.variant.payload.value)];
    return [
        h('h3.verdict', h('span', { class: `badge ${explanation.enabled ? 'good' : 'off'}` }, explanation.enabled ? 'On' : 'Off'), variant),
        h('p.summary', sentence(explanation.summary)),
        pieces(explanation),
    ];
}

/** All parts of an explanation, in evaluation order. */
function pieces(explanation) {
    const decides = (kind, index) => explanation.decision?.by === kind && (index === undefined || explanation.decision.index === index);
    const list = [
        piece({ holds: explanation.switchedOn, decides: decides('switch'), title: explanation.switchedOn ? 'Switched on here' : 'Switched off here' }),
        ...explanation.parents.map((it, n) => piece({
            holds: it.satisfied, decides: decides('parent', n), title: ['Parent ', h('code', it.flag)], why: it.why,
            inside: it.explanation && [h('p.hint', sentence(it.explanation.summary)), pieces(it.explanation)],
        })),
        ...explanation.strategies.map((it, n) => strategyPiece(it, n, decides('strategy', n))),
        explanation.variants && variantsPiece(explanation.variants, 'Variants of the flag'),
    ];
    const wrong = explanation.problems.length > 0 && h('div.note', h('p', 'Wrong with the definition:'), h('ul', explanation.problems.map((it) => h('li', sentence(it)))));
    return [h('ul.pieces', list), wrong];
}

function strategyPiece(it, n, decides) {
    const place = it.rule?.placement;
    return piece({
        holds: it.matches,
        decides,
        unreached: !it.reached,
        title: [`Strategy ${n + 1}: `, h('code', it.name || 'unreadable'), it.title && ` ${it.title}`],
        why: it.why,
        inside: h('ul.pieces',
            it.rule && piece({ holds: it.rule.holds, title: 'Rule', why: it.rule.why, inside: place && bucket(place, it.rule.percentage) }),
            it.constraints.map(constraintPiece),
            it.segments.map((segment) => piece({
                holds: segment.holds,
                title: ['Segment ', segment.name ? h('strong', segment.name) : segment.id ?? 'unreadable', segment.missing && ' (missing)'],
                why: segment.why,
                inside: segment.constraints.length > 0 && h('ul.pieces', segment.constraints.map(constraintPiece)),
            })),
            it.variants && variantsPiece(it.variants, 'Variants of the strategy')),
    });
}

function constraintPiece(it) {
    return piece({ holds: it.holds, title: 'Constraint', why: it.why });
}

function variantsPiece(it, title) {
    return piece({
        decides: it.decides,
        title: [title, it.chosen && [': ', h('code', it.chosen)]],
        why: it.why,
        inside: it.placement && shares(it),
    });
}

/** One part: whether it matches (no badge if undefined), whether it decided the result, and why. */
function piece({ holds, decides, unreached, title, why, inside }) {
    const state = holds === undefined ? null
        : h('span', { class: `badge ${holds ? 'good' : 'off'}` }, holds ? 'Yes' : 'No');
    return h('li', { class: ['piece', decides && 'decides', unreached && 'unreached'].filter(Boolean).join(' ') },
        h('p.piece-title', state, h('span', title), decides && h('span.badge.kind', 'Decided'), unreached && h('span.muted', 'not evaluated')),
        why && h('p.why', sentence(why)), inside);
}

/** A bar with the rollout's percentage, and a mark at the bucket of the context. */
function bucket(place, percentage) {
    const facts = [
        ['Bucket', place.bucket === null ? 'none' : `${place.bucket} of ${place.buckets}`],
        percentage !== null && percentage !== undefined && ['Rollout', `${percentage} %`],
        ['By', place.drawn ? 'random' : place.field ?? place.stickiness],
        place.value !== null && place.value !== undefined && ['Value', place.value],
        place.group !== null && place.group !== undefined && ['Group', place.group],
    ].filter(Boolean);
    const meter = h('div.bucket', { 'aria-hidden': 'true' });
    const share = h('span.bucket-share');
    share.style.width = `${Math.min(percentage ?? 0, 100)}%`;
    meter.append(share);
    if (place.bucket !== null) meter.append(pin(place));
    return [meter, h('dl.facts.inline', facts.map(([name, value]) => [h('dt', name), h('dd', value)]))];
}

function shares(it) {
    const total = it.shares.reduce((sum, share) => sum + share.weight, 0);
    const meter = h('div.bucket', { 'aria-hidden': 'true' }, it.shares.map((share, n) => {
        const part = h('span', { class: `bucket-part part-${n % 4}` });
        part.style.width = total > 0 ? `${(share.weight / total) * 100}%` : '0';
        return part;
    }));
    if (it.placement.bucket !== null) meter.append(pin(it.placement));
    const ranges = it.shares.filter((share) => share.weight > 0)
        .map((share) => `${share.name}: ${share.firstBucket} to ${share.firstBucket + share.weight - 1}`).join(', ');
    const where = it.placement.bucket === null ? 'No bucket' : `Bucket ${it.placement.bucket} of ${it.placement.buckets}`;
    return [meter, h('p.hint', `${where}. ${ranges}.`)];
}

function pin({ bucket, buckets }) {
    const mark = h('span.bucket-pin');
    mark.style.left = `${((bucket - 0.5) / buckets) * 100}%`;
    return mark;
}

/** A text as a sentence, with parts in backticks as code. */
function sentence(text = '') {
    const parts = text.split('`').map((part, n) => (n % 2 === 1 ? h('code', part) : part));
    if (typeof parts[0] === 'string' && parts[0] !== '') parts[0] = parts[0][0].toUpperCase() + parts[0].slice(1);
    const last = parts.at(-1);
    if (typeof last === 'string' && !/[.!?]$/.test(last)) parts.push('.');
    return parts;
}
