// The colours, before anything is drawn. A classic script, so that the page never flashes in the other theme.
// Nothing is stored while the system's own choice is in force.
(() => {
    const key = 'parapet-theme';
    const system = matchMedia('(prefers-color-scheme: dark)');
    const stored = () => {
        try {
            return localStorage.getItem(key);
        } catch {
            return null;
        }
    };
    const apply = () => {
        const chosen = stored();
        document.documentElement.dataset.theme = chosen ?? (system.matches ? 'dark' : 'light');
        document.dispatchEvent(new Event('themechange'));
    };
    apply();
    system.addEventListener('change', apply);
    addEventListener('storage', apply);

    /** Changes to the other theme; forgets the choice where it is the system's own. */
    globalThis.toggleTheme = () => {
        const next = document.documentElement.dataset.theme === 'dark' ? 'light' : 'dark';
        try {
            if ((next === 'dark') === system.matches) localStorage.removeItem(key);
            else localStorage.setItem(key, next);
        } catch {
            // Without storage there is no choice to keep.
        }
        document.documentElement.dataset.theme = next;
        document.dispatchEvent(new Event('themechange'));
    };
})();
