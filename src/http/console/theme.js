// Sets the light or dark theme before the page is drawn; a classic script, so that the page never flashes in the other theme.
// Nothing is stored while the theme follows the system.
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

    /** Switches the theme; removes the stored choice if it equals the system's. */
    globalThis.toggleTheme = () => {
        const next = document.documentElement.dataset.theme === 'dark' ? 'light' : 'dark';
        try {
            if ((next === 'dark') === system.matches) localStorage.removeItem(key);
            else localStorage.setItem(key, next);
        } catch {
            // Storage is not available, so the choice is not stored.
        }
        document.documentElement.dataset.theme = next;
        document.dispatchEvent(new Event('themechange'));
    };
})();
