// The flags of an environment.

import { ApiError, get, getIfThere } from '../api.js';
import { h } from '../dom.js';
import { field, select } from '../form.js';
import { empty } from '../messages.js';
import { address, replaceQuery } from '../router.js';
import { table } from '../table.js';
import { counted, number } from '../time.js';

export async function flagsPage({ query, status, signal }) {
    const environments = await environmentNames(signal);
    const chosen = environmentOf(query, environments);
    const list = await flagsOf(chosen, signal);
    const search = h('input', { type: 'search', value: query.get('q') ?? '', placeholder: 'Name, project, description…', oninput: () => {
        replaceQuery(['flags'], { environment: environment.value, q: search.value });
        draw();
    } });
    const environment = select(environments, chosen, { onchange: () => {
        location.hash = address(['flags'], { environment: environment.value, q: search.value });
    } });
    const count = h('p.count', { role: 'status' });
    const grid = table({ caption: `Flags of ${chosen}`, order: 'Name', columns: columns(chosen) });
    const draw = () => {
        const term = search.value.trim().toLowerCase();
        const rows = (list ?? []).filter((it) => [it.name, it.project, it.description].join(' ').toLowerCase().includes(term));
        count.textContent = list === null ? '' : rows.length === list.length ? counted(list.length, 'flag') : `${rows.length} of ${list.length} flags`;
        grid.show(rows, nothing(list, chosen, status));
    };
    draw();
    return [
        h('div.page-head', h('div', h('h1', 'Flags'), h('p.lead', 'What this instance serves to SDKs. Open a flag to see who gets it, and why.'))),
        h('div.card.flush', h('div.toolbar', field('Environment', environment), field('Search flags', search), count), grid),
    ];
}

/** The names of the enabled environments, or of all if none is enabled. */
export async function environmentNames(signal) {
    const response = await getIfThere('api/admin/environments', { signal });
    const all = response?.environments ?? [];
    const usable = all.filter((it) => it.enabled !== false);
    return (usable.length > 0 ? usable : all).map((it) => it.name);
}

/** The environment in the URL, or else `development`, `production` or the first one. */
export function environmentOf(query, names) {
    const requested = query.get('environment');
    if (requested && (names.length === 0 || names.includes(requested))) return requested;
    return ['development', 'production'].find((it) => names.includes(it)) ?? names[0] ?? '';
}

/** The flags, or `null` if this server does not provide them. */
async function flagsOf(environment, signal) {
    try {
        return (await get('api/admin/flags', { query: { environment }, signal, quiet: true })).flags;
    } catch (error) {
        if (error instanceof ApiError && [401, 404, 405].includes(error.status)) return null;
        throw error;
    }
}

function nothing(list, environment, { isUnleash }) {
    if (list === null) return empty('Not shown here', `This server does not provide the flags${environment ? ` of ${environment}` : ''}.${isUnleash ? ' See them in Unleash.' : ''}`);
    if (list.length === 0) return empty('No flags', `${environment} has no flags yet. They appear here as soon as the instance serves them.`);
    return empty('No flag matches', 'Try fewer letters of its name, project or description.');
}

function columns(environment) {
    return [
        { label: 'Name', class: 'name', sort: (it) => it.name, cell: (it) => [
            h('a', { href: address(['flags', it.name], { environment }) }, it.name), it.description && h('span.by', it.description)] },
        { label: 'State', sort: (it) => (it.enabled ? 'a' : 'b'), cell: (it) => [
            h('span', { class: `badge ${it.enabled ? 'good' : 'off'}` }, it.enabled ? 'On' : 'Off'), it.stale && h('span.badge.warn', 'Stale')] },
        { label: 'Project', sort: (it) => it.project ?? '', cell: (it) => it.project ?? '' },
        { label: 'Type', sort: (it) => it.type ?? '', cell: (it) => it.type ?? '' },
        { label: 'Strategies', class: 'number', sort: (it) => count(it.strategies), cell: (it) => number(count(it.strategies)) },
        { label: 'Variants', class: 'number', sort: (it) => count(it.variants), cell: (it) => number(count(it.variants)) },
    ];
}

const count = (value) => (Array.isArray(value) ? value.length : value ?? 0);
