// Parses dates in JavaScript: the milliseconds since 1970 of each text, or null if it is not a date.
import { serve } from './jsonl.mjs';

await serve({
    read: (texts) => ({
        milliseconds: texts.map((text) => {
            const read = new Date(text).getTime();
            return Number.isNaN(read) ? null : read;
        }),
    }),
    close: () => {},
});
