// API tokens: list, create, change expiry, delete.

import { get, getIfThere, path, post, put, remove } from '../api.js';
import { copy } from '../clipboard.js';
import { buttons, confirm, open } from '../dialog.js';
import { fill, h, uniqueId } from '../dom.js';
import { FieldError, choice, field, form, group, select } from '../form.js';
import { icon } from '../icons.js';
import { announce, empty } from '../messages.js';
import { replaceQuery } from '../router.js';
import { snippets } from '../snippets.js';
import { hidden, table } from '../table.js';
import { ago, atText } from '../time.js';

const KINDS = {
    client: { label: 'Backend', hint: 'Server SDKs fetch the flag configuration and report usage. Keep it secret.' },
    frontend: { label: 'Frontend', hint: 'Browsers and apps get evaluated flags only. It may be public.' },
    admin: { label: 'Admin', hint: 'Everything an admin can do. For scripts that you trust.' },
};

/** The choices of lifetime: days, and the label. */
const LIFETIMES = [['never', 'Never'], ['7', 'In 7 days'], ['30', 'In 30 days'], ['60', 'In 60 days'], ['365', 'In a year'], ['custom', 'On a day of your choice']];

export async function tokensPage({ session, status, query, signal }) {
    const [first, environments, projects] = await Promise.all([
        loadTokens(signal),
        getIfThere('api/admin/environments', { signal }),
        getIfThere('api/admin/projects', { signal }),
    ]);
    const scope = { environments: environments?.environments ?? [], projects: projects?.projects ?? [] };
    let tokens = first;

    const search = h('input', { type: 'search', value: query.get('q') ?? '', placeholder: 'Name, environment, project…', oninput: () => {
        replaceQuery(['api-access'], { q: search.value });
        draw();
    } });
    const grid = table({ caption: 'API tokens', order: '-Created', columns: columns({ session, reload, edit, drop }) });
    const count = h('p.count', { role: 'status' });
    const creatable = Object.keys(KINDS).filter((kind) => session.may('CREATE', kind) && !(kind === 'admin' && status.isUnleash));
    const create = () => openNew({ kinds: creatable, scope, status, created: reload });
    const button = () => h('button.button.primary', { type: 'button', onclick: create }, icon('plus'), 'New API token');

    async function reload() {
        tokens = await loadTokens(signal);
        draw();
    }
    function draw() {
        const term = search.value.trim().toLowerCase();
        const rows = term === '' ? tokens : tokens.filter((token) => searchable(token).includes(term));
        count.textContent = rows.length === tokens.length ? `${tokens.length} shown` : `${rows.length} of ${tokens.length} shown`;
        grid.show(rows, tokens.length === 0
            ? empty('No API tokens yet', creatable.length > 0
                ? 'A service needs one to fetch its flags. Create the first, and copy what it needs to start.'
                : 'A service needs one to fetch its flags. Ask an admin to create one, or for the permission to do so.')
            : empty('No token matches', 'Try fewer letters of its name, environment or project.'));
    }
    function edit(token) {
        openExpiry(token, reload);
    }
    function drop(token) {
        confirm({
            title: `Delete “${token.name}”?`,
            text: 'Clients that use it are rejected within a second. This cannot be undone.',
            yes: 'Delete token',
            act: async () => {
                await remove(path('api/admin/api-tokens', token.identifier));
                await reload();
                announce(`The token ${token.name} is deleted.`);
            },
        });
    }

    draw();
    return [
        h('div.page-head', h('div', h('h1', 'API access'),
            h('p.lead', 'Tokens that let services fetch flags and report usage. Each is shown in full only once, when it is created.')),
        creatable.length > 0 && button()),
        h('div.card.flush', h('div.toolbar', field('Filter tokens', search), count), grid),
    ];
}

async function loadTokens(signal) {
    const { tokens } = await get('api/admin/api-tokens', { signal });
    return tokens.map(token).sort((one, other) => String(other.createdAt).localeCompare(String(one.createdAt)));
}

/** Normalises a token for display: older servers use the type `client`, and return whole secrets, which are masked here. */
function token(raw) {
    return {
        identifier: raw.secret,
        name: raw.tokenName ?? raw.username ?? '',
        kind: raw.type === 'backend' ? 'client' : raw.type,
        environment: raw.environment ?? '*',
        projects: raw.projects ?? (raw.project ? [raw.project] : ['*']),
        createdAt: raw.createdAt,
        createdBy: raw.createdBy,
        seenAt: raw.seenAt,
        expiresAt: raw.expiresAt,
        masked: raw.masked ?? mask(raw.secret),
    };
}

function mask(secret = '') {
    const [scope, rest] = secret.includes('.') ? [`${secret.slice(0, secret.indexOf('.'))}.`, secret.slice(secret.indexOf('.') + 1)] : ['', secret];
    return `${scope}${rest.slice(0, 4)}****`;
}

