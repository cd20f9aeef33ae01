// Drives the console in a headless Chromium, as a user would: `node console.mjs '{"url": …, "chromium": …}'`.
// Elements are found by their accessible names, so that an element without one cannot be used.
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { chromium } from 'playwright-core';
import { serve } from './jsonl.mjs';

const { url, chromium: executablePath, session, publicKeyHash } = JSON.parse(process.argv[2]);
const axe = readFileSync(createRequire(import.meta.url).resolve('axe-core/axe.min.js'), 'utf8');

// Chromium has no sandbox for root, who may run the tests.
const args = ['--no-sandbox'];
// The only trusted certificate: the one with this public key, with any issuer.
if (publicKeyHash) args.push(`--ignore-certificate-errors-spki-list=${publicKeyHash}`);
const browser = await chromium.launch({ executablePath, args });
const context = await browser.newContext({ viewport: { width: 1280, height: 800 }, locale: 'en-GB', timezoneId: 'UTC' });
// The session cookie of an earlier visit.
if (session) await context.addCookies([{ name: 'parapet-session', value: session, url, httpOnly: true, sameSite: 'Strict' }]);
await context.grantPermissions(['clipboard-read', 'clipboard-write'], { origin: url });
const page = await context.newPage();
/** The timeout for any action, in milliseconds. */
const PATIENCE = 100_000;
page.setDefaultTimeout(PATIENCE);

/** Errors of the page: failed scripts, and violations of its content security policy. */
const troubles = [];
page.on('pageerror', (error) => troubles.push(`error: ${error.stack ?? error}`));
page.on('console', (message) => {
    // The page itself reports rejected requests, which some tests expect.
    if (message.type() === 'error' && !message.text().startsWith('Failed to load resource')) troubles.push(`console: ${message.text()}`);
});
page.on('request', (request) => {
    if (!request.url().startsWith(url)) troubles.push(`asked elsewhere: ${request.url()}`);
});
await page.goto(url);

const button = (name, within = page) => within.getByRole('button', { name, exact: true });
const dialog = () => page.getByRole('dialog');
/** A closed dialog restores the focus when it leaves the page, a moment after it has become invisible. */
const dialogGone = () => page.locator('dialog').waitFor({ state: 'detached' });
const heading = (name) => page.getByRole('heading', { level: 1, name, exact: true });

/** The rows of the table with this caption, as objects with the first line of each cell. */
async function rows(caption) {
    const table = page.getByRole('table', { name: caption });
    if ((await table.count()) === 0) return [];
    const heads = await table.locator('thead th').allInnerTexts();
    const lines = table.locator('tbody > tr:not(.detail)');
    const read = async (line) => {
        const cells = await line.locator(':scope > th, :scope > td').allInnerTexts();
        return Object.fromEntries(cells.map((cell, n) => [heads[n].trim().split('\n')[0], cell.trim().split('\n')[0]]));
    };
    return Promise.all((await lines.all()).map(read));
}

const pageUp = async (section) => {
    const menu = button('Menu');
    if (await menu.isVisible() && (await menu.getAttribute('aria-expanded')) === 'false') await menu.click();
    await page.getByRole('navigation', { name: 'Main' }).getByRole('link', { name: section, exact: true }).click();
    await heading(section).waitFor();
    await page.getByText('Loading…').waitFor({ state: 'detached' });
};

