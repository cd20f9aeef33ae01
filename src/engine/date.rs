//! Parses dates like JavaScript, on which Unleash and the Node SDK rely for date constraints.
//!
//! Unleash accepts every text that `new Date(text)` accepts: besides ISO 8601 (`2024-05-01T10:00:00Z`,
//! `2024-05`) also free formats of people and mail programs (`2024/05/01`, `May 1, 2024 10:00 PM`,
//! `Wed, 01 May 2024 10:00:00 +0200`). ECMAScript leaves free formats to implementations. The rules here
//! are those observed in V8; a test compares random texts with Node. A time without a zone is UTC, as on
//! a server in that zone. Nothing here allocates.

mod lexer;

use jiff::Timestamp;

use self::lexer::{Keyword, Lexer, Token};

/// Parses a date to the millisecond. A date beyond the range of [`Timestamp`] is the end of that range.
pub(super) fn parse(text: &str) -> Option<Timestamp> {
    let milliseconds = Parser::new(text).parse()?;
    let end = if milliseconds < 0 { Timestamp::MIN } else { Timestamp::MAX };
    Some(Timestamp::from_millisecond(milliseconds).unwrap_or(end))
}

/// JavaScript's dates end 100,000,000 days before and after 1970.
const MAX_MILLISECONDS: i64 = 100_000_000 * 86_400_000;

/// A year beyond that.
const MAX_YEAR: i64 = 300_000;

/// Up to `N` numbers in the order of the text.
#[derive(Clone, Copy, Debug)]
struct Numbers<const N: usize> {
    values: [i64; N],
    count: usize,
}

impl<const N: usize> Numbers<N> {
    fn new(fill: i64) -> Self {
        Self { values: [fill; N], count: 0 }
    }

    fn add(&mut self, value: i64) -> Option<()> {
        *self.values.get_mut(self.count)? = value;
        self.count += 1;
        Some(())
    }
}

/// The parser's state: date, time and zone as far as they have been parsed.
#[derive(Clone, Debug)]
struct Parser<'t> {
    lexer: Lexer<'t>,
    /// The next token.
    next: Token,
    /// Day, month and year in the order of the text, which is interpreted at the end.
    date: Numbers<3>,
    month_name: Option<i64>,
    is_iso: bool,
    /// Hour, minute, second, millisecond.
    time: Numbers<4>,
    am_pm_hours: Option<i64>,
    zone_sign: i64,
    zone_hours: Option<i64>,
    zone_minutes: Option<i64>,
}

/// The part of the text that matches ISO 8601.
enum IsoMatch {
    /// The whole text.
    Complete,
    /// A prefix. The rest may be in a free format.
    Prefix,
}

impl<'t> Parser<'t> {
    fn new(text: &'t str) -> Self {
        let mut lexer = Lexer::new(text);
        let next = lexer.next_token();
        Self {
            lexer,
            next,
            date: Numbers::new(1),
            month_name: None,
            is_iso: false,
            time: Numbers::new(0),
            am_pm_hours: None,
            zone_sign: 1,
            zone_hours: None,
            zone_minutes: None,
        }
    }

    fn parse(mut self) -> Option<i64> {
        match self.iso()? {
            IsoMatch::Complete => self.is_iso = true,
            IsoMatch::Prefix => self.free_form()?,
        }
        let days = self.days_since_1970()?;
        let milliseconds =
            days * 86_400_000 + self.time_milliseconds()? - self.zone_seconds()? * 1000;
        (-MAX_MILLISECONDS..=MAX_MILLISECONDS).contains(&milliseconds).then_some(milliseconds)
    }

    fn advance(&mut self) -> Token {
        let next = self.lexer.next_token();
        std::mem::replace(&mut self.next, next)
    }

    fn advance_if(&mut self, token: Token) -> bool {
        let found = self.next == token;
        if found {
            self.advance();
        }
        found
    }

    /// Takes the next token if it is a number of exactly `digits` digits within `range`.
    fn fixed_digits(&mut self, digits: usize, range: std::ops::RangeInclusive<i64>) -> Option<i64> {
        match self.next {
            Token::Number { value, digits: found } if found == digits && range.contains(&value) => {
                self.advance();
                Some(value)
            }
            _ => None,
        }
    }

