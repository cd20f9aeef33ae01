// The audit log: who changed what, when and from where.

import { get, getIfThere } from '../api.js';
import { h } from '../dom.js';
import { field, form, select } from '../form.js';
import { entry, text } from '../lenient.js';
import { empty, failure } from '../messages.js';
import { address } from '../router.js';
import { table } from '../table.js';
import { at, counted } from '../time.js';

const PAGE = 50;
// The server counts events up to this number.
const MOST_COUNTED = 10000;

/** The label of each event type. */
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
    const filter = Object.fromEntries(['type', 'createdBy', 'environment', 'from', 'to'].map((name) => [name, query.get(name) ?? '']));
    // An invalid time in the URL is ignored.
    for (const name of ['from', 'to']) if (Number.isNaN(Date.parse(filter[name]))) filter[name] = '';
    const offset = Math.max(0, Number.parseInt(query.get('offset') ?? '0', 10) || 0);
    const grid = table({ caption: 'Audit log', columns: COLUMNS, detail });
    const count = h('p.count', { role: 'status' });
    const pager = h('nav.pager', { 'aria-label': 'Pages of the log' });
    let result;
    try {
        result = await load(filter, offset, status, signal);
    } catch (error) {
        if (error.status !== 400) throw error;
        result = { events: [], total: 0, trouble: failure(error) };
    }
    const { events, total } = result;
    const isFiltered = Object.values(filter).some((it) => it !== '');
    grid.show(events, result.trouble ?? (isFiltered
        ? empty('Nothing matches', 'No event fits these filters.', h('a.button', { href: address(['audit-log']) }, 'Show all'))
        : empty('Nothing yet', 'Changes by accounts and tokens are recorded here.')));
    count.textContent = events.length === 0 ? '' : `${offset + 1} to ${offset + events.length} of ${counted(total, 'event')}${total === MOST_COUNTED ? ' or more' : ''}`;
    const turn = (to, label) => h('a.button', { href: address(['audit-log'], { ...filter, offset: to || '' }) }, label);
    if (offset > 0) pager.append(turn(Math.max(0, offset - PAGE), 'Newer'));
    if (events.length > 0 && (offset + events.length < total || (total === MOST_COUNTED && events.length === PAGE))) pager.append(turn(offset + PAGE, 'Older'));
    return [
        h('div.page-head', h('div', h('h1', 'Audit log'), h('p.lead', 'Everything that was changed or refused, newest first. Nothing in it can be edited.'))),
        h('div.card.flush', filters(filter, environments, status), h('div.toolbar', count, pager.hasChildNodes() && pager), grid),
    ];
}

async function load(filter, offset, status, signal) {
    const instant = (time) => (time === '' ? '' : new Date(time).toISOString());
    const times = { from: instant(filter.from), to: instant(filter.to) };
    if (!status.isUnleash) {
        const response = await get('api/admin/events', { query: { ...filter, ...times, limit: PAGE, offset }, signal });
        return { events: response.events, total: response.totalEvents ?? response.events.length };
    }
    // Unleash filters by expressions, and by whole days only.
    const is = (value) => (value === '' ? '' : `IS:${value}`);
    const response = await get('api/admin/search/events', { signal, query: {
        type: is(filter.type), environment: is(filter.environment), from: is(filter.from.slice(0, 10)), to: is(filter.to.slice(0, 10)), limit: PAGE, offset,
    } });
    return { events: response.events, total: response.total ?? response.events.length };
}

function filters(filter, environments, status) {
    const kinds = Object.entries(KINDS);
    if (filter.type !== '' && !Object.hasOwn(KINDS, filter.type)) kinds.push([filter.type, filter.type]);
    const type = select([['', 'All'], ...kinds], filter.type, { name: 'type' });
    const createdBy = h('input', { name: 'createdBy', value: filter.createdBy, autocomplete: 'off', spellcheck: 'false' });
    const environment = select([['', 'All'], ...environments.map((it) => [it.name, it.name])], filter.environment, { name: 'environment' });
    const [from, to] = ['from', 'to'].map((name) => h('input', { type: 'datetime-local', name, value: filter[name] }));
    const fields = [
        field('What', type, { names: ['type'] }),
        // Unleash filters by account id only.
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
    const merged = { ...preData, ...data };
    const name = [merged.tokenName, merged.username, merged.name, featureName].map(text).find((it) => it !== null);
    return name ?? [merged.permissions].flat().map(text).filter(Boolean).join(', ');
}

/** The details of an event, with its changes by field. */
function detail(event) {
    const facts = [['Event', `${event.id} ${event.type}`], ['Project', event.project], ['Account', event.createdByUserId]];
    return h('div.event', h('dl.facts.inline', facts.filter(([, value]) => value != null && value !== '').map(([name, value]) => [h('dt', name), h('dd', value)])),
        changes(event.preData, event.data));
}

function changes(before, after) {
    const isObject = (it) => it !== null && typeof it === 'object';
    if (!isObject(before) && !isObject(after)) return h('p.muted', 'No further details.');
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
