// Parses counters from the Prometheus text format and computes their rates.

/** The samples of the counters `names`: `{ name, labels, value }`. */
export function samples(text, names) {
    const found = [];
    for (const line of text.split('\n')) {
        const name = line.slice(0, line.search(/[{ ]/));
        if (!names.includes(name)) continue;
        const close = line.lastIndexOf('}');
        const value = Number(line.slice(Math.max(close, name.length) + 1).trim().split(' ')[0]);
        found.push({ name, labels: labels(line.slice(name.length + 1, Math.max(close, 0))), value });
    }
    return found;
}

/** The sums of samples by the key that `keyOf` returns; samples with the key `null` are omitted. */
export function sums(found, keyOf) {
    const totals = new Map();
    for (const sample of found) {
        const key = keyOf(sample);
        if (key !== null) totals.set(key, (totals.get(key) ?? 0) + sample.value);
    }
    return totals;
}

/** The rate per second of `key` between `before` and `after`; `null` if a restart has reset the counter. */
export function rate(before, after, key, seconds) {
    const grown = (after.get(key) ?? 0) - (before.get(key) ?? 0);
    return grown < 0 || seconds <= 0 ? null : grown / seconds;
}

function labels(text) {
    const found = {};
    for (const [, name, value] of text.matchAll(/([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g)) {
        found[name] = value.replace(/\\(.)/g, (_, letter) => (letter === 'n' ? '\n' : letter));
    }
    return found;
}
