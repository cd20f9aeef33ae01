//! Announces the new tokens of a standalone instance's first start, and how to use them.
//!
//! Secrets are printed on a terminal. Otherwise the output is a log that may be collected, so secrets
//! are written to a file that the log names.

use std::{
    io::{self, IsTerminal as _, Write},
    net::{IpAddr, SocketAddr},
    path::Path,
};

use tracing::{error, info, warn};

use crate::{
    control_plane::{BootstrapReport, GeneratedTokens, TokenBootstrapOutcome},
    secret_file,
    telemetry::{LogFormat, error_chain},
};

/// The file in the data directory with secrets that must not be logged.
const SECRETS_FILE: &str = "first-start.txt";

/// The address of a bound listener, and whether it uses TLS.
#[derive(Clone, Copy, Debug)]
pub(super) struct ListenerAddress {
    pub(super) address: SocketAddr,
    pub(super) is_tls: bool,
}

/// Announces what was created, once, with commands that work when pasted.
pub(super) fn announce_initial_credentials(
    opened: &BootstrapReport,
    addresses: (ListenerAddress, ListenerAddress),
    base_path: &str,
    log: LogFormat,
    data_dir: &Path,
) {
    if let Some(mut terminal) = open_terminal(log) {
        // If this goes unread, `parapet account password` and `token create` can replace the secrets.
        let _ = terminal
            .write_all(banner_text(opened, addresses, base_path, "shown only now").as_bytes());
        return;
    }
    if let Some(account) = &opened.account {
        let (username, console) = (account.username.as_str(), local_url(addresses.1));
        info!(username, console, "First start: created an admin account");
    }
    let has_password = opened.account.as_ref().is_some_and(|it| it.generated_password.is_some());
    if !has_password && !matches!(opened.tokens, TokenBootstrapOutcome::Generated(_)) {
        return;
    }
    let file = data_dir.join(SECRETS_FILE);
    let text = banner_text(opened, addresses, base_path, "stored nowhere else");
    match secret_file::write(&file, text.as_bytes()) {
        // A warning, so that it is logged at that level too: the operator has to act.
        Ok(()) => warn!(
            file = %file.display(),
            "The generated password and tokens are in a file that only its owner can read: read it, then delete it"
        ),
        Err(error) => error!(
            file = %file.display(),
            error = error_chain(&error),
            "The generated password and tokens could not be written and are lost; create others with `parapet account password` and `parapet token create`"
        ),
    }
}

/// The terminal, if output goes to one and is not collected as a log.
fn open_terminal(log: LogFormat) -> Option<Box<dyn Write>> {
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

/// The complete text; `once` states where the secrets are available.
fn banner_text(
    opened: &BootstrapReport,
    (data, admin): (ListenerAddress, ListenerAddress),
    base_path: &str,
    once: &str,
) -> String {
    let mut text = String::new();
    if let Some(account) = &opened.account {
        let (name, console) = (&account.username, local_url(admin));
        let password = match &account.generated_password {
            Some(password) => format!("{}   ({once})", password.expose()),
            None => "the configured one".to_owned(),
        };
        let account_text = format!(
            "
This is the first start. Open the console at {console} and sign in as

  username  {name}
  password  {password}
"
        );
        text.push_str(&account_text);
    }
    if let TokenBootstrapOutcome::Generated(generated) = &opened.tokens {
        text.push_str(&tokens_text(generated, (data, admin), base_path, once));
    }
    text
}

fn tokens_text(
    generated: &GeneratedTokens,
    (data, admin): (ListenerAddress, ListenerAddress),
    base_path: &str,
    once: &str,
) -> String {
    let GeneratedTokens { admin: admin_token, client, frontend } = generated;
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
        data = local_url(data),
        operators = local_url(admin),
    )
}

/// A URL that works on this machine.
fn local_url(ListenerAddress { address, is_tls }: ListenerAddress) -> String {
    let host = match address.ip() {
        ip if ip.is_unspecified() => "localhost".to_owned(),
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => format!("[{ip}]"),
    };
    let scheme = if is_tls { "https" } else { "http" };
    format!("{scheme}://{host}:{}", address.port())
}
