//! The rows of the main table: the most common requests of SDKs, with a goal for each.

use std::{collections::BTreeMap, time::Duration};

use anyhow::Result;

use super::{
    contender::{Bearer, Contender},
    exchange::{NUMBER, OCTET, Request, UNIQUE_NUMBER},
    load::{Draw, Over},
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
    ask: Ask,
    over: Over,
    /// Whether all requests are identical.
    is_repeated: bool,
}

/// The kind of a request.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ask {
    /// Flag configuration in a content encoding.
    Features(Option<&'static str>),
    /// Flag configuration with a current entity tag.
    FeaturesUnlessKnown,
    /// The evaluated flags of one user.
    Frontend,
    /// The evaluated flags of one user with a current entity tag.
    FrontendUnlessKnown,
    /// The evaluated flags of a new user each time.
    FrontendNewUser,
}

const UNCHANGED: Ask = Ask::FeaturesUnlessKnown;
const GZIP: Ask = Ask::Features(Some("gzip"));
const ZSTD: Ask = Ask::Features(Some("zstd"));

pub(crate) const ROWS: [Row; 15] = [
    Row::of("features-304", "`/api/client/features`, 304", 0.96, UNCHANGED),
    Row::of("features", "`/api/client/features`, 200, identity", 0.95, Ask::Features(None)),
    Row::of("features-gzip", "`/api/client/features`, 200, gzip", 0.95, GZIP),
    Row::of("features-br", "`/api/client/features`, 200, br", 0.95, Ask::Features(Some("br"))),
    Row::of("features-zstd", "`/api/client/features`, 200, zstd", 0.95, ZSTD),
    Row::of("frontend", "`/api/frontend`, same context again", 0.92, Ask::Frontend),
    Row::of("frontend-304", "`/api/frontend`, 304", 0.92, Ask::FrontendUnlessKnown),
    Row::of("frontend-new", "`/api/frontend`, a new user each request", 0.64, Ask::FrontendNewUser),
    Row {
        flags: 5,
        ..Row::of("five", "5 flags (2 kB), `/api/client/features`, 200", 0.95, Ask::Features(None))
    },
    Row {
        goal: None,
        is_repeated: true,
        ..Row::of("repeated", "`/api/client/features`, 304, same bytes each time", 0.0, UNCHANGED)
    },
    Row::tls("tls-304", "TLS, `/api/client/features`, 304", UNCHANGED, Over::Tls),
    Row::tls("tls-gzip", "TLS, `/api/client/features`, 200, gzip", GZIP, Over::Tls),
    Row::tls("tls-frontend", "TLS, `/api/frontend`, same context again", Ask::Frontend, Over::Tls),
    Row::tls("tls-full", "TLS, a full handshake for each 304", UNCHANGED, Over::NewTls),
    Row::tls("tls-resumed", "TLS, a resumed handshake for each 304", UNCHANGED, Over::ResumedTls),
];

/// The result of a row.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) row: &'static Row,
    pub(crate) measured: BTreeMap<Contender, Measured>,
}

impl Row {
    const fn of(id: &'static str, title: &'static str, goal: f64, ask: Ask) -> Self {
        let (over, is_repeated) = (Over::Tcp, false);
        Self { id, title, goal: Some(goal), flags: FLAGS, ask, over, is_repeated }
    }

    const fn tls(id: &'static str, title: &'static str, ask: Ask, over: Over) -> Self {
        Self { over, ..Self::of(id, title, 0.95, ask) }
    }

    pub(crate) fn run(&'static self, session: &Session) -> Result<Outcome> {
        eprintln!("{}", self.title);
        let all = [Contender::Bare, Contender::Parapet, Contender::Edge];
        let contenders = if self.over == Over::Tcp { &all[..] } else { &all[..2] };
        let case = if self.is_repeated {
            self.ask.repeated(self.flags)
        } else {
            self.ask.case(self.flags)
        };
        let case = Case { over: self.over, ..case };
        let measured = session.measure(&case, contenders, session.rounds)?;
        Ok(Outcome { row: self, measured })
    }
}

impl Outcome {
    /// Parapet's requests per second as a fraction of another contender's.
    pub(crate) fn ratio(&self, to: Contender) -> Option<f64> {
        Some(self.measured.get(&Contender::Parapet)?.ratio(self.measured.get(&to)?))
    }
}

impl Ask {
    /// The case with the headers of an ingress, for this number of flags.
    pub(crate) fn case(self, flags: usize) -> Case {
        let case = self.repeated(flags);
        Case { request: behind_ingress(case.request), ..case }
    }

    /// The case with requests as their client sends them, without an ingress.
    fn repeated(self, flags: usize) -> Case {
        let (bearer, path) = match self {
            Self::Features(_) | Self::FeaturesUnlessKnown => {
                (Bearer::Client, "/api/client/features".to_owned())
            }
            Self::Frontend | Self::FrontendUnlessKnown => (Bearer::Frontend, frontend("4711")),
            Self::FrontendNewUser => (Bearer::Frontend, frontend(NUMBER)),
        };
        let mut request = Request::get(&path).header("Authorization", &bearer.token());
        if bearer == Bearer::Client {
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
            draw: Draw::Next,
            over: Over::Tcp,
            expected: match self {
                Self::FeaturesUnlessKnown | Self::FrontendUnlessKnown => Expected::NotModified,
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
pub(crate) fn frontend(user: &str) -> String {
    let properties = [("country", "v7"), ("plan", "v12"), ("version", "1.5.2")]
        .map(|(name, value)| format!("&properties%5B{name}%5D={value}"));
    format!("/api/frontend?appName=v5&userId=user-{user}&sessionId=s-{user}{}", properties.concat())
}
