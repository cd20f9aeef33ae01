// Describes strategies and constraints in plain text.

import { entry } from './lenient.js';

/** The text of each operator, plain and negated. */
const OPERATORS = {
    IN: ['is one of', 'is none of'],
    NOT_IN: ['is none of', 'is one of'],
    STR_STARTS_WITH: ['starts with', 'does not start with'],
    STR_ENDS_WITH: ['ends with', 'does not end with'],
    STR_CONTAINS: ['contains', 'does not contain'],
    NUM_EQ: ['is', 'is not'],
    NUM_GT: ['is more than', 'is not more than'],
    NUM_GTE: ['is at least', 'is not at least'],
    NUM_LT: ['is less than', 'is not less than'],
    NUM_LTE: ['is at most', 'is not at most'],
    DATE_AFTER: ['is after', 'is not after'],
    DATE_BEFORE: ['is before', 'is not before'],
    SEMVER_EQ: ['is the version', 'is not the version'],
    SEMVER_GT: ['is newer than', 'is not newer than'],
    SEMVER_GTE: ['is at least the version', 'is not at least the version'],
    SEMVER_LT: ['is older than', 'is not older than'],
    SEMVER_LTE: ['is at most the version', 'is not at most the version'],
    REGEX: ['matches the pattern', 'does not match the pattern'],
    IN_CIDR: ['is an address in', 'is no address in'],
};

/** The number of values that are listed; further ones are only counted. */
const MAX_LISTED = 12;

/** Describes a readable constraint: `{ field, phrase, values, note }`. */
export function constraint({ contextName, operator, values, value, inverted, caseInsensitive }) {
    const [plain, negated] = entry(OPERATORS, operator) ?? [`${operator} (unknown here: it never holds)`, `not ${operator} (unknown here: it never holds)`];
    const all = values.length > 0 ? values : value !== '' ? [value] : [];
    return {
        field: contextName,
        phrase: inverted ? negated : plain,
        values: all.slice(0, MAX_LISTED),
        note: [all.length > MAX_LISTED && `and ${all.length - MAX_LISTED} more`, caseInsensitive && 'in upper or lower case'].filter(Boolean).join(', '),
    };
}

/** Describes a readable strategy: who gets the flag (a headline), and how (small print). */
export function strategy({ name, parameters }) {
    const list = (value) => (value ?? '').split(',').map((it) => it.trim()).filter((it) => it !== '');
    const share = (value) => `${Number.parseInt(value, 10) || 0} %`;
    const grouped = parameters.groupId ? `Hashed with the group “${parameters.groupId}”.` : '';
    switch (name) {
        case 'default':
            return { who: 'Everyone', how: '' };
        case 'flexibleRollout':
            return rollout(parameters, grouped);
        case 'userWithId':
            return { who: `Users ${enumerate(list(parameters.userIds))}`, how: '' };
        case 'gradualRolloutUserId':
            return { who: `${share(parameters.percentage)} of users`, how: `By user ID. ${grouped}` };
        case 'gradualRolloutSessionId':
            return { who: `${share(parameters.percentage)} of sessions`, how: `By session ID. ${grouped}` };
        case 'gradualRolloutRandom':
            return { who: `${share(parameters.percentage)} of checks`, how: 'Random each time.' };
        case 'remoteAddress':
            return { who: `Addresses ${enumerate(list(parameters.IPs))}`, how: 'The remote address of the context, exact or in a range.' };
        case 'applicationHostname':
            return { who: `Hosts ${enumerate(list(parameters.hostNames))}`, how: 'The host that evaluates: for server SDKs.' };
        default:
            return { who: `Custom strategy “${name}”`, how: 'Unknown to Parapet: it never matches here. SDKs that implement it decide themselves.' };
    }
}

/** How each stickiness assigns buckets. */
const STICKINESS = {
    '': 'By user ID, else session ID, else random each time.',
    default: 'By user ID, else session ID, else random each time.',
    random: 'Random each time.',
    userId: 'By user ID.',
    sessionId: 'By session ID.',
};

function rollout({ rollout = '0', stickiness = 'default' }, grouped) {
    const percent = Number.parseInt(rollout, 10) || 0;
    const by = entry(STICKINESS, stickiness) ?? `By the context field “${stickiness}”.`;
    const everyone = percent >= 100;
    const known = everyone && !['default', 'random', ''].includes(stickiness);
    return { who: everyone ? (known ? `Everyone with ${stickiness}` : 'Everyone') : `${percent} %`, how: everyone && !known ? '' : `${by} ${grouped}`.trim() };
}

function enumerate(names) {
    if (names.length === 0) return 'of an empty list: nobody';
    const shown = names.slice(0, MAX_LISTED).join(', ');
    return names.length > MAX_LISTED ? `${shown} and ${names.length - MAX_LISTED} more` : shown;
}
