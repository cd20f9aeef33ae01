//! Parsing of numbers, versions, networks and lists, compatible with the Node SDK.
//!
//! Numbers follow JavaScript's rules where values that occur in practice make a difference. Nothing here
//! allocates, except for versions with a long pre-release or build.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net};
use semver::Version;

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
pub(super) fn split_at_commas(text: &str) -> impl Iterator<Item = &str> {
    let commas = text.bytes().filter(|&byte| byte == b',').count();
    text.split(',').enumerate().map(move |(position, item)| {
        let item = if position > 0 { item.trim_start() } else { item };
        if position < commas { item.trim_end() } else { item }
    })
}

/// Parses a semantic version as defined by <https://semver.org>. Space around it is ignored.
pub(super) fn version(text: &str) -> Option<Version> {
    Version::parse(text.trim()).ok()
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
        let items: Vec<_> = split_at_commas(" a, b ,,c ").collect();
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
                let [left, right] = [left, right].map(|text| version(text).unwrap());
                assert_eq!(left.cmp_precedence(&right), i.cmp(&j));
            }
        }
        let build = version(" 1.0.0+a.01 ").unwrap();
        assert!(build.cmp_precedence(&Version::new(1, 0, 0)).is_eq());
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
            assert_eq!(version(text), None, "{text}");
        }
    }
}
