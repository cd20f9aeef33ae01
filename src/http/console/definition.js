// A flag's definition as its page shows it, read once and as leniently as the engine does: what cannot be read is `null`
// in its list, and never holds or is given to nobody there. What is left out is as good as empty.

import { list, object, text } from './loose.js';

/** A flag. One without a list of strategies is off, not on for everybody: it has one that cannot be read. */
export function flagOf(told) {
    const { enabled, stale, impressionData, type, project, description, dependencies, strategies, variants } = object(told) ?? {};
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

/** The segments that come with a flag. */
export function segmentsOf(told) {
    return items(told, (it) => object(it) && { id: it.id, name: text(it.name), constraints: items(it.constraints, constraintOf) })
        .filter((it) => it !== null);
}

/** What `read` makes of each item of a list; something else than a list is one item that cannot be read. */
function items(value, read) {
    return isMissing(value) ? [] : (list(value) ?? [null]).map((it) => read(it));
}

const isMissing = (value) => value === null || value === undefined;

/** Whether it is a boolean or left out. */
const isSwitch = (value) => isMissing(value) || typeof value === 'boolean';

function dependencyOf(told) {
    const { feature, enabled, variants } = object(told) ?? {};
    const read = { feature: text(feature), enabled: enabled ?? true, variants: items(variants, text) };
    return read.feature === null || !isSwitch(enabled) || read.variants.includes(null) ? null : read;
}

function strategyOf(told) {
    const { name, title, parameters, constraints, segments, variants } = object(told) ?? {};
    const settings = isMissing(parameters) ? {} : object(parameters);
    if (text(name) === null || settings === null) return null;
    const given = Object.entries(settings).filter(([, value]) => !isMissing(value));
    return {
        name: text(name),
        title: text(title),
        parameters: Object.fromEntries(given.map(([key, value]) => [key, text(value)]).filter(([, value]) => value !== null)),
        /** The names of the parameters that cannot be read. */
        unreadable: given.filter(([, value]) => text(value) === null).map(([key]) => key),
        constraints: items(constraints, constraintOf),
        segments: items(segments, (id) => (Number.isInteger(id) ? id : null)),
        variants: items(variants, variantOf),
    };
}

function constraintOf(told) {
    const { contextName, operator, value, values, inverted, caseInsensitive } = object(told) ?? {};
    const read = {
        contextName: text(contextName),
        operator: text(operator),
        value: isMissing(value) ? '' : text(value),
        values: items(list(values)?.filter((it) => !isMissing(it)) ?? values, text),
        inverted: inverted === true,
        caseInsensitive: caseInsensitive === true,
    };
    const isReadable = ![read.contextName, read.operator, read.value, ...read.values].includes(null) && [inverted, caseInsensitive].every(isSwitch);
    return isReadable ? read : null;
}

function variantOf(told) {
    const { name, weight, payload, overrides } = object(told) ?? {};
    if (text(name) === null || !Number.isInteger(weight) || weight < 0) return null;
    const [type, value] = [text(object(payload)?.type), text(object(payload)?.value)];
    return {
        name: text(name),
        weight,
        payload: type === null || value === null ? null : { type, value },
        // What cannot be read of these is left out.
        overrides: items(overrides, overrideOf).filter((it) => it !== null),
    };
}

function overrideOf(told) {
    const { contextName, values } = object(told) ?? {};
    const texts = items(values, text).filter((it) => it !== null);
    return text(contextName) === null || list(values) === null ? null : { contextName: text(contextName), values: texts };
}
