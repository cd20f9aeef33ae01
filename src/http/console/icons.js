// Icons on a 16 × 16 grid, in the colour of the surrounding text. Each is used beside text or in a labelled control.

import { svg } from './dom.js';

const STROKES = {
    overview: 'M2 13h12M4 13V8M8 13V3M12 13v-7',
    flags: 'M3.500 14.500v-13M3.500 2.500h9l-2.500 3 2.500 3h-9',
    tokens: 'M6.500 9.500a3.500 3.500 0 1 1 1.200.8L6.500 11.500H5v1.500H3.500v1.500h-2V12zM10.800 5.200v0',
    accounts: 'M8 7.500a2.800 2.800 0 1 0 0-5.500 2.800 2.800 0 0 0 0 5.500zM2.500 14.500c.3-3 2.500-4.700 5.500-4.700s5.200 1.700 5.500 4.700',
    audit: 'M4 1.500h8v13H4zM6 5h4M6 8h4M6 11h2.500',
    menu: 'M2 4h12M2 8h12M2 12h12',
    theme: 'M13.500 9.800A6 6 0 0 1 6.200 2.500a6 6 0 1 0 7.300 7.300z',
    plus: 'M8 3v10M3 8h10',
    chevron: 'M6 4l4 4-4 4',
};

export function icon(name) {
    const line = svg('path', { d: STROKES[name] });
    return svg('svg.icon', { viewBox: '0 0 16 16', 'aria-hidden': 'true', focusable: 'false' }, line);
}

/** Parapet's logo. */
export function mark() {
    return svg('svg.mark', { viewBox: '0 0 20 16', 'aria-hidden': 'true', focusable: 'false' },
        svg('path', { d: 'M0 1h5v4h2.500V1h5v4H15V1h5v8H0zM0 11h20v4H0z' }));
}
