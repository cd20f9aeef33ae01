// Accounts and their permissions.

import { get, path, post, put, remove } from '../api.js';
import { buttons, confirm, open } from '../dialog.js';
import { h } from '../dom.js';
import { FieldError, choice, field, form, group, select } from '../form.js';
import { icon } from '../icons.js';
import { announce, empty } from '../messages.js';
import { table } from '../table.js';
import { ago } from '../time.js';

/** The roles, for servers that do not list theirs. */
const ROLES = [
    { id: 1, name: 'Admin', description: 'May do everything.' },
    { id: 2, name: 'Editor', description: 'Sees backend and frontend tokens.' },
    { id: 3, name: 'Viewer', description: 'Sees flags and backend tokens.' },
];

const KINDS = [['CLIENT', 'Backend tokens'], ['FRONTEND', 'Frontend tokens']];
const ACTIONS = [['CREATE', 'Create'], ['READ', 'See'], ['UPDATE', 'Change expiry'], ['DELETE', 'Delete']];

/** The name of an account: Unleash accounts may have no username. */
const accountName = (it) => it.username ?? it.email ?? it.name ?? String(it.id);

export async function accountsPage({ session, status, signal }) {
    let response = await get('api/admin/user-admin', { signal });
    const roles = (response.rootRoles ?? []).filter((it) => it.type === undefined || it.type.startsWith('root'));
    const known = roles.length > 0 ? roles : ROLES;
    const context = { known, session, status, isGranting: !status.isUnleash };
    const grid = table({ caption: 'Accounts', order: 'Username', columns: columns(context, { edit, grant, reset, drop }) });
    const draw = () => grid.show(response.users, empty('No accounts', 'Nobody can sign in.'));
    const reload = async () => {
        response = await get('api/admin/user-admin', { signal });
        draw();
    };
    const done = (text) => async () => {
        await reload();
        announce(text);
    };
    function edit(account) {
        openAccount(account, known, done(`The account ${accountName(account)} is changed.`));
    }
    function grant(account) {
        openGrants(account, done(`The permissions of ${accountName(account)} are changed.`));
    }
    function reset(account) {
        openReset(account, done(`The password of ${accountName(account)} is changed.`));
    }
    function drop(account) {
        confirm({
            title: `Delete the account “${accountName(account)}”?`,
            text: 'Its sessions end at once. Tokens that it created stay valid. This cannot be undone.',
            yes: 'Delete account',
            act: async () => {
                await remove(path('api/admin/user-admin', account.id));
                await done(`The account ${accountName(account)} is deleted.`)();
            },
        });
    }
    draw();
    const create = h('button.button.primary', { type: 'button', onclick: () => openAccount(null, known, done('The account is created.')) }, icon('plus'), 'New account');
    return [
        h('div.page-head', h('div', h('h1', 'Accounts'), h('p.lead', 'People who may sign in. Admins may do everything; other accounts may get permissions beyond their role.')), create),
        h('div.card.flush', grid),
    ];
}

function columns({ known, session, isGranting }, { edit, grant, reset, drop }) {
    const role = (it) => known.find((role) => role.id === it.rootRole)?.name ?? String(it.rootRole ?? '');
    const label = (verb, it) => `${verb} ${accountName(it)}`;
    const columns = [
        { label: 'Username', class: 'name', sort: accountName, cell: (it) => [accountName(it), it.id === session.user.id && h('span.by', 'You')] },
        { label: 'Name', class: 'words', sort: (it) => it.name ?? '', cell: (it) => it.name ?? '' },
        { label: 'Email', class: 'words', sort: (it) => it.email ?? '', cell: (it) => it.email ?? '' },
        { label: 'Role', sort: role, cell: (it) => h('span.badge', { class: `badge ${it.rootRole === 1 ? 'kind' : 'off'}` }, role(it)) },
        isGranting && { label: 'Also may', cell: granted },
        { label: 'Last seen', sort: (it) => it.seenAt ?? '', cell: (it) => ago(it.seenAt, 'Never') },
        { label: 'Actions', hideLabel: true, class: 'end', cell: (it) => h('div.row-actions',
            h('button.quiet', { type: 'button', 'aria-label': label('Edit', it), onclick: () => edit(it) }, 'Edit'),
            isGranting && it.rootRole !== 1 && h('button.quiet', { type: 'button', 'aria-label': label('Permissions of', it), onclick: () => grant(it) }, 'Permissions'),
            h('button.quiet', { type: 'button', 'aria-label': label('Reset the password of', it), onclick: () => reset(it) }, 'Password'),
            it.id !== session.user.id && h('button.quiet.danger', { type: 'button', 'aria-label': label('Delete', it), onclick: () => drop(it) }, 'Delete')) },
    ];
    return columns.filter(Boolean);
}

