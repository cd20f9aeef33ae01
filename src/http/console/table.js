// Sortable tables. On narrow screens each row is shown as a card, but screen readers still see a table.

import { h, refill } from './dom.js';
import { icon } from './icons.js';

/** The default number of rows to show at once; a button shows more. */
const PAGE = 200;

/**
 * `columns`: `{ label, cell(row) -> child, sort?(row) -> string or number, class?, hideLabel? }`; the first is the row's heading.
 * `detail(row)` is the expandable content of a row. `order` is the label of the column to sort by, with `-` before it for
 * descending order. `page` is the number of rows to show at once. The result's `show(rows, empty)` replaces the rows;
 * `empty` is shown if there are none.
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
            // The button was replaced, so the focus moves to the first new row.
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
    const drawWhenReleased = deferWhilePressed(box, draw);
    box.show = (rows, empty) => {
        shown = { rows, empty };
        drawWhenReleased();
    };
    return box;
}

/** Delays `act` while a pointer or key is pressed in `box`: a click is lost if its element is replaced in between. */
function deferWhilePressed(box, act) {
    let isPressed = false;
    let isDue = false;
    const release = () => setTimeout(() => {
        isPressed = false;
        if (isDue) act();
        isDue = false;
    });
    const onPress = (ends) => () => {
        isPressed = true;
        const over = new AbortController();
        for (const end of [...ends, 'blur']) addEventListener(end, () => (over.abort(), release()), { signal: over.signal });
    };
    box.addEventListener('pointerdown', onPress(['pointerup', 'pointercancel']));
    box.addEventListener('keydown', onPress(['keyup']));
    return () => {
        if (isPressed) isDue = true;
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
