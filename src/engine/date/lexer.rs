//! Splits the text of a date into tokens: numbers, words, signs and punctuation.
//!
//! The tokens are those that V8 distinguishes; their order is checked by the parser.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    Number {
        /// The value of the first nine significant digits.
        value: i64,
        /// How many digits there are, leading zeros included.
        digits: usize,
    },
    Keyword(Keyword),
    /// `+` is 1 and `-` is -1.
    Sign(i64),
    Colon,
    Dot,
    ClosingParenthesis,
    Space,
    /// Punctuation, or a comment in parentheses.
    Other,
    End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keyword {
    /// 1 to 12; only the first three letters count.
    Month(i64),
    /// The hours to add to a time on a 12-hour clock.
    AmPm(i64),
    /// Hours from UTC.
    Zone(i64),
    Z,
    /// The `T` between date and time.
    T,
    Unknown,
}

impl Keyword {
    fn lookup(prefix: [u8; 3], length: usize) -> Self {
        let zone = |hours| if length <= 3 { Self::Zone(hours) } else { Self::Unknown };
        match &prefix {
            b"jan" => Self::Month(1),
            b"feb" => Self::Month(2),
            b"mar" => Self::Month(3),
            b"apr" => Self::Month(4),
            b"may" => Self::Month(5),
            b"jun" => Self::Month(6),
            b"jul" => Self::Month(7),
            b"aug" => Self::Month(8),
            b"sep" => Self::Month(9),
            b"oct" => Self::Month(10),
            b"nov" => Self::Month(11),
            b"dec" => Self::Month(12),
            b"am\0" => Self::AmPm(0),
            b"pm\0" => Self::AmPm(12),
            b"t\0\0" => Self::T,
            b"z\0\0" => Self::Z,
            b"ut\0" | b"utc" | b"gmt" => zone(0),
            b"edt" => zone(-4),
            b"est" | b"cdt" => zone(-5),
            b"cst" | b"mdt" => zone(-6),
            b"mst" | b"pdt" => zone(-7),
            b"pst" => zone(-8),
            _ => Self::Unknown,
        }
    }
}

/// Splits a text into tokens.
#[derive(Clone, Debug)]
pub(super) struct Lexer<'t> {
    rest: &'t [u8],
}

impl<'t> Lexer<'t> {
    pub(super) fn new(text: &'t str) -> Self {
        Self { rest: text.as_bytes() }
    }

    pub(super) fn next_token(&mut self) -> Token {
        let Some(&first) = self.rest.first() else { return Token::End };
        let single = match first {
            b'0'..=b'9' => return self.number(),
            b'A'..=0x7f => return self.keyword(),
            0x80.. if self.non_ascii_space_len().is_none() => return self.keyword(),
            b'(' => {
                self.skip_parentheses();
                return Token::Other;
            }
            // JavaScript stops at NUL.
            0 => {
                self.rest = &[];
                return Token::End;
            }
            0x80.. => {
                self.rest = &self.rest[self.non_ascii_space_len().unwrap_or(1)..];
                return Token::Space;
            }
            b'+' => Token::Sign(1),
            b'-' => Token::Sign(-1),
            b':' => Token::Colon,
            b'.' => Token::Dot,
            b')' => Token::ClosingParenthesis,
            b'\t'..=b'\r' | b' ' => Token::Space,
            _ => Token::Other,
        };
        self.rest = &self.rest[1..];
        single
    }

    fn number(&mut self) -> Token {
        let (mut value, mut significant, mut digits) = (0, 0, 0);
        while let Some(digit @ b'0'..=b'9') = self.rest.get(digits) {
            if significant > 0 || *digit != b'0' {
                significant += 1;
            }
            if significant <= 9 {
                value = value * 10 + i64::from(digit - b'0');
            }
            digits += 1;
        }
        self.rest = &self.rest[digits..];
        Token::Number { value, digits }
    }

    fn keyword(&mut self) -> Token {
        let (mut prefix, mut length) = ([0; 3], 0);
        while let Some(&byte) = self.rest.first()
            && byte >= b'A'
            && (byte < 0x80 || self.non_ascii_space_len().is_none())
        {
            if let Some(place) = prefix.get_mut(length) {
                *place = byte.to_ascii_lowercase();
            }
            length += 1;
            self.rest = &self.rest[1..];
        }
        Token::Keyword(Keyword::lookup(prefix, length))
    }

    /// The length in bytes of the next character, if it is white space beyond ASCII.
    fn non_ascii_space_len(&self) -> Option<usize> {
        match self.rest {
            [0xc2, 0xa0, ..] => Some(2),
            [0xe1, 0x9a, 0x80, ..]
            | [0xe2, 0x80, 0x80..=0x8a | 0xa8 | 0xa9 | 0xaf, ..]
            | [0xe2, 0x81, 0x9f, ..]
            | [0xe3, 0x80, 0x80, ..]
            | [0xef, 0xbb, 0xbf, ..] => Some(3),
            _ => None,
        }
    }

    fn skip_parentheses(&mut self) {
        let mut depth = 0_usize;
        while let Some((&byte, rest)) = self.rest.split_first() {
            if byte == 0 {
                return;
            }
            self.rest = rest;
            match byte {
                b'(' => depth += 1,
                b')' => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                return;
            }
        }
    }
}
