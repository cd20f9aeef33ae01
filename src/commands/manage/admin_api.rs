//! Runs tasks through the admin API of a server: Parapet's admin listener, also one that relays, or
//! Unleash.
//!
//! The server checks the permissions of the token's owner and writes its own audit log.

use std::time::Duration;

use bytes::Bytes;
use reqwest::{Client, Method, Url, header::AUTHORIZATION, redirect};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};

use super::{
    error::Error,
    output::{AccountRow, Output, TokenRow},
    secret_input::{read_first_line, read_password},
};
use crate::{
    config::{ManageTask, RemoteServer},
    control_plane::RootRole,
    protocol::{
        byte_order_mark::without_byte_order_mark,
        tokens::{CreatedToken, ListedSecret, ListedToken, TokenList},
    },
    token::{Token, TokenKind},
    upstream::no_proxy,
};

/// The timeout of one request.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Runs a task.
pub(super) async fn run(server: RemoteServer, task: ManageTask) -> Result<Output, Error> {
    let api = AdminApi::new(server)?;
    match task {
        ManageTask::CreateToken { name, kind, environment, projects, expires_at } => {
            let is_admin = kind == TokenKind::Admin;
            let mut body = json!({ "tokenName": name, "type": kind.as_str() });
            body["environment"] = if is_admin { "*".into() } else { environment.into() };
            let all_projects = is_admin || projects.is_empty();
            body["projects"] = if all_projects { json!(["*"]) } else { projects.into() };
            if let Some(expires_at) = expires_at {
                body["expiresAt"] = expires_at.to_string().into();
            }
            let created: CreatedToken =
                api.send_for_json(Method::POST, TOKENS, Some(&body)).await?;
            Ok(Output::CreatedToken { secret: created.secret })
        }
        ManageTask::ListTokens { name } => {
            let matches = |token: &ListedToken| name.as_ref().is_none_or(|it| *it == token.name);
            let tokens = api.tokens().await?.into_iter().filter(matches);
            Ok(Output::Tokens(tokens.map(token_row).collect()))
        }
        ManageTask::RevokeToken { identifier } => {
            let identifier = match identifier {
                Some(identifier) => identifier,
                None => read_first_line("-")?,
            };
            // Servers report success also for the deletion of a token that does not exist.
            let token = Token::parse(&identifier).ok();
            let selector = token.as_ref().and_then(Token::selector);
            let same = |it: &ListedToken| {
                it.secret.expose() == identifier || selector == Some(it.secret.expose())
            };
            let revoked = api.tokens().await?.into_iter().find(same).ok_or(Error::TokenNotFound)?;
            api.send(Method::DELETE, &[TOKENS, &[&identifier]].concat(), None).await?;
            Ok(Output::RevokedToken { masked: masked_secret(&revoked.secret), name: revoked.name })
        }
        ManageTask::AddAccount { username, role, name, email, password } => {
            let (password, shown) = read_password(password)?;
            let body = json!({
                "username": username, "name": name, "email": email, "rootRole": role.id(),
                "password": password.expose(), "sendEmail": false,
            });
            let user: User = api.send_for_json(Method::POST, ACCOUNTS, Some(&body)).await?;
            Ok(Output::CreatedAccount { account: account_row(user), password: shown })
        }
        ManageTask::ListAccounts => {
            Ok(Output::Accounts(api.users().await?.into_iter().map(account_row).collect()))
        }
        ManageTask::Grant { username, permissions, revoke } => {
            let user = api.user(username).await?;
            let mut granted = user.permissions;
            let names = permissions.iter().map(|it| it.as_str());
            granted.retain(|it| !names.clone().any(|name| name == it));
            if !revoke {
                granted.extend(names.map(str::to_owned));
            }
            let id = user.id.to_string();
            let path = [ACCOUNTS, &[&id, "permissions"]].concat();
            let body = json!({ "permissions": granted });
            let user: User = api.send_for_json(Method::PUT, &path, Some(&body)).await?;
            Ok(Output::ChangedPermissions(account_row(user)))
        }
        ManageTask::SetPassword { username, password } => {
            let user = api.user(username).await?;
            let (password, shown) = read_password(password)?;
            let id = user.id.to_string();
            let path = [ACCOUNTS, &[&id, "change-password"]].concat();
            let body = json!({ "password": password.expose() });
            api.send(Method::POST, &path, Some(&body)).await?;
            Ok(Output::NewPassword { username: user.username.unwrap_or_default(), password: shown })
        }
    }
}

