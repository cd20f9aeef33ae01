//! Tokens and environments in `/edge/validate` and in the admin API of upstream.
//!
//! Secrets are parsed from the JSON directly into [`Token`]. An unreadable item of a list is skipped, so
//! that the others are still usable; a token of an unknown kind is such an item. A [`TokenList`] tells
//! which tokens the skipped items may be. This module neither validates nor stores tokens.

use std::{borrow::Cow, collections::HashSet, fmt};

use jiff::Timestamp;
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, SeqAccess, Visitor},
};
use serde_json::value::RawValue;

use super::{lenient::readable_items, rfc3339};
use crate::token::{
    Environment, Grant, ParseError, Projects, Scope, Token, TokenDigest, TokenKind,
};

/// The maximum number of tokens in a validate request.
pub const MAX_VALIDATED_TOKENS: usize = 1_000;

/// The body of `POST /edge/validate`: up to [`MAX_VALIDATED_TOKENS`] tokens to validate.
#[derive(Debug, Deserialize, Serialize)]
pub struct ValidateRequest<'a> {
    /// The tokens. Parsing skips strings that are not tokens.
    #[serde(serialize_with = "serialize_tokens", deserialize_with = "deserialize_tokens")]
    pub tokens: Cow<'a, [Token]>,
}

/// The response of `POST /edge/validate`: those tokens of the request that are valid.
#[derive(Debug, Deserialize, Serialize)]
pub struct ValidateResponse {
    /// The valid tokens with their grants.
    #[serde(deserialize_with = "readable_items")]
    pub tokens: Vec<ValidatedToken>,
}

/// A token that upstream found valid.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
#[serde(try_from = "RawValidated<'_>")]
pub struct ValidatedToken {
    /// The token as it was sent.
    pub token: Token,
    /// The grant; its kind may be [`TokenKind::Admin`].
    pub grant: Grant,
}

/// The response of `GET /api/admin/api-tokens`, for all tokens or for those of one name.
#[derive(Debug, Default, Deserialize)]
#[serde(from = "RawTokenList<'_>")]
pub struct TokenList {
    /// The readable items.
    pub tokens: Vec<ListedToken>,
    /// The secrets of the unreadable items; `None` for an item without a usable secret.
    pub unreadable: Vec<Option<ListedSecret>>,
}

/// The tokens that the unreadable items of a list may be.
#[derive(Clone, Debug, Default)]
pub struct UnreadableTokens {
    /// The digests of whole tokens.
    pub digests: HashSet<TokenDigest>,
    /// The selectors of v2 tokens.
    pub selectors: HashSet<String>,
    /// Whether an item has no usable secret, and so may be any token.
    pub has_unidentified: bool,
}

/// A token as the admin API lists it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
#[serde(try_from = "RawListed<'_>")]
pub struct ListedToken {
    /// The name of the token.
    pub name: String,
    /// The kind of the token.
    pub kind: TokenKind,
    /// The environment of the token; `*` for an admin token.
    pub environment: Environment,
    /// The projects that it can access.
    pub projects: Projects,
    /// The time when it expires, if ever.
    pub expires_at: Option<Timestamp>,
    /// The time when it was created.
    pub created_at: Option<Timestamp>,
    /// The time when upstream last saw it used.
    pub seen_at: Option<Timestamp>,
    /// The secret, as far as it is listed.
    pub secret: ListedSecret,
}

/// The secret of a token as the admin API lists it; it also identifies the token there.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum ListedSecret {
    /// The whole token (v1).
    Full(Token),
    /// The selector, which is the public part, of a v2 token. Upstream does not know its secret.
    Selector(String),
}

/// The body of `POST /api/admin/api-tokens`, for a token of one environment and all its projects.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CreateTokenRequest<'a> {
    token_name: &'a str,
    r#type: &'static str,
    environment: &'a str,
    projects: [&'static str; 1],
}

