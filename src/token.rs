//! API tokens and their grants, parsed here and nowhere else.
//!
//! Only [`Token`] holds a plaintext token: it is wiped on drop, and neither `Debug` nor any other trait
//! prints it. Code that needs the plaintext calls [`Token::expose`] explicitly. Everything that outlives
//! a request is keyed by [`TokenDigest`].
//!
//! This module does not validate tokens (`auth` does) and does not know the names of headers.

use std::{
    collections::BTreeSet,
    fmt,
    hash::{Hash, Hasher},
    sync::Arc,
};

use hkdf::Hkdf;
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

/// The longest accepted token, in bytes; Unleash's own are below 200.
pub const MAX_LEN: usize = 512;

/// A plaintext API token.
///
/// Every form that Unleash has issued is accepted: `project:environment.secret` with a v1 or v2
/// secret, `*` or `[]` for the projects, the bare 64 hexadecimal digits of Unleash 4.0, and
/// personal access tokens (`user:…`), which upstream may accept but which grant nothing here.
#[derive(Clone, Eq, PartialEq)]
pub struct Token {
    text: Zeroizing<String>,
    form: Form,
}

/// The form of a token, with the positions of its parts.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Form {
    /// `projects:environment.secret`: the positions of the colon and of the dot.
    Scoped { colon: usize, dot: usize },
    /// 64 hexadecimal digits without environment or project.
    Legacy,
    /// `user:` and a secret.
    Personal,
}

/// Why a text is not a token. The message never repeats the text.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ParseError {
    /// Nothing but white space.
    #[error("the token is empty")]
    Empty,
    /// More than [`MAX_LEN`] bytes.
    #[error("the token is longer than {MAX_LEN} bytes")]
    TooLong,
    /// White space, control characters or non-ASCII inside.
    #[error("the token has a character outside visible ASCII")]
    Character,
    /// None of the known forms.
    #[error("the token is not of the form project:environment.secret")]
    Form,
}

impl Token {
    /// Parses a token from the text of a header or a setting; surrounding white space is ignored.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let text = text.trim();
        if text.is_empty() {
            return Err(ParseError::Empty);
        }
        if text.len() > MAX_LEN {
            return Err(ParseError::TooLong);
        }
        if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(ParseError::Character);
        }
        let form = Form::detect(text).ok_or(ParseError::Form)?;
        Ok(Self { text: Zeroizing::new(text.to_owned()), form })
    }

    /// Parses a token from the value of an authorization header, with or without `Bearer`.
    pub fn from_header(value: &str) -> Result<Self, ParseError> {
        Self::parse(Self::strip_bearer(value))
    }

    /// The token in the value of an authorization header, without `Bearer` and unvalidated. Pass it to
    /// [`TokenDigest::of`] to look up a cached token without parsing it.
    pub fn strip_bearer(value: &str) -> &str {
        let value = value.trim();
        match value.split_at_checked("bearer ".len()) {
            Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer ") => token.trim_start(),
            _ => value,
        }
    }

    /// The plaintext, to send upstream or to show to its owner.
    pub fn expose(&self) -> &str {
        &self.text
    }

    /// The digest, which caches and stores use as the key of this token.
    pub fn digest(&self) -> TokenDigest {
        TokenDigest::of(&self.text)
    }

    /// Derives a secret key from the token, a different one for each `purpose` (HKDF-SHA256, RFC 5869).
    pub fn derive_key(&self, purpose: &[u8]) -> Zeroizing<[u8; 32]> {
        let mut key = Zeroizing::new([0; 32]);
        Hkdf::<Sha256>::new(None, self.text.as_bytes())
            .expand(purpose, key.as_mut())
            .expect("32 bytes are a length that HKDF-SHA256 gives");
        key
    }

    /// The environment in the text; `None` for `*` and for forms without an environment.
    pub fn environment(&self) -> Option<Environment> {
        match self.form {
            Form::Scoped { colon, dot } => match &self.text[colon + 1..dot] {
                "*" => None,
                name => Some(Environment::new(name)),
            },
            Form::Legacy | Form::Personal => None,
        }
    }

    /// The projects in the text; `None` if only the issuer knows them (`[]`).
    pub fn projects(&self) -> Option<Projects> {
        match self.form {
            Form::Scoped { colon, .. } => match &self.text[..colon] {
                "[]" => None,
                "*" => Some(Projects::All),
                name => Some(Projects::Only(BTreeSet::from([Project::new(name)]))),
            },
            Form::Legacy | Form::Personal => None,
        }
    }

    /// The public part of a v2 token's secret, by which admin listings identify the token.
    pub fn selector(&self) -> Option<&str> {
        selector_of(self.secret())
    }

    /// The token as it may be displayed: the part before the dot and four characters of the secret.
    pub fn masked(&self) -> Arc<str> {
        let (shown, secret) = match self.form {
            Form::Scoped { dot, .. } => (&self.text[..=dot], self.secret()),
            Form::Legacy | Form::Personal => ("", self.secret()),
        };
        let secret = selector_of(secret).unwrap_or(secret);
        // Four characters would reveal too much of a short secret.
        let hint = if secret.len() >= 16 { &secret[..4] } else { "" };
        format!("{shown}{hint}****").into()
    }

    /// The secret part of the text.
    fn secret(&self) -> &str {
        match self.form {
            Form::Scoped { dot, .. } => &self.text[dot + 1..],
            Form::Legacy => &self.text,
            Form::Personal => &self.text["user:".len()..],
        }
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({})", self.masked())
    }
}

