// Builds elements. Text only ever becomes text nodes, so nothing that a server says can turn into markup.

const SVG = 'http://www.w3.org/2000/svg';

/**
 * An element: `h('p.note', { id: 'a', onclick: f }, 'text', child, [more])`.
 * Attributes that are `null`, `undefined` or `false` are left out; `true` is an attribute without a value.
 */
export function h(selector, ...rest) {
    return build((tag) => document.createElement(tag), selector, rest);
}

/** An SVG element, written like `h`. */
export function svg(selector, ...rest) {
    return build((tag) => document.createElementNS(SVG, tag), selector, rest);
}

/** Puts `children` in the place of what `element` had. */
export function fill(element, ...children) {
    element.replaceChildren(...children.flat(Infinity).filter(isShown));
    return element;
}

/** What a control is called, whichever way a column is sorted. */
const nameOf = (control) => control.getAttribute('aria-label') ?? control.textContent.replace(/[↑↓]$/, '');

const CONTROLS = 'a[href], button, summary, input, select, [tabindex]';

/** Puts `children` as `fill` does; the focus goes to what has the name and the place of that which had it, and what was unfolded stays so. */
export function refill(element, ...children) {
    const { activeElement: held } = document;
    const namesakes = (name) => [...element.querySelectorAll(CONTROLS)].filter((it) => nameOf(it) === name);
    const name = element.contains(held) ? nameOf(held) : null;
    const at = name === null ? -1 : namesakes(name).indexOf(held);
    const unfolded = [...element.querySelectorAll('details')].map((it) => it.open);
    fill(element, ...children);
    const details = [...element.querySelectorAll('details')];
    if (details.length === unfolded.length) details.forEach((it, n) => { it.open = unfolded[n]; });
    if (name !== null) (namesakes(name)[at] ?? namesakes(name)[0] ?? document.querySelector('main h1'))?.focus({ preventScroll: true });
    return element;
}

/** Puts the focus where it was, or on what has the same name by now, or where reading begins. */
export function refocus(before) {
    if (before?.isConnected) return before.focus();
    const same = before && [...document.querySelectorAll('main :is(a[href], button)')].find((it) => nameOf(it) === nameOf(before));
    return (same ?? document.querySelector('main h1'))?.focus();
}

let count = 0;

/** An id that no other element has. */
export function uniqueId(prefix) {
    count += 1;
    return `${prefix}-${count}`;
}

function build(create, selector, rest) {
    const [tag, ...classes] = selector.split('.');
    const element = create(tag);
    if (classes.length) element.setAttribute('class', classes.join(' '));
    const attributes = isPlain(rest[0]) ? rest.shift() : {};
    for (const [name, value] of Object.entries(attributes)) set(element, name, value);
    element.append(...rest.flat(Infinity).filter(isShown));
    return element;
}

function set(element, name, value) {
    if (value === null || value === undefined || value === false) return;
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else if (name === 'value' || name === 'checked' || name === 'selected') element[name] = value;
    else element.setAttribute(name, value === true ? '' : value);
}

function isPlain(value) {
    return value !== null && typeof value === 'object' && !Array.isArray(value) && !(value instanceof Node);
}

function isShown(child) {
    return child !== null && child !== undefined && child !== false && child !== '';
}
