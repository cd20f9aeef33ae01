//! Sockets to listen on.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;

use super::plan::Error;

/// Connections that wait to be accepted; more than that many new ones at once are rare.
const BACKLOG: i32 = 4096;

/// Listens on an address, and tells which it became.
///
/// The unspecified IPv6 address means IPv4 too, and stands for the unspecified IPv4 address where
/// the machine has no IPv6.
pub(super) fn bind(address: SocketAddr) -> Result<(TcpListener, SocketAddr), Error> {
    let bound = match listen(address) {
        Err(_) if address.is_ipv6() && address.ip().is_unspecified() => {
            listen(SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), address.port()))
        }
        bound => bound,
    };
    bound
        .and_then(|listener| Ok((listener.local_addr()?, listener)))
        .map(|(address, listener)| (listener, address))
        .map_err(|error| Error::Listen(address, error))
}

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