impl Form {
    fn detect(text: &str) -> Option<Self> {
        if text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Some(Self::Legacy);
        }
        let colon = text.find(':')?;
        if let Some(dot) = text[colon..].find('.').map(|at| colon + at) {
            let parts_are_there = colon > 0 && dot > colon + 1 && dot + 1 < text.len();
            return parts_are_there.then_some(Self::Scoped { colon, dot });
        }
        (text.starts_with("user:") && text.len() > "user:".len()).then_some(Self::Personal)
    }
}

/// The selector of `v2_<22 base64url>_<43 base64url>` (protocol: Unleash 8.1, `secureTokenStorage`).
fn selector_of(secret: &str) -> Option<&str> {
    const SELECTOR: usize = 22;
    const VERIFIER: usize = 43;
    let rest = secret.strip_prefix("v2_")?;
    let shape = rest.len() == SELECTOR + 1 + VERIFIER
        && rest.as_bytes()[SELECTOR] == b'_'
        && rest.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'));
    shape.then(|| &rest[..SELECTOR])
}

/// SHA-256 of a whole token, stored and compared in place of the token.
///
/// Unleash's tokens have at least 224 random bits, so the digest reveals nothing about them.
#[derive(Clone, Copy, Eq, Ord, PartialEq, PartialOrd)]
pub struct TokenDigest([u8; 32]);

/// Hashes only the first eight bytes: the digest is uniformly distributed already.
impl Hash for TokenDigest {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let (first, _) = self.0.split_first_chunk().expect("a digest has 32 bytes");
        state.write_u64(u64::from_le_bytes(*first));
    }
}

impl TokenDigest {
    /// The digest of a token's text.
    pub fn of(text: &str) -> Self {
        Self(Sha256::digest(text.as_bytes()).into())
    }

    /// The digest with these bytes, as returned by [`TokenDigest::as_bytes`].
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Parses the 64 hexadecimal digits that [`TokenDigest::to_hex`] returns.
    pub fn from_hex(text: &str) -> Option<Self> {
        if text.len() != 64 || !text.is_ascii() {
            return None;
        }
        let mut bytes = [0; 32];
        for (byte, at) in bytes.iter_mut().zip((0..64).step_by(2)) {
            *byte = u8::from_str_radix(&text[at..at + 2], 16).ok()?;
        }
        Some(Self(bytes))
    }

