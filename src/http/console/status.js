// The status of the instance, if the account may read it.

import { ApiError, get, getIfThere } from './api.js';

/** The default port for SDKs, if the status is not available. */
const DATA_PORT = 3063;

/** Whether the server that an edge relays to is an Unleash server; `null` until that is known. */
let isRelayedUnleash = null;

/**
 * Loads `/status`, if available (`hasStatus`). `isUnleash` is whether the control plane behind the console is an Unleash
 * server, and `dataUrl` is the URL for SDKs. `options` are those of the requests.
 */
export async function loadStatus(options) {
    const status = await getIfThere('status', options);
    const hasStatus = status !== null && typeof status === 'object';
    const isRelayed = hasStatus ? status.consoleFor === 'unleash' : true;
    if (isRelayed) isRelayedUnleash ??= await relaysToUnleash(options);
    const isUnleash = isRelayed && (isRelayedUnleash ?? true);
    return { ...(hasStatus ? status : {}), hasStatus, isUnleash, dataUrl: status?.dataUrl ?? defaultDataUrl(status) };
}

/** An edge may relay to another Parapet, which does not have Unleash's `ui-config`. */
async function relaysToUnleash(options) {
    try {
        await get('api/admin/ui-config', { ...options, quiet: true });
        return true;
    } catch (error) {
        return error instanceof ApiError && error.status === 404 ? false : null;
    }
}

/** The SDK port at the console's own host: the status of a port bound to all addresses has no host. */
function defaultDataUrl(status) {
    const host = location.hostname;
    return `${status?.dataTls ? 'https' : 'http'}://${host}:${status?.dataPort ?? DATA_PORT}${status?.dataPath ?? ''}`;
}
