//! Operations on sessions: sign-in, sign-out, the current user and their password.

use std::net::IpAddr;

use bytes::Bytes;
use hyper::HeaderMap;

use super::{
    authentication::AuthenticatedCaller,
    csrf::is_same_origin,
    headers::{
        DEVICE_COOKIE, SECURE_SESSION_COOKIE, SESSION_COOKIE, cookie, is_encrypted, session_cookie,
    },
    request,
};
use crate::{
    control_plane::{Account, ControlPlane, Operator, RootRole, SignInAttempt},
    http::response::{self, HttpError, HttpResponse},
    protocol::admin::{self as wire, FieldErrors},
};

/// The lifetime of the device cookie, in seconds: one year.
const DEVICE_COOKIE_MAX_AGE_SECONDS: u32 = 365 * 24 * 60 * 60;

/// Starts a session and returns its cookie. `is_tls` states whether this listener uses TLS.
pub(super) async fn sign_in(
    control: &ControlPlane,
    headers: &HeaderMap,
    is_tls: bool,
    address: IpAddr,
    body: &Bytes,
) -> Result<HttpResponse, HttpError> {
    // Otherwise another site could sign its visitors in to an account of its choice (login CSRF).
    if headers.contains_key("origin") && !is_same_origin(headers) {
        return Err(HttpError::CrossOrigin);
    }
    let request: wire::Login = request::parse_object(body)?;
    let mut problems = FieldErrors::default();
    let username = problems.required("username", request.username);
    let password = problems.required("password", request.password);
    let password = request::current_password(&mut problems, "password", password.as_ref());
    let (username, password) = problems.into_result(username.zip(password))?;
    let device = cookie(headers, DEVICE_COOKIE);
    let attempt = SignInAttempt { username: &username.0, password: &password, address, device };
    let signed_in = control.sign_in(attempt).await?;
    let (name, secure) = if is_encrypted(headers, is_tls) {
        (SECURE_SESSION_COOKIE, "; Secure")
    } else {
        (SESSION_COOKIE, "")
    };
    let session = signed_in.session.expose();
    let session = format!("{name}={session}; Path=/; HttpOnly; SameSite=Strict{secure}");
    let device = signed_in.device.expose();
    let device = format!(
        "{DEVICE_COOKIE}={device}; Path=/auth; Max-Age={DEVICE_COOKIE_MAX_AGE_SECONDS}; HttpOnly; SameSite=Strict{secure}"
    );
    let reply = response::json_document(&account_json(&signed_in.account));
    Ok(response::with_cookie(response::with_cookie(reply, &session), &device))
}

/// Ends the session, if there is one.
pub(super) async fn sign_out(
    control: &ControlPlane,
    headers: &HeaderMap,
    is_tls: bool,
    address: IpAddr,
) -> Result<HttpResponse, HttpError> {
    if let Some(session) = session_cookie(headers, is_tls) {
        if !is_same_origin(headers) {
            return Err(HttpError::CrossOrigin);
        }
        control.sign_out(session, address).await?;
    }
    // Both names: a browser deletes the one it has, and accepts the prefixed one only over TLS.
    let expired = |name| format!("{name}=; Path=/; Max-Age=0; HttpOnly; SameSite=Strict");
    let reply = response::with_cookie(response::no_content(), &expired(SESSION_COOKIE));
    Ok(response::with_cookie(reply, &format!("{}; Secure", expired(SECURE_SESSION_COOKIE))))
}

/// Returns the caller and their permissions.
pub(super) fn current_user(caller: &AuthenticatedCaller) -> HttpResponse {
    let operator = &caller.actor.operator;
    let user = match &caller.account {
        Some(account) => account_json(account),
        None => token_json(operator),
    };
    let permissions = operator.permission_names();
    response::json_document(&wire::Me {
        user,
        permissions: permissions.map(|permission| wire::Permission { permission }).collect(),
        feedback: Vec::new(),
        splash: std::collections::BTreeMap::default(),
    })
}

fn account_json(account: &Account) -> wire::Caller {
    wire::Caller {
        id: account.id,
        username: account.username.clone(),
        name: account.name.clone(),
        email: account.email.clone(),
        root_role: account.role.id(),
        is_api: false,
    }
}

fn token_json(operator: &Operator) -> wire::Caller {
    wire::Caller {
        id: 0,
        username: operator.name().to_owned(),
        name: None,
        email: None,
        root_role: RootRole::Admin.id(),
        is_api: true,
    }
}

/// Changes the caller's own password.
pub(super) async fn change_password(
    control: &ControlPlane,
    caller: &AuthenticatedCaller,
    body: &Bytes,
) -> Result<HttpResponse, HttpError> {
    if caller.account.is_none() {
        return Err(HttpError::Malformed("an API token has no password".to_owned()));
    }
    let request: wire::ChangePassword = request::parse_object(body)?;
    let mut problems = FieldErrors::default();
    let old = problems.required("oldPassword", request.old_password);
    let old = request::current_password(&mut problems, "oldPassword", old.as_ref());
    let new = problems.required("password", request.password);
    let again = problems.optional("confirmPassword", request.confirm_password);
    if let (Some(new), Some(again)) = (&new, &again)
        && new.0 != again.0
    {
        problems.add("confirmPassword", "does not match the password");
    }
    let new = request::new_password(&mut problems, new.as_ref());
    let (old, new) = problems.into_result(old.zip(new))?;
    control.change_own_password(&caller.actor, &old, new).await?;
    Ok(response::empty_ok())
}