    /// The digest as 64 lower-case hexadecimal digits, for a store.
    pub fn to_hex(&self) -> String {
        use fmt::Write as _;
        self.0.iter().fold(String::with_capacity(64), |mut text, byte| {
            write!(text, "{byte:02x}").expect("writing to a string cannot fail");
            text
        })
    }
}

impl fmt::Debug for TokenDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TokenDigest({}…)", &self.to_hex()[..8])
    }
}

/// The API that a token is for.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum TokenKind {
    /// The admin API.
    Admin,
    /// Server SDKs: flag configuration and usage. Unleash calls it `client` or `backend`.
    Client,
    /// Frontend SDKs: evaluated flags and usage.
    Frontend,
}

impl TokenKind {
    /// Parses Unleash's name of a kind, in any case; `backend` is the same as `client`.
    pub fn parse(text: &str) -> Option<Self> {
        match text.to_ascii_lowercase().as_str() {
            "admin" => Some(Self::Admin),
            "client" | "backend" => Some(Self::Client),
            "frontend" => Some(Self::Frontend),
            _ => None,
        }
    }

    /// The name of the kind in `/edge/validate` and the admin API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Admin => "admin",
            Self::Client => "backend",
            Self::Frontend => "frontend",
        }
    }
}

/// The name of an Unleash environment.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Environment(Arc<str>);

impl Environment {
    /// The environment of tokens, requests and files that name none.
    pub const DEFAULT: &str = "development";

    /// The environment of that name.
    pub fn new(name: &str) -> Self {
        Self(name.into())
    }

    /// Its name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The id of an Unleash project.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Project(Arc<str>);

impl Project {
    /// The project of that id.
    pub fn new(id: &str) -> Self {
        Self(id.into())
    }

    /// Its id.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::borrow::Borrow<str> for Project {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// The projects whose flags a token can read.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum Projects {
    /// All projects, including future ones.
    All,
    /// These projects; none if the set is empty.
    Only(BTreeSet<Project>),
}

impl Projects {
    /// Parses the project list of Unleash's token objects, where `*` stands for all.
    pub fn from_list<'a>(ids: impl IntoIterator<Item = &'a str>) -> Self {
        let ids: BTreeSet<_> = ids.into_iter().map(Project::new).collect();
        if ids.contains("*") { Self::All } else { Self::Only(ids) }
    }

    /// The project list in the format of Unleash's token objects.
    pub fn to_list(&self) -> Vec<&str> {
        match self {
            Self::All => vec!["*"],
            Self::Only(ids) => ids.iter().map(Project::as_str).collect(),
        }
    }

    /// Whether `project` is included.
    pub fn contains(&self, project: &str) -> bool {
        match self {
            Self::All => true,
            Self::Only(ids) => ids.contains(project),
        }
    }

    /// The projects in either set.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        match (self, other) {
            (Self::All, _) | (_, Self::All) => Self::All,
            (Self::Only(ours), Self::Only(theirs)) => Self::Only(ours | theirs),
        }
    }

    /// Whether this set includes all of `other`.
    pub fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::All, _) => true,
            (Self::Only(_), Self::All) => false,
            (Self::Only(ours), Self::Only(theirs)) => theirs.is_subset(ours),
        }
    }
}

/// The part of the flag configuration that a token can read.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Scope {
    /// The environment whose strategies apply.
    pub environment: Environment,
    /// The projects whose flags are visible.
    pub projects: Projects,
}

