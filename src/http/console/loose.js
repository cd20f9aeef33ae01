// Values of the kind that is meant, whatever came. Flags are written by others and passed on as they are, so anything may
// stand anywhere in them.

/** A text, or the text of a number or a boolean, as the engine reads them; else `null`. */
export const text = (value) => (['string', 'number', 'boolean'].includes(typeof value) ? String(value) : null);

/** A list; else `null`. */
export const list = (value) => (Array.isArray(value) ? value : null);

/** An object that is no list; else `null`. */
export const object = (value) => (value !== null && typeof value === 'object' && !Array.isArray(value) ? value : null);

/** What `table` has for a name that others chose, without what every object has, as `constructor`. */
export const entry = (table, name) => (Object.hasOwn(table, name) ? table[name] : undefined);
