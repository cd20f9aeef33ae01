// Dates as JavaScript reads them: each text's milliseconds since 1970, or null where it is none.
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
