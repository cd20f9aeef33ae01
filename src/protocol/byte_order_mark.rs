//! Removes the byte order mark that some programs and editors put in front of a text.
//!
//! The mark announces UTF-8. JSON, TOML and PEM are UTF-8 anyway, and their parsers reject it.

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// The text without a leading byte order mark.
pub fn without_byte_order_mark(text: &[u8]) -> &[u8] {
    text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text)
}

/// Removes a leading byte order mark in place.
pub fn remove_byte_order_mark(text: &mut String) {
    let length = text.len() - without_byte_order_mark(text.as_bytes()).len();
    text.drain(..length);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_leading_byte_order_mark_is_removed() {
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
