//! Parsing of numbers, versions, networks and lists, compatible with the Node SDK.
//!
//! Numbers follow JavaScript's rules where values that occur in practice make a difference. Only
//! [`Version::into_owned`] allocates.

use std::cmp::Ordering;
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net};

/// Parses a number like JavaScript's `Number(text)`: surrounding space is ignored, the empty text is
/// zero, and `0x`, `0o`, `0b` prefix integers.
pub(super) fn number(text: &str) -> Option<f64> {
    let text = text.trim();
    if text.is_empty() {
        return Some(0.0);
    }
    if let [b'0', radix @ (b'x' | b'X' | b'o' | b'O' | b'b' | b'B'), digits @ ..] = text.as_bytes()
    {
        let radix = match radix.to_ascii_lowercase() {
            b'x' => 16,
            b'o' => 8,
            _ => 2,
        };
        return digits.iter().try_fold(None, |sum: Option<f64>, &digit| {
            let digit = char::from(digit).to_digit(radix)?;
            Some(Some(sum.unwrap_or(0.0) * f64::from(radix) + f64::from(digit)))
        })?;
    }
    match text.strip_prefix(['+', '-']).unwrap_or(text) {
        "Infinity" if text.starts_with('-') => Some(f64::NEG_INFINITY),
        "Infinity" => Some(f64::INFINITY),
        // Rust also reads `nan` and other spellings of infinity.
        digits
            if digits
                .bytes()
                .all(|b| matches!(b, b'0'..=b'9' | b'.' | b'e' | b'E' | b'+' | b'-')) =>
        {
            text.parse().ok()
        }
        _ => None,
    }
}

/// Parses an address or a network (CIDR, for IPv4 also with a netmask).
pub(super) fn network(text: &str) -> Option<IpNet> {
    let Some((address, size)) = text.split_once('/') else {
        return text.parse().ok().map(IpAddr::into);
    };
    let address = address.parse().ok()?;
    match (size.parse(), address) {
        (Ok(bits), _) => IpNet::new(address, bits).ok(),
        (Err(_), IpAddr::V4(address)) => {
            Ipv4Net::with_netmask(address, size.parse().ok()?).ok().map(IpNet::V4)
        }
        (Err(_), IpAddr::V6(_)) => None,
    }
}

/// Splits at commas. Space around commas is dropped; space at both ends of the text is kept.
pub(super) fn comma_list(text: &str) -> impl Iterator<Item = &str> {
    let commas = text.bytes().filter(|&byte| byte == b',').count();
    text.split(',').enumerate().map(move |(position, item)| {
        let item = if position > 0 { item.trim_start() } else { item };
        if position < commas { item.trim_end() } else { item }
    })
}

/// A semantic version. Build metadata is validated and dropped.
///
/// `P` is the text of the pre-release: borrowed from a context, or owned by a constraint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Version<P> {
    core: [u64; 3],
    pre_release: P,
}

impl<'a> Version<&'a str> {
    /// Parses `1.2.3`, `1.2.3-rc.1` or `1.2.3-rc.1+build` as defined by <https://semver.org>.
    pub(super) fn parse(text: &'a str) -> Option<Self> {
        let (text, build) = match text.trim().split_once('+') {
            Some((text, build)) => (text, Some(build)),
            None => (text.trim(), None),
        };
        let (core, pre) = match text.split_once('-') {
            Some((core, pre)) => (core, Some(pre)),
            None => (text, None),
        };
        let mut numerals = core.split('.').map(version_number);
        let core = [numerals.next()??, numerals.next()??, numerals.next()??];
        let well_formed = numerals.next().is_none()
            && build.is_none_or(|build| build.split('.').all(is_identifier))
            && pre.is_none_or(|pre| pre.split('.').all(is_pre_release));
        well_formed.then(|| Self { core, pre_release: pre.unwrap_or("") })
    }

    /// The same version, independent of the text that it was parsed from.
    pub(super) fn into_owned(self) -> Version<Box<str>> {
        Version { core: self.core, pre_release: self.pre_release.into() }
    }
}

