// What the instance says of itself, as far as it lets us see it.

import { getIfThere } from './api.js';

/** The port that SDKs go to where nothing is told. */
const DATA_PORT = 3063;

/**
 * What `/status` tells, or `null`; `isUnleash` is whether the control plane behind the console is an Unleash server,
 * `dataUrl` where SDKs go.
 */
export async function loadStatus(signal) {
    const told = await getIfThere('status', { signal });
    const isTold = told !== null && typeof told === 'object';
    // A relayed session is Unleash's own: the edge in between does not know who it is.
    const isUnleash = isTold ? told.consoleFor === 'unleash' : true;
    return { ...(isTold ? told : {}), isTold, isUnleash, dataUrl: told?.dataUrl ?? nearby(told) };
}

/** The data listener at the host that the console was found at, which is all that is known of one bound to every address. */
function nearby(told) {
    const host = location.hostname;
    return `http://${host}:${told?.dataPort ?? DATA_PORT}${told?.dataPath ?? ''}`;
}