const places = (token) => (token.projects.includes('*') ? 'All' : token.projects.join(', '));
const environmentOf = (token) => (['*', '[]'].includes(token.environment) ? 'All' : token.environment);
const kindOf = (token) => KINDS[token.kind]?.label ?? token.kind;
const hasExpired = (token) => token.expiresAt && Date.parse(token.expiresAt) <= Date.now();
const searchable = (token) =>
    [token.name, kindOf(token), token.environment, ...token.projects, token.masked, token.createdBy].join(' ').toLowerCase();

function columns({ session, edit, drop }) {
    const columns = [
        { label: 'Name', sort: (it) => it.name, class: 'name', cell: (it) => [it.name, h('span.by', hidden('Secret '), h('code', it.masked))] },
        { label: 'Type', sort: kindOf, cell: (it) => h('span.badge', { class: `badge kind-${it.kind}` }, kindOf(it)) },
        { label: 'Environment', sort: environmentOf, cell: environmentOf },
        { label: 'Projects', class: 'words', sort: places, cell: places },
        { label: 'Created', class: 'words', sort: (it) => it.createdAt ?? '', cell: (it) => [ago(it.createdAt, ''), it.createdBy && h('span.by', `by ${it.createdBy}`)] },
        { label: 'Last seen', sort: (it) => it.seenAt ?? '', cell: (it) => ago(it.seenAt, 'Never') },
        { label: 'Expires', sort: (it) => it.expiresAt ?? '9', cell: (it) =>
            (hasExpired(it) ? h('span.badge.bad', { title: atText(it.expiresAt) }, 'Expired') : ago(it.expiresAt, 'Never')) },
    ];
    const actions = (it) => h('div.row-actions',
        session.may('UPDATE', it.kind) && h('button.quiet', { type: 'button', 'aria-label': `Change expiry of ${it.name}`, onclick: () => edit(it) }, 'Expiry'),
        session.may('DELETE', it.kind) && h('button.quiet.danger', { type: 'button', 'aria-label': `Delete ${it.name}`, onclick: () => drop(it) }, 'Delete'));
    const mayAny = ['UPDATE', 'DELETE'].some((action) => Object.keys(KINDS).some((kind) => session.may(action, kind)));
    return mayAny ? [...columns, { label: 'Actions', hideLabel: true, class: 'end', cell: actions }] : columns;
}

function openNew({ kinds, scope, status, created }) {
    const name = h('input', { name: 'tokenName', required: true, maxlength: '255', autocomplete: 'off', spellcheck: 'false' });
    const places = environments(scope.environments);
    const environment = places.length > 0
        ? select(places, places.find(([key]) => key === 'development')?.[0], { name: 'environment' })
        : h('input', { name: 'environment', value: 'development', required: true, autocomplete: 'off' });
    const projects = projectChoice(scope.projects);
    const expiry = expiryChoice();
    const scoped = h('div.scoped', field('Environment', environment, { names: ['environment'] }), projects);
    const kind = () => box.querySelector('input[name="type"]:checked').value;
    const reshape = () => {
        scoped.hidden = kind() === 'admin';
    };
    const type = group('Type', kinds.map((it, n) => choice('radio', 'type', it, KINDS[it].label,
        { checked: n === 0, hint: KINDS[it].hint, onchange: reshape })), { names: ['type'] });
    const named = field('Name', name, { names: ['tokenName', 'username', 'name'], hint: 'What uses it, for instance “payments service”.' });
    const fields = [named, type, scoped.firstChild, projects, expiry];
    let box;
    open('New API token', (close) => {
        box = form({
            fields,
            parts: [named, type, scoped, expiry],
            buttons: buttons(close, 'Create token'),
            submit: async () => {
                const body = { tokenName: name.value.trim(), type: kind() };
                if (body.tokenName === '') throw new FieldError('tokenName', 'Enter a name that says what uses it.');
                if (body.type !== 'admin') Object.assign(body, { environment: environment.value, projects: projects.read() });
                const expiresAt = expiry.read();
                if (expiresAt) body.expiresAt = expiresAt;
                const made = await post('api/admin/api-tokens', body);
                close();
                openSecret(made, body, status);
                await created();
            },
        });
        return box;
    });
    reshape();
}

function openSecret(made, { tokenName, type }, status) {
    const { secret } = made;
    const text = h('code.secret-text', { id: uniqueId('secret'), tabindex: '0', 'aria-label': 'The token’s secret' }, secret);
    const done = h('p.copied', { role: 'status' });
    const copyButton = h('button.button.primary', { type: 'button', autofocus: true, onclick: async () => {
        if (await copy(secret)) {
            copyButton.textContent = 'Copied';
            done.textContent = 'The secret is in the clipboard.';
        } else {
            getSelection().selectAllChildren(text);
            done.textContent = 'The browser did not allow it. The secret is selected: copy it with the keyboard.';
        }
    } }, 'Copy');
    open(`Token “${tokenName}” is ready`, (close) => h('div.secret-dialog',
        h('p.warn', 'Copy the secret now: it cannot be shown again, neither here nor on the server.'),
        h('div.secret-line', text, copyButton), done,
        h('h3', 'Start with it'),
        tabs('Ways to use the token', snippets(type, secret, status.dataUrl)),
        h('div.actions', h('button.button', { type: 'button', onclick: close }, 'Done'))),
    { mustAnswer: true, wide: true });
}

