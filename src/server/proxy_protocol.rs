//! The PROXY protocol, versions 1 and 2: the client's address, as sent by a load balancer.
//!
//! The header precedes everything else, TLS included. Exactly its bytes are read, so that nothing that
//! follows is consumed. `http_server` decides whose headers are trusted.

use std::{
    io::{self, ErrorKind},
    net::SocketAddr,
};

use ppp::{HeaderResult, v1, v2};
use tokio::io::{AsyncRead, AsyncReadExt as _};

/// The size of the fixed part of a version 2 header, in bytes.
const V2_FIXED_HEADER_BYTES: usize = 16;

/// The maximum size of the rest of a version 2 header, in bytes: two socket addresses and a few hundred
/// bytes of extensions (TLVs).
const MAX_V2_BODY_BYTES: usize = 2048;

/// The maximum size of a version 1 header, in bytes, with the end of its line.
const MAX_V1_LINE_BYTES: usize = 107;

/// Reads a header. `None` if it names no client: the connection is the load balancer's own, a probe for
/// instance.
///
/// # Errors
/// The header is missing, too long or malformed.
pub(super) async fn read_header<I: AsyncRead + Unpin>(
    io: &mut I,
) -> io::Result<Option<SocketAddr>> {
    let mut header = vec![0; v2::PROTOCOL_PREFIX.len()];
    io.read_exact(&mut header).await?;
    if header == v2::PROTOCOL_PREFIX {
        header.resize(V2_FIXED_HEADER_BYTES, 0);
        io.read_exact(&mut header[v2::PROTOCOL_PREFIX.len()..]).await?;
        let rest = usize::from(u16::from_be_bytes([
            header[V2_FIXED_HEADER_BYTES - 2],
            header[V2_FIXED_HEADER_BYTES - 1],
        ]));
        if rest > MAX_V2_BODY_BYTES {
            return Err(header_error("is too long"));
        }
        header.resize(V2_FIXED_HEADER_BYTES + rest, 0);
        io.read_exact(&mut header[V2_FIXED_HEADER_BYTES..]).await?;
    } else if header.starts_with(v1::PROTOCOL_PREFIX.as_bytes()) {
        while !header.ends_with(b"\r\n") {
            if header.len() == MAX_V1_LINE_BYTES {
                return Err(header_error("is too long"));
            }
            header.push(io.read_u8().await?);
        }
    } else {
        return Err(header_error("is missing"));
    }
    match HeaderResult::parse(&header) {
        HeaderResult::V1(Ok(header)) => Ok(match header.addresses {
            v1::Addresses::Tcp4(it) => Some((it.source_address, it.source_port).into()),
            v1::Addresses::Tcp6(it) => Some((it.source_address, it.source_port).into()),
            v1::Addresses::Unknown => None,
        }),
        HeaderResult::V2(Ok(header)) => Ok(match (header.command, header.addresses) {
            (v2::Command::Proxy, v2::Addresses::IPv4(it)) => {
                Some((it.source_address, it.source_port).into())
            }
            (v2::Command::Proxy, v2::Addresses::IPv6(it)) => {
                Some((it.source_address, it.source_port).into())
            }
            (v2::Command::Local | v2::Command::Proxy, _) => None,
        }),
        HeaderResult::V1(Err(_)) | HeaderResult::V2(Err(_)) => Err(header_error("cannot be read")),
    }
}

fn header_error(why: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, format!("the PROXY protocol header {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads `header` with a request behind it, and asserts that the request is left.
    async fn read_from(header: &[u8]) -> Option<Option<String>> {
        let bytes = [header, b"GET /"].concat();
        let mut io = &bytes[..];
        let client = read_header(&mut io).await.ok()?;
        assert_eq!(io, b"GET /", "nothing that follows is consumed");
        Some(client.map(|address| address.to_string()))
    }

    fn v2_header(command: u8, family: u8, addresses: &[u8]) -> Vec<u8> {
        let length = u16::try_from(addresses.len()).unwrap().to_be_bytes();
        [v2::PROTOCOL_PREFIX, &[command, family], &length, addresses].concat()
    }

    #[tokio::test]
    async fn client_address_is_read_from_both_versions_and_following_bytes_are_left() {
        let client = read_from(b"PROXY TCP4 192.0.2.7 192.0.2.1 50000 443\r\n").await;
        assert_eq!(client, Some(Some("192.0.2.7:50000".into())));
        let client = read_from(b"PROXY TCP6 2001:db8::7 2001:db8::1 50000 443\r\n").await;
        assert_eq!(client, Some(Some("[2001:db8::7]:50000".into())));
        assert_eq!(read_from(b"PROXY UNKNOWN\r\n").await, Some(None));

        let four = [192, 0, 2, 7, 192, 0, 2, 1, 0xc3, 0x50, 1, 0xbb];
        let client = read_from(&v2_header(0x21, 0x11, &four)).await;
        assert_eq!(client, Some(Some("192.0.2.7:50000".into())));
        let with_more = [&four[..], &[4, 0, 3, 1, 2, 3]].concat();
        let client = read_from(&v2_header(0x21, 0x11, &with_more)).await;
        assert_eq!(client, Some(Some("192.0.2.7:50000".into())));
        let six = [&[0x20, 1, 0xd, 0xb8][..], &[0; 11], &[7], &[0; 16], &[0xc3, 0x50, 1, 0xbb]];
        let client = read_from(&v2_header(0x21, 0x21, &six.concat())).await;
        assert_eq!(client, Some(Some("[2001:db8::7]:50000".into())));
        assert_eq!(
            read_from(&v2_header(0x20, 0x00, &[])).await,
            Some(None),
            "a connection of the load balancer"
        );
        assert_eq!(
            read_from(&v2_header(0x21, 0x00, &[])).await,
            Some(None),
            "the client is unspecified"
        );
    }

    #[tokio::test]
    async fn missing_or_malformed_header_is_rejected() {
        let long = format!("PROXY TCP4 {}\r\n", "1".repeat(200));
        for header in [
            &b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"[..],
            b"PROXY TCP4 192.0.2.7 192.0.2.1 50000\r\n",
            b"PROXY TCP4 nobody 192.0.2.1 50000 443\r\n",
            long.as_bytes(),
            &v2_header(0x21, 0x11, &[1, 2]),
            &v2_header(0x31, 0x11, &[0; 12]),
            &v2_header(0x21, 0x11, &vec![0; 4000]),
            b"PROXY",
        ] {
            assert_eq!(read_from(header).await, None, "{}", String::from_utf8_lossy(header));
        }
    }
}