/// The permissions of a valid token.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Grant {
    /// The API that it is for.
    pub kind: TokenKind,
    /// The flags that it can read.
    pub scope: Scope,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const V1: &str = "*:development.964a287e1b728cb5f4f3e0120df92cb5f4f3e0120df92cb5964a287e";
    const V2: &str = "[]:production.v2_AbCdEfGhIjKlMnOpQrStUv_\
                      0123456789_123456789-123456789_123456789ABC";

    #[track_caller]
    fn check(text: &str, environment: Option<&str>, projects: Option<&[&str]>) {
        let token = Token::parse(text).expect(text);
        assert_eq!(token.environment().as_ref().map(Environment::as_str), environment);
        let listed = token.projects();
        assert_eq!(listed.as_ref().map(Projects::to_list).as_deref(), projects);
    }

    #[test]
    fn every_token_form_of_unleash_is_parsed() {
        check(V1, Some("development"), Some(&["*"]));
        check(V2, Some("production"), None);
        check("web:dev.x", Some("dev"), Some(&["web"]));
        check("*:*.secret", None, Some(&["*"]));
        check("web:dev.a.b:c", Some("dev"), Some(&["web"]));
        check(&"a0".repeat(32), None, None);
        check("user:0123456789abcdef", None, None);
    }

    #[test]
    fn malformed_token_is_rejected_with_the_reason() {
        let check = |text: &str, error| assert_eq!(Token::parse(text), Err(error), "{text}");
        check(" \t", ParseError::Empty);
        check(&format!("*:d.{}", "x".repeat(MAX_LEN)), ParseError::TooLong);
        check("*:dev. secret", ParseError::Character);
        check("*:dév.secret", ParseError::Character);
        for text in ["secret", "*:development", ":dev.x", "*:.x", "*:dev.", "dev.x", "user:"] {
            check(text, ParseError::Form);
        }
    }

    #[test]
    fn bearer_scheme_is_stripped_in_any_case() {
        for value in [V1.to_owned(), format!("Bearer {V1}"), format!(" bearer   {V1} ")] {
            assert_eq!(
                Token::from_header(&value).map(|token| token.digest()),
                Ok(TokenDigest::of(V1))
            );
        }
    }

    #[test]
    fn masked_token_shows_the_part_before_the_dot_and_four_characters() {
        let check = |text: &str, shown| assert_eq!(&*Token::parse(text).unwrap().masked(), shown);
        check(V1, "*:development.964a****");
        check(V2, "[]:production.AbCd****");
        check("*:dev.short", "*:dev.****");
        check(&"a0".repeat(32), "a0a0****");
        check("user:0123456789abcdef", "0123****");
    }

    #[test]
    fn only_v2_tokens_have_a_selector() {
        assert_eq!(Token::parse(V2).unwrap().selector(), Some("AbCdEfGhIjKlMnOpQrStUv"));
        assert_eq!(Token::parse(V1).unwrap().selector(), None);
        assert_eq!(Token::parse("*:dev.v2_tooshort_x").unwrap().selector(), None);
    }

    #[test]
    fn project_set_covers_its_subsets_only() {
        let only = |ids: &[&str]| Projects::from_list(ids.iter().copied());
        assert!(Projects::All.covers(&only(&["a"])));
        assert!(!only(&["a"]).covers(&Projects::All));
        assert!(only(&["a", "b"]).covers(&only(&["b"])));
        assert!(!only(&["a"]).covers(&only(&["a", "b"])));
        assert_eq!(only(&["a", "*"]), Projects::All);
        assert_eq!(only(&["a", "b"]).union(&only(&["b", "c"])), only(&["a", "b", "c"]));
        assert_eq!(only(&["a"]).union(&Projects::All), Projects::All);
    }

    proptest! {
        #[test]
        fn parsing_never_panics_and_debug_never_shows_a_secret(text in ".{0,80}") {
            if let Ok(token) = Token::parse(&text) {
                let secret = token.secret().to_owned();
                if secret.len() > 4 {
                    let shown = format!("{token:?} {:?}", token.digest());
                    prop_assert!(!shown.contains(&secret), "{}", shown);
                }
            }
        }

        #[test]
        fn digest_is_unchanged_after_a_round_trip_through_hex(text in ".{0,80}") {
            let digest = TokenDigest::of(&text);
            prop_assert_eq!(TokenDigest::from_hex(&digest.to_hex()), Some(digest));
        }
    }
}
