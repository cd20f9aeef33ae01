// One flag: who gets it, its usage, and an explanation of its result for a context.

import { ApiError, get, getIfThere, isStep, path } from '../api.js';
import { barChart } from '../charts.js';
import { flagOf, segmentsOf } from '../definition.js';
import { h } from '../dom.js';
import { explainForm } from '../explain.js';
import { field, select } from '../form.js';
import { entry, list, object } from '../lenient.js';
import { empty } from '../messages.js';
import { address } from '../router.js';
import { table } from '../table.js';
import { counted, number } from '../time.js';
import { constraint, strategy } from '../descriptions.js';
import { environmentNames, environmentOf } from './flags.js';

const HOUR = 3_600_000;

export async function flagPage({ params, query, signal }) {
    const { name } = params;
    const environments = await environmentNames(signal);
    const environment = environmentOf(query, environments);
    const [definition, usage] = await Promise.all([
        isStep(name) ? flagAmongAll(name, environment, signal) : flagIfThere(name, environment, signal),
        isStep(name) ? null : getIfThere(`${path('api/admin/client-metrics/features', name)}/raw`, { query: { hoursBack: 24 }, signal }),
    ]);
    const choice = select(environments, environment, { onchange: () => {
        location.hash = address(['flags', name], { environment: choice.value });
    } });
    const crumbs = h('p.crumbs', h('a', { href: address(['flags'], { environment }) }, 'Flags'));
    if (definition === null) {
        return [crumbs, h('div.page-head', h('div', h('h1', name)), field('Environment', choice)),
            empty('No such flag', `${environment} has no flag with this name.`)];
    }
    const [flag, segments] = [flagOf(definition.flag), segmentsOf(definition.segments)];
    return [
        crumbs,
        h('div.page-head', h('div', h('h1', name), description(flag)), field('Environment', choice)),
        h('div.pair.uneven',
            h('div.stack', whoCard(flag, segments), variantsCard(flag.variants)),
            h('div.stack', usageCard(usage, environment, name))),
        h('section.card', { 'aria-labelledby': 'explain' }, h('h2', { id: 'explain' }, 'Explain'),
            h('p', 'Enter the context that an application would send, and see the result of the flag and the reasons.'),
            explainForm({ flag: name, environment, signal })),
    ];
}

async function flagIfThere(name, environment, signal) {
    try {
        return await get(path('api/admin/flags', name), { query: { environment }, signal, quiet: true });
    } catch (error) {
        if (error instanceof ApiError && error.status === 404) return null;
        throw error;
    }
}

/** A flag whose name cannot be part of a URL, from the whole configuration, if that is available. */
async function flagAmongAll(name, environment, signal) {
    const all = await getIfThere('internal-backstage/features', { signal });
    if (all === null) throw new ApiError(404, `No URL can contain the name “${name}”, and this instance does not list its whole configuration.`);
    const { features, segments } = object(entry(all, environment)) ?? {};
    const flag = (list(features) ?? []).find((it) => object(it)?.name === name);
    return flag ? { flag, segments } : null;
}

function description(flag) {
    return h('div.lead',
        h('span', { class: `badge ${flag.enabled ? 'good' : 'off'}` }, flag.enabled ? 'On' : 'Off'),
        flag.stale && h('span.badge.warn', 'Stale'),
        [flag.type, flag.project && `project ${flag.project}`, flag.impressionData && 'impression data on'].filter(Boolean).map((it) => h('span.fact', it)),
        flag.description && h('p', flag.description));
}

function whoCard({ enabled, dependencies, strategies }, segments) {
    return h('section.card', { 'aria-labelledby': 'who' }, h('h2', { id: 'who' }, 'Who gets it'),
        !enabled && h('p.note', 'Nobody: it is off in this environment. If it were on:'),
        dependencies.length > 0 && h('div.parents', h('h3', 'Only where'), h('ul', dependencies.map(parentLine))),
        strategies.length === 0 ? h('p', 'Everyone: it has no strategies.')
            : h('ol.strategies', strategies.map((it) => h('li', strategyBox(it, segments)))),
        strategies.length > 1 && h('p.hint', 'The first strategy that matches decides.'));
}

function parentLine(parent) {
    if (parent === null) return h('li.bad-text', 'something that cannot be read: it never holds.');
    const { feature, enabled, variants } = parent;
    const state = !enabled ? 'is off' : variants.length > 0 ? `has the variant ${variants.join(' or ')}` : 'is on';
    return h('li', h('code', feature), ` ${state}`);
}

