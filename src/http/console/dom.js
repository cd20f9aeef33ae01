// Builds elements. Text becomes text nodes only, so text from a server cannot inject markup.

const SVG = 'http://www.w3.org/2000/svg';

/**
 * An element: `h('p.note', { id: 'a', onclick: f }, 'text', child, [more])`.
 * Attributes that are `null`, `undefined` or `false` are omitted; `true` is an attribute without a value.
 */
export function h(selector, ...rest) {
    return build((tag) => document.createElement(tag), selector, rest);
}

/** An SVG element, with the same arguments as `h`. */
export function svg(selector, ...rest) {
    return build((tag) => document.createElementNS(SVG, tag), selector, rest);
}

/** Replaces the children of `element`. */
export function fill(element, ...children) {
    element.replaceChildren(...children.flat(Infinity).filter(isShown));
    return element;
}

/** The accessible name of a control, without the arrow of a sorted column. */
const nameOf = (control) => control.getAttribute('aria-label') ?? control.textContent.replace(/[↑↓]$/, '');

const CONTROLS = 'a[href], button, summary, input, select, [tabindex]';

/** Like `fill`, but keeps the focus on the control with the same name and position, and keeps open `details` open. */
export function refill(element, ...children) {
    const { activeElement: focused } = document;
    const namesakes = (name) => [...element.querySelectorAll(CONTROLS)].filter((it) => nameOf(it) === name);
    const name = element.contains(focused) ? nameOf(focused) : null;
    const at = name === null ? -1 : namesakes(name).indexOf(focused);
    const unfolded = [...element.querySelectorAll('details')].map((it) => it.open);
    fill(element, ...children);
    const details = [...element.querySelectorAll('details')];
    if (details.length === unfolded.length) details.forEach((it, n) => { it.open = unfolded[n]; });
    if (name !== null) (namesakes(name)[at] ?? namesakes(name)[0] ?? document.querySelector('main h1'))?.focus({ preventScroll: true });
    return element;
}

/** Restores the focus to `before`, or to a control with the same name, or to the heading of the page. */
export function refocus(before) {
    if (before?.isConnected) return before.focus();
    const same = before && [...document.querySelectorAll('main :is(a[href], button)')].find((it) => nameOf(it) === nameOf(before));
    return (same ?? document.querySelector('main h1'))?.focus();
}

let count = 0;

/** A unique element id. */
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
