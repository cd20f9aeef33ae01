//! Text as programs and editors write it, some with a byte order mark in front.
//!
//! The mark says that UTF-8 follows, which JSON, TOML and PEM are in any case; their parsers refuse it.

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// The text without the byte order mark that it may begin with.
pub fn without_byte_order_mark(text: &[u8]) -> &[u8] {
    text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text)
}

/// The same, in place.
pub fn remove_byte_order_mark(text: &mut String) {
    let length = text.len() - without_byte_order_mark(text.as_bytes()).len();
    text.drain(..length);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_order_mark_is_removed_from_the_front() {
        let check = |text: &str, expect: &str| {
            assert_eq!(without_byte_order_mark(text.as_bytes()), expect.as_bytes());
            let mut text = text.to_owned();
            remove_byte_order_mark(&mut text);
            assert_eq!(text, expect);
        };
        check("{}", "{}");
        check("", "");
        check("\u{feff}{}", "{}");
        check("\u{feff}", "");
        check("\u{feff}\u{feff}{}", "\u{feff}{}");
        check("{}\u{feff}", "{}\u{feff}");
        assert_eq!(without_byte_order_mark(b"\xef\xbb"), b"\xef\xbb");
    }
}