/// The response of `POST /api/admin/api-tokens`: the only one that contains the secret of a v2 token.
#[derive(Debug, Deserialize)]
pub struct CreatedToken {
    /// The new token.
    #[serde(deserialize_with = "deserialize_token")]
    pub secret: Token,
}

/// The response of `GET /api/admin/environments`.
#[derive(Debug, Deserialize)]
pub struct EnvironmentList {
    /// The environments, disabled ones included.
    #[serde(deserialize_with = "readable_items")]
    pub environments: Vec<ListedEnvironment>,
}

/// An environment as the admin API lists it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
pub struct ListedEnvironment {
    /// Its name.
    #[serde(deserialize_with = "deserialize_environment")]
    pub name: Environment,
    /// Whether projects may use it.
    pub enabled: bool,
}

impl<'a> CreateTokenRequest<'a> {
    /// A request for a backend token of `environment`, named `name`.
    pub fn backend(token_name: &'a str, environment: &'a Environment) -> Self {
        Self {
            token_name,
            r#type: TokenKind::Client.as_str(),
            environment: environment.as_str(),
            projects: ["*"],
        }
    }
}

impl Serialize for ValidatedToken {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Shape<'a> {
            token: &'a str,
            r#type: &'static str,
            environment: &'a str,
            projects: Vec<&'a str>,
            status: &'static str,
        }
        let Scope { environment, projects } = &self.grant.scope;
        Shape {
            token: self.token.expose(),
            r#type: self.grant.kind.as_str(),
            environment: environment.as_str(),
            projects: projects.to_list(),
            status: "Validated",
        }
        .serialize(serializer)
    }
}

impl ListedToken {
    /// The grant of the token.
    pub fn grant(&self) -> Grant {
        let (environment, projects) = (self.environment.clone(), self.projects.clone());
        Grant { kind: self.kind, scope: Scope { environment, projects } }
    }

    /// Whether the token is expired at `now`.
    pub fn is_expired(&self, now: Timestamp) -> bool {
        self.expires_at.is_some_and(|end| end <= now)
    }
}

impl TokenList {
    /// The tokens that the unreadable items may be. Hashes each of them once.
    pub fn unreadable_tokens(&self) -> UnreadableTokens {
        let mut names = UnreadableTokens::default();
        for item in &self.unreadable {
            let Some(secret) = item else {
                names.has_unidentified = true;
                continue;
            };
            names.selectors.extend(secret.selector().map(str::to_owned));
            if let ListedSecret::Full(token) = secret {
                names.digests.insert(token.digest());
            }
        }
        names
    }
}

impl UnreadableTokens {
    /// Whether an unreadable item may be the token of this digest and selector.
    pub fn may_include(&self, digest: &TokenDigest, selector: Option<&str>) -> bool {
        self.has_unidentified
            || self.digests.contains(digest)
            || selector.is_some_and(|it| self.selectors.contains(it))
    }

    /// Whether an unreadable item may be the token of this selector.
    pub fn may_include_selector(&self, selector: &str) -> bool {
        self.has_unidentified || self.selectors.contains(selector)
    }
}

impl ListedSecret {
    /// Whether this is the listed form of `token`.
    pub fn matches(&self, token: &Token) -> bool {
        match self {
            Self::Full(full) => full == token,
            Self::Selector(selector) => token.selector() == Some(selector),
        }
    }

    /// The selector, if the token has one.
    pub fn selector(&self) -> Option<&str> {
        match self {
            Self::Full(token) => token.selector(),
            Self::Selector(selector) => Some(selector),
        }
    }

    /// The string by which the admin API finds the token. It is secret if the token has no selector.
    pub fn expose(&self) -> &str {
        match self {
            Self::Full(token) => token.expose(),
            Self::Selector(selector) => selector,
        }
    }

    /// Parses the secret of a listed token; `None` if it is neither a token nor a selector.
    pub fn parse(text: &str) -> Option<Self> {
        if let Ok(token) = Token::parse(text) {
            return Some(Self::Full(token));
        }
        // Anything but the 22 base64url characters of a selector may be a secret.
        let is_selector = text.len() == 22
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'));
        is_selector.then(|| Self::Selector(text.to_owned()))
    }
}

