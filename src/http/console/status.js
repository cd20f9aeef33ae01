// What the instance says of itself, as far as it lets us see it.

import { ApiError, get, getIfThere } from './api.js';

/** The port that SDKs go to where nothing is told. */
const DATA_PORT = 3063;

/** Whether the server that an edge relays to is an Unleash; `null` until that is known. */
let isRelayedUnleash = null;

/**
 * What `/status` tells, or `null`; `isUnleash` is whether the control plane behind the console is an Unleash server,
 * `dataUrl` where SDKs go. `options` are those of the requests.
 */
export async function loadStatus(options) {
    const told = await getIfThere('status', options);
    const isTold = told !== null && typeof told === 'object';
    const isRelayed = isTold ? told.consoleFor === 'unleash' : true;
    if (isRelayed) isRelayedUnleash ??= await relaysToUnleash(options);
    const isUnleash = isRelayed && (isRelayedUnleash ?? true);
    return { ...(isTold ? told : {}), isTold, isUnleash, dataUrl: told?.dataUrl ?? nearby(told) };
}

/** An edge may stand in front of another Parapet, which has no settings of Unleash's pages to tell. */
async function relaysToUnleash(options) {
    try {
        await get('api/admin/ui-config', { ...options, quiet: true });
        return true;
    } catch (error) {
        return error instanceof ApiError && error.status === 404 ? false : null;
    }
}

/** The data listener at the host that the console was found at, which is all that is known of one bound to every address. */
function nearby(told) {
    const host = location.hostname;
    return `${told?.dataTls ? 'https' : 'http'}://${host}:${told?.dataPort ?? DATA_PORT}${told?.dataPath ?? ''}`;
}
