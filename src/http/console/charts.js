// Small charts. The drawing is hidden from screen readers; a legend or a table beside it has the same data.

import { fill, h, svg, uniqueId } from './dom.js';
import { number } from './time.js';

/** Drawing units; the drawing is stretched to the available space. */
const [WIDTH, HEIGHT] = [600, 120];

/**
 * A line chart of recent samples. Each of `series` is `{ key, label, class }`. The result's `add({ key: value })` appends a
 * sample and drops those beyond `moments`.
 */
export function lineChart({ title, unit, series, moments, span }) {
    const history = [];
    const drawing = svg('svg.lines', { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: 'none', 'aria-hidden': 'true', focusable: 'false' });
    const top = h('span.scale-top');
    const values = series.map(() => h('span.value', '–'));
    const legend = h('ul.legend', series.map((it, n) => h('li', h('span.swatch', { class: `swatch ${it.class}` }), it.label, values[n])));
    fill(drawing, grid());
    const id = uniqueId('chart');
    const box = h('section.card.chart', { 'aria-labelledby': id },
        h('h2', { id }, title, h('span.unit', unit)),
        h('div.plot', { 'aria-hidden': 'true' }, drawing, top), h('div.axis', { 'aria-hidden': 'true' }, h('span', span), h('span', 'now')), legend);
    box.add = (now) => {
        history.push(now);
        if (history.length > moments) history.shift();
        const most = ceiling(Math.max(0, ...history.flatMap((moment) => series.map((it) => moment[it.key] ?? 0))));
        top.textContent = short(most);
        fill(drawing, grid(), series.map((it) => line(history, it, most, moments)));
        values.forEach((value, n) => {
            const latest = now[series[n].key];
            value.textContent = latest === null || latest === undefined ? '–' : short(latest);
        });
    };
    return box;
}

/** A stacked bar chart. Each of `bars` is `{ label, yes, no }`, the oldest first. */
export function barChart({ title, bars }) {
    const most = Math.max(1, ...bars.map((bar) => bar.yes + bar.no));
    const drawing = svg('svg.bars', { viewBox: `0 0 ${bars.length * 10} 100`, preserveAspectRatio: 'none', 'aria-hidden': 'true', focusable: 'false' },
        bars.map((bar, n) => {
            const [yes, no] = [bar.yes, bar.no].map((it) => (it / most) * 100);
            const part = (kind, y, height) => height > 0 && svg(`rect.${kind}`, { x: n * 10 + 1.5, y, width: 7, height });
            return [part('yes', 100 - yes, yes), part('no', 100 - yes - no, no)];
        }));
    const rows = bars.filter((bar) => bar.yes + bar.no > 0).map((bar) =>
        h('tr', h('th', { scope: 'row' }, bar.label), h('td', number(bar.yes)), h('td', number(bar.no))));
    return h('div.bar-chart',
        h('div.plot', { 'aria-hidden': 'true' }, drawing, h('span.scale-top', short(most))),
        h('div.axis', { 'aria-hidden': 'true' }, h('span', bars[0].label), h('span', bars.at(-1).label)),
        h('details', h('summary', 'The same as a table'),
            h('table.plain', h('caption.visually-hidden', title),
                h('thead', h('tr', ['Hour', 'Yes', 'No'].map((it) => h('th', { scope: 'col' }, it)))), h('tbody', rows))));
}

/** A number in short form: 0.25, 3.4, 120, 5.6k. */
export function short(value) {
    if (value >= 1e6) return `${trim(value / 1e6)}M`;
    if (value >= 1e4) return `${trim(value / 1e3)}k`;
    return trim(value);
}

function trim(value) {
    return String(value >= 100 ? Math.round(value) : Number(value.toFixed(value >= 10 ? 1 : 2)));
}

/** The next round number, so that the scale does not change with every sample. */
function ceiling(value) {
    if (value <= 1) return 1;
    const power = 10 ** Math.floor(Math.log10(value));
    return [1, 2, 5, 10].map((it) => it * power).find((it) => it >= value);
}

function grid() {
    return [0, 0.5, 1].map((part) => {
        const y = Math.min(Math.max(part * HEIGHT, 0.5), HEIGHT - 0.5);
        return svg('line.grid', { x1: 0, x2: WIDTH, y1: y, y2: y });
    });
}

function line(history, series, most, moments) {
    const step = WIDTH / (moments - 1);
    const first = moments - history.length;
    let pen = 'M';
    const path = history.map((moment, n) => {
        const value = moment[series.key];
        if (value === null || value === undefined) {
            pen = 'M';
            return '';
        }
        const point = `${pen}${((first + n) * step).toFixed(1)} ${(HEIGHT - (value / most) * (HEIGHT - 4) - 2).toFixed(1)}`;
        pen = 'L';
        return point;
    });
    return svg('path', { class: `line ${series.class}`, d: path.join('') });
}
