//! Parses timestamps (RFC 3339), including those beyond the range of our clock.
//!
//! [`Timestamp::MAX`] is two hours before the end of the year 9999, and many people write the last
//! second of that year for "never".

use jiff::{Timestamp, fmt::temporal::Pieces};

/// Parses a timestamp with an offset from UTC. One beyond the range of [`Timestamp`] is clamped to it.
pub fn parse(text: &str) -> Option<Timestamp> {
    text.parse().ok().or_else(|| parse_out_of_range(text))
}

fn parse_out_of_range(text: &str) -> Option<Timestamp> {
    let pieces = Pieces::parse(text).ok()?;
    let is_whole = pieces.time().is_some() && pieces.to_numeric_offset().is_some();
    is_whole.then(|| limit_in_year(pieces.date().year())).flatten()
}

/// The limit of [`Timestamp`] that lies in `year`.
pub fn limit_in_year(year: i16) -> Option<Timestamp> {
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
    fn timestamp_out_of_range_is_clamped() {
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
