//! Regular expressions in RE2's syntax, which Unleash's constraints use.
//!
//! The `regex` crate descends from RE2 but differs in a few points: `\d`, `\w`, `\s` and `\b` match
//! Unicode, `[` and `&&` have a meaning inside a class, and `\<` is the start of a word. These are
//! rewritten to RE2's meaning; the rest is passed on. Matching takes linear time.

use regex::{Regex, RegexBuilder};

/// Memory limit of one compiled pattern, in bytes.
const SIZE_LIMIT: usize = 1 << 20;

/// Compiles a pattern; `None` if it is not valid or too large.
pub(super) fn compile(pattern: &str, ignore_case: bool) -> Option<Regex> {
    RegexBuilder::new(&translate(pattern))
        .case_insensitive(ignore_case)
        .size_limit(SIZE_LIMIT)
        .dfa_size_limit(SIZE_LIMIT)
        .build()
        .ok()
}

fn translate(pattern: &str) -> String {
    let mut out = String::with_capacity(pattern.len() + 16);
    let mut rest = pattern;
    let mut in_class = false;
    while let Some(next) = rest.chars().next() {
        let taken = match next {
            '\\' => write_escape(rest, in_class, &mut out),
            '[' if !in_class => {
                in_class = true;
                write_class_start(rest, &mut out)
            }
            // A named class such as `[:alpha:]`.
            '[' if rest.starts_with("[:") && rest.contains(":]") => {
                let len = rest.find(":]").map_or(1, |at| at + 2);
                out.push_str(&rest[..len]);
                len
            }
            '[' | '&' | '~' if in_class => {
                out.push('\\');
                out.push(next);
                1
            }
            ']' => {
                in_class = false;
                out.push(next);
                1
            }
            _ => {
                out.push(next);
                next.len_utf8()
            }
        };
        rest = &rest[taken..];
    }
    out
}

/// Copies `[`, a negation, and a `]` in the first position, where it is a member of the class. Returns
/// the number of bytes read.
fn write_class_start(rest: &str, out: &mut String) -> usize {
    let open = if rest.starts_with("[^") { "[^" } else { "[" };
    out.push_str(open);
    if rest[open.len()..].starts_with(']') {
        out.push_str("\\]");
        return open.len() + 1;
    }
    open.len()
}

fn write_escape(rest: &str, in_class: bool, out: &mut String) -> usize {
    let Some(escaped) = rest[1..].chars().next() else {
        out.push('\\');
        return 1;
    };
    let ascii = match escaped {
        'd' => "[0-9]",
        'D' => "[^0-9]",
        'w' => "[0-9A-Za-z_]",
        'W' => "[^0-9A-Za-z_]",
        's' => r"[\t\n\f\r ]",
        'S' => r"[^\t\n\f\r ]",
        'b' if !in_class => r"(?-u:\b)",
        'B' if !in_class => r"(?-u:\B)",
        '<' => "<",
        '>' => ">",
        'Q' if !in_class => {
            let quoted = &rest[2..];
            let (text, taken) = match quoted.find(r"\E") {
                Some(end) => (&quoted[..end], end + 2),
                None => (quoted, quoted.len()),
            };
            out.push_str(&regex::escape(text));
            return 2 + taken;
        }
        _ => &rest[..=escaped.len_utf8()],
    };
    out.push_str(ascii);
    1 + escaped.len_utf8()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(pattern: &str, text: &str, expect: bool) {
        let regex = compile(pattern, false).unwrap_or_else(|| panic!("{pattern} is valid"));
        assert_eq!(regex.is_match(text), expect, "{pattern} on {text}");
    }

    #[test]
    fn perl_classes_match_ascii_only() {
        check(r"^\d$", "4", true);
        check(r"^\d$", "٤", false);
        check(r"^[\w.]+$", "a_b.c", true);
        check(r"^\w$", "é", false);
        check(r"^[\D]$", "٤", true);
        check(r"\s", "\u{b}", false);
        check(r"\bcat\b", "a cat!", true);
        check(r"\bt", "ét", true);
        check(r"\Bt", "at", true);
        check(r"^\pL$", "é", true);
        check(r"^.$", "é", true);
    }

    #[test]
    fn character_classes_have_the_members_of_re2() {
        check(r"^[[a]$", "[", true);
        check(r"^[a&&b]+$", "a&b", true);
        check(r"^[]a]+$", "a]", true);
        check(r"^[^]a]$", "]", false);
        check(r"^[[:alpha:]_]+$", "ab_", true);
        check(r"^[a\]b]+$", "a]b", true);
    }

    #[test]
    fn quotes_and_brackets_are_literal() {
        check(r"^\Qa.b\E.$", "a.bc", true);
        check(r"^\Qa.b\E$", "axb", false);
        check(r"^\<a\>$", "<a>", true);
    }

    #[test]
    fn patterns_outside_re2_are_rejected() {
        for pattern in ["(a", r"(?=a)b", r"(a)\1", "a{2,1}", r"\", "((a{99}){99}){99}"] {
            assert!(compile(pattern, false).is_none(), "{pattern}");
        }
    }

    proptest! {
        #[test]
        fn no_pattern_panics(pattern in r"[\[\]\\^&~:a-c()<QEdwb*{}0-9é.]{0,16}") {
            let _ = compile(&pattern, true);
        }
    }
}
