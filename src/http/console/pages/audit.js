// The audit log: who did what, when, from where, and what it changed.

import { get, getIfThere } from '../api.js';
import { h } from '../dom.js';
import { field, form, select } from '../form.js';
import { entry, text } from '../loose.js';
import { empty, failure } from '../notice.js';
import { address } from '../router.js';
import { table } from '../table.js';
import { at, counted } from '../time.js';

const PAGE = 50;
// Events are counted no further.
const MOST_COUNTED = 10000;

/** What each kind of event says, in the past tense. */
const KINDS = {
    'api-token-created': 'API token created',
    'api-token-updated': 'API token changed',
    'api-token-deleted': 'API token deleted',
    'user-created': 'Account created',
    'user-updated': 'Account changed',
    'user-deleted': 'Account deleted',
    'user-permissions-changed': 'Permissions changed',
    'user-password-changed': 'Password changed',
    'user-signed-in': 'Signed in',
    'user-signed-out': 'Signed out',
    'sign-in-refused': 'Sign-in refused',
    'permission-denied': 'Permission denied',
};
const REFUSALS = ['sign-in-refused', 'permission-denied'];

export async function auditPage({ query, status, signal }) {
    const environments = (await getIfThere('api/admin/environments', { signal }))?.environments ?? [];
    const asked = Object.fromEntries(['type', 'createdBy', 'environment', 'from', 'to'].map((name) => [name, query.get(name) ?? '']));
    // A time that is none, as somebody may write it into the address, filters nothing.
    for (const name of ['from', 'to']) if (Number.isNaN(Date.parse(asked[name]))) asked[name] = '';
    const offset = Math.max(0, Number.parseInt(query.get('offset') ?? '0', 10) || 0);
    const grid = table({ caption: 'Audit log', columns: COLUMNS, detail });
    const count = h('p.count', { role: 'status' });
    const pager = h('nav.pager', { 'aria-label': 'Pages of the log' });
    let told;
    try {
        told = await load(asked, offset, status, signal);
    } catch (error) {
        if (error.status !== 400) throw error;
        told = { events: [], total: 0, trouble: failure(error) };
    }
    const { events, total } = told;
    const isFiltered = Object.values(asked).some((it) => it !== '');
    grid.show(events, told.trouble ?? (isFiltered
        ? empty('Nothing matches', 'No event fits these filters.', h('a.button', { href: address(['audit-log']) }, 'Show all'))
        : empty('Nothing yet', 'What people and tokens change is written down here.')));
    count.textContent = events.length === 0 ? '' : `${offset + 1} to ${offset + events.length} of ${counted(total, 'event')}${total === MOST_COUNTED ? ' or more' : ''}`;
    const turn = (to, label) => h('a.button', { href: address(['audit-log'], { ...asked, offset: to || '' }) }, label);
    if (offset > 0) pager.append(turn(Math.max(0, offset - PAGE), 'Newer'));
    if (events.length > 0 && (offset + events.length < total || (total === MOST_COUNTED && events.length === PAGE))) pager.append(turn(offset + PAGE, 'Older'));
    return [
        h('div.page-head', h('div', h('h1', 'Audit log'), h('p.lead', 'Everything that was changed or refused, newest first. Nothing in it can be edited.'))),
        h('div.card.flush', filters(asked, environments, status), h('div.toolbar', count, pager.hasChildNodes() && pager), grid),
    ];
}

async function load(asked, offset, status, signal) {
    const instant = (time) => (time === '' ? '' : new Date(time).toISOString());
    const times = { from: instant(asked.from), to: instant(asked.to) };
    if (!status.isUnleash) {
        const told = await get('api/admin/events', { query: { ...asked, ...times, limit: PAGE, offset }, signal });
        return { events: told.events, total: told.totalEvents ?? told.events.length };
    }
    // Unleash searches by expressions, and days are its finest times.
    const is = (value) => (value === '' ? '' : `IS:${value}`);
    const told = await get('api/admin/search/events', { signal, query: {
        type: is(asked.type), environment: is(asked.environment), from: is(asked.from.slice(0, 10)), to: is(asked.to.slice(0, 10)), limit: PAGE, offset,
    } });
    return { events: told.events, total: told.total ?? told.events.length };
}