/// The error of an unreadable item. Repeats nothing of the item, because it contains secrets.
#[derive(Debug, thiserror::Error)]
enum ItemError {
    #[error("the token cannot be read")]
    Secret,
    #[error("the token's type is unknown")]
    Kind,
    #[error("the token's status is not Validated")]
    Status,
    #[error("the token has no environment")]
    Environment,
    #[error("the token has no projects")]
    Projects,
    #[error("the token's expiry is not a timestamp")]
    Expiry,
}

/// An item of a validate response, or of Unleash Edge's token file.
#[derive(Deserialize)]
struct RawValidated<'a> {
    #[serde(deserialize_with = "deserialize_token")]
    token: Token,
    #[serde(borrow)]
    r#type: CowStr<'a>,
    #[serde(borrow, default)]
    environment: Option<CowStr<'a>>,
    #[serde(borrow, default)]
    projects: Option<Vec<CowStr<'a>>>,
    #[serde(borrow, default)]
    project: Option<CowStr<'a>>,
    #[serde(borrow, default)]
    status: Option<CowStr<'a>>,
}

impl TryFrom<RawValidated<'_>> for ValidatedToken {
    type Error = ItemError;

    fn try_from(raw: RawValidated<'_>) -> Result<Self, ItemError> {
        if raw.status.is_some_and(|status| !status.0.eq_ignore_ascii_case("validated")) {
            return Err(ItemError::Status);
        }
        let kind = TokenKind::parse(&raw.r#type.0).ok_or(ItemError::Kind)?;
        let environment = resolve_environment(kind, raw.environment, Some(&raw.token))?;
        let projects = resolve_projects(raw.projects, raw.project, Some(&raw.token))?;
        let scope = Scope { environment, projects };
        Ok(Self { token: raw.token, grant: Grant { kind, scope } })
    }
}

/// A token list whose items are not parsed yet.
#[derive(Deserialize)]
struct RawTokenList<'a> {
    #[serde(borrow)]
    tokens: Vec<&'a RawValue>,
}

impl From<RawTokenList<'_>> for TokenList {
    fn from(raw: RawTokenList<'_>) -> Self {
        #[derive(Deserialize)]
        struct Named {
            #[serde(deserialize_with = "deserialize_listed_secret")]
            secret: Option<ListedSecret>,
        }
        let mut list = Self::default();
        for item in raw.tokens {
            if let Ok(listed) = serde_json::from_str(item.get()) {
                list.tokens.push(listed);
            } else {
                let named = serde_json::from_str(item.get()).ok();
                list.unreadable.push(named.and_then(|Named { secret }| secret));
            }
        }
        list
    }
}

/// An item of a token list. In Unleash 4 the name is called `username`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawListed<'a> {
    #[serde(deserialize_with = "deserialize_listed_secret")]
    secret: Option<ListedSecret>,
    #[serde(borrow, default)]
    token_name: Option<CowStr<'a>>,
    #[serde(borrow, default)]
    username: Option<CowStr<'a>>,
    #[serde(borrow)]
    r#type: CowStr<'a>,
    #[serde(borrow, default)]
    environment: Option<CowStr<'a>>,
    #[serde(borrow, default)]
    projects: Option<Vec<CowStr<'a>>>,
    #[serde(borrow, default)]
    project: Option<CowStr<'a>>,
    #[serde(borrow, default)]
    expires_at: Option<CowStr<'a>>,
    #[serde(borrow, default)]
    created_at: Option<CowStr<'a>>,
    #[serde(borrow, default)]
    seen_at: Option<CowStr<'a>>,
}

