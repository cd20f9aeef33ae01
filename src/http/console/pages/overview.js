// The state of the instance: environments, upstream, request rates and connected applications.

import { get, getIfThere } from '../api.js';
import { lineChart, short } from '../charts.js';
import { fill, h } from '../dom.js';
import { empty } from '../messages.js';
import { rate, samples, sums } from '../prometheus.js';
import { address } from '../router.js';
import { loadStatus } from '../status.js';
import { table } from '../table.js';
import { ago, at, counted, lasting, number } from '../time.js';

/** The polling interval in milliseconds, and the number of samples in the charts. */
const INTERVAL = 2_000;
const MOMENTS = 61;
/** The routes that this page polls, which the statistics exclude. */
const OWN_ROUTES = ['/metrics', '/status'];
/** The number of routes shown at first. */
const ROUTES_SHOWN = 8;
/** The number of topics of a fleet, and of the names of its instances, shown at first. */
const TOPICS_SHOWN = 6;
const NAMES_SHOWN = 10;

const REQUESTS = 'http_server_requests_total';
const SECONDS = ['http_server_request_duration_seconds_sum', 'http_server_request_duration_seconds_count'];
const VERDICTS = 'parapet_token_verdicts_total';

const BY_STATUS = [
    { key: 'served', label: 'Served', class: 'good' },
    { key: 'refused', label: 'Refused (4xx)', class: 'warn' },
    { key: 'failed', label: 'Failed (5xx)', class: 'bad' },
];
const BY_VERDICT = [
    { key: 'valid', label: 'Valid', class: 'good' },
    { key: 'invalid', label: 'Rejected', class: 'warn' },
    { key: 'unavailable', label: 'Not validated', class: 'bad' },
];
const VERDICT = { known: 'valid', accepted: 'valid', refused: 'invalid', rejected: 'invalid', malformed: 'invalid', unavailable: 'unavailable' };

export async function overviewPage({ status, signal }) {
    const response = await getIfThere('api/admin/metrics/applications', { signal });
    const head = h('p.lead');
    const environments = h('div');
    const upstream = h('div');
    const requests = lineChart({ title: 'Requests', unit: 'per second', series: BY_STATUS, moments: MOMENTS, span: '2 minutes ago' });
    const verdicts = lineChart({ title: 'Tokens presented', unit: 'per second', series: BY_VERDICT, moments: MOMENTS, span: '2 minutes ago' });
    const routes = table({ caption: 'Requests by route', columns: ROUTE_COLUMNS, order: '-Since the start', page: ROUTES_SHOWN });
    const grids = {
        environments: table({ caption: 'Environments', columns: ENVIRONMENT_COLUMNS }),
        topics: table({ caption: 'Fleet', columns: TOPIC_COLUMNS, page: TOPICS_SHOWN }),
    };
    const facts = h('div');
    const redis = h('span');
    const fleet = h('section.card', { 'aria-labelledby': 'fleet', hidden: true }, h('h2', { id: 'fleet' }, 'Fleet', redis), facts, grids.topics);
    environments.append(grids.environments);

    const showStatus = (now) => {
        fill(head, summary(now));
        grids.environments.show(now.environments ?? [], now.hasStatus
            ? empty('No environments yet', 'The instance has nothing to serve so far.')
            : empty('Not available to this account', 'Only accounts and admin tokens of this instance can see its state.'));
        fill(upstream, now.upstream && upstreamCard(now.upstream));
        grids.topics.show(now.fleet?.topics ?? [], empty('Nothing is shared yet', 'The fleet shares flags once an environment is in use.'));
        fill(redis, now.fleet?.redis.lastError ? h('span.badge.bad', 'Redis fails') : h('span.badge.good', 'Redis responds'));
        fill(facts, now.fleet && fleetFacts(now.fleet));
        fleet.hidden = !now.fleet;
    };
    const stop = watch({ signal, showStatus, requests, verdicts, routes });
    signal.addEventListener('abort', stop);
    showStatus(status);
    return [
        h('div.page-head', h('div', h('h1', 'Overview'), head)),
        upstream,
        fleet,
        h('section.card.flush', { 'aria-labelledby': 'environments' }, h('h2', { id: 'environments' }, 'Environments'), environments),
        h('div.pair', requests, verdicts),
        applicationsCard(response),
        h('section.card.flush', { 'aria-labelledby': 'routes' }, h('h2', { id: 'routes' }, 'Requests by route'), routes),
    ];
}

