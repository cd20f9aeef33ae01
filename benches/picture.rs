//! SVG plots of all benchmarks, for light and dark pages.

use std::fmt::Write as _;

const STYLE: &str = "
text { font: 12px system-ui, sans-serif; fill: #24292f }
.title { font-size: 15px; font-weight: 600 }
.faint { fill: #57606a }
.number { font-size: 11px }
.grid { stroke: #d0d7de; stroke-width: 1 }
.goal { stroke: #57606a; stroke-width: 1.5; stroke-dasharray: 5 4 }
.bare { fill: #8c959f; stroke: #8c959f }
.parapet { fill: #0969da; stroke: #0969da }
.edge { fill: #d4761c; stroke: #d4761c }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 }
.faint { fill: #9198a1 }
.grid { stroke: #3d444d }
.goal { stroke: #9198a1 }
.parapet { fill: #4493f8; stroke: #4493f8 }
.edge { fill: #e8933b; stroke: #e8933b }
}";

/// An SVG picture under construction.
pub(crate) struct Picture(String);

impl Picture {
    pub(crate) fn new(title: &str) -> Self {
        let mut picture = Self(String::new());
        picture.text((16.0, 28.0), "start", "title", title);
        picture
    }

    pub(crate) fn draw(&mut self, element: std::fmt::Arguments<'_>) {
        writeln!(self.0, "{element}").expect("a string takes all");
    }

    pub(crate) fn text(&mut self, (x, y): (f64, f64), anchor: &str, class: &str, text: &str) {
        let text = text.replace('`', "").replace('&', "&amp;").replace('<', "&lt;");
        self.draw(format_args!(
            r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}" class="{class}">{text}</text>"#
        ));
    }

    /// Draws a legend in one line from `x` on; each name has the colour of its CSS class.
    pub(crate) fn legend(&mut self, (mut x, y): (f64, f64), names: &[(&str, &str)]) {
        for (class, name) in names {
            let top = y - 9.0;
            self.draw(format_args!(
                r#"<rect x="{x:.1}" y="{top:.1}" width="10" height="10" rx="2" class="{class}"/>"#
            ));
            self.text((x + 15.0, y), "start", "", name);
            // The approximate width of the text.
            x += 35.0 + 7.0 * super::numbers::to_f64(name.len() as u64);
        }
    }

    pub(crate) fn finish(self, width: f64, height: f64) -> String {
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
             width=\"{width}\" height=\"{height}\">\n<style>{STYLE}\n</style>\n{}</svg>\n",
            self.0
        )
    }
}

/// A logarithmic range of whole decades.
#[derive(Clone, Copy)]
struct Decades {
    first: f64,
    last: f64,
}

impl Decades {
    /// The decades that contain all values, and at least `min_decades`, so that a small difference looks
    /// small.
    fn around(values: impl Iterator<Item = f64>, min_decades: f64) -> Self {
        let (low, high) =
            values.fold((f64::MAX, f64::MIN), |(low, high), it| (low.min(it), high.max(it)));
        let (first, last) = (low.log10().floor(), high.log10().ceil());
        Self { first: first.min(last - min_decades), last }
    }

    /// The position of a value in the range, from 0 to 1.
    fn position(self, value: f64) -> f64 {
        (value.log10() - self.first) / (self.last - self.first)
    }

    /// The powers of ten.
    fn powers(self) -> impl Iterator<Item = f64> {
        std::iter::successors(Some(self.first), |it| Some(it + 1.0))
            .take_while(move |it| *it <= self.last)
            .map(|it| 10_f64.powf(it))
    }
}

/// A plot of values over a growing quantity; both axes are logarithmic.
pub(crate) struct Panel<'a> {
    pub(crate) title: &'a str,
    /// The name of the growing quantity.
    pub(crate) axis: &'a str,
    /// Lines with their CSS class; the last one is on top.
    pub(crate) lines: Vec<(&'a str, Vec<(f64, f64)>)>,
    /// The goal for the values, if there is one.
    pub(crate) goal: Option<f64>,
}

impl Panel<'_> {
    pub(crate) fn draw(
        &self,
        picture: &mut Picture,
        (x, y): (f64, f64),
        (width, height): (f64, f64),
    ) {
        let (left, right) = (x + 52.0, x + width - 16.0);
        let (top, bottom) = (y + 34.0, y + height - 34.0);
        let points = || self.lines.iter().flat_map(|(_, points)| points);
        let across = Decades::around(points().map(|(n, _)| *n), 1.0);
        let up = Decades::around(points().map(|(_, value)| *value).chain(self.goal), 2.0);
        let at_x = |value| left + across.position(value) * (right - left);
        let at_y = |value| bottom - up.position(value) * (bottom - top);
        picture.text((left, y + 22.0), "start", "", self.title);
        let levels = up.powers().map(|power| ("grid", power));
        for (class, value) in levels.chain(self.goal.map(|goal| ("goal", goal))) {
            let y = at_y(value);
            picture.draw(format_args!(
                r#"<line x1="{left:.1}" y1="{y:.1}" x2="{right:.1}" y2="{y:.1}" class="{class}"/>"#
            ));
        }
        for power in up.powers() {
            picture.text(
                (left - 6.0, at_y(power) + 4.0),
                "end",
                "faint number",
                &axis_label(power),
            );
        }
        for power in across.powers() {
            picture.text(
                (at_x(power), bottom + 15.0),
                "middle",
                "faint number",
                &axis_label(power),
            );
        }
        picture.text((f64::midpoint(left, right), bottom + 29.0), "middle", "faint", self.axis);
        for (class, points) in &self.lines {
            let mut line = String::new();
            for &(n, value) in points {
                let (x, y) = (at_x(n), at_y(value));
                picture.draw(format_args!(
                    r#"<circle cx="{x:.1}" cy="{y:.1}" r="3" class="{class}"/>"#
                ));
                write!(line, "{x:.1},{y:.1} ").expect("a string takes all");
            }
            let line = line.trim_end();
            picture.draw(format_args!(
                r#"<polyline points="{line}" class="{class}" style="fill:none;stroke-width:2"/>"#
            ));
        }
    }
}

/// A short label for a power of ten.
fn axis_label(value: f64) -> String {
    match value {
        _ if value >= 1e6 => format!("{} M", value / 1e6),
        _ if value >= 1e3 => format!("{} k", value / 1e3),
        _ if value < 1.0 => format!("{value:.3}").trim_end_matches('0').to_owned(),
        _ => format!("{value}"),
    }
}