    /// Parses `YYYY[-MM[-DD]][THH:MM[:SS[.mmm]][Z|±HH:MM|±HHMM]]`, where the year may be `±YYYYYY`.
    /// `None` if the text cannot be a date in any format.
    fn iso(&mut self) -> Option<IsoMatch> {
        if let Token::Sign(sign) = self.next {
            self.advance();
            let Some(year) = self.fixed_digits(6, 0..=999_999) else {
                return Some(IsoMatch::Prefix);
            };
            if sign < 0 && year == 0 {
                return Some(IsoMatch::Prefix);
            }
            self.date.add(sign * year)?;
        } else {
            let Some(year) = self.fixed_digits(4, 0..=9_999) else { return Some(IsoMatch::Prefix) };
            self.date.add(year)?;
        }
        for range in [1..=12, 1..=31] {
            if !self.advance_if(Token::Sign(-1)) {
                break;
            }
            let Some(number) = self.fixed_digits(2, range) else { return Some(IsoMatch::Prefix) };
            self.date.add(number)?;
        }
        if self.next == Token::End {
            return Some(IsoMatch::Complete);
        }
        if !self.advance_if(Token::Keyword(Keyword::T)) {
            return Some(IsoMatch::Prefix);
        }
        self.iso_time()?;
        (self.next == Token::End).then_some(IsoMatch::Complete)
    }

    fn iso_time(&mut self) -> Option<()> {
        let hour = self.fixed_digits(2, 0..=24)?;
        let last = if hour == 24 { 0 } else { 59 };
        self.time.add(hour)?;
        if !self.advance_if(Token::Colon) {
            return None;
        }
        let minute = self.fixed_digits(2, 0..=last)?;
        self.time.add(minute)?;
        if self.advance_if(Token::Colon) {
            let second = self.fixed_digits(2, 0..=last)?;
            self.time.add(second)?;
            if self.advance_if(Token::Dot) {
                let Token::Number { value, digits } = self.advance() else { return None };
                if hour == 24 && value > 0 {
                    return None;
                }
                self.time.add(fraction_to_milliseconds(value, digits))?;
            }
        }
        match self.next {
            Token::Keyword(Keyword::Z) => {
                self.advance();
                self.set_zone(0);
            }
            Token::Sign(sign) => {
                self.advance();
                self.zone_sign = sign;
                let (hours, minutes) = if let Some(both) = self.fixed_digits(4, 0..=2359) {
                    (both / 100, both % 100)
                } else {
                    let hours = self.fixed_digits(2, 0..=23)?;
                    if !self.advance_if(Token::Colon) {
                        return None;
                    }
                    (hours, self.fixed_digits(2, 0..=59)?)
                };
                if minutes > 59 {
                    return None;
                }
                (self.zone_hours, self.zone_minutes) = (Some(hours), Some(minutes));
            }
            _ => {}
        }
        Some(())
    }

    fn set_zone(&mut self, hours: i64) {
        self.zone_sign = if hours < 0 { -1 } else { 1 };
        (self.zone_hours, self.zone_minutes) = (Some(hours.abs()), Some(0));
    }

    /// Parses numbers, names of months, times and zones in any order. Ignores words before the first
    /// number, punctuation, and comments in parentheses.
    fn free_form(&mut self) -> Option<()> {
        let mut seen_number = self.date.count > 0;
        loop {
            match self.advance() {
                Token::End => return Some(()),
                Token::Number { value, .. } => {
                    seen_number = true;
                    self.number(value)?;
                }
                Token::Keyword(Keyword::AmPm(hours)) if self.time.count > 0 => {
                    self.am_pm_hours = Some(hours);
                }
                Token::Keyword(Keyword::Month(month)) => {
                    self.month_name = Some(month);
                    self.advance_if(Token::Sign(-1));
                }
                Token::Keyword(Keyword::Zone(hours)) if seen_number => self.set_zone(hours),
                Token::Keyword(Keyword::Z) if seen_number => self.set_zone(0),
                Token::Keyword(_) => {
                    if seen_number || matches!(self.next, Token::Number { .. }) {
                        return None;
                    }
                }
                Token::Sign(sign) if self.time.count > 0 || self.is_utc() => {
                    seen_number = true;
                    self.zone_offset(sign)?;
                }
                Token::Sign(_) | Token::ClosingParenthesis if seen_number => return None,
                Token::Sign(_)
                | Token::ClosingParenthesis
                | Token::Colon
                | Token::Dot
                | Token::Space
                | Token::Other => {}
            }
        }
    }

    fn is_utc(&self) -> bool {
        self.zone_hours == Some(0) && self.zone_minutes == Some(0)
    }

