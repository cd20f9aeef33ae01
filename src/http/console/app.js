// The application shell: sign-in state, navigation, and the page for the current URL.

import { ApiError, SIGNED_OUT } from './api.js';
import { closeAll, open } from './dialog.js';
import { fill, h } from './dom.js';
import { icon, mark } from './icons.js';
import { announce, empty, failure } from './messages.js';
import { accountsPage } from './pages/accounts.js';
import { auditPage } from './pages/audit.js';
import { flagPage } from './pages/flag.js';
import { flagsPage } from './pages/flags.js';
import { overviewPage } from './pages/overview.js';
import { passwordForm } from './pages/password.js';
import { signInPage } from './pages/signin.js';
import { tokensPage } from './pages/tokens.js';
import { address, match } from './router.js';
import { Session, signOut } from './session.js';
import { loadStatus } from './status.js';

/** Delay before a loading page shows a loading message, in milliseconds. */
const LOADING_DELAY = 200;

const ROUTES = [
    { path: '', section: 'overview', title: 'Overview', page: overviewPage },
    { path: 'overview', section: 'overview', title: 'Overview', page: overviewPage },
    { path: 'flags', section: 'flags', title: 'Flags', page: flagsPage },
    { path: 'flags/:name', section: 'flags', title: 'Flag', page: flagPage },
    { path: 'api-access', section: 'api-access', title: 'API access', page: tokensPage },
    { path: 'accounts', section: 'accounts', title: 'Accounts', page: accountsPage, adminOnly: true },
    { path: 'audit-log', section: 'audit-log', title: 'Audit log', page: auditPage, adminOnly: true },
];

const NAVIGATION = [
    { items: [['overview', 'Overview', 'overview'], ['flags', 'Flags', 'flags']] },
    { title: 'Advanced', items: [['api-access', 'API access', 'tokens']] },
    { title: 'Admin', adminOnly: true, items: [['accounts', 'Accounts', 'accounts'], ['audit-log', 'Audit log', 'audit']] },
];

const root = document.getElementById('app');
let session = null;
let status = null;
/** Aborts the requests and timers of the current page. */
let currentPage = new AbortController();

addEventListener('hashchange', () => session && showPage());
document.addEventListener(SIGNED_OUT, () => session && showSignIn('Your session has ended. Sign in again to go on.'));
start();

async function start() {
    try {
        session = await Session.load();
        await showShell();
    } catch (error) {
        // 429: other clients at this address have exceeded the limit of attempts. Signing in is still possible.
        if (error instanceof ApiError && [401, 429].includes(error.status)) showSignIn();
        else fill(root, h('main.alone', failure(error, start)));
    }
}

function showSignIn(reason = '') {
    session = null;
    currentPage.abort();
    closeAll();
    document.title = 'Sign in · Parapet';
    fill(root, signInPage({ reason, theme: themeButton(), signedIn: async (now) => {
        session = now;
        await showShell();
    } }));
    root.querySelector('input')?.focus();
}

async function showShell() {
    status = await loadStatus();
    // The session may have ended in the meantime.
    if (session === null) return;
    const main = h('main', { id: 'main', tabindex: '-1' });
    const menu = h('button.menu', { type: 'button', 'aria-expanded': 'false', 'aria-controls': 'navigation', onclick: () => {
        const isOpen = menu.getAttribute('aria-expanded') === 'true';
        menu.setAttribute('aria-expanded', String(!isOpen));
    } }, icon('menu'), 'Menu');
    const skip = h('a.skip', { href: '#main', onclick: (event) => {
        // The hash of the URL selects the page, so the link only moves the focus.
        event.preventDefault();
        main.focus();
    } }, 'Skip to the content');
    fill(root, skip, h('div.shell',
        h('header.side',
            h('div.brand', h('a', { href: address([]) }, mark(), 'Parapet'), menu),
            h('div.folding', { id: 'navigation' }, navigation(), userMenu())),
        main));
    await showPage();
}

function navigation() {
    const groups = NAVIGATION.filter((it) => !it.adminOnly || session.isAdmin).map(({ title, items }) => {
        const list = h('ul', items.map(([where, label, picture]) =>
            h('li', h('a', { href: address([where]), 'data-section': where }, icon(picture), label))));
        return [title && h('p.nav-title', title), list];
    });
    return h('nav', { 'aria-label': 'Main' }, groups);
}

function userMenu() {
    const role = session.isAdmin ? 'Admin' : { 2: 'Editor', 3: 'Viewer' }[session.user.rootRole] ?? '';
    const own = session.user.isAPI ? null : h('button.quiet', { type: 'button', onclick: () =>
        open('Change your password', (close) => passwordForm(close)) }, 'Change password');
    const leave = h('button.quiet', { type: 'button', onclick: async () => {
        await signOut().catch(() => {});
        showSignIn('You are signed out.');
    } }, 'Sign out');
    return h('div.user',
        h('p.user-name', session.name, role && h('span.muted', role)),
        h('div.user-actions', own, leave, themeButton()));
}

function themeButton() {
    const button = h('button.quiet.icon-only', { type: 'button', onclick: () => globalThis.toggleTheme() }, icon('theme'));
    const label = () => {
        const other = document.documentElement.dataset.theme === 'dark' ? 'light' : 'dark';
        button.setAttribute('aria-label', `Switch to the ${other} theme`);
        button.title = `Switch to the ${other} theme`;
    };
    document.addEventListener('themechange', label);
    label();
    return button;
}

async function showPage() {
    currentPage.abort();
    currentPage = new AbortController();
    const { signal } = currentPage;
    closeAll();
    document.querySelector('button.menu')?.setAttribute('aria-expanded', 'false');
    const main = document.getElementById('main');
    const found = match(ROUTES);
    markSection(found?.route.section);
    document.title = `${found?.params.name ?? found?.route.title ?? 'Not found'} · Parapet`;
    if (!found || (found.route.adminOnly && !session.isAdmin)) {
        const reason = found ? 'Only admins see this page.' : 'There is no page at this address.';
        fill(main, h('h1', found?.route.title ?? 'Not found'), empty(reason, null, h('a.button', { href: address([]) }, 'Go to the overview')));
        return arrive(main);
    }
    const loading = setTimeout(() => fill(main, h('h1', found.route.title), h('p.loading', { role: 'status' }, 'Loading…')), LOADING_DELAY);
    try {
        const page = await found.route.page({ params: found.params, query: found.query, session, status, signal, announce });
        if (signal.aborted) return;
        fill(main, page);
    } catch (error) {
        if (signal.aborted) return;
        fill(main, h('h1', found.route.title), failure(error, showPage));
    } finally {
        clearTimeout(loading);
    }
    arrive(main);
}

/** Moves the focus to the heading of a new page. */
function arrive(main) {
    const heading = main.querySelector('h1');
    heading?.setAttribute('tabindex', '-1');
    heading?.focus({ preventScroll: true });
    scrollTo(0, 0);
}

function markSection(section) {
    for (const link of document.querySelectorAll('nav a')) {
        if (link.dataset.section === section) link.setAttribute('aria-current', 'page');
        else link.removeAttribute('aria-current');
    }
}
