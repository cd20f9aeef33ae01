//! A reply as bytes.

use bytes::Bytes;
use hyper::{Response, StatusCode, header::DATE};

use super::outgoing::Outgoing;

/// A reply that can be sent any number of times.
#[derive(Debug, Eq, PartialEq)]
pub struct Written {
    /// The head up to the value of `Date`, its last header.
    pub head: Bytes,
    /// What follows the head.
    pub body: Bytes,
}

impl Written {
    /// The reply as hyper writes it to who may go on asking on the same connection, by HTTP/1.1; `None`
    /// if it is not one that clients ask for again and again: something, or that nothing has changed.
    pub fn of(reply: &Response<Outgoing>) -> Option<Self> {
        let Outgoing::Whole(body) = reply.body() else { return None };
        let body = body.clone().unwrap_or_default();
        let is_complete = match reply.status() {
            StatusCode::OK => !body.is_empty(),
            StatusCode::NOT_MODIFIED => body.is_empty(),
            _ => false,
        };
        if !is_complete || reply.headers().contains_key(DATE) {
            return None;
        }
        let mut head = format!("HTTP/1.1 {}\r\n", reply.status()).into_bytes();
        for (name, value) in reply.headers() {
            for part in [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"] {
                head.extend_from_slice(part);
            }
        }
        if !body.is_empty() {
            head.extend_from_slice(format!("content-length: {}\r\n", body.len()).as_bytes());
        }
        head.extend_from_slice(b"date: ");
        Some(Self { head: head.into(), body })
    }
}
