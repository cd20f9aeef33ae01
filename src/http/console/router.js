// Maps URLs to pages. The path of a page is in the URL's fragment, so the server serves only one page.

/** Finds the entry of `routes` for the current URL: `{ route, params, query }`, or `null` if none matches. */
export function match(routes, hash = location.hash) {
    const [path, query = ''] = hash.replace(/^#\/?/, '').split('?');
    const parts = path.split('/').filter((part) => part !== '').map(decoded);
    for (const route of routes) {
        const params = fit(route.path, parts);
        if (params) return { route, params, query: new URLSearchParams(query) };
    }
    return null;
}

/** The URL of a page: `address(['flags', name], { environment })`. */
export function address(parts, query = {}) {
    const search = new URLSearchParams(Object.entries(query).filter(([, value]) => value !== '' && value != null));
    const text = search.toString();
    return `#/${parts.map(encodeURIComponent).join('/')}${text === '' ? '' : `?${text}`}`;
}

/** Replaces the query of the URL without a new history entry and without changing the page. */
export function replaceQuery(parts, query) {
    history.replaceState(null, '', address(parts, query));
}

function fit(pattern, parts) {
    const segments = pattern.split('/').filter((part) => part !== '');
    if (segments.length !== parts.length) return null;
    const params = {};
    for (const [n, segment] of segments.entries()) {
        if (segment.startsWith(':')) params[segment.slice(1)] = parts[n];
        else if (segment !== parts[n]) return null;
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
