// Formats times and numbers.

import { h } from './dom.js';

const RELATIVE = new Intl.RelativeTimeFormat('en', { numeric: 'auto' });
const ABSOLUTE = new Intl.DateTimeFormat('en-GB', { dateStyle: 'medium', timeStyle: 'short' });
const EXACT = new Intl.DateTimeFormat('en-GB', { dateStyle: 'long', timeStyle: 'long' });
const NUMBER = new Intl.NumberFormat('en-GB');
const UNITS = [['year', 31_557_600], ['month', 2_629_800], ['week', 604_800], ['day', 86_400], ['hour', 3_600], ['minute', 60]];

/** A relative time such as `5 minutes ago`, with the exact time as its title. */
export function ago(iso, otherwise) {
    const time = moment(iso);
    if (time === null) return h('span.muted', otherwise);
    return h('time', { datetime: iso, title: EXACT.format(time) }, relative((time - Date.now()) / 1000));
}

/** A time as `24 Nov 2026, 09:30`, in the browser's time zone. */
export function at(iso, otherwise = '') {
    const time = moment(iso);
    return time === null ? otherwise : h('time', { datetime: iso, title: EXACT.format(time) }, ABSOLUTE.format(time));
}

/** `at` as plain text. */
export function atText(iso) {
    const time = moment(iso);
    return time === null ? '' : ABSOLUTE.format(time);
}

/** Formats a duration in seconds as `3 minutes`. */
export function lasting(seconds) {
    const [unit, length] = UNITS.find(([, length]) => seconds >= length) ?? ['second', 1];
    const count = Math.floor(seconds / length);
    return `${count} ${unit}${count === 1 ? '' : 's'}`;
}

export const number = (value) => NUMBER.format(value);

/** `1 flag`, `2 flags`. */
export function counted(count, noun, plural = `${noun}s`) {
    return `${NUMBER.format(count)} ${count === 1 ? noun : plural}`;
}

function relative(seconds) {
    const [unit, length] = UNITS.find(([, length]) => Math.abs(seconds) >= length) ?? ['second', 1];
    return unit === 'second' ? (seconds > 0 ? 'in a moment' : 'just now') : RELATIVE.format(Math.trunc(seconds / length), unit);
}

function moment(iso) {
    const time = iso ? Date.parse(iso) : NaN;
    return Number.isNaN(time) ? null : time;
}
