//! Signing in and out, and who is asking.

use std::net::IpAddr;

use bytes::Bytes;
use hyper::HeaderMap;

use super::{
    body,
    caller::{Caller, DEVICE, SECURE_SESSION, SESSION, cookie, is_encrypted, session_cookie},
    origin::is_same_origin,
};
use crate::{
    control::{Account, Control, Operator, RootRole, SignIn},
    http::reply::{self, Failure, Reply},
    wire::admin::{self as wire, Problems},
};

/// How long a browser remembers that somebody has signed in from it, in seconds: a year.
const DEVICE_AGE: u32 = 365 * 24 * 60 * 60;

/// Begins a session; its cookie is in the answer. With `is_tls` this listener's connections are encrypted.
pub(super) async fn sign_in(
    control: &Control,
    headers: &HeaderMap,
    is_tls: bool,
    address: IpAddr,
    body: &Bytes,
) -> Result<Reply, Failure> {
    // A page of somebody else's could otherwise sign its visitors in as somebody else.
    if headers.contains_key("origin") && !is_same_origin(headers) {
        return Err(Failure::CrossOrigin);
    }
    let asked: wire::Login = body::read(body)?;
    let mut problems = Problems::default();
    let username = problems.required("username", asked.username);
    let password = problems.required("password", asked.password);
    let password = body::shown_password(&mut problems, "password", password.as_ref());
    let (username, password) = problems.or(username.zip(password))?;
    let device = cookie(headers, DEVICE);
    let attempt = SignIn { username: &username.0, password: &password, address, device };
    let signed_in = control.sign_in(attempt).await?;
    let (name, secure) =
        if is_encrypted(headers, is_tls) { (SECURE_SESSION, "; Secure") } else { (SESSION, "") };
    let session = signed_in.session.expose();
    let session = format!("{name}={session}; Path=/; HttpOnly; SameSite=Strict{secure}");
    let device = signed_in.device.expose();
    let device = format!(
        "{DEVICE}={device}; Path=/auth; Max-Age={DEVICE_AGE}; HttpOnly; SameSite=Strict{secure}"
    );
    let reply = reply::document(&of_account(&signed_in.account));
    Ok(reply::with_cookie(reply::with_cookie(reply, &session), &device))
}

/// Ends the session, if there is one.
pub(super) async fn sign_out(
    control: &Control,
    headers: &HeaderMap,
    is_tls: bool,
    address: IpAddr,
) -> Result<Reply, Failure> {
    if let Some(session) = session_cookie(headers, is_tls) {
        if !is_same_origin(headers) {
            return Err(Failure::CrossOrigin);
        }
        control.sign_out(session, address).await?;
    }
    // Under either name: a browser deletes what it has, and takes the prefixed one only if encrypted.
    let gone = |name| format!("{name}=; Path=/; Max-Age=0; HttpOnly; SameSite=Strict");
    let reply = reply::with_cookie(reply::nothing(), &gone(SESSION));
    Ok(reply::with_cookie(reply, &format!("{}; Secure", gone(SECURE_SESSION))))
}

/// Who is asking, and what they may do.
pub(super) fn me(caller: &Caller) -> Reply {
    let operator = &caller.actor.operator;
    let user = match &caller.account {
        Some(account) => of_account(account),
        None => of_token(operator),
    };
    let permissions = operator.permissions();
    reply::document(&wire::Me {
        user,
        permissions: permissions.map(|permission| wire::Permission { permission }).collect(),
        feedback: Vec::new(),
        splash: std::collections::BTreeMap::default(),
    })
}

fn of_account(account: &Account) -> wire::Caller {
    wire::Caller {
        id: account.id,
        username: account.username.clone(),
        name: account.name.clone(),
        email: account.email.clone(),
        root_role: account.role.id(),
        is_api: false,
    }
}

fn of_token(operator: &Operator) -> wire::Caller {
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
    control: &Control,
    caller: &Caller,
    body: &Bytes,
) -> Result<Reply, Failure> {
    if caller.account.is_none() {
        return Err(Failure::Malformed("an API token has no password".to_owned()));
    }
    let asked: wire::ChangePassword = body::read(body)?;
    let mut problems = Problems::default();
    let old = problems.required("oldPassword", asked.old_password);
    let old = body::shown_password(&mut problems, "oldPassword", old.as_ref());
    let new = problems.required("password", asked.password);
    let again = problems.optional("confirmPassword", asked.confirm_password);
    if let (Some(new), Some(again)) = (&new, &again)
        && new.0 != again.0
    {
        problems.add("confirmPassword", "is another than the password");
    }
    let new = body::new_password(&mut problems, new.as_ref());
    let (old, new) = problems.or(old.zip(new))?;
    control.change_own_password(&caller.actor, &old, new).await?;
    Ok(reply::done())
}
