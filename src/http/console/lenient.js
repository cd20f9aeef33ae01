// Lenient reading of JSON values. Flags are passed on as their source sent them, so any value may have any type.

/** A string, or a number or boolean as a string, as the engine reads them; otherwise `null`. */
export const text = (value) => (['string', 'number', 'boolean'].includes(typeof value) ? String(value) : null);

/** An array; otherwise `null`. */
export const list = (value) => (Array.isArray(value) ? value : null);

/** An object that is not an array; otherwise `null`. */
export const object = (value) => (value !== null && typeof value === 'object' && !Array.isArray(value) ? value : null);

/** The own property `name` of `table`, which ignores inherited names such as `constructor`. */
export const entry = (table, name) => (Object.hasOwn(table, name) ? table[name] : undefined);
