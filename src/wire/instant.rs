//! Points in time as they are written: RFC 3339, whatever the year.
//!
//! Our clock ends two hours before the year 9999 does, whose last second is what many write for "never".

use jiff::{Timestamp, fmt::temporal::Pieces};

/// Reads a time with its offset from UTC; one beyond the clock's end is its end.
pub fn parse(text: &str) -> Option<Timestamp> {
    text.parse().ok().or_else(|| beyond(text))
}

fn beyond(text: &str) -> Option<Timestamp> {
    let pieces = Pieces::parse(text).ok()?;
    let is_whole = pieces.time().is_some() && pieces.to_numeric_offset().is_some();
    is_whole.then(|| farthest(pieces.date().year())).flatten()
}

/// The end of the clock that lies in a year.
pub fn farthest(year: i16) -> Option<Timestamp> {
    match year {
        9999 => Some(Timestamp::MAX),
        -9999 => Some(Timestamp::MIN),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_beyond_the_clock_is_its_end() {
        for (text, expect) in [
            ("9999-12-31T23:59:59Z", Some(Timestamp::MAX)),
            ("9999-12-31T23:59:59.999Z", Some(Timestamp::MAX)),
            ("9999-12-31T23:59:59.999+02:00", Some(Timestamp::MAX)),
            ("-009999-01-01T00:00:00Z", Some(Timestamp::MIN)),
            ("9999-12-30T00:00:00Z", "9999-12-30T00:00:00Z".parse().ok()),
            ("2027-01-31T12:00:00+01:00", "2027-01-31T11:00:00Z".parse().ok()),
            ("9999-12-31T23:59:59", None),
            ("9999-12-31", None),
            ("9999-13-31T23:59:59Z", None),
            ("never", None),
        ] {
            assert_eq!(parse(text), expect, "{text}");
        }
    }
}
