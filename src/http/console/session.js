// The signed-in account and its permissions.

import { get, post } from './api.js';

/** The account and permissions from `/api/admin/user`. */
export class Session {
    constructor({ user, permissions }) {
        this.user = user ?? {};
        this.permissions = new Set((permissions ?? []).map((it) => (typeof it === 'string' ? it : it.permission)));
    }

    /** Loads the current session; an `ApiError` with status 401 if there is none. */
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

    /** The display name. */
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

/** Ends the session. A session that the server no longer knows is not an error. */
export async function signOut() {
    await fetch(new URL('logout', document.baseURI.split('#')[0]), { method: 'POST', redirect: 'manual' });
}