/** Polls while the page is visible; returns a function that stops it. */
function watch({ signal, showStatus, requests, verdicts, routes }) {
    const unattended = { signal, background: true };
    let before = null;
    let timer = null;
    let isStopped = false;
    const poll = async () => {
        clearTimeout(timer);
        if (isStopped || document.hidden) return;
        try {
            const [text, now] = await Promise.all([get('metrics', unattended), loadStatus(unattended)]);
            if (isStopped) return;
            const after = measure(String(text));
            if (before) draw(before, after, { requests, verdicts });
            routes.show(byRoute(before, after), empty('No requests yet', 'Requests appear here once a service sends them.'));
            before = after;
            showStatus(now);
        } catch {
            // The charts show a gap, and the next poll tries again.
            before = null;
            if (!isStopped) [requests, verdicts].forEach((chart) => chart.add({}));
        }
        if (!isStopped) timer = setTimeout(poll, INTERVAL);
    };
    document.addEventListener('visibilitychange', poll, { signal });
    poll();
    return () => {
        isStopped = true;
        clearTimeout(timer);
    };
}

function measure(text) {
    const found = samples(text, [REQUESTS, ...SECONDS, VERDICTS]);
    const of = (name) => found.filter((sample) => sample.name === name && !OWN_ROUTES.includes(sample.labels.http_route));
    return {
        time: performance.now() / 1000,
        status: sums(of(REQUESTS), ({ labels }) => ({ 4: 'refused', 5: 'failed' })[labels.http_response_status_code?.[0]] ?? 'served'),
        verdicts: sums(of(VERDICTS), ({ labels }) => VERDICT[labels.verdict] ?? null),
        routes: sums(of(REQUESTS), ({ labels }) => labels.http_route ?? null),
        took: SECONDS.map((name) => sums(of(name), ({ labels }) => labels.http_route ?? null)),
    };
}

function draw(before, after, { requests, verdicts }) {
    const seconds = after.time - before.time;
    const rates = (series, what) => Object.fromEntries(series.map(({ key }) => [key, rate(before[what], after[what], key, seconds)]));
    requests.add(rates(BY_STATUS, 'status'));
    verdicts.add(rates(BY_VERDICT, 'verdicts'));
}

function byRoute(before, after) {
    const [sum, count] = after.took;
    return [...after.routes].filter(([, total]) => total > 0).map(([route, total]) => ({
        route,
        total,
        perSecond: before && rate(before.routes, after.routes, route, after.time - before.time),
        mean: count.get(route) > 0 ? sum.get(route) / count.get(route) : null,
    }));
}

const ROUTE_COLUMNS = [
    { label: 'Route', sort: (it) => it.route, cell: (it) => h('code', it.route) },
    { label: 'Per second', class: 'number', sort: (it) => it.perSecond ?? 0, cell: (it) => (it.perSecond === null ? '–' : short(it.perSecond)) },
    { label: 'Since the start', class: 'number', sort: (it) => it.total, cell: (it) => number(it.total) },
    { label: 'Mean time', class: 'number', sort: (it) => it.mean ?? 0, cell: (it) => (it.mean === null ? '–' : duration(it.mean)) },
];

const ENVIRONMENT_COLUMNS = [
    { label: 'Environment', cell: (it) => h('a', { href: address(['flags'], { environment: it.name }) }, it.name) },
    { label: 'Flags', class: 'number', cell: (it) => number(it.flags) },
    { label: 'Segments', class: 'number', cell: (it) => number(it.segments ?? 0) },
    { label: 'Revision', class: 'number', cell: (it) => it.revision ?? '–' },
    { label: 'Confirmed', cell: (it) => (it.ageSeconds === null || it.ageSeconds === undefined ? h('span.muted', 'Not yet') : it.ageSeconds < 3 ? 'just now' : `${lasting(it.ageSeconds)} ago`) },
    { label: 'Problems', cell: (it) => problems(it.problems ?? []) },
];

function problems(list) {
    if (list.length === 0) return h('span.muted', 'None');
    return h('details.problems', h('summary', h('span.badge.warn', String(list.length))), h('ul', list.map((it) => h('li', it))));
}

function summary(status) {
    if (!status.hasStatus) return 'Connected applications and requests.';
    const ready = status.ready === false ? h('span.badge.bad', 'Not ready') : h('span.badge.good', 'Ready');
    const refused = status.upstream?.adminToken?.refusedSince && h('span.badge.bad', 'Admin token refused');
    return [ready, refused, ` Parapet ${status.version}, ${status.mode}, started `, ago(status.started, 'at an unknown time'),
        '. SDKs go to ', h('code', status.dataUrl), '.'];
}

