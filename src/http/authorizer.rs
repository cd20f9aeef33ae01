//! The steps between the route of a request and its handler: authenticate the token, check what it may
//! do, and load the flags that it sees.
//!
//! A handler receives a [`RoutedRequest`] and, if it reads flags, an [`AuthorizedRead`]. Nothing here
//! knows a particular endpoint: the route says which kinds of token it accepts.

use std::{sync::Arc, time::Duration};

use hyper::{
    HeaderMap, Method,
    header::{HeaderName, HeaderValue},
};

use super::{client_address::ClientAddresses, response::HttpError, routes::Route};
use crate::{
    auth::{AuthError, AuthenticatedToken, Authenticator},
    served::{ServedSnapshot, Snapshots},
    token::{Grant, TokenDigest},
};

/// A request that has a route.
#[derive(Clone, Copy, Debug)]
pub struct RoutedRequest<'a> {
    /// The route.
    pub route: &'static Route,
    /// The path parameter, still percent-encoded; empty if the route has none.
    pub parameter: &'a str,
    /// The method, one that the route supports.
    pub method: &'a Method,
    /// The headers.
    pub headers: &'a HeaderMap,
    /// The query, still encoded; empty if there is none.
    pub query: &'a str,
    /// The addresses of the client.
    pub client: ClientAddresses,
}

/// An authorized request for flags: the token's grant and the snapshot to serve it from.
#[derive(Debug)]
pub struct AuthorizedRead {
    /// The rights of the token.
    pub grant: Arc<Grant>,
    /// Identifies the token.
    pub digest: TokenDigest,
    /// The flags of the token's environment.
    pub snapshot: Arc<ServedSnapshot>,
}

/// Alternative token header of OpenFeature providers, accepted on every route.
const API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// Authorizes requests by their tokens.
#[derive(Debug)]
pub struct Authorizer {
    /// Validates tokens.
    pub auth: Authenticator,
    /// The flags of each environment.
    pub snapshots: Snapshots,
    /// The request header with the SDK's token.
    pub token_header: HeaderName,
    /// How long a request with a first-seen token waits for the first flags of its scope.
    pub first_fetch_timeout: Duration,
}

impl Authorizer {
    /// Authenticates the request's token, and checks that the route accepts its kind and that this
    /// instance serves its environment. Waits only for the validation of a first-seen token.
    pub async fn authenticate(
        &self,
        request: &RoutedRequest<'_>,
    ) -> Result<AuthenticatedToken, HttpError> {
        let token = self.auth.authenticate(self.presented_token(request.headers)?).await?;
        self.check_grant(token, request.route)
    }

    /// Authenticates the request, and loads a snapshot that covers the token's scope.
    ///
    /// A first-seen token may trigger the first fetch of its scope, and waits for it. Flags that were
    /// never fetched are an error (503), not an empty list.
    pub async fn authorize(
        &self,
        request: &RoutedRequest<'_>,
    ) -> Result<AuthorizedRead, HttpError> {
        let AuthenticatedToken { grant, digest, first_seen } = self.authenticate(request).await?;
        let snapshot = match self.snapshots.load_for_scope(&grant.scope) {
            Some(snapshot) => Some(snapshot),
            None if first_seen => {
                let fetched = self.snapshots.wait_for_scope(&grant.scope);
                tokio::time::timeout(self.first_fetch_timeout, fetched).await.ok().flatten()
            }
            None => None,
        };
        let snapshot = snapshot.ok_or(HttpError::FLAGS_NOT_FETCHED)?;
        Ok(AuthorizedRead { grant, digest, snapshot })
    }

    /// Like [`authorize`](Self::authorize), if no waiting is necessary.
    pub fn authorize_now(
        &self,
        request: &RoutedRequest<'_>,
    ) -> Option<Result<AuthorizedRead, HttpError>> {
        let token = match self.presented_token(request.headers) {
            Ok(text) => self.auth.authenticate_cached(text)?.map_err(HttpError::from),
            Err(error) => Err(error),
        };
        let read = token.and_then(|token| self.check_grant(token, request.route)).and_then(
            |AuthenticatedToken { grant, digest, .. }| {
                let snapshot = self
                    .snapshots
                    .load_for_scope(&grant.scope)
                    .ok_or(HttpError::FLAGS_NOT_FETCHED)?;
                Ok(AuthorizedRead { grant, digest, snapshot })
            },
        );
        Some(read)
    }

    /// The text of the request's token, unparsed.
    fn presented_token<'a>(&self, headers: &'a HeaderMap) -> Result<&'a str, HttpError> {
        let header = headers.get(&self.token_header).or_else(|| headers.get(API_KEY));
        match header.map(HeaderValue::to_str) {
            None | Some(Ok("")) => Err(HttpError::MissingToken),
            Some(Ok(token)) => Ok(token),
            Some(Err(_)) => Err(HttpError::InvalidToken),
        }
    }

    fn check_grant(
        &self,
        token: AuthenticatedToken,
        route: &Route,
    ) -> Result<AuthenticatedToken, HttpError> {
        if !route.token_kinds.contains(&token.grant.kind) {
            return Err(HttpError::WrongTokenKind);
        }
        if !self.snapshots.is_environment_allowed(&token.grant.scope.environment) {
            return Err(HttpError::EnvironmentNotServed);
        }
        Ok(token)
    }
}

impl From<AuthError> for HttpError {
    fn from(error: AuthError) -> Self {
        match error {
            AuthError::Unknown => Self::InvalidToken,
            AuthError::Forbidden => Self::ForbiddenUpstream,
            AuthError::Unavailable => Self::TOKEN_NOT_VALIDATED,
        }
    }
}