const TOKENS: &[&str] = &["api", "admin", "api-tokens"];
const ACCOUNTS: &[&str] = &["api", "admin", "user-admin"];

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct User {
    id: i64,
    username: Option<String>,
    email: Option<String>,
    root_role: Value,
    #[serde(default)]
    permissions: Vec<String>,
}

/// A client of a server's admin API.
struct AdminApi {
    client: Client,
    url: Url,
    token: Token,
}

impl AdminApi {
    fn new(server: RemoteServer) -> Result<Self, Error> {
        let RemoteServer { url, token_file, no_proxy } = server;
        let token = Token::parse(&read_first_line(&token_file)?);
        let token = token.map_err(|error| Error::InvalidToken(token_file, error))?;
        // Fails if a provider is installed already, which is fine.
        let _ = rustls::crypto::ring::default_provider().install_default();
        // A redirect could send the token to another server.
        let mut client = Client::builder().timeout(TIMEOUT).redirect(redirect::Policy::none());
        if no_proxy::includes(&no_proxy, &url) {
            client = client.no_proxy();
        }
        let client = client.build().map_err(|error| Error::NoResponse(origin(&url), error))?;
        Ok(Self { client, url, token })
    }

    async fn tokens(&self) -> Result<Vec<ListedToken>, Error> {
        Ok(self.send_for_json::<TokenList>(Method::GET, TOKENS, None).await?.tokens)
    }

    async fn users(&self) -> Result<Vec<User>, Error> {
        #[derive(Deserialize)]
        struct List {
            users: Vec<User>,
        }
        Ok(self.send_for_json::<List>(Method::GET, ACCOUNTS, None).await?.users)
    }

    async fn user(&self, username: String) -> Result<User, Error> {
        let key = username.to_lowercase();
        let named = |it: &User| it.username.as_ref().is_some_and(|it| it.to_lowercase() == key);
        self.users().await?.into_iter().find(named).ok_or(Error::AccountNotFound(username))
    }

    async fn send_for_json<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &[&str],
        body: Option<&Value>,
    ) -> Result<T, Error> {
        let response = self.send(method, path, body).await?;
        serde_json::from_slice(without_byte_order_mark(&response))
            .map_err(|error| Error::InvalidResponse(origin(&self.url), error))
    }

    /// Sends a request; returns the body of a successful response.
    async fn send(
        &self,
        method: Method,
        path: &[&str],
        body: Option<&Value>,
    ) -> Result<Bytes, Error> {
        let mut url = self.url.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(path);
        }
        let request = self.client.request(method, url).header(AUTHORIZATION, self.token.expose());
        let request = match body {
            Some(body) => request.header("content-type", "application/json").body(body.to_string()),
            None => request,
        };
        let no_response =
            |error: reqwest::Error| Error::NoResponse(origin(&self.url), error.without_url());
        let response = request.send().await.map_err(no_response)?;
        let status = response.status();
        let body = response.bytes().await.map_err(no_response)?;
        if status.is_success() {
            return Ok(body);
        }
        let (origin, message) = (origin(&self.url), error_message(&body));
        Err(Error::ErrorResponse { origin, status: status.as_u16(), message })
    }
}

fn origin(url: &Url) -> String {
    url.origin().ascii_serialization()
}

/// The message in the body of an error response: those of its details, or else its own.
fn error_message(body: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Body {
        #[serde(default)]
        message: String,
        #[serde(default)]
        details: Vec<Detail>,
    }
    #[derive(Deserialize)]
    struct Detail {
        message: String,
    }
    let Ok(Body { message, details }) = serde_json::from_slice(body) else { return String::new() };
    if details.is_empty() {
        return message;
    }
    details.into_iter().map(|it| it.message).collect::<Vec<_>>().join("; ")
}

/// The token masked for display, or its selector.
fn masked_secret(secret: &ListedSecret) -> String {
    match secret {
        ListedSecret::Full(token) => token.masked().to_string(),
        ListedSecret::Selector(selector) => selector.clone(),
    }
}

fn token_row(token: ListedToken) -> TokenRow {
    TokenRow {
        identifier: masked_secret(&token.secret),
        name: token.name,
        r#type: token.kind.as_str().to_owned(),
        environment: token.environment.as_str().to_owned(),
        projects: token.projects.to_list().into_iter().map(str::to_owned).collect(),
        expires_at: token.expires_at,
        last_seen_at: token.seen_at,
    }
}

fn account_row(user: User) -> AccountRow {
    let role = RootRole::ALL.into_iter().find(|role| user.root_role == role.id());
    let role = role.map_or_else(|| user.root_role.to_string(), |role| role.name().to_owned());
    let username = user.username.or(user.email).unwrap_or_default();
    AccountRow { id: user.id, username, role, permissions: user.permissions }
}
