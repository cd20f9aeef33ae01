// Tables that stay tables for a screen reader when narrow screens show each row as a card.

import { h, refill } from './dom.js';
import { icon } from './icons.js';

/** So many rows are drawn at once where nothing is said; the rest on demand. */
const PAGE = 200;

/**
 * A table.
 *
 * `columns`: `{ label, cell(row) -> child, sort?(row) -> string or number, class?, hideLabel? }`; the first is the row's heading.
 * `detail(row)`, where given, is what a row unfolds to. `order` is the label of the column that the rows are in, `-` before it
 * for the largest first. `page` is how many rows are drawn at once. The result's `show(rows, empty)` replaces the rows; `empty` stands there when there are none.
 */
export function table({ caption, columns, detail, order = '', page = PAGE }) {
    let shown = { rows: [], empty: null };
    let limit = page;
    let sorting = { label: order.replace(/^-/, ''), down: order.startsWith('-') };
    const box = h('div.table-box');
    const draw = () => {
        const { rows, empty } = shown;
        if (rows.length === 0) return refill(box, empty);
        const sorted = arranged(rows, columns, sorting);
        const more = sorted.length > limit && h('button.button', { type: 'button', onclick: () => {
            const at = limit;
            limit += Math.max(page, PAGE);
            draw();
            // The button is gone, or another: reading goes on at the first row that is new.
            const next = box.querySelectorAll('tbody > tr:not(.detail)')[at];
            next?.setAttribute('tabindex', '-1');
            next?.focus();
        } }, `Show ${Math.min(Math.max(page, PAGE), sorted.length - limit)} more of ${sorted.length}`);
        const head = h('tr', { role: 'row' }, columns.map((column) => heading(column, sorting, (next) => {
            sorting = next;
            draw();
            box.querySelector(`th[data-column="${columns.indexOf(column)}"] button`)?.focus();
        }, columns.indexOf(column))), detail && h('th', { role: 'columnheader', scope: 'col' }, hidden('Details')));
        const body = sorted.slice(0, limit).flatMap((row) => line(row, columns, detail));
        const grid = h('table', { role: 'table' }, h('caption.visually-hidden', caption),
            h('thead', { role: 'rowgroup' }, head), h('tbody', { role: 'rowgroup' }, body));
        return refill(box, grid, more && h('div.table-more', more));
    };
    const drawFreely = unlessHeld(box, draw);
    box.show = (rows, empty) => {
        shown = { rows, empty };
        drawFreely();
    };
    return box;
}

/** `act`, put off for as long as something in `box` is pressed: a click ends on what it began on, or is none. */
function unlessHeld(box, act) {
    let isHeld = false;
    let isDue = false;
    const letGo = () => setTimeout(() => {
        isHeld = false;
        if (isDue) act();
        isDue = false;
    });
    const hold = (ends) => () => {
        isHeld = true;
        const over = new AbortController();
        for (const end of [...ends, 'blur']) addEventListener(end, () => (over.abort(), letGo()), { signal: over.signal });
    };
    box.addEventListener('pointerdown', hold(['pointerup', 'pointercancel']));
    box.addEventListener('keydown', hold(['keyup']));
    return () => {
        if (isHeld) isDue = true;
        else act();
    };
}

/** Text for screen readers only. */
export function hidden(text) {
    return h('span.visually-hidden', text);
}

function heading(column, sorting, sortBy, at) {
    const isSorted = sorting.label === column.label;
    const attributes = { role: 'columnheader', scope: 'col', class: column.class, 'data-column': at };
    if (column.hideLabel) return h('th', attributes, hidden(column.label));
    if (!column.sort) return h('th', attributes, column.label);
    attributes['aria-sort'] = isSorted ? (sorting.down ? 'descending' : 'ascending') : 'none';
    const flip = () => sortBy({ label: column.label, down: isSorted && !sorting.down });
    const arrow = h('span.arrow', { 'aria-hidden': 'true' }, isSorted ? (sorting.down ? '↓' : '↑') : '');
    return h('th', attributes, h('button.sort', { type: 'button', onclick: flip }, column.label, arrow));
}

function line(row, columns, detail) {
    const cells = columns.map((column, n) => {
        const attributes = { role: n === 0 ? 'rowheader' : 'cell', 'data-label': column.hideLabel ? null : column.label, class: column.class };
        return n === 0 ? h('th', { ...attributes, scope: 'row' }, column.cell(row)) : h('td', attributes, column.cell(row));
    });
    if (!detail) return [h('tr', { role: 'row' }, cells)];
    const wide = h('td', { role: 'cell', colspan: columns.length + 1 });
    const below = h('tr.detail', { role: 'row', hidden: true }, wide);
    const button = h('button.unfold', { type: 'button', 'aria-expanded': 'false', onclick: () => {
        below.hidden = !below.hidden;
        button.setAttribute('aria-expanded', String(!below.hidden));
        if (!below.hidden && !wide.hasChildNodes()) wide.append(detail(row));
    } }, icon('chevron'), hidden('Details'));
    return [h('tr', { role: 'row' }, cells, h('td.end', { role: 'cell' }, button)), below];
}

function arranged(rows, columns, { label, down }) {
    const sort = columns.find((column) => column.label === label)?.sort;
    if (!sort) return rows;
    const compare = (one, other) => {
        const [a, b] = [sort(one), sort(other)];
        return typeof a === 'number' && typeof b === 'number' ? a - b : String(a).localeCompare(String(b), 'en', { numeric: true });
    };
    return [...rows].sort(down ? (one, other) => compare(other, one) : compare);
}