function upstreamCard({ url, streams = 0, lastSuccess, lastError, consecutiveFailures = 0, adminToken }) {
    const fine = consecutiveFailures === 0;
    return h('section.card', { 'aria-labelledby': 'upstream' },
        h('h2', { id: 'upstream' }, 'Upstream', h('span.badge', { class: `badge ${fine ? 'good' : 'bad'}` }, fine ? 'Reachable' : `${consecutiveFailures} failures in a row`)),
        h('dl.facts',
            url && [h('dt', 'Address'), h('dd', h('code', url))],
            h('dt', 'Changes arrive'), h('dd', streams === 0 ? 'by polling' : streams === 1 ? 'on a stream' : `on ${number(streams)} streams`),
            h('dt', 'Last response'), h('dd', ago(lastSuccess, 'None yet')),
            adminToken && [h('dt', 'Admin token'), h('dd', adminTokenState(adminToken))],
            lastError && [h('dt', 'Last error'), h('dd', lastError.error, ' (', at(lastError.at), ')')]));
}

/** The edges that act towards upstream as one, as this instance sees them. */
function fleetFacts({ name, redis, instances, lastNoticeSeconds: notice }) {
    const others = instances.count - Math.min(instances.names.length, NAMES_SHOWN);
    const names = [...instances.names.slice(0, NAMES_SHOWN), ...(others > 0 ? [`${number(others)} more`] : [])];
    return h('dl.facts',
        h('dt', 'Name'), h('dd', name),
        h('dt', 'Instances'), h('dd', counted(instances.count, 'instance'), names.length > 0 && `: ${names.join(', ')}`),
        h('dt', 'Redis'), h('dd', h('code', redis.url)),
        h('dt', 'Last notice'), h('dd', notice === null ? h('span.muted', 'None yet') : notice < 3 ? 'just now' : `${lasting(notice)} ago`),
        redis.lastError && [h('dt', 'Last error'), h('dd', redis.lastError)]);
}

const ROLES = {
    leader: () => h('span.badge.good', 'Leads'),
    follower: () => 'Follows',
    alone: () => h('span.badge.warn', 'Fetches for itself'),
};
const TOPIC_COLUMNS = [
    { label: 'Shared', cell: (it) => topicName(it.topic) },
    { label: 'This instance', cell: (it) => ROLES[it.role]?.() ?? it.role },
    { label: 'Leader', cell: (it) => it.leader ?? h('span.muted', 'None') },
    { label: 'Leads since', cell: (it) => ago(it.leaderSince, '–') },
];

function topicName(topic) {
    const [kind, environment] = topic.split(':');
    return environment === undefined ? kind : `${kind} of ${decodeURIComponent(environment)}`;
}

/** Whether upstream accepts the edge's admin token, and how to replace one that it rejects. */
function adminTokenState({ refusedSince, file }) {
    if (!refusedSince) return 'Accepted';
    const remedy = file ? ['Replace it in ', h('code', file), '.'] : ['Replace it in the configuration, and send SIGHUP.'];
    return [h('span.badge.bad', 'Refused'), ' by upstream ', ago(refusedSince),
        '. Flags are served as before; new tokens and environments are not found. ', ...remedy];
}

function applicationsCard(response) {
    const grid = table({ caption: 'Connected applications', order: 'Application', columns: [
        { label: 'Application', sort: (it) => it.appName, cell: (it) => it.appName },
        { label: 'SDKs', cell: (it) => (it.sdkVersions ?? []).join(', ') || h('span.muted', 'Unknown') },
        { label: 'Environments', cell: (it) => (it.environments ?? []).join(', ') },
        { label: 'Instances', class: 'number', sort: (it) => it.instances ?? 0, cell: (it) => number(it.instances ?? 0) },
        { label: 'Strategies', cell: (it) => (it.strategies ?? []).join(', ') || h('span.muted', 'Unknown') },
        { label: 'Last seen', sort: (it) => it.seenAt ?? '', cell: (it) => ago(it.seenAt, 'Never') },
    ] });
    grid.show((response?.applications ?? []).map(application), response === null
        ? empty('Not available', 'This server does not list connected applications.')
        : empty('No applications yet', 'An application appears once its SDK has registered or reported usage.'));
    return h('section.card.flush', { 'aria-labelledby': 'applications' }, h('h2', { id: 'applications' }, 'Connected applications'), grid);
}

/** Normalises an application: in Unleash's format, environments are part of its usage. */
function application(raw) {
    const usage = raw.usage ?? [];
    return {
        ...raw,
        environments: raw.environments ?? [...new Set(usage.flatMap((it) => it.environments ?? []))],
        instances: raw.instances?.length ?? raw.instances,
    };
}

function duration(seconds) {
    return seconds >= 1 ? `${seconds.toFixed(2)} s` : seconds >= 0.001 ? `${(seconds * 1e3).toFixed(1)} ms` : `${(seconds * 1e6).toFixed(0)} µs`;
}
