//! Authenticates callers of the admin API, and rejects cross-site requests.
//!
//! A caller presents an admin token or a session cookie. The control plane checks permissions, not this
//! module.

use std::net::IpAddr;

use hyper::{header::HeaderName, http::request::Parts};

use super::{
    csrf::is_same_origin,
    headers::{BACKGROUND_HEADER, presented_token, session_cookie},
    relay::Relay,
};
use crate::{
    auth::Authenticator,
    control_plane::{Account, Activity, Actor, ControlPlane, Operator},
    http::response::HttpError,
    protocol::user::User,
    token::{Token, TokenKind},
};

/// The authenticated caller of a request.
#[derive(Debug)]
pub(super) struct AuthenticatedCaller {
    /// The caller as the control plane's actor.
    pub(super) actor: Actor,
    /// The account; `None` for a token and for a user of upstream.
    pub(super) account: Option<Account>,
}

/// Authenticates callers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Authentication<'a> {
    /// The request header with an admin token.
    pub(super) token_header: &'a HeaderName,
    /// Validates admin tokens.
    pub(super) auth: &'a Authenticator,
    /// The control plane, which stores the sessions; `None` if there is none.
    pub(super) control_plane: Option<&'a ControlPlane>,
    /// The upstream server that has the sessions instead.
    pub(super) relay: Option<&'a Relay>,
    /// Whether this listener uses TLS.
    pub(super) is_tls: bool,
}

impl Authentication<'_> {
    /// Authenticates a request by its admin token, or else by its session. With `changes`, a session
    /// request must come from a page of the same origin.
    pub(super) async fn authenticate(
        &self,
        head: &Parts,
        address: IpAddr,
        changes: bool,
    ) -> Result<AuthenticatedCaller, HttpError> {
        if let Some(header) = presented_token(&head.headers, self.token_header) {
            let header = header.to_str().map_err(|_| HttpError::InvalidToken)?;
            return self.authenticate_token(header, address).await;
        }
        let is_foreign = changes && !is_same_origin(&head.headers);
        if let Some(relay) = self.relay {
            let person = relay.signed_in_user(&head.headers).await?;
            return if is_foreign {
                Err(HttpError::CrossOrigin)
            } else {
                Ok(upstream_caller(&person, address))
            };
        }
        let control = self.control_plane.ok_or(HttpError::MissingToken)?;
        let cookie = session_cookie(&head.headers, self.is_tls).ok_or(HttpError::SignInRequired)?;
        if is_foreign {
            return Err(HttpError::CrossOrigin);
        }
        let is_background = !changes && head.headers.contains_key(&BACKGROUND_HEADER);
        let cause = if is_background { Activity::Background } else { Activity::Interactive };
        let session =
            control.session(cookie, address, cause).await?.ok_or(HttpError::SignInRequired)?;
        let actor = Actor { operator: session.operator(), address: Some(address) };
        Ok(AuthenticatedCaller { actor, account: Some(session.account) })
    }

    async fn authenticate_token(
        &self,
        header: &str,
        address: IpAddr,
    ) -> Result<AuthenticatedCaller, HttpError> {
        let token = self.auth.authenticate(header).await?;
        match token.grant.kind {
            TokenKind::Admin => {}
            TokenKind::Client | TokenKind::Frontend => return Err(HttpError::WrongTokenKind),
        }
        let token = Token::from_header(header).map_err(|_| HttpError::InvalidToken)?;
        let named = self.control_plane.and_then(|control| control.token_name(&token.digest()));
        let name = named.unwrap_or_else(|| token.masked().to_string());
        let operator = Operator::Token { name, digest: token.digest() };
        let actor = Actor { operator, address: Some(address) };
        Ok(AuthenticatedCaller { actor, account: None })
    }
}

/// A user of upstream. Operations on this edge's own state need no permission.
fn upstream_caller(person: &User, address: IpAddr) -> AuthenticatedCaller {
    let operator = Operator::Upstream { name: person.display_name() };
    AuthenticatedCaller { actor: Actor { operator, address: Some(address) }, account: None }
}
