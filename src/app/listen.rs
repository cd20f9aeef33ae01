//! Sockets to listen on.

use std::{
    io::{self, ErrorKind},
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;

use super::plan::Error;

/// Connections that wait to be accepted; more than that many new ones at once are rare.
const BACKLOG: i32 = 4096;

/// Listens on an address, and tells which it became; `flags` are the options that name it.
///
/// The unspecified IPv6 address means IPv4 too, and stands for the unspecified IPv4 address where
/// the machine has no IPv6.
pub(super) fn bind(
    address: SocketAddr,
    flags: &'static str,
) -> Result<(TcpListener, SocketAddr), Error> {
    let is_any = address.is_ipv6() && address.ip().is_unspecified();
    let bound = match listen(address) {
        Err(error) if is_any && means_no_ipv6(&error) => {
            listen(SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), address.port()))
        }
        bound => bound,
    };
    bound
        .and_then(|listener| Ok((listener.local_addr()?, listener)))
        .map(|(address, listener)| (listener, address))
        .map_err(|source| Error::Listen { address, flags, source })
}

/// Whether the machine, and not somebody on it, stands against an address: a port that is taken is
/// no reason to listen elsewhere.
fn means_no_ipv6(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::AddrNotAvailable | ErrorKind::Unsupported)
        || error.raw_os_error() == Some(ADDRESS_FAMILY_NOT_SUPPORTED)
}

/// `EAFNOSUPPORT`, for which the standard library has no kind.
const ADDRESS_FAMILY_NOT_SUPPORTED: i32 = if cfg!(target_os = "linux") { 97 } else { 47 };

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use super::*;

    #[tokio::test]
    async fn a_taken_port_is_no_lack_of_ipv6() {
        let any = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 0);
        let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP));
        let taken = socket.and_then(|socket| {
            // Its IPv4 half stays free.
            socket.set_only_v6(true)?;
            socket.bind(&any.into())?;
            socket.listen(1)?;
            Ok(socket)
        });
        let taken = match taken {
            Ok(taken) => taken,
            Err(error) => {
                assert!(means_no_ipv6(&error), "{error}");
                assert!(bind(any, "--port").expect("listens on IPv4").1.is_ipv4());
                return;
            }
        };
        let address = taken.local_addr().expect("bound").as_socket().expect("an address");
        let error = bind(address, "--port").expect_err("the port is taken");
        let Error::Listen { source, .. } = error else { panic!("{error:?}") };
        assert_eq!(source.kind(), ErrorKind::AddrInUse, "{source}");
    }

    #[test]
    fn a_machine_without_ipv6_is_told_from_other_obstacles() {
        let check = |code| means_no_ipv6(&io::Error::from_raw_os_error(code));
        assert!(check(ADDRESS_FAMILY_NOT_SUPPORTED));
        assert!(means_no_ipv6(&ErrorKind::AddrNotAvailable.into()));
        for kind in [ErrorKind::AddrInUse, ErrorKind::PermissionDenied] {
            assert!(!means_no_ipv6(&kind.into()), "{kind}");
        }
    }
}