/** Tabs with texts to copy; arrow keys switch between them. */
function tabs(label, parts) {
    const panels = parts.map(([title, text]) => {
        const panel = h('div', { role: 'tabpanel', id: uniqueId('panel') });
        const button = h('button.quiet', { type: 'button', onclick: async () => {
            button.textContent = (await copy(text)) ? 'Copied' : 'Select and copy it by hand';
        } }, `Copy ${title} snippet`);
        // Focusable, so that long lines can be scrolled with the keyboard.
        return fill(panel, h('pre', { tabindex: '0' }, h('code', text)), button);
    });
    const choose = (at, focus) => list.forEach((tab, n) => {
        tab.setAttribute('aria-selected', String(n === at));
        tab.tabIndex = n === at ? 0 : -1;
        panels[n].hidden = n !== at;
        if (n === at && focus) tab.focus();
    });
    const list = parts.map(([title], n) => {
        const tab = h('button', { type: 'button', role: 'tab', id: uniqueId('tab'), 'aria-controls': panels[n].id, onclick: () => choose(n), onkeydown: (event) => {
            const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
            if (step) choose((n + step + parts.length) % parts.length, true);
        } }, title);
        panels[n].setAttribute('aria-labelledby', tab.id);
        return tab;
    });
    choose(0);
    return h('div.tabs', h('div', { role: 'tablist', 'aria-label': label }, list), panels);
}

function openExpiry(token, changed) {
    const expiry = expiryChoice(token.expiresAt);
    open(`Expiry of “${token.name}”`, (close) => form({
        fields: [expiry],
        parts: [h('p', token.expiresAt ? `It expires on ${atText(token.expiresAt)}.` : 'It does not expire.'), expiry],
        buttons: buttons(close, 'Save expiry'),
        submit: async () => {
            await put(path('api/admin/api-tokens', token.identifier), { expiresAt: expiry.read() });
            close();
            await changed();
            announce(`The expiry of ${token.name} is changed.`);
        },
    }));
}

function environments(list) {
    const usable = list.filter((it) => it.enabled !== false);
    return (usable.length > 0 ? usable : list).map((it) => [it.name, it.name]);
}

function projectChoice(projects) {
    if (projects.length === 0) {
        const input = h('input', { name: 'projects', value: '*', required: true, autocomplete: 'off' });
        const box = field('Projects', input, { names: ['projects', 'project'], hint: '* for all, or names separated by commas.' });
        box.read = () => input.value.split(',').map((it) => it.trim()).filter((it) => it !== '');
        return box;
    }
    const list = h('div.choices', { role: 'group', 'aria-label': 'Projects of the token', hidden: true }, projects.map((it) =>
        choice('checkbox', 'projects', it.id, it.name && it.name !== it.id ? `${it.name} (${it.id})` : it.id)));
    const fold = () => {
        list.hidden = box.querySelector('input[name="which"]:checked').value === '*';
    };
    const box = group('Projects', [
        choice('radio', 'which', '*', 'All, including future ones', { checked: true, onchange: fold }),
        choice('radio', 'which', 'some', 'Only these', { onchange: fold }),
        list,
    ], { names: ['projects', 'project'] });
    box.read = () => {
        if (list.hidden) return ['*'];
        const chosen = [...list.querySelectorAll('input:checked')].map((it) => it.value);
        if (chosen.length === 0) throw new FieldError('projects', 'Choose at least one project.');
        return chosen;
    };
    return box;
}

function expiryChoice(current) {
    const day = h('input', { type: 'datetime-local', name: 'day', disabled: true });
    const dayField = field('Expires on', day, { names: ['day'] });
    const lifetime = select(LIFETIMES, current ? 'custom' : 'never', { name: 'lifetime', onchange: () => fold() });
    const wrong = field('Expires', lifetime, { names: ['expiresAt'] });
    if (current) day.value = localText(new Date(current));
    const fold = () => {
        day.disabled = lifetime.value !== 'custom';
        day.required = !day.disabled;
        dayField.hidden = day.disabled;
    };
    fold();
    const box = h('div.field-pair', wrong, dayField);
    box.names = ['expiresAt', 'day'];
    box.setError = (text) => (day.disabled ? wrong : dayField).setError(text);
    box.focusControl = () => (day.disabled ? lifetime : day).focus();
    box.read = () => {
        if (lifetime.value === 'never') return null;
        if (lifetime.value !== 'custom') return new Date(Date.now() + Number(lifetime.value) * 86_400_000).toISOString();
        const time = new Date(day.value);
        if (Number.isNaN(time.getTime())) throw new FieldError('day', 'Choose a day and a time.');
        if (time <= Date.now()) throw new FieldError('day', 'Choose a time in the future.');
        return time.toISOString();
    };
    return box;
}

/** The format of `datetime-local`: the browser's time zone, to the minute. */
function localText(date) {
    return new Date(date - date.getTimezoneOffset() * 60_000).toISOString().slice(0, 16);
}
