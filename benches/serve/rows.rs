//! The rows of the table: what SDKs ask most, with the goal of each.

use std::{collections::BTreeMap, time::Duration};

use anyhow::Result;

use super::{
    contender::{Bearer, Contender},
    exchange::{DRAWN, Request},
    load::Draw,
    measure::{Case, Expected, Measured, Session},
};

/// How many flags there are, unless a row is about that.
pub(crate) const FLAGS: usize = 350;

/// As many connections as `wrk` has in all rows that are not about that.
pub(crate) const CONNECTIONS: usize = 32;

/// One row.
#[derive(Debug)]
pub(crate) struct Row {
    /// What `--only` knows it by.
    pub(crate) id: &'static str,
    pub(crate) title: &'static str,
    /// Requests per second, as a share of the baseline's, if there is one.
    pub(crate) goal: Option<f64>,
    flags: usize,
    ask: Ask,
    /// Whether each request has a header of its own, as where they are traced, so that none is like
    /// the one before.
    is_traced: bool,
}

/// What is asked.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ask {
    /// The flags' configuration, in a coding.
    Features(Option<&'static str>),
    /// The configuration, unless it has changed.
    FeaturesUnlessKnown,
    /// The flags of one user.
    Frontend,
    /// The flags of one user, unless they have changed.
    FrontendUnlessKnown,
    /// The flags of a user who has not asked before.
    FrontendNewUser,
}

pub(crate) const ROWS: [Row; 11] = [
    Row::of("features-304", "`/api/client/features`, 304", 0.85, Ask::FeaturesUnlessKnown),
    Row::of("features", "`/api/client/features`, 200, identity", 0.90, Ask::Features(None)),
    Row::of(
        "features-gzip",
        "`/api/client/features`, 200, gzip",
        0.90,
        Ask::Features(Some("gzip")),
    ),
    Row::of("features-br", "`/api/client/features`, 200, br", 0.90, Ask::Features(Some("br"))),
    Row::of(
        "features-zstd",
        "`/api/client/features`, 200, zstd",
        0.90,
        Ask::Features(Some("zstd")),
    ),
    Row::of("frontend", "`/api/frontend`, same context again", 0.80, Ask::Frontend),
    Row::of("frontend-304", "`/api/frontend`, 304", 0.80, Ask::FrontendUnlessKnown),
    Row::of("frontend-new", "`/api/frontend`, a new user each request", 0.45, Ask::FrontendNewUser),
    Row {
        flags: 5,
        ..Row::of("five", "5 flags (2 kB), `/api/client/features`, 200", 0.85, Ask::Features(None))
    },
    Row::traced(
        "features-304-traced",
        "`/api/client/features`, 304, a new `traceparent` each",
        Ask::FeaturesUnlessKnown,
    ),
    Row::traced(
        "frontend-304-traced",
        "`/api/frontend`, 304, a new `traceparent` each",
        Ask::FrontendUnlessKnown,
    ),
];

/// What came of a row.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) row: &'static Row,
    pub(crate) measured: BTreeMap<Contender, Measured>,
}

impl Row {
    const fn of(id: &'static str, title: &'static str, goal: f64, ask: Ask) -> Self {
        Self { id, title, goal: Some(goal), flags: FLAGS, ask, is_traced: false }
    }

    const fn traced(id: &'static str, title: &'static str, ask: Ask) -> Self {
        Self { id, title, goal: None, flags: FLAGS, ask, is_traced: true }
    }

    pub(crate) fn run(&'static self, session: &Session) -> Result<Outcome> {
        eprintln!("{}", self.title);
        let contenders = [Contender::Bare, Contender::Parapet, Contender::Edge];
        let mut case = self.ask.case(self.flags);
        if self.is_traced {
            let trace = format!("00-0af7651916cd43dd8448eb211c80319c-{DRAWN}-01");
            case.request = case.request.header("traceparent", &trace);
            case.draw = Draw::Next;
        }
        let measured = session.measure(&case, &contenders, session.rounds)?;
        Ok(Outcome { row: self, measured })
    }
}

impl Outcome {
    /// Parapet's requests per second, as a share of another's.
    pub(crate) fn ratio(&self, to: Contender) -> Option<f64> {
        Some(self.measured.get(&Contender::Parapet)?.ratio(self.measured.get(&to)?))
    }
}

impl Ask {
    /// The request, of so many flags.
    pub(crate) fn case(self, flags: usize) -> Case {
        let (bearer, path) = match self {
            Self::Features(_) | Self::FeaturesUnlessKnown => {
                (Bearer::Client, "/api/client/features".to_owned())
            }
            Self::Frontend | Self::FrontendUnlessKnown => (Bearer::Frontend, frontend("4711")),
            Self::FrontendNewUser => (Bearer::Frontend, frontend(DRAWN)),
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
            draw: if let Self::FrontendNewUser = self { Draw::Next } else { Draw::Nothing },
            expected: match self {
                Self::FeaturesUnlessKnown | Self::FrontendUnlessKnown => Expected::NotModified,
                _ => Expected::Body(coding),
            },
        }
    }
}

/// What a browser asks for its user.
pub(crate) fn frontend(user: &str) -> String {
    let properties = [("country", "v7"), ("plan", "v12"), ("version", "1.5.2")]
        .map(|(name, value)| format!("&properties%5B{name}%5D={value}"));
    format!("/api/frontend?appName=v5&userId=user-{user}&sessionId=s-{user}{}", properties.concat())
}
