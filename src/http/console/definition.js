// Parses a flag's definition for display, as leniently as the engine does. An unreadable item is `null` in its list; the
// engine never matches it. A missing value is the same as an empty one.

import { list, object, text } from './lenient.js';

/** Parses a flag. A flag without a list of strategies is off, not on for everyone, so it gets one unreadable strategy. */
export function flagOf(raw) {
    const { enabled, stale, impressionData, type, project, description, dependencies, strategies, variants } = object(raw) ?? {};
    return {
        enabled: enabled === true,
        stale: stale === true,
        impressionData: impressionData === true,
        type: text(type),
        project: text(project),
        description: text(description),
        dependencies: items(dependencies, dependencyOf),
        strategies: items(list(strategies) ?? [null], strategyOf),
        variants: items(variants, variantOf),
    };
}

/** Parses the segments that a flag uses. */
export function segmentsOf(raw) {
    return items(raw, (it) => object(it) && { id: it.id, name: text(it.name), constraints: items(it.constraints, constraintOf) })
        .filter((it) => it !== null);
}

/** Parses each item of a list with `read`. A value that is not a list counts as one unreadable item. */
function items(value, read) {
    return isMissing(value) ? [] : (list(value) ?? [null]).map((it) => read(it));
}

const isMissing = (value) => value === null || value === undefined;

/** Whether a value is a boolean or missing. */
const isBooleanOrMissing = (value) => isMissing(value) || typeof value === 'boolean';

function dependencyOf(raw) {
    const { feature, enabled, variants } = object(raw) ?? {};
    const read = { feature: text(feature), enabled: enabled ?? true, variants: items(variants, text) };
    return read.feature === null || !isBooleanOrMissing(enabled) || read.variants.includes(null) ? null : read;
}

function strategyOf(raw) {
    const { name, title, parameters, constraints, segments, variants } = object(raw) ?? {};
    const settings = isMissing(parameters) ? {} : object(parameters);
    if (text(name) === null || settings === null) return null;
    const present = Object.entries(settings).filter(([, value]) => !isMissing(value));
    return {
        name: text(name),
        title: text(title),
        parameters: Object.fromEntries(present.map(([key, value]) => [key, text(value)]).filter(([, value]) => value !== null)),
        /** The names of the unreadable parameters. */
        unreadable: present.filter(([, value]) => text(value) === null).map(([key]) => key),
        constraints: items(constraints, constraintOf),
        segments: items(segments, (id) => (Number.isInteger(id) ? id : null)),
        variants: items(variants, variantOf),
    };
}

function constraintOf(raw) {
    const { contextName, operator, value, values, inverted, caseInsensitive } = object(raw) ?? {};
    const read = {
        contextName: text(contextName),
        operator: text(operator),
        value: isMissing(value) ? '' : text(value),
        values: items(list(values)?.filter((it) => !isMissing(it)) ?? values, text),
        inverted: inverted === true,
        caseInsensitive: caseInsensitive === true,
    };
    const isReadable = ![read.contextName, read.operator, read.value, ...read.values].includes(null) && [inverted, caseInsensitive].every(isBooleanOrMissing);
    return isReadable ? read : null;
}

function variantOf(raw) {
    const { name, weight, payload, overrides } = object(raw) ?? {};
    if (text(name) === null || !Number.isInteger(weight) || weight < 0) return null;
    const [type, value] = [text(object(payload)?.type), text(object(payload)?.value)];
    return {
        name: text(name),
        weight,
        payload: type === null || value === null ? null : { type, value },
        // Unreadable overrides are omitted.
        overrides: items(overrides, overrideOf).filter((it) => it !== null),
    };
}

function overrideOf(raw) {
    const { contextName, values } = object(raw) ?? {};
    const texts = items(values, text).filter((it) => it !== null);
    return text(contextName) === null || list(values) === null ? null : { contextName: text(contextName), values: texts };
}
