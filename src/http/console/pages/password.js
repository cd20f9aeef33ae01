// The form to change one's own password.

import { post } from '../api.js';
import { buttons } from '../dialog.js';
import { h } from '../dom.js';
import { FieldError, field, form } from '../form.js';
import { announce } from '../messages.js';

export function passwordForm(close) {
    const secret = (autocomplete) => h('input', { type: 'password', autocomplete, required: true });
    const [current, next, again] = [secret('current-password'), secret('new-password'), secret('new-password')];
    return form({
        fields: [
            field('Current password', current, { names: ['oldPassword'] }),
            field('New password', next, { names: ['password'], hint: 'At least 10 characters. Your other sessions end.' }),
            field('New password again', again, { names: ['confirmPassword'] }),
        ],
        buttons: buttons(close, 'Change password'),
        submit: async () => {
            if (next.value !== again.value) throw new FieldError('confirmPassword', 'The two are not the same.');
            const body = { oldPassword: current.value, password: next.value, confirmPassword: again.value };
            // A 401 for a wrong current password must not end the session.
            await post('api/admin/user/change-password', body, { quiet: true });
            close();
            announce('Your password is changed.');
        },
    });
}
