//! The rows of the main table: the most common requests of SDKs, with a goal for each.

use std::{collections::BTreeMap, time::Duration};

use anyhow::Result;

use super::{
    contender::{Contender, TokenChoice},
    exchange::{NUMBER, OCTET, Request, UNIQUE_NUMBER},
    load::{NumberSource, Transport},
    measure::{Case, Expected, Measured, Session},
};

/// The number of flags, unless a row varies it.
pub(crate) const FLAGS: usize = 350;

/// The number of `wrk`'s connections, unless a row varies it.
pub(crate) const CONNECTIONS: usize = 32;

/// One row.
#[derive(Debug)]
pub(crate) struct Row {
    /// Its id for `--only`.
    pub(crate) id: &'static str,
    pub(crate) title: &'static str,
    /// The goal: requests per second as a fraction of the baseline's.
    pub(crate) goal: Option<f64>,
    flags: usize,
    request: RequestKind,
    transport: Transport,
    /// Whether all requests are identical.
    is_repeated: bool,
}

/// The kind of a request.
#[derive(Clone, Copy, Debug)]
pub(crate) enum RequestKind {
    /// Flag configuration in a content encoding.
    Features(Option<&'static str>),
    /// Flag configuration with a current entity tag.
    FeaturesNotModified,
    /// The evaluated flags of one user.
    Frontend,
    /// The evaluated flags of one user with a current entity tag.
    FrontendNotModified,
    /// The evaluated flags of a new user each time.
    FrontendNewUser,
}

const UNCHANGED: RequestKind = RequestKind::FeaturesNotModified;
const GZIP: RequestKind = RequestKind::Features(Some("gzip"));
const ZSTD: RequestKind = RequestKind::Features(Some("zstd"));

pub(crate) const ROWS: [Row; 15] = [
    Row::tcp("features-304", "`/api/client/features`, 304", 0.96, UNCHANGED),
    Row::tcp(
        "features",
        "`/api/client/features`, 200, identity",
        0.95,
        RequestKind::Features(None),
    ),
    Row::tcp("features-gzip", "`/api/client/features`, 200, gzip", 0.95, GZIP),
    Row::tcp(
        "features-br",
        "`/api/client/features`, 200, br",
        0.95,
        RequestKind::Features(Some("br")),
    ),
    Row::tcp("features-zstd", "`/api/client/features`, 200, zstd", 0.95, ZSTD),
    Row::tcp("frontend", "`/api/frontend`, same context again", 0.92, RequestKind::Frontend),
    Row::tcp("frontend-304", "`/api/frontend`, 304", 0.92, RequestKind::FrontendNotModified),
    Row::tcp(
        "frontend-new",
        "`/api/frontend`, a new user each request",
        0.64,
        RequestKind::FrontendNewUser,
    ),
    Row {
        flags: 5,
        ..Row::tcp(
            "five",
            "5 flags (2 kB), `/api/client/features`, 200",
            0.95,
            RequestKind::Features(None),
        )
    },
    Row {
        goal: None,
        is_repeated: true,
        ..Row::tcp("repeated", "`/api/client/features`, 304, same bytes each time", 0.0, UNCHANGED)
    },
    Row::tls("tls-304", "TLS, `/api/client/features`, 304", UNCHANGED, Transport::Tls),
    Row::tls("tls-gzip", "TLS, `/api/client/features`, 200, gzip", GZIP, Transport::Tls),
    Row::tls(
        "tls-frontend",
        "TLS, `/api/frontend`, same context again",
        RequestKind::Frontend,
        Transport::Tls,
    ),
    Row::tls("tls-full", "TLS, a full handshake for each 304", UNCHANGED, Transport::NewTls),
    Row::tls(
        "tls-resumed",
        "TLS, a resumed handshake for each 304",
        UNCHANGED,
        Transport::ResumedTls,
    ),
];

/// The result of a row.
#[derive(Debug)]
pub(crate) struct RowResult {
    pub(crate) row: &'static Row,
    pub(crate) measured: BTreeMap<Contender, Measured>,
}

impl Row {
    const fn tcp(id: &'static str, title: &'static str, goal: f64, request: RequestKind) -> Self {
        let (transport, is_repeated) = (Transport::Tcp, false);
        Self { id, title, goal: Some(goal), flags: FLAGS, request, transport, is_repeated }
    }

