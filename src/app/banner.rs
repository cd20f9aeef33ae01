//! What the first start of a standalone instance tells its owner: new tokens, and how to use them.

use std::{
    io::{self, Write as _},
    net::{IpAddr, SocketAddr},
};

use crate::control::tokens::Generated;

/// Prints the tokens, once and nowhere else, with commands that work when pasted.
pub(super) fn announce(
    generated: &Generated,
    (data, admin): (SocketAddr, SocketAddr),
    base_path: &str,
) {
    let Generated { admin: admin_token, client, frontend } = generated;
    let (client, frontend) = (client.expose(), frontend.expose());
    let text = format!(
        "
This is the first start: these tokens were created and are shown only now.

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
    );
    // Nobody may be reading; the tokens can be had again by starting over with an empty data folder.
    let _ = io::stdout().write_all(text.as_bytes());
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
