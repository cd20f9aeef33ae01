//! The current admin token, shared by all requests that present it to upstream.
//!
//! The operator can replace it at run time, and upstream can refuse it. This module records both and
//! notifies subscribers; `app` acts on them.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use metrics::{describe_gauge, gauge};
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};
use tracing::{info, warn};

use crate::{
    secret_file,
    token::{Environment, ParseError, Token},
};

const REFUSED_GAUGE: &str = "parapet_upstream_admin_token_refused";

/// Upstream's admin token; a cheap handle.
#[derive(Clone)]
pub struct AdminToken(Arc<Inner>);

struct Inner {
    state: watch::Sender<State>,
    /// Notified when upstream refuses the token: its file may contain another by now.
    reload_requested: Notify,
}

/// The token, its file, and whether upstream accepts it.
#[derive(Clone, Debug)]
pub struct State {
    token: Arc<Token>,
    file: Option<PathBuf>,
    status: Status,
}

/// Whether upstream accepts the token.
#[derive(Clone, Copy, Debug)]
enum Status {
    Unverified,
    Accepted,
    /// Since this time.
    Refused(Timestamp, Instant),
}

/// Why a text or a file is not an admin token. The message never contains the text.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error(transparent)]
    File(#[from] secret_file::Error),
    /// The text is no token.
    #[error("expected an admin token; {0}")]
    Token(#[from] ParseError),
    /// The token is for one environment.
    #[error("expected an admin token; this one is for the environment `{0}`")]
    OneEnvironment(Environment),
}

impl AdminToken {
    /// Starts with the configured token and the file that it was read from.
    pub fn new(token: Token, file: Option<PathBuf>) -> Self {
        describe_gauge!(
            REFUSED_GAUGE,
            "One while upstream refuses the admin token (401), else zero"
        );
        gauge!(REFUSED_GAUGE).set(0.0);
        let state = State { token: Arc::new(token), file, status: Status::Unverified };
        Self(Arc::new(Inner { state: watch::Sender::new(state), reload_requested: Notify::new() }))
    }

    /// Parses an admin token.
    pub fn parse(text: &str) -> Result<Token, Error> {
        let token = Token::parse(text)?;
        match token.environment() {
            None => Ok(token),
            Some(environment) => Err(Error::OneEnvironment(environment)),
        }
    }

    /// Reads the admin token from a file. Blocks on the file system.
    pub fn read(file: &Path) -> Result<Token, Error> {
        Self::parse(&secret_file::read(file)?)
    }

    /// The token to present.
    pub fn current(&self) -> Arc<Token> {
        Arc::clone(&self.0.state.borrow().token)
    }

    /// The file that the token was read from, if any.
    pub fn file(&self) -> Option<PathBuf> {
        self.0.state.borrow().file.clone()
    }

    /// Since when upstream has refused the token; `None` if it has not.
    pub fn refused_since(&self) -> Option<Timestamp> {
        self.0.state.borrow().refused().map(|(at, _)| at)
    }

    /// For how long upstream has refused the token; `None` if it has not.
    pub fn refused_for(&self) -> Option<Duration> {
        self.0.state.borrow().refused().map(|(_, at)| at.elapsed())
    }

    /// Subscribes to changes of the token and of upstream's acceptance.
    pub fn subscribe(&self) -> watch::Receiver<State> {
        self.0.state.subscribe()
    }

    /// Waits until upstream next refuses the token.
    pub async fn reload_requested(&self) {
        self.0.reload_requested.notified().await;
    }

    /// Replaces the token; returns whether it differs. A different token starts as unverified.
    pub fn replace(&self, token: Token, file: Option<PathBuf>) -> bool {
        self.0.state.send_if_modified(|state| {
            state.file = file;
            let is_other = *state.token != token;
            if is_other {
                state.token = Arc::new(token);
                state.status = Status::Unverified;
                gauge!(REFUSED_GAUGE).set(0.0);
            }
            is_other
        })
    }

    /// Marks the current token as refused by upstream.
    #[cfg(test)]
    pub(crate) fn mark_refused_for_test(&self) {
        self.mark_refused(&self.current());
    }

    /// Records that upstream responded to `token` with 401.
    pub(crate) fn mark_refused(&self, token: &Token) {
        let is_news = self.0.state.send_if_modified(|state| {
            let is_news = *state.token == *token && !state.is_refused();
            if is_news {
                state.status = Status::Refused(Timestamp::now(), Instant::now());
                gauge!(REFUSED_GAUGE).set(1.0);
            }
            is_news
        });
        if is_news {
            warn!(
                token = %token.masked(),
                "Upstream refuses the admin token: this edge's admin listener no longer accepts it. \
                 Flags are served as before"
            );
        }
        self.request_reload();
    }

    /// Requests an immediate reload of the token's file: upstream refused a request, perhaps because the
    /// token has been replaced.
    pub(super) fn request_reload(&self) {
        self.0.reload_requested.notify_one();
    }

    /// Records that upstream has accepted `token`.
    pub(crate) fn mark_accepted(&self, token: &Token) {
        let is_news = self.0.state.send_if_modified(|state| {
            let is_news = *state.token == *token && !matches!(state.status, Status::Accepted);
            if is_news {
                state.status = Status::Accepted;
                gauge!(REFUSED_GAUGE).set(0.0);
            }
            is_news
        });
        if is_news {
            info!(token = %token.masked(), "Upstream accepts the admin token");
        }
    }
}

impl State {
    /// The token.
    pub fn token(&self) -> &Arc<Token> {
        &self.token
    }

    /// Whether upstream refuses it.
    pub fn is_refused(&self) -> bool {
        self.refused().is_some()
    }

    /// Whether upstream accepts it.
    pub fn is_accepted(&self) -> bool {
        matches!(self.status, Status::Accepted)
    }

    fn refused(&self) -> Option<(Timestamp, Instant)> {
        match self.status {
            Status::Refused(at, since) => Some((at, since)),
            Status::Unverified | Status::Accepted => None,
        }
    }
}

impl fmt::Debug for AdminToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdminToken").field("file", &self.file()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(text: &str) -> Token {
        Token::parse(text).expect("token")
    }

    #[test]
    fn refusal_of_replaced_token_does_not_affect_current_one() {
        let (first, second) = (token("*:*.first"), token("*:*.second"));
        let admin = AdminToken::new(first.clone(), None);
        let mut changes = admin.subscribe();
        admin.mark_refused(&first);
        assert!(admin.refused_since().is_some() && changes.has_changed().expect("open"));
        assert!(admin.replace(second.clone(), None));
        assert_eq!((admin.refused_since(), &*admin.current()), (None, &second));
        changes.mark_unchanged();
        admin.mark_refused(&first);
        admin.mark_accepted(&first);
        assert!(admin.refused_since().is_none() && !changes.has_changed().expect("open"));
        admin.mark_refused(&second);
        let since = admin.refused_since();
        admin.mark_refused(&second);
        assert_eq!(admin.refused_since(), since);
        admin.mark_accepted(&second);
        assert_eq!(admin.refused_since(), None);
    }

    #[test]
    fn token_of_one_environment_is_rejected() {
        let error = AdminToken::parse("*:dev.secret").expect_err("of one environment");
        assert_eq!(
            error.to_string(),
            "expected an admin token; this one is for the environment `dev`"
        );
        assert!(AdminToken::parse("user:secret").is_ok());
        assert!(
            !AdminToken::parse("secret").expect_err("no token").to_string().contains("secret ")
        );
    }
}