    const fn tls(
        id: &'static str,
        title: &'static str,
        ask: RequestKind,
        transport: Transport,
    ) -> Self {
        Self { transport, ..Self::tcp(id, title, 0.95, ask) }
    }

    pub(crate) fn run(&'static self, session: &Session) -> Result<RowResult> {
        eprintln!("{}", self.title);
        let all = [Contender::Bare, Contender::Parapet, Contender::Edge];
        let contenders = if self.transport == Transport::Tcp { &all[..] } else { &all[..2] };
        let case = if self.is_repeated {
            self.request.identical_case(self.flags)
        } else {
            self.request.case(self.flags)
        };
        let case = Case { transport: self.transport, ..case };
        let measured = session.measure(&case, contenders, session.rounds)?;
        Ok(RowResult { row: self, measured })
    }
}

impl RowResult {
    /// Parapet's requests per second as a fraction of another contender's.
    pub(crate) fn ratio(&self, to: Contender) -> Option<f64> {
        Some(self.measured.get(&Contender::Parapet)?.ratio(self.measured.get(&to)?))
    }
}

impl RequestKind {
    /// The case with the headers of an ingress, for this number of flags.
    pub(crate) fn case(self, flags: usize) -> Case {
        let case = self.identical_case(flags);
        Case { request: behind_ingress(case.request), ..case }
    }

    /// The case with requests as their client sends them, without an ingress.
    fn identical_case(self, flags: usize) -> Case {
        let (bearer, path) = match self {
            Self::Features(_) | Self::FeaturesNotModified => {
                (TokenChoice::Client, "/api/client/features".to_owned())
            }
            Self::Frontend | Self::FrontendNotModified => {
                (TokenChoice::Frontend, frontend_path("4711"))
            }
            Self::FrontendNewUser => (TokenChoice::Frontend, frontend_path(NUMBER)),
        };
        let mut request = Request::get(&path).header("Authorization", &bearer.token());
        if bearer == TokenChoice::Client {
            request = request.header("Unleash-Client-Spec", "5.2.0");
        }
        let coding = if let Self::Features(coding) = self { coding } else { None };
        if let Some(coding) = coding {
            request = request.header("Accept-Encoding", coding);
        }
        Case {
            flags,
            tokens: 0,
            connections: CONNECTIONS,
            pause: Duration::ZERO,
            request,
            numbers: NumberSource::Sequential,
            transport: Transport::Tcp,
            expected: match self {
                Self::FeaturesNotModified | Self::FrontendNotModified => Expected::NotModified,
                _ => Expected::Body(coding),
            },
        }
    }
}

/// Adds the headers of an ingress, which differ for each request; numbers have ten digits.
fn behind_ingress(request: Request) -> Request {
    request
        .header("X-Request-Id", &format!("5f2b6a1c-9e0d-4c7a-8b3e-0a{UNIQUE_NUMBER}"))
        .header(
            "Traceparent",
            &format!("00-0af7651916cd43dd8448eb{UNIQUE_NUMBER}-b7ad6b7169203331-01"),
        )
        .header("X-Forwarded-For", &format!("203.0.113.{OCTET}"))
}

/// The path of a browser's request for its user.
pub(crate) fn frontend_path(user: &str) -> String {
    let properties = [("country", "v7"), ("plan", "v12"), ("version", "1.5.2")]
        .map(|(name, value)| format!("&properties%5B{name}%5D={value}"));
    format!("/api/frontend?appName=v5&userId=user-{user}&sessionId=s-{user}{}", properties.concat())
}
