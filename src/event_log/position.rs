//! How far the event log was read, and what was added since. Pure.

use jiff::{civil::Date, tz::Offset};

use crate::protocol::event_log::{EventPage, LoggedEvent};

/// The maximum number of added events that are read one by one.
pub(super) const MAX_NEW_EVENTS: u16 = 100;

/// How far the log was read.
///
/// The newest event alone would not show an event that became visible late: two transactions that ran at
/// the same time end in any order. So the number of events is compared too, of the last days only, because
/// upstream counts them for each request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Position {
    /// The highest id seen; 0 if the log was empty.
    newest_id: u64,
    /// From which day on events are read.
    since: Option<Date>,
    /// How many there are since then; `None` if they were not counted yet.
    total: Option<u64>,
}

/// The additions to the log since an earlier position.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Difference {
    Nothing,
    /// Exactly these events.
    Events(Vec<LoggedEvent>),
    /// More events than the page has. A page with this limit has them all.
    Incomplete {
        limit: u16,
    },
    /// Too many events, or some that cannot be told from older ones.
    Unknown,
}

impl Position {
    /// From which day on to read events.
    pub(super) fn since(&self) -> Option<Date> {
        self.since
    }

    /// The position after a page that was read with `since`; `None` if the next page is to be read without
    /// it.
    pub(super) fn after(
        known: Option<&Self>,
        since: Option<Date>,
        page: &EventPage,
    ) -> Option<Self> {
        let Some(newest) = page.events.first() else {
            // Events were deleted, unless there never were any.
            return since.is_none().then_some(Self {
                newest_id: 0,
                since: None,
                total: Some(page.total),
            });
        };
        // One day more than necessary, because upstream's days may begin in another time zone.
        let day = Offset::UTC.to_datetime(newest.created_at).date();
        let next_since = day.yesterday().and_then(Date::yesterday).ok();
        Some(Self {
            newest_id: page
                .events
                .iter()
                .fold(known.map_or(0, |known| known.newest_id), |id, event| id.max(event.id)),
            since: next_since,
            total: (next_since == since).then_some(page.total),
        })
    }
}

impl Difference {
    /// Compares a page, which was read since the day of the `known` position, with that position.
    pub(super) fn between(known: Option<&Position>, page: &EventPage) -> Self {
        let Some(known) = known else { return Self::Unknown };
        let is_added = |event: &&LoggedEvent| event.id > known.newest_id;
        let added: Vec<_> = page.events.iter().filter(is_added).cloned().collect();
        let Some(total) = known.total else {
            let is_known = |event: &LoggedEvent| event.id == known.newest_id;
            let is_unchanged = added.is_empty() && page.events.first().is_some_and(is_known);
            return if is_unchanged { Self::Nothing } else { Self::Unknown };
        };
        let Some(expected) = page.total.checked_sub(total) else { return Self::Unknown };
        let expected = usize::try_from(expected).unwrap_or(usize::MAX);
        if expected == added.len() {
            return if added.is_empty() { Self::Nothing } else { Self::Events(added) };
        }
        match u16::try_from(expected) {
            Ok(limit)
                if limit <= MAX_NEW_EVENTS && !added.is_empty() && page.events.len() < expected =>
            {
                Self::Incomplete { limit }
            }
            _ => Self::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::event_log::ChangedSubject;

    fn event(id: u64) -> LoggedEvent {
        LoggedEvent {
            id,
            created_at: "2026-03-01T12:00:00Z".parse().unwrap(),
            subject: ChangedSubject::Flag,
            environment: None,
        }
    }

    fn page(ids: &[u64], total: u64) -> EventPage {
        EventPage { events: ids.iter().copied().map(event).collect(), total }
    }

    /// The position after event 10, when there were 5 events since the day before yesterday.
    fn at_10() -> Position {
        let first = Position::after(None, None, &page(&[10], 70)).unwrap();
        assert_eq!((first.newest_id, first.total), (10, None), "counted since another day");
        assert_eq!(first.since().unwrap().to_string(), "2026-02-27");
        assert_eq!(Difference::between(Some(&first), &page(&[10], 5)), Difference::Nothing);
        Position::after(Some(&first), first.since(), &page(&[10], 5)).unwrap()
    }

    #[test]
    fn without_a_position_everything_may_have_changed() {
        assert_eq!(Difference::between(None, &page(&[10], 5)), Difference::Unknown);
    }

    #[test]
    fn added_events_are_told_exactly() {
        let known = at_10();
        let difference = |ids: &[u64], total| Difference::between(Some(&known), &page(ids, total));
        assert_eq!(difference(&[10], 5), Difference::Nothing);
        assert_eq!(difference(&[11], 6), Difference::Events(vec![event(11)]));
        assert_eq!(difference(&[14], 8), Difference::Incomplete { limit: 3 });
        let three = [14, 13, 12].map(event).to_vec();
        assert_eq!(difference(&[14, 13, 12], 8), Difference::Events(three));
    }

    #[test]
    fn late_deleted_and_too_many_events_count_as_any_change() {
        let known = at_10();
        for (ids, total, why) in [
            (&[10][..], 6, "an event with a lower id appeared late"),
            (&[14, 13, 9], 8, "so did one of three"),
            (&[10], 4, "one was deleted"),
            (&[9], 4, "the newest was deleted"),
            (&[], 0, "all were deleted"),
            (&[900], 5 + u64::from(MAX_NEW_EVENTS) + 1, "too many"),
        ] {
            assert_eq!(
                Difference::between(Some(&known), &page(ids, total)),
                Difference::Unknown,
                "{why}"
            );
        }
    }

    #[test]
    fn empty_log_is_followed_and_an_emptied_one_is_read_anew() {
        let empty = Position::after(None, None, &page(&[], 0)).unwrap();
        assert_eq!(Difference::between(Some(&empty), &page(&[], 0)), Difference::Nothing);
        assert_eq!(
            Difference::between(Some(&empty), &page(&[1], 1)),
            Difference::Events(vec![event(1)])
        );
        let known = at_10();
        assert_eq!(Position::after(Some(&known), known.since(), &page(&[], 0)), None);
    }

    #[test]
    fn another_day_is_counted_anew() {
        let known = at_10();
        let mut next_day = page(&[11], 6);
        next_day.events[0].created_at = "2026-03-02T00:00:00Z".parse().unwrap();
        let next = Position::after(Some(&known), known.since(), &next_day).unwrap();
        assert_eq!((next.newest_id, next.total), (11, None));
        assert_eq!(Difference::between(Some(&next), &page(&[11], 2)), Difference::Nothing);
        assert_eq!(Difference::between(Some(&next), &page(&[12], 3)), Difference::Unknown);
    }
}
