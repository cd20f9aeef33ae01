//! Binds the listening sockets.

use std::{
    io::{self, ErrorKind},
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;

use crate::{
    config::{AdminListenerConfig, ConfigError, ConfigErrors, DataListenerConfig},
    telemetry::error_chain,
};

/// Connections that may wait to be accepted; bursts of more new ones are rare.
const ACCEPT_BACKLOG: i32 = 4096;

/// A listening socket with its address, which contains the actual port if port 0 was requested.
pub(super) type BoundSocket = (TcpListener, SocketAddr);

/// The sockets of an instance.
#[derive(Debug)]
pub(super) struct Sockets {
    pub(super) data: BoundSocket,
    /// Receives unencrypted requests, which are redirected.
    pub(super) redirect: Option<BoundSocket>,
    pub(super) admin: BoundSocket,
}

impl Sockets {
    /// Binds all sockets. An error names every address that cannot be bound, with the options that
    /// specify it.
    pub(super) fn bind(
        data: &DataListenerConfig,
        admin: &AdminListenerConfig,
    ) -> Result<Self, ConfigErrors> {
        let mut failures = Vec::new();
        let mut bind = |address, flags: &str| {
            let failed = |error| {
                let reason = format!("cannot listen on {address}: {}", error_chain(&error));
                failures.push(ConfigError { location: flags.to_owned(), reason });
            };
            bind(address).map_err(failed).ok()
        };
        let plain = "--interface and --port";
        let flags = if data.tls.is_some() { "--interface and --tls-server-port" } else { plain };
        let data_socket = bind(data.address, flags);
        let redirect = data.redirect_from.and_then(|address| bind(address, plain));
        let admin = bind(admin.address, "--admin-interface and --admin-port");
        ConfigErrors::check_empty(failures)?;
        let (data, admin) = data_socket.zip(admin).expect("an unbound socket is an error");
        Ok(Self { data, redirect, admin })
    }
}

/// Listens on an address.
///
/// The unspecified IPv6 address includes IPv4. It falls back to the unspecified IPv4 address if the
/// machine has no IPv6.
fn bind(address: SocketAddr) -> io::Result<BoundSocket> {
    let is_any = address.is_ipv6() && address.ip().is_unspecified();
    let listener = match listen(address) {
        Err(error) if is_any && is_ipv6_unavailable(&error) => {
            listen(SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), address.port()))
        }
        bound => bound,
    }?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

/// Whether the error means that the machine has no IPv6. A port in use is no reason to listen on another
/// address.
fn is_ipv6_unavailable(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::AddrNotAvailable | ErrorKind::Unsupported)
        || error.raw_os_error() == Some(EAFNOSUPPORT)
}

/// The error code for an unsupported address family, for which the standard library has no kind.
const EAFNOSUPPORT: i32 = if cfg!(target_os = "linux") { 97 } else { 47 };

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(ACCEPT_BACKLOG)?;
    TcpListener::from_std(socket.into())
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use super::*;

    #[tokio::test]
    async fn port_in_use_is_not_mistaken_for_missing_ipv6() {
        let any = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 0);
        let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP));
        let occupied = socket.and_then(|socket| {
            // Its IPv4 half remains free.
            socket.set_only_v6(true)?;
            socket.bind(&any.into())?;
            socket.listen(1)?;
            Ok(socket)
        });
        let occupied = match occupied {
            Ok(occupied) => occupied,
            Err(error) => {
                assert!(is_ipv6_unavailable(&error), "{error}");
                assert!(bind(any).expect("listens on IPv4").1.is_ipv4());
                return;
            }
        };
        let address = occupied.local_addr().expect("bound").as_socket().expect("an address");
        let error = bind(address).expect_err("the port is taken");
        assert_eq!(error.kind(), ErrorKind::AddrInUse, "{error}");
    }

    #[test]
    fn missing_ipv6_is_distinguished_from_other_errors() {
        let check = |code| is_ipv6_unavailable(&io::Error::from_raw_os_error(code));
        assert!(check(EAFNOSUPPORT));
        assert!(is_ipv6_unavailable(&ErrorKind::AddrNotAvailable.into()));
        for kind in [ErrorKind::AddrInUse, ErrorKind::PermissionDenied] {
            assert!(!is_ipv6_unavailable(&kind.into()), "{kind}");
        }
    }
}
