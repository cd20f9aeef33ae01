//! The plots, as SVG that suits a light page and a dark one.

use std::fmt::Write as _;

use super::{
    contender::Contender, measure::Measured, report::thousands, rows::Outcome, scaling::Growth,
};

const STYLE: &str = "
text { font: 12px system-ui, sans-serif; fill: #24292f }
.title { font-size: 15px; font-weight: 600 }
.faint { fill: #57606a }
.number { font-size: 11px }
.grid { stroke: #d0d7de; stroke-width: 1 }
.bare { fill: #8c959f; stroke: #8c959f }
.parapet { fill: #0969da; stroke: #0969da }
.edge { fill: #d4761c; stroke: #d4761c }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 }
.faint { fill: #9198a1 }
.grid { stroke: #3d444d }
.parapet { fill: #4493f8; stroke: #4493f8 }
.edge { fill: #e8933b; stroke: #e8933b }
}";

fn class(contender: Contender) -> &'static str {
    match contender {
        Contender::Bare => "bare",
        Contender::Parapet => "parapet",
        Contender::Edge => "edge",
    }
}

/// Requests per second, row by row.
pub(crate) fn requests(outcomes: &[Outcome]) -> String {
    bars(outcomes, "Requests per second, more is better", |it| it.per_second, thousands)
}

/// The slowest of a hundred requests, row by row.
pub(crate) fn p99(outcomes: &[Outcome]) -> String {
    let write = |micros: f64| format!("{:.2} ms", micros / 1e3);
    bars(outcomes, "p99 in milliseconds, less is better", |it| it.p99_micros, write)
}

/// A picture that grows by what is drawn into it.
struct Picture(String);

impl Picture {
    fn draw(&mut self, element: std::fmt::Arguments<'_>) {
        writeln!(self.0, "{element}").expect("a string takes all");
    }

    fn text(&mut self, (x, y): (f64, f64), anchor: &str, class: &str, text: &str) {
        let text = text.replace('`', "").replace('&', "&amp;").replace('<', "&lt;");
        self.draw(format_args!(
            r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}" class="{class}">{text}</text>"#
        ));
    }

    /// Whose colour is whose, in one line from `x` on.
    fn legend(&mut self, (mut x, y): (f64, f64)) {
        for contender in [Contender::Bare, Contender::Parapet, Contender::Edge] {
            let (class, top) = (class(contender), y - 9.0);
            self.draw(format_args!(
                r#"<rect x="{x:.1}" y="{top:.1}" width="10" height="10" rx="2" class="{class}"/>"#
            ));
            self.text((x + 15.0, y), "start", "", contender.name());
            x += 105.0;
        }
    }

    fn finish(self, width: f64, height: f64) -> String {
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
             width=\"{width}\" height=\"{height}\">\n<style>{STYLE}\n</style>\n{}</svg>\n",
            self.0
        )
    }
}

/// A group of bars for each row, with the number at the end of each.
fn bars(
    outcomes: &[Outcome],
    title: &str,
    of: fn(&Measured) -> f64,
    write: impl Fn(f64) -> String,
) -> String {
    const WIDTH: f64 = 900.0;
    const LEFT: f64 = 270.0;
    const TOP: f64 = 60.0;
    const BAR: f64 = 14.0;
    const GAP: f64 = 12.0;
    let longest = outcomes.iter().flat_map(|it| it.measured.values()).map(of).fold(1.0, f64::max);
    let scale = (WIDTH - LEFT - 90.0) / longest;
    let mut picture = Picture(String::new());
    picture.text((16.0, 28.0), "start", "title", title);
    picture.legend((WIDTH - 330.0, 28.0));
    let mut y = TOP;
    for outcome in outcomes {
        let bars = outcome.measured.iter();
        let middle = y + BAR * crate::measure::to_f64(bars.len() as u64) / 2.0 + 4.0;
        picture.text((LEFT - 12.0, middle), "end", "", outcome.row.title);
        for (&contender, measured) in bars {
            let (class, value) = (class(contender), of(measured));
            let (length, thickness) = ((value * scale).max(1.0), BAR - 2.0);
            picture.draw(format_args!(
                r#"<rect x="{LEFT}" y="{y:.1}" width="{length:.1}" height="{thickness}" class="{class}"/>"#
            ));
            let end = (LEFT + length + 6.0, y + BAR - 4.0);
            picture.text(end, "start", "number", &write(value));
            y += BAR;
        }
        y += GAP;
    }
    picture.draw(format_args!(
        r#"<line x1="{LEFT}" y1="{:.1}" x2="{LEFT}" y2="{y:.1}" class="grid"/>"#,
        TOP - 6.0
    ));
    picture.finish(WIDTH, y + 8.0)
}

/// Requests per second against what grows, a panel for each thing that does; both axes in decades.
pub(crate) fn growth(growths: &[Growth]) -> String {
    const WIDTH: f64 = 300.0;
    const HEIGHT: f64 = 250.0;
    const COLUMNS: usize = 3;
    let mut picture = Picture(String::new());
    picture.text((16.0, 28.0), "start", "title", "Requests per second, as things grow");
    picture.legend((WIDTH * 3.0 - 330.0, 28.0));
    for (at, growth) in growths.iter().enumerate() {
        let place = |n: usize| crate::measure::to_f64(n as u64);
        let (column, row) = (place(at % COLUMNS), place(at / COLUMNS));
        panel(&mut picture, growth, (column * WIDTH, 44.0 + row * HEIGHT), (WIDTH, HEIGHT));
    }
    let rows = crate::measure::to_f64(growths.len().div_ceil(COLUMNS) as u64);
    picture.finish(WIDTH * 3.0, 52.0 + rows * HEIGHT)
}

/// From a decade to a decade.
#[derive(Clone, Copy)]
struct Decades {
    first: f64,
    last: f64,
}

impl Decades {
    /// All that hold the values, and so many at least that a small difference looks small.
    fn around(values: impl Iterator<Item = f64>, least: f64) -> Self {
        let (low, high) =
            values.fold((f64::MAX, f64::MIN), |(low, high), it| (low.min(it), high.max(it)));
        let (first, last) = (low.log10().floor(), high.log10().ceil());
        Self { first: first.min(last - least), last }
    }

    /// Where a value lies between the two, from 0 to 1.
    fn place(self, value: f64) -> f64 {
        (value.log10() - self.first) / (self.last - self.first)
    }

    /// The powers of ten.
    fn powers(self) -> impl Iterator<Item = f64> {
        std::iter::successors(Some(self.first), |it| Some(it + 1.0))
            .take_while(move |it| *it <= self.last)
            .map(|it| 10_f64.powf(it))
    }
}

fn panel(picture: &mut Picture, growth: &Growth, (x, y): (f64, f64), (width, height): (f64, f64)) {
    let (left, right) = (x + 52.0, x + width - 16.0);
    let (top, bottom) = (y + 34.0, y + height - 34.0);
    let points = || growth.points.iter().map(|(n, by)| (crate::measure::to_f64(*n), by));
    let across = Decades::around(points().map(|(n, _)| n), 1.0);
    let rates = points().flat_map(|(_, by)| by.values().map(|it| it.per_second));
    let up = Decades::around(rates, 2.0);
    let at_x = |value| left + across.place(value) * (right - left);
    let at_y = |value| bottom - up.place(value) * (bottom - top);
    picture.text((left, y + 22.0), "start", "", growth.curve.request);
    for power in up.powers() {
        let y = at_y(power);
        picture.draw(format_args!(
            r#"<line x1="{left:.1}" y1="{y:.1}" x2="{right:.1}" y2="{y:.1}" class="grid"/>"#
        ));
        picture.text((left - 6.0, y + 4.0), "end", "faint number", &short(power));
    }
    for power in across.powers() {
        picture.text((at_x(power), bottom + 15.0), "middle", "faint number", &short(power));
    }
    picture.text((f64::midpoint(left, right), bottom + 29.0), "middle", "faint", growth.curve.axis);
    for contender in [Contender::Bare, Contender::Edge, Contender::Parapet] {
        let class = class(contender);
        let mut line = String::new();
        for (n, by) in points() {
            let Some(measured) = by.get(&contender) else { continue };
            let (x, y) = (at_x(n), at_y(measured.per_second));
            picture
                .draw(format_args!(r#"<circle cx="{x:.1}" cy="{y:.1}" r="3" class="{class}"/>"#));
            write!(line, "{x:.1},{y:.1} ").expect("a string takes all");
        }
        let line = line.trim_end();
        picture.draw(format_args!(
            r#"<polyline points="{line}" class="{class}" style="fill:none;stroke-width:2"/>"#
        ));
    }
}

/// A power of ten in few letters.
fn short(value: f64) -> String {
    match value {
        _ if value >= 1e6 => format!("{} M", value / 1e6),
        _ if value >= 1e3 => format!("{} k", value / 1e3),
        _ => format!("{value}"),
    }
}
