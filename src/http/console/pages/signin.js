// The sign-in page.

import { h } from '../dom.js';
import { field, form } from '../form.js';
import { mark } from '../icons.js';
import { Session } from '../session.js';

export function signInPage({ reason, theme, signedIn }) {
    const username = h('input', { name: 'username', autocomplete: 'username', required: true, autocapitalize: 'none', spellcheck: 'false' });
    const password = h('input', { name: 'password', type: 'password', autocomplete: 'current-password', required: true });
    const fields = [
        field('Username', username, { names: ['username'] }),
        field('Password', password, { names: ['password'] }),
    ];
    const box = form({
        fields,
        buttons: [h('button.button.primary', { type: 'submit' }, 'Sign in')],
        submit: async () => {
            try {
                await signedIn(await Session.signIn(username.value, password.value));
            } catch (error) {
                password.value = '';
                password.focus();
                throw error;
            }
        },
    });
    return h('main.sign-in', h('div.card',
        h('p.brand', mark(), 'Parapet'),
        h('h1', { tabindex: '-1' }, 'Sign in'),
        reason && h('p.reason', { role: 'status' }, reason),
        box,
        h('p.hint', 'The first start printed the name and password of the first admin, or wrote them to first-start.txt in its data directory, unless the operator had set them.')),
    h('div.corner', theme));
}
