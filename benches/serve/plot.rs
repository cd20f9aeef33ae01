//! The plots.

use super::{
    contender::Contender,
    growth_curves::CurveResult,
    measure::Measured,
    numbers::{thousands, to_f64},
    picture::{Panel, Picture},
    sdk_requests::RowResult,
};

fn class(contender: Contender) -> &'static str {
    match contender {
        Contender::Bare => "bare",
        Contender::Parapet => "parapet",
        Contender::Edge => "edge",
    }
}

fn legend(picture: &mut Picture, place: (f64, f64)) {
    let contenders = [Contender::Bare, Contender::Parapet, Contender::Edge];
    picture.legend(place, &contenders.map(|it| (class(it), it.name())));
}

/// Requests per second, row by row.
pub(crate) fn requests(outcomes: &[RowResult]) -> String {
    bars(outcomes, "Requests per second, more is better", |it| it.per_second, thousands)
}

/// The slowest of a hundred requests, row by row.
pub(crate) fn p99(outcomes: &[RowResult]) -> String {
    let write = |micros: f64| format!("{:.2} ms", micros / 1e3);
    bars(outcomes, "p99 in milliseconds, less is better", |it| it.p99_micros, write)
}

/// A group of bars for each row, with its value at the end of each bar.
fn bars(
    outcomes: &[RowResult],
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
    let mut picture = Picture::new(title);
    legend(&mut picture, (WIDTH - 330.0, 28.0));
    let mut y = TOP;
    for outcome in outcomes {
        let bars = outcome.measured.iter();
        let middle = y + BAR * to_f64(bars.len() as u64) / 2.0 + 4.0;
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

/// Requests per second over a growing quantity, one panel for each quantity.
pub(crate) fn growth(growths: &[CurveResult]) -> String {
    const WIDTH: f64 = 300.0;
    const HEIGHT: f64 = 250.0;
    const COLUMNS: usize = 3;
    let mut picture = Picture::new("Requests per second, as things grow");
    legend(&mut picture, (WIDTH * 3.0 - 330.0, 28.0));
    for (at, growth) in growths.iter().enumerate() {
        let place = |n: usize| to_f64(n as u64);
        let (column, row) = (place(at % COLUMNS), place(at / COLUMNS));
        let place = (column * WIDTH, 44.0 + row * HEIGHT);
        panel(growth).draw(&mut picture, place, (WIDTH, HEIGHT));
    }
    let rows = to_f64(growths.len().div_ceil(COLUMNS) as u64);
    picture.finish(WIDTH * 3.0, 52.0 + rows * HEIGHT)
}

fn panel(growth: &CurveResult) -> Panel<'_> {
    let line = |contender| {
        let rate = |(n, by): &(u64, std::collections::BTreeMap<_, Measured>)| {
            Some((to_f64(*n), by.get(&contender)?.per_second))
        };
        (class(contender), growth.points.iter().filter_map(rate).collect())
    };
    Panel {
        title: growth.curve.request,
        axis: growth.curve.axis,
        lines: [Contender::Bare, Contender::Edge, Contender::Parapet].map(line).into(),
        goal: None,
    }
}