/** Describes permissions: `Backend tokens: create, delete`. */
function granted({ permissions = [], rootRole }) {
    if (rootRole === 1) return h('span.muted', 'Everything');
    const words = KINDS.map(([kind, label]) => {
        const verbs = ACTIONS.filter(([action]) => permissions.includes(`${action}_${kind}_API_TOKEN`)).map(([, verb]) => verb.toLowerCase());
        return verbs.length > 0 && `${label}: ${verbs.join(', ')}`;
    }).filter(Boolean);
    return words.length > 0 ? h('div', words.map((it) => h('span.line', it))) : h('span.muted', 'Nothing more');
}

function openAccount(account, roles, changed) {
    const text = (name, value, attributes) => h('input', { name, value: value ?? '', autocomplete: 'off', ...attributes });
    const username = text('username', account?.username, { required: !account, disabled: Boolean(account), autocapitalize: 'none', spellcheck: 'false' });
    const name = text('name', account?.name);
    const email = text('email', account?.email, { type: 'email' });
    const password = account ? null : newPassword();
    const role = group('Role', roles.map((it) => choice('radio', 'rootRole', String(it.id), it.name,
        { checked: it.id === (account?.rootRole ?? 3), hint: it.description })), { names: ['rootRole'] });
    const fields = [
        field('Username', username, { names: ['username'] }),
        field('Name', name, { names: ['name'], hint: 'Display name; optional.' }),
        field('Email', email, { names: ['email'] }),
        password,
        role,
    ].filter(Boolean);
    open(account ? `Edit ${accountName(account)}` : 'New account', (close) => form({
        fields,
        buttons: buttons(close, account ? 'Save' : 'Create account'),
        submit: async () => {
            const body = { rootRole: Number(role.querySelector('input:checked').value), name: name.value.trim(), email: email.value.trim() };
            if (!account) {
                Object.assign(body, { username: username.value.trim(), password: password.read() });
                for (const key of ['name', 'email']) if (body[key] === '') delete body[key];
                await post('api/admin/user-admin', body);
            } else {
                for (const key of ['name', 'email']) if (body[key] === (account[key] ?? '')) delete body[key];
                await put(path('api/admin/user-admin', account.id), body);
            }
            close();
            await changed();
        },
    }));
}

function openGrants(account, changed) {
    const current = new Set(account.permissions ?? []);
    const groups = KINDS.map(([kind, label]) => group(label, ACTIONS.map(([action, verb]) => {
        const permission = `${action}_${kind}_API_TOKEN`;
        return choice('checkbox', 'permissions', permission, verb, { checked: current.has(permission) });
    }), { names: ['permissions'] }));
    open(`Permissions of ${accountName(account)}`, (close) => form({
        fields: groups,
        parts: [h('p', 'Permissions beyond the role. Changes take effect at once.'), h('div.field-pair', groups)],
        buttons: buttons(close, 'Save permissions'),
        submit: async () => {
            const permissions = groups.flatMap((it) => [...it.querySelectorAll('input:checked')].map((input) => input.value));
            await put(`${path('api/admin/user-admin', account.id)}/permissions`, { permissions });
            close();
            await changed();
        },
    }));
}

function openReset(account, changed) {
    const password = newPassword();
    open(`New password for ${accountName(account)}`, (close) => form({
        fields: [password],
        parts: [h('p', 'All sessions of the account end. Tell the person the password in a safe way; they can change it themselves.'), password],
        buttons: buttons(close, 'Set password'),
        submit: async () => {
            await post(`${path('api/admin/user-admin', account.id)}/change-password`, { password: password.read() });
            close();
            await changed();
        },
    }));
}

/** A field for a new password, with a button to generate one. */
function newPassword() {
    const input = h('input', { name: 'password', type: 'password', autocomplete: 'new-password', required: true });
    const box = field('Password', input, { names: ['password'], hint: 'At least 10 characters.' });
    input.after(h('button.quiet', { type: 'button', onclick: () => {
        input.type = 'text';
        input.value = randomPassword();
        input.select();
    } }, 'Generate and show'));
    box.read = () => {
        if (input.value.length < 10) throw new FieldError('password', 'Use at least 10 characters.');
        return input.value;
    };
    return box;
}

/** A password of 24 unambiguous letters and digits; 23 would already exceed 128 bits. */
function randomPassword() {
    const letters = 'abcdefghjkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789';
    const password = [];
    while (password.length < 24) {
        const [byte] = crypto.getRandomValues(new Uint8Array(1));
        // Bytes beyond the last multiple of the alphabet's length would favour the first letters.
        if (byte < 256 - (256 % letters.length)) password.push(letters[byte % letters.length]);
    }
    return password.join('');
}