impl TryFrom<RawListed<'_>> for ListedToken {
    type Error = ItemError;

    fn try_from(raw: RawListed<'_>) -> Result<Self, ItemError> {
        let secret = raw.secret.ok_or(ItemError::Secret)?;
        let text = match &secret {
            ListedSecret::Full(token) => Some(token),
            ListedSecret::Selector(_) => None,
        };
        let kind = TokenKind::parse(&raw.r#type.0).ok_or(ItemError::Kind)?;
        let environment = resolve_environment(kind, raw.environment, text)?;
        let projects = resolve_projects(raw.projects, raw.project, text)?;
        // A token with an unreadable expiry must not be treated as one that never expires.
        let end = |text: CowStr<'_>| rfc3339::parse(&text.0).ok_or(ItemError::Expiry);
        let expires_at = raw.expires_at.map(end).transpose()?;
        let time = |text: Option<CowStr<'_>>| text.and_then(|it| rfc3339::parse(&it.0));
        Ok(Self {
            name: raw.token_name.or(raw.username).map_or_else(String::new, |it| it.0.into_owned()),
            kind,
            environment,
            projects,
            expires_at,
            created_at: time(raw.created_at),
            seen_at: time(raw.seen_at),
            secret,
        })
    }
}

/// The environment of a token object. Servers before 7.4.2 have it only in the token itself.
fn resolve_environment(
    kind: TokenKind,
    field: Option<CowStr<'_>>,
    token: Option<&Token>,
) -> Result<Environment, ItemError> {
    field
        .map(|name| Environment::new(&name.0))
        .or_else(|| token.and_then(Token::environment))
        .or_else(|| (kind == TokenKind::Admin).then(|| Environment::new("*")))
        .ok_or(ItemError::Environment)
}

/// The projects of a token object: from the list, else from the older single field, else from the token.
fn resolve_projects(
    list: Option<Vec<CowStr<'_>>>,
    single: Option<CowStr<'_>>,
    token: Option<&Token>,
) -> Result<Projects, ItemError> {
    list.or_else(|| single.map(|id| vec![id]))
        .map(|ids| Projects::from_list(ids.iter().map(|id| &*id.0)))
        .or_else(|| token.and_then(Token::projects))
        .ok_or(ItemError::Projects)
}

/// A string, borrowed from the JSON unless it has escapes.
#[derive(Deserialize)]
#[serde(transparent)]
struct CowStr<'a>(#[serde(borrow)] Cow<'a, str>);

fn deserialize_tokens<'de, D>(deserializer: D) -> Result<Cow<'static, [Token]>, D::Error>
where
    D: Deserializer<'de>,
{
    #[derive(Deserialize)]
    #[serde(transparent)]
    struct Item(#[serde(deserialize_with = "deserialize_token")] Token);
    struct Items;
    impl<'de> Visitor<'de> for Items {
        type Value = Vec<Token>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "at most {MAX_VALIDATED_TOKENS} tokens")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
            let (mut tokens, mut count) = (Vec::new(), 0);
            while let Some(item) = items.next_element::<&RawValue>()? {
                count += 1;
                // Counted while parsing, so that an oversized list is not parsed to its end.
                if count > MAX_VALIDATED_TOKENS {
                    return Err(de::Error::invalid_length(count, &self));
                }
                tokens.extend(serde_json::from_str(item.get()).map(|Item(token)| token));
            }
            Ok(tokens)
        }
    }
    deserializer.deserialize_seq(Items).map(Cow::Owned)
}

fn serialize_tokens<S: Serializer>(tokens: &[Token], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(tokens.iter().map(Token::expose))
}

fn deserialize_token<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Token, D::Error> {
    deserializer
        .deserialize_str(ParseStr(Token::parse))?
        .map_err(|error: ParseError| de::Error::custom(error))
}

fn deserialize_listed_secret<'de, D>(deserializer: D) -> Result<Option<ListedSecret>, D::Error>
where
    D: Deserializer<'de>,
{
    deserializer.deserialize_str(ParseStr(ListedSecret::parse))
}