function strategyBox(definition, segments) {
    if (definition === null) return [h('p.who', 'Nobody'), h('p.hint.bad-text', 'The definition of a strategy here cannot be read: it never matches.')];
    const { who, how } = strategy(definition);
    return [
        h('p.who', who, definition.title && h('span.muted', definition.title)),
        how && h('p.hint', how),
        definition.unreadable.length > 0 && h('p.hint.bad-text', `Cannot be read: ${definition.unreadable.join(', ')}. Explain shows the effect.`),
        constraintList(definition.constraints),
        definition.segments.map((id) => segmentBox(id, segments.find((it) => it.id === id))),
        definition.variants.length > 0 && h('p.hint', `Variants: ${definition.variants.map((it) => it?.name ?? 'one that cannot be read').join(', ')}.`),
    ];
}

function segmentBox(id, segment) {
    if (id === null) return h('p.hint.bad-text', 'A segment cannot be read: the strategy never matches.');
    if (!segment) return h('p.hint.bad-text', `Segment ${id} is missing: the strategy never matches.`);
    return h('div.segment', h('p', 'In the segment ', h('strong', segment.name ?? `number ${id}`)), constraintList(segment.constraints));
}

function constraintList(constraints) {
    if (constraints.length === 0) return null;
    return h('ul.constraints', constraints.map((definition) => {
        if (definition === null) return h('li.bad-text', 'A constraint cannot be read: it never holds.');
        const { field, phrase, values, note } = constraint(definition);
        return h('li', h('code', field), ` ${phrase} `, values.map((value, n) => [n > 0 && ', ', h('code', value)]), note && ` ${note}`);
    }));
}

function variantsCard(variants) {
    if (variants.length === 0) return null;
    const total = variants.reduce((sum, it) => sum + (it?.weight ?? 0), 0);
    const grid = table({ caption: 'Variants', columns: [
        { label: 'Variant', cell: (it) => it?.name ?? h('span.bad-text', 'Cannot be read') },
        { label: 'Share', class: 'number', cell: (it) => (it && total > 0 ? `${Number(((it.weight / total) * 100).toFixed(1))} %` : '–') },
        { label: 'Payload', cell: (it) => (it?.payload ? [h('span.muted', `${it.payload.type} `), h('code.payload', it.payload.value)] : h('span.muted', 'None')) },
        { label: 'Reserved for', cell: (it) => it?.overrides.map((o) => `${o.contextName}: ${o.values.join(', ')}`).join('; ') || h('span.muted', 'Nobody') },
    ] });
    grid.show(variants, null);
    return h('section.card.flush', { 'aria-labelledby': 'variants' }, h('h2', { id: 'variants' }, 'Variants'), grid);
}

function usageCard(usage, environment, name) {
    const data = (list(usage?.data) ?? []).filter((it) => it.environment === environment);
    const heading = h('h2', { id: 'usage' }, 'Usage, last 24 hours');
    const section = (...parts) => h('section.card', { 'aria-labelledby': 'usage' }, heading, parts);
    if (usage === null) return section(empty('Not available', isStep(name) ? 'No URL can contain this name, so its usage is not available.' : 'This server does not record usage.'));
    const [yes, no] = ['yes', 'no'].map((key) => data.reduce((sum, it) => sum + it[key], 0));
    if (yes + no === 0) return section(empty('Not used yet', `No application has reported checks of this flag in ${environment}. SDKs report about once a minute.`));
    return section(
        h('p.usage', h('span.swatch.yes'), h('strong', number(yes)), ' yes ', h('span.swatch.no'), h('strong', number(no)), ' no'),
        barChart({ title: `Usage of ${name} by hour`, bars: hours(data) }),
        h('ul.plain', byApplication(data).map(([app, count]) => h('li', h('span', app), h('span.muted', counted(count, 'check'))))),
        h('p.hint', variantWords(data)));
}

/** The last 24 hours, including empty ones. */
function hours(data) {
    const last = Math.floor(Date.now() / HOUR) * HOUR;
    return Array.from({ length: 24 }, (_, n) => {
        const start = last - (23 - n) * HOUR;
        const within = data.filter((it) => Math.floor(Date.parse(it.timestamp) / HOUR) * HOUR === start);
        const sum = (key) => within.reduce((total, it) => total + it[key], 0);
        const label = new Intl.DateTimeFormat('en-GB', { hour: '2-digit', minute: '2-digit' }).format(start);
        return { label, yes: sum('yes'), no: sum('no') };
    });
}

function byApplication(data) {
    const sums = new Map();
    for (const it of data) sums.set(it.appName, (sums.get(it.appName) ?? 0) + it.yes + it.no);
    return [...sums].sort((one, other) => other[1] - one[1]);
}

function variantWords(data) {
    const sums = new Map();
    for (const it of data) for (const [variant, count] of Object.entries(it.variants ?? {})) sums.set(variant, (sums.get(variant) ?? 0) + count);
    const words = [...sums].map(([variant, count]) => `${variant} ${number(count)}`);
    return words.length > 0 ? `Variants served: ${words.join(', ')}.` : '';
}