    /// Adds a number to the time, the zone or the date, depending on the tokens around it.
    fn number(&mut self, value: i64) -> Option<()> {
        if self.advance_if(Token::Colon) {
            if self.advance_if(Token::Colon) {
                if self.time.count > 0 {
                    return None;
                }
                self.time.add(value)?;
                return self.time.add(0);
            }
            self.time.add(value)?;
            self.advance_if(Token::Dot);
            return Some(());
        }
        let expects_time = match self.time.count {
            1 | 2 => value < 60,
            3 => value < 1000,
            _ => false,
        };
        if self.advance_if(Token::Dot) && expects_time {
            self.time.add(value)?;
            let Token::Number { value, digits } = self.advance() else { return None };
            self.finish_time(fraction_to_milliseconds(value, digits));
            return Some(());
        }
        if self.zone_hours.is_some() && self.zone_minutes.is_none() && value < 60 {
            self.zone_minutes = Some(value);
        } else if expects_time {
            self.finish_time(value);
            let may_follow = [Token::End, Token::Space, Token::Keyword(Keyword::Z)];
            if !may_follow.contains(&self.next) && !matches!(self.next, Token::Sign(_)) {
                return None;
            }
        } else {
            self.date.add(value)?;
            self.advance_if(Token::Sign(-1));
        }
        Some(())
    }

    /// Adds the last number of the time, unless the time is complete. Later numbers do not belong to it.
    fn finish_time(&mut self, value: i64) {
        let _ = self.time.add(value);
        self.time.count = self.time.values.len();
    }

    fn zone_offset(&mut self, sign: i64) -> Option<()> {
        self.zone_sign = sign;
        let (value, digits) = match self.next {
            Token::Number { value, digits } => {
                self.advance();
                (value, digits)
            }
            _ => (0, 0),
        };
        (self.zone_hours, self.zone_minutes) = match digits {
            _ if self.next == Token::Colon => (Some(value), None),
            1 | 2 => (Some(value), Some(0)),
            3 | 4 => (Some(value / 100), Some(value % 100)),
            _ => return None,
        };
        Some(())
    }

    /// Days since 1970. A day beyond the end of its month falls into the next month.
    fn days_since_1970(&self) -> Option<i64> {
        let [first, second, third] = self.date.values;
        if self.date.count == 0 {
            return None;
        }
        let is_day = |number| (1..=31).contains(&number);
        let (year, month, day) = match self.month_name {
            None if self.is_iso || !is_day(first) => (first, second, third),
            None => (third, first, second),
            Some(month) if is_day(first) => (second, month, first),
            Some(month) => (first, month, second),
        };
        let year = match year {
            0..=49 if !self.is_iso => year + 2000,
            50..=99 if !self.is_iso => year + 1900,
            year => year,
        };
        let is_in_range = (1..=12).contains(&month) && is_day(day) && year.abs() <= MAX_YEAR;
        is_in_range.then(|| days_to_month(year, month) + day - 1)
    }

    /// The offset of the zone from UTC in seconds. V8 computes it in 32 bits and rejects the top bit.
    fn zone_seconds(&self) -> Option<i64> {
        let (hours, minutes) = (self.zone_hours.unwrap_or(0), self.zone_minutes.unwrap_or(0));
        let seconds = (hours * 3600 + minutes * 60) % (1 << 32);
        (seconds < 1 << 31).then_some(self.zone_sign * seconds)
    }

    fn time_milliseconds(&self) -> Option<i64> {
        let [mut hour, minute, second, millisecond] = self.time.values;
        if let Some(hours) = self.am_pm_hours {
            if hour > 12 {
                return None;
            }
            hour = hour % 12 + hours;
        }
        let is_in_day = hour < 24 && minute < 60 && second < 60 && millisecond < 1000;
        let is_midnight = (hour, minute, second, millisecond) == (24, 0, 0, 0);
        let seconds = (hour * 60 + minute) * 60 + second;
        (is_in_day || is_midnight).then_some(seconds * 1000 + millisecond)
    }
}

/// Milliseconds from the digits after the decimal point.
fn fraction_to_milliseconds(value: i64, digits: usize) -> i64 {
    let shift = |by: usize| (0..by).fold(1, |power, _| power * 10);
    match digits {
        0..3 => value * shift(3 - digits),
        // `value` has nine digits at most.
        digits => value / shift(digits.min(9) - 3),
    }
}