fn deserialize_environment<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Environment, D::Error> {
    deserializer.deserialize_str(ParseStr(Environment::new))
}

/// Passes a JSON string to a parser, without leaving a copy of it in memory.
struct ParseStr<F>(F);

impl<T, F: Fn(&str) -> T> Visitor<'_> for ParseStr<F> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_str<E>(self, text: &str) -> Result<T, E> {
        Ok((self.0)(text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "*:development.964a287e1b728cb5f4f3e0120df92cb5f4f3e0120df92cb5964a287e";

    #[track_caller]
    fn check(item: &str, expected: Option<(TokenKind, &str, &[&str])>) {
        let reply: ValidateResponse =
            serde_json::from_str(&format!(r#"{{"tokens":[{item}],"more":1}}"#)).expect("reply");
        let grants: Vec<_> = reply
            .tokens
            .iter()
            .map(|it| {
                let Scope { environment, projects } = &it.grant.scope;
                (it.grant.kind, environment.as_str(), projects.to_list())
            })
            .collect();
        let expected: Vec<_> =
            expected.into_iter().map(|(kind, name, ids)| (kind, name, ids.to_vec())).collect();
        assert_eq!(grants, expected, "{item}");
    }

    #[test]
    fn validated_token_is_parsed_in_every_form_that_servers_send() {
        use TokenKind::{Admin, Client, Frontend};
        let check =
            |fields: &str, expected| check(&format!(r#"{{"token":"{V1}",{fields}}}"#), expected);
        let all: &[&str] = &["*"];
        check(r#""type":"client","projects":["*"]"#, Some((Client, "development", all)));
        check(
            r#""type":"BACKEND","environment":"prod","projects":["b","a"],"status":"Validated""#,
            Some((Client, "prod", &["a", "b"])),
        );
        check(
            r#""type":"frontend","project":"a","environment":null"#,
            Some((Frontend, "development", &["a"])),
        );
        check(r#""type":"admin","environment":"*""#, Some((Admin, "*", all)));
        check(r#""type":"gateway","projects":["*"]"#, None);
        check(r#""type":"client","status":"Invalid""#, None);
        check(r#""type":7"#, None);
    }

    #[test]
    fn unreadable_item_is_skipped() {
        let body = format!(
            r#"{{"tokens":[{{"token":"no","type":"client"}},7,{{"token":"{V1}","type":"client"}}]}}"#
        );
        let reply: ValidateResponse = serde_json::from_str(&body).expect("reply");
        assert_eq!(reply.tokens.len(), 1);
        let request: ValidateRequest<'_> =
            serde_json::from_str(&format!(r#"{{"tokens":["no",null,"{V1}"]}}"#)).expect("request");
        assert_eq!(*request.tokens, [Token::parse(V1).expect("token")]);
    }

    #[test]
    fn validate_bodies_survive_a_round_trip() {
        let token = Token::parse(V1).expect("token");
        let request = ValidateRequest { tokens: Cow::Owned(vec![token.clone()]) };
        assert_eq!(
            serde_json::to_string(&request).expect("json"),
            format!(r#"{{"tokens":["{V1}"]}}"#)
        );
        let scope = Scope { environment: Environment::new("development"), projects: Projects::All };
        let grant = Grant { kind: TokenKind::Client, scope };
        let reply = ValidateResponse { tokens: vec![ValidatedToken { token, grant }] };
        let json = serde_json::to_string(&reply).expect("json");
        assert_eq!(
            json,
            format!(
                r#"{{"tokens":[{{"token":"{V1}","type":"backend","environment":"development","projects":["*"],"status":"Validated"}}]}}"#
            )
        );
        let read: ValidateResponse = serde_json::from_str(&json).expect("reply");
        assert_eq!(read.tokens, reply.tokens);
    }

    #[test]
    fn token_list_contains_full_secrets_or_selectors() {
        let body = format!(
            r#"{{"tokens":[
                {{"secret":"{V1}","tokenName":"a","type":"client","project":"*","projects":["*"],
                  "environment":"development","expiresAt":"2026-01-01T00:00:00.000Z",
                  "createdAt":"2025-01-01T00:00:00.000Z","seenAt":null,"alias":null}},
                {{"secret":"AbCdEfGhIjKlMnOpQrStUv","tokenName":"b","type":"backend","projects":["x"],
                  "environment":"production","secure":true}},
                {{"secret":"{V1}","username":"c","type":"client","expiresAt":"soon"}},
                {{"secret":"","tokenName":"d","type":"client"}},
                {{"secret":"a-custom-one","tokenName":"e","type":"client","environment":"dev","projects":[]}}
            ]}}"#
        );
        let list: TokenList = serde_json::from_str(&body).expect("list");
        let [full, secure] = list.tokens.as_slice() else { panic!("{:?}", list.tokens) };
        assert_eq!(full.secret, ListedSecret::Full(Token::parse(V1).expect("token")));
        assert_eq!((full.name.as_str(), &full.projects), ("a", &Projects::All));
        let end: Timestamp = "2026-01-01T00:00:00Z".parse().expect("time");
        assert!(full.is_expired(end) && !full.is_expired(Timestamp::UNIX_EPOCH));
        assert_eq!(full.seen_at, None);
        assert_eq!(secure.secret, ListedSecret::Selector("AbCdEfGhIjKlMnOpQrStUv".to_owned()));
        assert!(!secure.is_expired(end));
        let named = ListedSecret::Full(Token::parse(V1).expect("token"));
        assert_eq!(list.unreadable, [Some(named), None, None]);
    }

    #[test]
    fn unreadable_item_may_be_the_token_it_names_or_any_token() {
        let (one, other) = (TokenDigest::of(V1), TokenDigest::of("*:dev.other"));
        let list = |items: &str| {
            serde_json::from_str::<TokenList>(&format!(r#"{{"tokens":[{items}]}}"#)).expect("list")
        };
        let of_a_later_release =
            list(&format!(r#"{{"secret":"{V1}","tokenName":"a","type":"gateway"}}"#));
        assert!(of_a_later_release.unreadable_tokens().may_include(&one, None));
        assert!(!of_a_later_release.unreadable_tokens().may_include(&other, None));
        let secure = list(r#"{"secret":"AbCdEfGhIjKlMnOpQrStUv","type":7}"#);
        assert!(secure.unreadable_tokens().may_include(&one, Some("AbCdEfGhIjKlMnOpQrStUv")));
        assert!(!secure.unreadable_tokens().may_include(&one, Some("anotherSelector_012345")));
        for unnamed in [r#"{"type":"client"}"#, r#"{"secret":null}"#, r#"{"secret":"x"}"#, "7"] {
            let list = list(unnamed);
            let names = list.unreadable_tokens();
            assert!(names.may_include(&one, None) && names.may_include(&other, None), "{unnamed}");
            assert!(names.may_include_selector("anotherSelector_012345"), "{unnamed}");
            assert_eq!((list.tokens.len(), list.unreadable.len()), (0, 1));
        }
        assert!(!list("").unreadable_tokens().may_include(&one, None));
    }

    #[test]
    fn parse_error_contains_no_secret() {
        let body = format!(r#"{{"secret":"{V1} {V1}"}}"#);
        let error = serde_json::from_str::<CreatedToken>(&body).expect_err("no token");
        assert!(!error.to_string().contains("964a"), "{error}");
    }

    #[test]
    fn disabled_environments_are_parsed() {
        let body = r#"{"version":1,"environments":[{"name":"production","type":"production",
            "enabled":true,"protected":false},{"name":"old","enabled":false},{"enabled":true}]}"#;
        let list: EnvironmentList = serde_json::from_str(body).expect("list");
        let read: Vec<_> =
            list.environments.iter().map(|it| (it.name.as_str(), it.enabled)).collect();
        assert_eq!(read, [("production", true), ("old", false)]);
    }
}
