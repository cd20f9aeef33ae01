// Which page an address means. Addresses are behind the `#`, so the server has one page only.

/** `{ route, params, query }` of the address that is shown, by the table `routes`; `null` where none fits. */
export function match(routes, hash = location.hash) {
    const [path, query = ''] = hash.replace(/^#\/?/, '').split('?');
    const parts = path.split('/').filter((part) => part !== '').map(decoded);
    for (const route of routes) {
        const params = fit(route.path, parts);
        if (params) return { route, params, query: new URLSearchParams(query) };
    }
    return null;
}

/** The address of a page: `address(['flags', name], { environment })`. */
export function address(parts, query = {}) {
    const search = new URLSearchParams(Object.entries(query).filter(([, value]) => value !== '' && value != null));
    const text = search.toString();
    return `#/${parts.map(encodeURIComponent).join('/')}${text === '' ? '' : `?${text}`}`;
}

/** Changes what stands behind the `?` of the address, without another entry in the history and without a page change. */
export function keep(parts, query) {
    history.replaceState(null, '', address(parts, query));
}

function fit(pattern, parts) {
    const wanted = pattern.split('/').filter((part) => part !== '');
    if (wanted.length !== parts.length) return null;
    const params = {};
    for (const [n, want] of wanted.entries()) {
        if (want.startsWith(':')) params[want.slice(1)] = parts[n];
        else if (want !== parts[n]) return null;
    }
    return params;
}

function decoded(part) {
    try {
        return decodeURIComponent(part);
    } catch {
        return part;
    }
}
