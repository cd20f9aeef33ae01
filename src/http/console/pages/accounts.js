// Accounts: who may sign in, and what each may do.

import { get, path, post, put, remove } from '../api.js';
import { buttons, confirm, open } from '../dialog.js';
import { h } from '../dom.js';
import { FieldError, choice, field, form, group, select } from '../form.js';
import { icon } from '../icons.js';
import { announce, empty } from '../notice.js';
import { table } from '../table.js';
import { ago } from '../time.js';

/** What a role may do, for servers that do not describe theirs. */
const ROLES = [
    { id: 1, name: 'Admin', description: 'May do everything.' },
    { id: 2, name: 'Editor', description: 'Sees backend and frontend tokens.' },
    { id: 3, name: 'Viewer', description: 'Sees flags and backend tokens.' },
];

const KINDS = [['CLIENT', 'Backend tokens'], ['FRONTEND', 'Frontend tokens']];
const ACTIONS = [['CREATE', 'Create'], ['READ', 'See'], ['UPDATE', 'Change expiry'], ['DELETE', 'Delete']];

/** What an account is known by: those of an Unleash need no username. */
const called = (it) => it.username ?? it.email ?? it.name ?? String(it.id);

export async function accountsPage({ session, status, signal }) {
    let told = await get('api/admin/user-admin', { signal });
    const roles = (told.rootRoles ?? []).filter((it) => it.type === undefined || it.type.startsWith('root'));
    const known = roles.length > 0 ? roles : ROLES;
    const context = { known, session, status, isGranting: !status.isUnleash };
    const grid = table({ caption: 'Accounts', order: 'Username', columns: columns(context, { edit, grant, reset, drop }) });
    const draw = () => grid.show(told.users, empty('No accounts', 'Nobody can sign in.'));
    const reload = async () => {
        told = await get('api/admin/user-admin', { signal });
        draw();
    };
    const done = (text) => async () => {
        await reload();
        announce(text);
    };
    function edit(account) {
        openAccount(account, known, done(`The account ${called(account)} is changed.`));
    }
    function grant(account) {
        openGrants(account, done(`The permissions of ${called(account)} are changed.`));
    }
    function reset(account) {
        openReset(account, done(`The password of ${called(account)} is changed.`));
    }
    function drop(account) {
        confirm({
            title: `Delete the account “${called(account)}”?`,
            text: 'Its sessions end at once. Tokens that it has created go on working. This cannot be undone.',
            yes: 'Delete account',
            act: async () => {
                await remove(path('api/admin/user-admin', account.id));
                await done(`The account ${called(account)} is deleted.`)();
            },
        });
    }
    draw();
    const create = h('button.button.primary', { type: 'button', onclick: () => openAccount(null, known, done('The account is created.')) }, icon('plus'), 'New account');
    return [
        h('div.page-head', h('div', h('h1', 'Accounts'), h('p.lead', 'People who may sign in. Admins may do everything; what others may do beyond their role is granted here.')), create),
        h('div.card.flush', grid),
    ];
}

function columns({ known, session, isGranting }, { edit, grant, reset, drop }) {
    const role = (it) => known.find((role) => role.id === it.rootRole)?.name ?? String(it.rootRole ?? '');
    const label = (verb, it) => `${verb} ${called(it)}`;
    const columns = [
        { label: 'Username', class: 'name', sort: called, cell: (it) => [called(it), it.id === session.user.id && h('span.by', 'You')] },
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

/** Grants in words: `create and delete backend tokens`. */
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
        field('Name', name, { names: ['name'], hint: 'What the person is called; may be empty.' }),
        field('Email', email, { names: ['email'] }),
        password,
        role,
    ].filter(Boolean);
    open(account ? `Edit ${called(account)}` : 'New account', (close) => form({
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
    open(`Permissions of ${called(account)}`, (close) => form({
        fields: groups,
        parts: [h('p', 'What the account may do beyond its role. It takes effect at once.'), h('div.field-pair', groups)],
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
    open(`New password for ${called(account)}`, (close) => form({
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

/** A field for a new password that can also make one up. */
function newPassword() {
    const input = h('input', { name: 'password', type: 'password', autocomplete: 'new-password', required: true });
    const box = field('Password', input, { names: ['password'], hint: 'At least 10 characters.' });
    input.after(h('button.quiet', { type: 'button', onclick: () => {
        input.type = 'text';
        input.value = madeUp();
        input.select();
    } }, 'Make one up and show it'));
    box.read = () => {
        if (input.value.length < 10) throw new FieldError('password', 'Use at least 10 characters.');
        return input.value;
    };
    return box;
}

/** 24 letters and digits, none easily mistaken for another: more than 128 bits would be 23. */
function madeUp() {
    const letters = 'abcdefghjkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789';
    const made = [];
    while (made.length < 24) {
        const [byte] = crypto.getRandomValues(new Uint8Array(1));
        // A byte beyond the last whole run of letters would favour the first ones.
        if (byte < 256 - (256 % letters.length)) made.push(letters[byte % letters.length]);
    }
    return made.join('');
}