impl<P: AsRef<str>> Version<P> {
    /// Orders by precedence: a pre-release comes before its release.
    pub(super) fn compare<Q: AsRef<str>>(&self, other: &Version<Q>) -> Ordering {
        self.core.cmp(&other.core).then_with(|| {
            match (self.pre_release.as_ref(), other.pre_release.as_ref()) {
                ("", "") => Ordering::Equal,
                ("", _) => Ordering::Greater,
                (_, "") => Ordering::Less,
                (ours, theirs) => compare_pre_release(ours, theirs),
            }
        })
    }
}

fn compare_pre_release(ours: &str, theirs: &str) -> Ordering {
    let mut theirs = theirs.split('.');
    for our in ours.split('.') {
        let Some(their) = theirs.next() else {
            return Ordering::Greater;
        };
        let order = match (is_numeric(our), is_numeric(their)) {
            // Without leading zeros the longer numeral is the greater one.
            (true, true) => our.len().cmp(&their.len()).then_with(|| our.cmp(their)),
            (true, false) => Ordering::Less,
            (false, true) => Ordering::Greater,
            (false, false) => our.cmp(their),
        };
        if order.is_ne() {
            return order;
        }
    }
    if theirs.next().is_some() { Ordering::Less } else { Ordering::Equal }
}

fn version_number(text: &str) -> Option<u64> {
    let plain = is_numeric(text) && (text.len() == 1 || !text.starts_with('0'));
    plain.then(|| text.parse().ok())?
}

fn is_numeric(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn is_pre_release(part: &str) -> bool {
    is_identifier(part) && (part == "0" || !is_numeric(part) || !part.starts_with('0'))
}

fn is_identifier(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_parsed_as_in_javascript() {
        for (text, expect) in [
            ("12", Some(12.0)),
            (" 12.5\n", Some(12.5)),
            ("", Some(0.0)),
            ("1e3", Some(1000.0)),
            ("+.5", Some(0.5)),
            ("5.", Some(5.0)),
            ("0x1F", Some(31.0)),
            ("0b101", Some(5.0)),
            ("-Infinity", Some(f64::NEG_INFINITY)),
            ("inf", None),
            ("NaN", None),
            ("12px", None),
            ("0x", None),
            ("-0x1", None),
            ("1_000", None),
            (".", None),
        ] {
            assert_eq!(number(text), expect, "{text:?}");
        }
    }

    #[test]
    fn only_space_around_commas_is_dropped() {
        let items: Vec<_> = comma_list(" a, b ,,c ").collect();
        assert_eq!(items, [" a", "b", "", "c "]);
    }

    #[test]
    fn versions_are_ordered_by_semver_precedence() {
        let order = [
            "1.0.0-alpha",
            "1.0.0-alpha.1",
            "1.0.0-alpha.beta",
            "1.0.0-beta",
            "1.0.0-beta.2",
            "1.0.0-beta.11",
            "1.0.0-rc.1",
            "1.0.0",
            "1.0.1",
            "1.9.0",
            "1.10.0",
            "2.0.0",
        ];
        for (i, left) in order.iter().enumerate() {
            for (j, right) in order.iter().enumerate() {
                let (left, right) = (Version::parse(left).unwrap(), Version::parse(right).unwrap());
                assert_eq!(left.compare(&right), i.cmp(&j));
            }
        }
        assert_eq!(Version::parse("1.0.0+a.1"), Version::parse("1.0.0"));
    }

    #[test]
    fn malformed_versions_are_rejected() {
        for text in [
            "",
            "1",
            "1.2",
            "1.2.3.4",
            "v1.2.3",
            "01.2.3",
            "1.2.3-",
            "1.2.3-01",
            "1.2.3+",
            "1.2.x",
            "1.2.3-a..b",
            "1.-2.3",
            "99999999999999999999.0.0",
        ] {
            assert_eq!(Version::parse(text), None, "{text}");
        }
    }
}
