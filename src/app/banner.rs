//! What the first start of a standalone instance tells its owner: new tokens, and how to use them.

use std::{
    io::{self, Write as _},
    net::{IpAddr, SocketAddr},
};

use crate::control::{FoundTokens, Generated, Opened};

/// Prints what was created, once and nowhere else, with commands that work when pasted.
pub(super) fn announce(opened: &Opened, (data, admin): (SocketAddr, SocketAddr), base_path: &str) {
    let mut text = String::new();
    if let Some(account) = &opened.account {
        let (name, operators) = (&account.username, url(admin));
        let password = match &account.generated {
            Some(password) => format!("{}   (shown only now)", password.expose()),
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
        text.push_str(&tokens(generated, (data, admin), base_path));
    }
    // Nobody may be reading; `parapet account password` and `token create` make them anew.
    let _ = io::stdout().write_all(text.as_bytes());
}

fn tokens(
    generated: &Generated,
    (data, admin): (SocketAddr, SocketAddr),
    base_path: &str,
) -> String {
    let Generated { admin: admin_token, client, frontend } = generated;
    let (client, frontend) = (client.expose(), frontend.expose());
    format!(
        "
These tokens were created and are shown only now.

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
fn url(address: SocketAddr) -> String {
    let host = match address.ip() {
        ip if ip.is_unspecified() => "localhost".to_owned(),
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => format!("[{ip}]"),
    };
    format!("http://{host}:{}", address.port())
}
