// Who is signed in, and what they may do.

import { get, post } from './api.js';

/** An account as `/api/admin/user` tells it. */
export class Session {
    constructor({ user, permissions }) {
        this.user = user ?? {};
        this.permissions = new Set((permissions ?? []).map((it) => (typeof it === 'string' ? it : it.permission)));
    }

    /** The signed-in account; an `ApiError` of status 401 where there is none. */
    static async load() {
        return new Session(await get('api/admin/user', { anonymous: true }));
    }

    static async signIn(username, password) {
        await post('auth/simple/login', { username, password }, { anonymous: true });
        return Session.load();
    }

    get isAdmin() {
        return this.permissions.has('ADMIN');
    }

    /** What the person is called. */
    get name() {
        return this.user.name || this.user.username || this.user.email || 'Signed in';
    }

    /** Whether tokens of `kind` (`client`, `frontend`, `admin`) may be created, updated or deleted: `may('CREATE', kind)`. */
    may(action, kind) {
        if (this.isAdmin) return true;
        if (kind === 'admin') return false;
        return this.permissions.has(`${action}_${kind.toUpperCase()}_API_TOKEN`) || this.permissions.has(`${action}_API_TOKEN`);
    }
}

/** Ends the session; that the server does not know it any more is as good. */
export async function signOut() {
    await fetch(new URL('logout', document.baseURI.split('#')[0]), { method: 'POST', redirect: 'manual' });
}
