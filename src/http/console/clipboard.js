// Copies text to the clipboard, with a fallback for pages without TLS, where the clipboard API is unavailable.

/** Copies the text; resolves to whether it succeeded. */
export async function copy(text) {
    try {
        await navigator.clipboard.writeText(text);
        return true;
    } catch {
        return copyBySelection(text);
    }
}

function copyBySelection(text) {
    const area = document.createElement('textarea');
    area.value = text;
    area.className = 'visually-hidden';
    const before = document.activeElement;
    // While a modal dialog is open, only text inside it can be selected.
    (before?.closest('dialog') ?? document.body).append(area);
    area.select();
    const isDone = document.execCommand('copy');
    area.remove();
    before?.focus();
    return isDone;
}
