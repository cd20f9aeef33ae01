// Strategies and constraints in words.

import { entry } from './loose.js';

/** What an operator says, and what it says when it is negated. */
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

/** Where more values than these stand, the rest is counted. */
const NAMED = 12;

/** `{ field, phrase, values, note }` of a constraint that can be read. */
export function constraint({ contextName, operator, values, value, inverted, caseInsensitive }) {
    const [plain, negated] = entry(OPERATORS, operator) ?? [`${operator} (unknown here: it never holds)`, `not ${operator} (unknown here: it never holds)`];
    const told = values.length > 0 ? values : value !== '' ? [value] : [];
    return {
        field: contextName,
        phrase: inverted ? negated : plain,
        values: told.slice(0, NAMED),
        note: [told.length > NAMED && `and ${told.length - NAMED} more`, caseInsensitive && 'in upper or lower case'].filter(Boolean).join(', '),
    };
}

/** Who a strategy that can be read is for, as a headline and a line of small print. */
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
            return { who: `${share(parameters.percentage)} of checks`, how: 'Drawn anew each time.' };
        case 'remoteAddress':
            return { who: `Addresses ${enumerate(list(parameters.IPs))}`, how: 'The remote address of the context, exact or in a range.' };
        case 'applicationHostname':
            return { who: `Hosts ${enumerate(list(parameters.hostNames))}`, how: 'The host that evaluates: for server SDKs.' };
        default:
            return { who: `Custom strategy “${name}”`, how: 'Not known here: it never matches. SDKs that have it decide themselves.' };
    }
}

/** What keeps somebody in the same bucket. */
const STICKINESS = {
    '': 'By user ID, else session ID, else drawn anew each time.',
    default: 'By user ID, else session ID, else drawn anew each time.',
    random: 'Drawn anew each time.',
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
    const shown = names.slice(0, NAMED).join(', ');
    return names.length > NAMED ? `${shown} and ${names.length - NAMED} more` : shown;
}
