//! Who is at the other end, as a load balancer says that passes connections through: the PROXY protocol,
//! versions 1 and 2.
//!
//! Its header precedes everything, TLS too. It is read byte for byte as long as it is, so that nothing of
//! what follows is taken. Whose headers are believed is decided elsewhere.

use std::{
    io::{self, ErrorKind},
    net::SocketAddr,
};

use ppp::{HeaderResult, v1, v2};
use tokio::io::{AsyncRead, AsyncReadExt as _};

/// How long the header of version 2 is that precedes the addresses.
const FIXED: usize = 16;

/// The longest part of it after that which is read: addresses of sockets, and a few hundred bytes of what
/// else a balancer has to say.
const LONGEST: usize = 2048;

/// The longest header of version 1, with the end of its line.
const LONGEST_LINE: usize = 107;

/// Reads a header. `None` where it names nobody: the balancer speaks for itself, to probe for instance.
///
/// # Errors
/// Where there is none, or none that can be read.
pub(super) async fn read<I: AsyncRead + Unpin>(io: &mut I) -> io::Result<Option<SocketAddr>> {
    let mut header = vec![0; v2::PROTOCOL_PREFIX.len()];
    io.read_exact(&mut header).await?;
    if header == v2::PROTOCOL_PREFIX {
        header.resize(FIXED, 0);
        io.read_exact(&mut header[v2::PROTOCOL_PREFIX.len()..]).await?;
        let rest = usize::from(u16::from_be_bytes([header[FIXED - 2], header[FIXED - 1]]));
        if rest > LONGEST {
            return Err(malformed("is longer than any"));
        }
        header.resize(FIXED + rest, 0);
        io.read_exact(&mut header[FIXED..]).await?;
    } else if header.starts_with(v1::PROTOCOL_PREFIX.as_bytes()) {
        while !header.ends_with(b"\r\n") {
            if header.len() == LONGEST_LINE {
                return Err(malformed("is longer than any"));
            }
            header.push(io.read_u8().await?);
        }
    } else {
        return Err(malformed("is missing"));
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
        HeaderResult::V1(Err(_)) | HeaderResult::V2(Err(_)) => Err(malformed("cannot be read")),
    }
}

fn malformed(why: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, format!("the PROXY protocol's header {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes of `header` with something behind it, and that this is left.
    async fn check(header: &[u8]) -> Option<Option<String>> {
        let bytes = [header, b"GET /"].concat();
        let mut io = &bytes[..];
        let told = read(&mut io).await.ok()?;
        assert_eq!(io, b"GET /", "nothing that follows is taken");
        Some(told.map(|address| address.to_string()))
    }

    fn version_2(command: u8, family: u8, addresses: &[u8]) -> Vec<u8> {
        let length = u16::try_from(addresses.len()).unwrap().to_be_bytes();
        [v2::PROTOCOL_PREFIX, &[command, family], &length, addresses].concat()
    }

    #[tokio::test]
    async fn both_versions_name_the_client_and_leave_what_follows() {
        let told = check(b"PROXY TCP4 192.0.2.7 192.0.2.1 50000 443\r\n").await;
        assert_eq!(told, Some(Some("192.0.2.7:50000".into())));
        let told = check(b"PROXY TCP6 2001:db8::7 2001:db8::1 50000 443\r\n").await;
        assert_eq!(told, Some(Some("[2001:db8::7]:50000".into())));
        assert_eq!(check(b"PROXY UNKNOWN\r\n").await, Some(None));

        let four = [192, 0, 2, 7, 192, 0, 2, 1, 0xc3, 0x50, 1, 0xbb];
        let told = check(&version_2(0x21, 0x11, &four)).await;
        assert_eq!(told, Some(Some("192.0.2.7:50000".into())));
        let with_more = [&four[..], &[4, 0, 3, 1, 2, 3]].concat();
        let told = check(&version_2(0x21, 0x11, &with_more)).await;
        assert_eq!(told, Some(Some("192.0.2.7:50000".into())));
        let six = [&[0x20, 1, 0xd, 0xb8][..], &[0; 11], &[7], &[0; 16], &[0xc3, 0x50, 1, 0xbb]];
        let told = check(&version_2(0x21, 0x21, &six.concat())).await;
        assert_eq!(told, Some(Some("[2001:db8::7]:50000".into())));
        assert_eq!(check(&version_2(0x20, 0x00, &[])).await, Some(None), "it speaks for itself");
        assert_eq!(
            check(&version_2(0x21, 0x00, &[])).await,
            Some(None),
            "it does not know whom for"
        );
    }

    #[tokio::test]
    async fn what_is_no_header_is_refused() {
        let long = format!("PROXY TCP4 {}\r\n", "1".repeat(200));
        for header in [
            &b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"[..],
            b"PROXY TCP4 192.0.2.7 192.0.2.1 50000\r\n",
            b"PROXY TCP4 nobody 192.0.2.1 50000 443\r\n",
            long.as_bytes(),
            &version_2(0x21, 0x11, &[1, 2]),
            &version_2(0x31, 0x11, &[0; 12]),
            &version_2(0x21, 0x11, &vec![0; 4000]),
            b"PROXY",
        ] {
            assert_eq!(check(header).await, None, "{}", String::from_utf8_lossy(header));
        }
    }
}