await serve({
    sign_in: async ({ username, password }) => {
        await page.getByLabel('Username').fill(username);
        await page.getByLabel('Password').fill(password);
        await button('Sign in').click();
        await Promise.race([heading('Overview').waitFor(), page.getByRole('alert').filter({ hasText: /\S/ }).waitFor()]);
        return { signedIn: await heading('Overview').isVisible(), text: await page.locator('main').innerText() };
    },
    sign_out: async () => {
        await button('Sign out').click();
        await heading('Sign in').waitFor();
    },
    cookies: async () => ({ cookies: await context.cookies() }),
    /** The groups of the navigation, each with its links. */
    navigation: async () => ({ text: await page.getByRole('navigation', { name: 'Main' }).innerText() }),
    go: async ({ section }) => pageUp(section),
    open_flag: async ({ flag }) => {
        await page.getByRole('link', { name: flag, exact: true }).click();
        await heading(flag).waitFor();
    },
    reload: async ({ heading: name }) => {
        await page.reload();
        await heading(name).waitFor();
    },
    text: async () => ({ text: await page.locator('main').innerText() }),
    rows: async ({ table }) => ({ rows: await rows(table) }),
    buttons: async () => ({ buttons: (await page.locator('main').getByRole('button').allInnerTexts()).map((it) => it.trim()) }),
    create_token: async ({ name, kind, environment, projects }) => {
        await button('New API token').click();
        await dialog().getByLabel('Name', { exact: true }).fill(name);
        await dialog().getByRole('radio', { name: kind }).check();
        if (environment) await dialog().getByLabel('Environment').selectOption(environment);
        if (projects) {
            await dialog().getByRole('radio', { name: 'Only these' }).check();
            for (const project of projects) await dialog().getByRole('checkbox', { name: project }).check();
        }
        await button('Create token', dialog()).click();
        const secret = dialog().getByLabel('The token’s secret');
        await secret.waitFor();
        const shown = await secret.innerText();
        await button('Copy', dialog()).click();
        await button('Copied', dialog()).waitFor();
        const snippets = {};
        for (const tab of await dialog().getByRole('tab').all()) {
            await tab.click();
            snippets[await tab.innerText()] = await dialog().getByRole('tabpanel').locator('pre').innerText();
        }
        const clipboard = await page.evaluate(() => navigator.clipboard.readText());
        return { secret: shown, clipboard, snippets };
    },
    /** Submits the form of a new token with an error, and returns the messages beside the fields. */
    create_token_wrongly: async ({ name }) => {
        await button('New API token').click();
        await dialog().getByLabel('Name', { exact: true }).fill(name);
        await button('Create token', dialog()).click();
        const field = dialog().getByLabel('Name', { exact: true });
        await page.waitForFunction((it) => it.getAttribute('aria-invalid') === 'true', await field.elementHandle());
        const messages = await dialog().locator('.wrong').allInnerTexts();
        await page.keyboard.press('Escape');
        await dialogGone();
        return { messages: messages.filter((it) => it !== '') };
    },
    close_dialog: async () => {
        await button('Done', dialog()).click();
        await dialogGone();
    },
    delete_token: async ({ name }) => {
        await button(`Delete ${name}`).click();
        await button('Cancel', dialog()).click();
        await button(`Delete ${name}`).click();
        await button('Delete token', dialog()).click();
        await dialogGone();
    },
    create_account: async ({ username, password, role }) => {
        await button('New account').click();
        await dialog().getByLabel('Username').fill(username);
        await dialog().getByLabel('Password', { exact: true }).fill(password);
        await dialog().getByRole('radio', { name: role }).check();
        await button('Create account', dialog()).click();
        await dialogGone();
    },
    grant: async ({ username, kind, permission }) => {
        await button(`Permissions of ${username}`).click();
        await dialog().getByRole('group', { name: kind }).getByRole('checkbox', { name: permission }).check();
        await button('Save permissions', dialog()).click();
        await dialogGone();
    },
    explain: async ({ fields }) => {
        for (const [label, value] of Object.entries(fields)) await page.getByLabel(label, { exact: true }).fill(value);
        await button('Explain').click();
        const verdict = page.getByRole('region', { name: 'Explanation' });
        await verdict.getByText(/\S/).first().waitFor();
        return { text: await verdict.innerText() };
    },
    /** Sends a request that the page does not offer, with the page's cookies. */
    ask: async ({ method, path, body }) => page.evaluate(async ([method, path, body]) => {
        const init = { method, headers: { 'Content-Type': 'application/json' }, body: body && JSON.stringify(body) };
        const answer = await fetch(path, init);
        return { status: answer.status, text: await answer.text() };
    }, [method, path, body]),
    /** Presses the tab key until the element of this name has the focus, which may be on a page that is still loading. */
    tab_to: async ({ name }) => {
        for (const until = Date.now() + PATIENCE; Date.now() < until;) {
            await page.keyboard.press('Tab');
            const at = await page.evaluate(() => {
                const { activeElement: it } = document;
                return { name: (it.getAttribute('aria-label') ?? it.innerText ?? '').trim(), outline: getComputedStyle(it).outlineStyle };
            });
            if (at.name === name) return { found: true, visible: at.outline !== 'none' };
        }
        return { found: false };
    },
    press: async ({ key }) => page.keyboard.press(key),
    /** The violations that axe finds on the page, in this theme and width. */
    audit: async ({ theme, width }) => {
        await look(theme, width);
        await page.evaluate(axe);
        const { violations } = await page.evaluate(() => globalThis.axe.run(document, { resultTypes: ['violations'] }));
        const messages = violations.map(({ id, help, nodes }) => `${id}: ${help}: ${nodes.map((it) => `${it.html} ${it.failureSummary}`).join(' | ')}`);
        const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
        if (wide > 0) messages.push(`the page is ${wide} px wider than the window`);
        return { violations: messages };
    },
    /** The widths at which the page overflows, with the elements that do. */
    fit: async ({ widths }) => {
        const overflows = [];
        for (const width of widths) {
            await look('light', width);
            const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
            if (wide > 0) overflows.push(`${width} px: ${wide} px too wide`);
            const hidden = await page.evaluate(() => [...document.querySelectorAll('.table-box')].filter((it) => it.scrollWidth > it.clientWidth)
                .map((it) => it.querySelector('caption').textContent));
            overflows.push(...hidden.map((it) => `${width} px: the table ${it} is cut off`));
        }
        await look('light', 1280);
        return { overflows };
    },
    /** Waits until the charts have this many points. */
    chart: async ({ moments }) => {
        await page.waitForFunction((count) => [...document.querySelectorAll('path.line')].some((it) => it.getAttribute('d').split(/[ML]/).length > count), moments);
    },
    /** Waits until the charts show a gap. */
    gap: async () => {
        await page.waitForFunction(() => [...document.querySelectorAll('.chart .value')].every((it) => it.textContent === '–'));
    },
    /** The error messages beside the fields of a form. */
    mistakes: async () => {
        await dialog().locator('.wrong').filter({ hasText: /\S/ }).first().waitFor();
        const messages = await dialog().locator('.wrong').allInnerTexts();
        return { messages: messages.filter((it) => it !== '') };
    },
    /** The name of the focused element, or its tag. */
    focus: async () => page.evaluate(() => {
        const { activeElement: it } = document;
        return { name: it.getAttribute('aria-label') ?? (it === document.body ? '' : it.innerText.trim().replace(/\s+/g, ' ')), tag: it.tagName.toLowerCase() };
    }),
    /** Whether a dialog is open. */
    dialog: async () => ({ open: await dialog().isVisible() }),
    fill: async ({ label, value }) => page.getByLabel(label, { exact: true }).fill(value),
    click: async ({ name }) => button(name).click(),
    /** The two halves of a slow click. */
    hold: async ({ name }) => {
        await button(name).hover();
        await page.mouse.down();
    },
    release: () => page.mouse.up(),
    /** Navigates to a hash, and waits for this heading. */
    visit: async ({ hash, heading: name }) => {
        await page.evaluate((it) => { location.hash = it; }, hash);
        await heading(name).waitFor();
        await page.getByText('Loading…').waitFor({ state: 'detached' });
    },
    /** The browser's back button. */
    back: async () => {
        await page.goBack();
    },
    /** Waits until the page contains this text. */
    says: async ({ text }) => page.locator('main').getByText(text).first().waitFor(),
    /** From now on responses from this path do not arrive. */
    withhold: async ({ path }) => page.route(new URL(path, url).href, (route) => (route.request().method() === 'GET' ? null : route.continue())),
    /** From now on requests to this path are denied, as an edge may deny its own pages to a session of its Unleash. */
    refuse: async ({ path }) => page.route(new URL(path, url).href, (route) => route.fulfill({ status: 401, json: { message: 'not for you' } })),
    screenshot: async ({ path, theme, width }) => {
        await look(theme, width);
        // As high as the page, so that elements at the bottom of the window are at the bottom of the screenshot.
        const height = await page.evaluate(() => document.documentElement.scrollHeight);
        await page.setViewportSize({ width, height: Math.max(height, 640) });
        const bytes = await page.screenshot({ path, animations: 'disabled' });
        return { bytes: bytes.length };
    },
    troubles: async () => ({ troubles }),
    close: () => browser.close(),
});

async function look(theme, width) {
    await page.setViewportSize({ width, height: 800 });
    await page.emulateMedia({ colorScheme: theme });
    await page.waitForFunction((it) => document.documentElement.dataset.theme === it, theme);
    // Wait until the colours of the theme have stopped fading.
    await page.evaluate(() => Promise.all(document.getAnimations().map((it) => it.finished.catch(() => {}))));
}
