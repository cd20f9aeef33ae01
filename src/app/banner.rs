//! What the first start of a standalone instance tells its owner: new tokens, and how to use them.
//!
//! Secrets are shown on a terminal. Elsewhere what is printed is a log, which is collected and kept:
//! there they go into a file that the log names.

use std::{
    io::{self, IsTerminal as _, Write},
    net::{IpAddr, SocketAddr},
    path::Path,
};

use tracing::{error, info, warn};

use crate::{
    control::{FoundTokens, Generated, Opened},
    secret_file,
    telemetry::{LogFormat, report},
};

/// The file of the data dir that holds what must not be logged.
const FILE: &str = "first-start.txt";

/// Where a listener was bound, and whether its connections are encrypted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bound {
    pub(super) address: SocketAddr,
    pub(super) is_tls: bool,
}

/// Tells what was created, once, with commands that work when pasted.
pub(super) fn announce(
    opened: &Opened,
    addresses: (Bound, Bound),
    base_path: &str,
    log: LogFormat,
    data_dir: &Path,
) {
    if let Some(mut terminal) = terminal(log) {
        // Nobody may be reading; `parapet account password` and `token create` make them anew.
        let _ = terminal.write_all(text(opened, addresses, base_path, "shown only now").as_bytes());
        return;
    }
    if let Some(account) = &opened.account {
        let (username, console) = (account.username.as_str(), url(addresses.1));
        info!(username, console, "This is the first start, which has created an admin's account");
    }
    let has_password = opened.account.as_ref().is_some_and(|it| it.generated.is_some());
    if !has_password && !matches!(opened.tokens, FoundTokens::Generated(_)) {
        return;
    }
    let file = data_dir.join(FILE);
    let text = text(opened, addresses, base_path, "kept nowhere else");
    match secret_file::write(&file, text.as_bytes()) {
        // A warning, so that it shows at that level too: there is something to be done.
        Ok(()) => warn!(
            file = %file.display(),
            "The first start's password and tokens are in a file for its owner alone: read it, then delete it"
        ),
        Err(error) => error!(
            file = %file.display(),
            error = report(&error),
            "The first start's password and tokens cannot be written and are lost; make others by `parapet account password` and `parapet token create`"
        ),
    }
}

/// Where somebody reads, and no log is collected.
fn terminal(log: LogFormat) -> Option<Box<dyn Write>> {
    if log == LogFormat::Json {
        None
    } else if io::stdout().is_terminal() {
        Some(Box::new(io::stdout()))
    } else if io::stderr().is_terminal() {
        Some(Box::new(io::stderr()))
    } else {
        None
    }
}

/// The whole text; `once` says where else the secrets are.
fn text(opened: &Opened, (data, admin): (Bound, Bound), base_path: &str, once: &str) -> String {
    let mut text = String::new();
    if let Some(account) = &opened.account {
        let (name, operators) = (&account.username, url(admin));
        let password = match &account.generated {
            Some(password) => format!("{}   ({once})", password.expose()),
            None => "the one that was given".to_owned(),
        };
        let made = format!(
            "
This is the first start. Open the console at {operators} and sign in as

  username  {name}
  password  {password}
"
        );
        text.push_str(&made);
    }
    if let FoundTokens::Generated(generated) = &opened.tokens {
        text.push_str(&tokens(generated, (data, admin), base_path, once));
    }
    text
}

fn tokens(
    generated: &Generated,
    (data, admin): (Bound, Bound),
    base_path: &str,
    once: &str,
) -> String {
    let Generated { admin: admin_token, client, frontend } = generated;
    let (client, frontend) = (client.expose(), frontend.expose());
    format!(
        "
These tokens were created and are {once}.

  client    {client}
  frontend  {frontend}
  admin     {admin}

Try them:

  curl -H 'Authorization: {client}' {data}{base_path}/api/client/features
  curl -H 'Authorization: {frontend}' '{data}{base_path}/api/frontend?userId=7&properties%5Bcountry%5D=NO'
  curl -H 'Authorization: {admin}' {operators}/status

",
        admin = admin_token.expose(),
        data = url(data),
        operators = url(admin),
    )
}

/// An address that works on this machine.
fn url(Bound { address, is_tls }: Bound) -> String {
    let host = match address.ip() {
        ip if ip.is_unspecified() => "localhost".to_owned(),
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => format!("[{ip}]"),
    };
    let scheme = if is_tls { "https" } else { "http" };
    format!("{scheme}://{host}:{}", address.port())
}