function filters(asked, environments, status) {
    const kinds = Object.entries(KINDS);
    if (asked.type !== '' && !Object.hasOwn(KINDS, asked.type)) kinds.push([asked.type, asked.type]);
    const type = select([['', 'All'], ...kinds], asked.type, { name: 'type' });
    const createdBy = h('input', { name: 'createdBy', value: asked.createdBy, autocomplete: 'off', spellcheck: 'false' });
    const environment = select([['', 'All'], ...environments.map((it) => [it.name, it.name])], asked.environment, { name: 'environment' });
    const [from, to] = ['from', 'to'].map((name) => h('input', { type: 'datetime-local', name, value: asked[name] }));
    const fields = [
        field('What', type, { names: ['type'] }),
        // Unleash knows people by number only.
        !status.isUnleash && field('By whom', createdBy, { names: ['createdBy'] }),
        field('Environment', environment, { names: ['environment'] }),
        field('From', from, { names: ['from'] }),
        field('To', to, { names: ['to'] }),
    ].filter(Boolean);
    const box = form({
        fields,
        buttons: [h('button.button.primary', { type: 'submit' }, 'Filter'), h('a.button', { href: address(['audit-log']) }, 'Clear')],
        submit: async () => {
            location.hash = address(['audit-log'], { type: type.value, createdBy: createdBy.value.trim(), environment: environment.value, from: from.value, to: to.value });
        },
    });
    box.classList.add('filters');
    return box;
}

const COLUMNS = [
    { label: 'When', class: 'name', cell: (it) => at(it.createdAt) },
    { label: 'What', cell: (it) => h('span.badge', { class: `badge ${REFUSALS.includes(it.type) ? 'warn' : 'off'}` }, entry(KINDS, it.type) ?? text(it.label) ?? text(it.type)) },
    { label: 'Of', class: 'words', cell: subject },
    { label: 'By whom', class: 'words', cell: (it) => it.createdBy ?? '' },
    { label: 'Address', class: 'address', cell: (it) => (it.ip ? h('code', it.ip) : '') },
    { label: 'Environment', cell: (it) => (it.environment === '*' ? 'All' : it.environment ?? '') },
];

function subject({ data, preData, featureName }) {
    const told = { ...preData, ...data };
    const name = [told.tokenName, told.username, told.name, featureName].map(text).find((it) => it !== null);
    return name ?? [told.permissions].flat().map(text).filter(Boolean).join(', ');
}

/** What an event changed, line by line. */
function detail(event) {
    const facts = [['Event', `${event.id} ${event.type}`], ['Project', event.project], ['Account', event.createdByUserId]];
    return h('div.event', h('dl.facts.inline', facts.filter(([, value]) => value != null && value !== '').map(([name, value]) => [h('dt', name), h('dd', value)])),
        changes(event.preData, event.data));
}

function changes(before, after) {
    const isObject = (it) => it !== null && typeof it === 'object';
    if (!isObject(before) && !isObject(after)) return h('p.muted', 'Nothing more is told.');
    const both = isObject(before) && isObject(after);
    const keys = [...new Set([...Object.keys(before ?? {}), ...Object.keys(after ?? {})])];
    const rows = keys.map((key) => {
        const [was, is] = [shown(before?.[key]), shown(after?.[key])];
        const changed = both && was !== is;
        const cell = (value, kind) => h('td', value === '' ? h('span.muted', '–') : changed ? h(kind, value) : value);
        return h('tr', { class: changed ? 'changed' : null }, h('th', { scope: 'row' }, key), before && cell(was, 'del'), after && cell(is, 'ins'));
    });
    const heads = ['Field', before && 'Before', after && 'After'].filter(Boolean);
    return h('table.plain.diff', h('caption.visually-hidden', 'What it changed'),
        h('thead', h('tr', heads.map((it) => h('th', { scope: 'col' }, it)))), h('tbody', rows));
}

function shown(value) {
    if (value === undefined || value === null) return '';
    if (Array.isArray(value)) return value.every((it) => typeof it !== 'object') ? value.join(', ') : JSON.stringify(value);
    return typeof value === 'object' ? JSON.stringify(value) : String(value);
}
