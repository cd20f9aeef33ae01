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
