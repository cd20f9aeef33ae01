// Copying text, also where the browser keeps the clipboard from pages that came without TLS.

/** Whether the text is in the clipboard now. */
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
    // Inside a modal dialog nothing outside of it can be selected.
    (before?.closest('dialog') ?? document.body).append(area);
    area.select();
    const isDone = document.execCommand('copy');
    area.remove();
    before?.focus();
    return isDone;
}