/// Days from 1970 to the first of a month, in the Gregorian calendar.
fn days_to_month(year: i64, month: i64) -> i64 {
    // Years are counted from March, so that the leap day is the last day.
    let year = if month < 3 { year - 1 } else { year };
    let months = (month + 9) % 12;
    let days_of_months = (153 * months + 2) / 5;
    let leap_days = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    365 * year + leap_days + days_of_months - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expect: &str) {
        assert_eq!(parse(text), Some(expect.parse().unwrap()), "{text:?}");
    }

    #[test]
    fn iso_dates_are_parsed_in_every_precision() {
        check("2022-01-22T11:00:00.000Z", "2022-01-22T11:00:00Z");
        check("2022-01-22T13:00:00.000+02:00", "2022-01-22T11:00:00Z");
        check("2022-01-22T13:00:00+0200", "2022-01-22T11:00:00Z");
        check("2022-01-22T11:00:00", "2022-01-22T11:00:00Z");
        check("2022-01-22T11:00", "2022-01-22T11:00:00Z");
        check("2022-01-22t11:00z", "2022-01-22T11:00:00Z");
        check("2022-01-22", "2022-01-22T00:00:00Z");
        check("2022-01", "2022-01-01T00:00:00Z");
        check("2022", "2022-01-01T00:00:00Z");
        check("+002022-01-22", "2022-01-22T00:00:00Z");
        check("2022-01-22T24:00", "2022-01-23T00:00:00Z");
        check("2022-01-22T11:00:00.1239999Z", "2022-01-22T11:00:00.123Z");
        check("2022-01-22T11:00:00.5Z", "2022-01-22T11:00:00.5Z");
        check("2023-02-29", "2023-03-01T00:00:00Z");
    }

    #[test]
    fn free_formats_of_people_and_mail_programs_are_parsed() {
        check("2024-5-1", "2024-05-01T00:00:00Z");
        check("2024/05/01", "2024-05-01T00:00:00Z");
        check("05/01/2024", "2024-05-01T00:00:00Z");
        check("01 May 2024", "2024-05-01T00:00:00Z");
        check("1-May-24", "2024-05-01T00:00:00Z");
        check("May 1, 2024 10:00 PM", "2024-05-01T22:00:00Z");
        check("Wed, 01 May 2024 10:00:00 GMT", "2024-05-01T10:00:00Z");
        check("Wed May 01 2024 10:00:00 GMT+0200 (CEST)", "2024-05-01T08:00:00Z");
        check("2024-05-01 10:00:00 UTC", "2024-05-01T10:00:00Z");
        check("2024-05-01 10:00:00.25", "2024-05-01T10:00:00.25Z");
        check("2024-05-01 10:00 -7:30", "2024-05-01T17:30:00Z");
        check("1 May 2024 10:00 EST", "2024-05-01T15:00:00Z");
        check("2024\u{a0}5", "2024-05-01T00:00:00Z");
    }

    #[test]
    fn dates_out_of_range_are_clamped() {
        for text in ["9999-12-31T23:59:59.999Z", "9999-12-31", "+275760-09-13", "31 Dec 12345"] {
            assert_eq!(parse(text), Some(Timestamp::MAX), "{text}");
        }
        assert_eq!(parse("-100000-01-01"), Some(Timestamp::MIN));
        check("9999-12-30T00:00:00Z", "9999-12-30T00:00:00Z");
        check("-000001-01-01T00:00:00Z", "-000001-01-01T00:00:00Z");
    }

    #[test]
    fn text_that_is_not_a_date_is_rejected() {
        for text in [
            "",
            " ",
            "yesterday",
            "2022-13-01",
            "2022-01-22T25:00:00Z",
            "2022-01-22T11Z",
            "20220122",
            " 2022-01-22T11:00:00Z",
            "2022-01-22T11:00:00UTC",
            "2022-01-22 11:00:60",
            "1 2 3 4",
            "Z",
            "1 May 2024 13:00 PM",
            "1 May 2024 10:00 +12345",
            "+275760-09-13T00:00:00.001Z",
            "1 May 2024)",
            "garbage1 May 2024",
            "1 garbage 2024",
            "1650000000000",
            "((((",
            "12345678901234567890",
            "999999999-05-01",
            "1 May 2024 10:00 +600000:00",
            "2024--05",
        ] {
            assert_eq!(parse(text), None, "{text:?}");
        }
    }
}
