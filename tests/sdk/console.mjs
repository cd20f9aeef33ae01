// Drives the console in a headless Chromium, as a person would: `node console.mjs '{"url": …, "chromium": …}'`.
// Everything is found by what a screen reader would say, so that what cannot be named cannot be used either.
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { chromium } from 'playwright-core';
import { serve } from './jsonl.mjs';

const { url, chromium: executablePath, session, publicKeyHash } = JSON.parse(process.argv[2]);
const axe = readFileSync(createRequire(import.meta.url).resolve('axe-core/axe.min.js'), 'utf8');

// Whoever runs the tests may be root, for whom Chromium has no sandbox.
const args = ['--no-sandbox'];
// The only certificate that is trusted: that of this public key, whoever has signed it.
if (publicKeyHash) args.push(`--ignore-certificate-errors-spki-list=${publicKeyHash}`);
const browser = await chromium.launch({ executablePath, args });
const context = await browser.newContext({ viewport: { width: 1280, height: 800 }, locale: 'en-GB', timezoneId: 'UTC' });
// The cookie of an earlier visit.
if (session) await context.addCookies([{ name: 'parapet-session', value: session, url, httpOnly: true, sameSite: 'Strict' }]);
await context.grantPermissions(['clipboard-read', 'clipboard-write'], { origin: url });
const page = await context.newPage();
/** How long anything may take, in milliseconds. */
const PATIENCE = 20_000;
page.setDefaultTimeout(PATIENCE);

/** What went wrong in the page: scripts that failed, and what its policy forbade. */
const troubles = [];
page.on('pageerror', (error) => troubles.push(`error: ${error.stack ?? error}`));
page.on('console', (message) => {
    // A refused request is told by the page itself, and is what some tests are after.
    if (message.type() === 'error' && !message.text().startsWith('Failed to load resource')) troubles.push(`console: ${message.text()}`);
});
page.on('request', (request) => {
    if (!request.url().startsWith(url)) troubles.push(`asked elsewhere: ${request.url()}`);
});
await page.goto(url);

const button = (name, within = page) => within.getByRole('button', { name, exact: true });
const dialog = () => page.getByRole('dialog');
/** A dialog that is closed hands the focus back as it leaves the page, a moment after it can be seen no more. */
const dialogGone = () => page.locator('dialog').waitFor({ state: 'detached' });
const heading = (name) => page.getByRole('heading', { level: 1, name, exact: true });

/** The first lines of the cells of a table, by its caption: an object for each row. */
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
    /** A mistake in the form of a new token: what it says beside the field. */
    create_token_wrongly: async ({ name }) => {
        await button('New API token').click();
        await dialog().getByLabel('Name', { exact: true }).fill(name);
        await button('Create token', dialog()).click();
        const field = dialog().getByLabel('Name', { exact: true });
        await page.waitForFunction((it) => it.getAttribute('aria-invalid') === 'true', await field.elementHandle());
        const told = await dialog().locator('.wrong').allInnerTexts();
        await page.keyboard.press('Escape');
        await dialogGone();
        return { told: told.filter((it) => it !== '') };
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
    /** What the page itself is refused when it asks for what it does not offer. */
    ask: async ({ method, path, body }) => page.evaluate(async ([method, path, body]) => {
        const init = { method, headers: { 'Content-Type': 'application/json' }, body: body && JSON.stringify(body) };
        const answer = await fetch(path, init);
        return { status: answer.status, text: await answer.text() };
    }, [method, path, body]),
    /** Walks by the tab key alone until the focus is on what is called so, which may be on a page that is still on its way. */
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
    /** What axe finds wrong with the page, in this theme and width. */
    audit: async ({ theme, width }) => {
        await look(theme, width);
        await page.evaluate(axe);
        const { violations } = await page.evaluate(() => globalThis.axe.run(document, { resultTypes: ['violations'] }));
        const told = violations.map(({ id, help, nodes }) => `${id}: ${help}: ${nodes.map((it) => `${it.html} ${it.failureSummary}`).join(' | ')}`);
        const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
        if (wide > 0) told.push(`the page is ${wide} px wider than the window`);
        return { violations: told };
    },
    /** Which of these widths the page is too wide for, with what sticks out. */
    fit: async ({ widths }) => {
        const told = [];
        for (const width of widths) {
            await look('light', width);
            const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
            if (wide > 0) told.push(`${width} px: ${wide} px too wide`);
            const hidden = await page.evaluate(() => [...document.querySelectorAll('.table-box')].filter((it) => it.scrollWidth > it.clientWidth)
                .map((it) => it.querySelector('caption').textContent));
            told.push(...hidden.map((it) => `${width} px: the table ${it} is cut off`));
        }
        await look('light', 1280);
        return { told };
    },
    /** Waits until the charts have so many moments. */
    chart: async ({ moments }) => {
        await page.waitForFunction((count) => [...document.querySelectorAll('path.line')].some((it) => it.getAttribute('d').split(/[ML]/).length > count), moments);
    },
    /** Waits until the charts show that nothing was heard. */
    gap: async () => {
        await page.waitForFunction(() => [...document.querySelectorAll('.chart .value')].every((it) => it.textContent === '–'));
    },
    /** What a form says is wrong, beside its fields. */
    mistakes: async () => {
        await dialog().locator('.wrong').filter({ hasText: /\S/ }).first().waitFor();
        const told = await dialog().locator('.wrong').allInnerTexts();
        return { told: told.filter((it) => it !== '') };
    },
    /** What has the focus: its name, or its element. */
    focus: async () => page.evaluate(() => {
        const { activeElement: it } = document;
        return { name: it.getAttribute('aria-label') ?? (it === document.body ? '' : it.innerText.trim().replace(/\s+/g, ' ')), tag: it.tagName.toLowerCase() };
    }),
    /** Whether a dialog is open. */
    dialog: async () => ({ open: await dialog().isVisible() }),
    fill: async ({ label, value }) => page.getByLabel(label, { exact: true }).fill(value),
    click: async ({ name }) => button(name).click(),
    /** The two halves of a click, as a slow hand makes them. */
    hold: async ({ name }) => {
        await button(name).hover();
        await page.mouse.down();
    },
    release: () => page.mouse.up(),
    /** Changes the address by hand; the page has this heading then. */
    visit: async ({ hash, heading: name }) => {
        await page.evaluate((it) => { location.hash = it; }, hash);
        await heading(name).waitFor();
        await page.getByText('Loading…').waitFor({ state: 'detached' });
    },
    /** The browser's own way back. */
    back: async () => {
        await page.goBack();
    },
    /** Waits until the page says this. */
    says: async ({ text }) => page.locator('main').getByText(text).first().waitFor(),
    /** From now on nothing that is read there arrives. */
    withhold: async ({ path }) => page.route(new URL(path, url).href, (route) => (route.request().method() === 'GET' ? null : route.continue())),
    /** From now on what is asked there is refused, as an edge's own pages may be to a session of its Unleash's. */
    refuse: async ({ path }) => page.route(new URL(path, url).href, (route) => route.fulfill({ status: 401, json: { message: 'not for you' } })),
    screenshot: async ({ path, theme, width }) => {
        await look(theme, width);
        // As high as the page, so that what stands at the window's foot stands at the picture's.
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
    // Colours fade from one theme to the other; what is judged is where they end.
    await page.evaluate(() => Promise.all(document.getAnimations().map((it) => it.finished.catch(() => {}))));
}
