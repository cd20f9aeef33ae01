//! How cost grows with flags, tokens, connections and contexts.

use std::collections::BTreeMap;

use anyhow::Result;

use super::{
    contender::{Contender, TokenChoice},
    exchange::NUMBER,
    load::NumberSource,
    measure::{Case, Measured, Session},
    sdk_requests::{FLAGS, RequestKind, frontend_path},
};

/// More rounds would not make a curve more precise.
const ROUNDS: usize = 3;

const ALL: &[Contender] = &[Contender::Bare, Contender::Parapet, Contender::Edge];
const PAIR: &[Contender] = &[Contender::Bare, Contender::Parapet];

/// A growing quantity.
#[derive(Debug)]
pub(crate) struct Curve {
    /// Its id for `--only`.
    pub(crate) id: &'static str,
    /// The name of the quantity.
    pub(crate) axis: &'static str,
    pub(crate) request: &'static str,
    points: [u64; 4],
    contenders: &'static [Contender],
    case: fn(u64) -> Case,
}

pub(crate) const CURVES: [Curve; 6] = [
    Curve {
        id: "flags-304",
        axis: "flags",
        request: "`/api/client/features`, 304",
        points: [10, 100, 1_000, 10_000],
        contenders: ALL,
        case: |flags| RequestKind::FeaturesNotModified.case(count(flags)),
    },
    Curve {
        id: "flags-frontend",
        axis: "flags",
        request: "`/api/frontend`, same context again",
        points: [10, 100, 1_000, 10_000],
        contenders: ALL,
        case: |flags| RequestKind::Frontend.case(count(flags)),
    },
    Curve {
        id: "flags-new",
        axis: "flags",
        request: "`/api/frontend`, a new user each request",
        points: [10, 100, 1_000, 10_000],
        contenders: ALL,
        case: |flags| RequestKind::FrontendNewUser.case(count(flags)),
    },
    Curve {
        id: "tokens",
        axis: "distinct tokens",
        request: "`/api/client/features`, 304",
        points: [1, 100, 10_000, 100_000],
        contenders: PAIR,
        case: |tokens| {
            let mut case = RequestKind::FeaturesNotModified.case(FLAGS);
            let bearer = case.request.headers.iter_mut().find(|(name, _)| name == "Authorization");
            bearer.expect("every request bears a token").1 = TokenChoice::Numbered.token();
            Case { tokens, numbers: NumberSource::RandomBelow(tokens), ..case }
        },
    },
    Curve {
        id: "connections",
        axis: "connections",
        request: "`/api/client/features`, 304",
        points: [32, 128, 512, 2_000],
        contenders: ALL,
        case: |connections| Case {
            connections: count(connections),
            ..RequestKind::FeaturesNotModified.case(FLAGS)
        },
    },
    Curve {
        id: "contexts",
        axis: "distinct contexts",
        request: "`/api/frontend`",
        points: [1, 1_000, 100_000, 1_000_000],
        contenders: PAIR,
        case: |contexts| {
            let mut case = RequestKind::Frontend.case(FLAGS);
            case.request.path = frontend_path(NUMBER);
            Case { numbers: NumberSource::RandomBelow(contexts), ..case }
        },
    },
];

/// The results of a curve.
#[derive(Debug)]
pub(crate) struct CurveResult {
    pub(crate) curve: &'static Curve,
    pub(crate) points: Vec<(u64, BTreeMap<Contender, Measured>)>,
}

impl Curve {
    pub(crate) fn run(&'static self, session: &Session) -> Result<CurveResult> {
        let points = self.points.iter().map(|&point| {
            eprintln!("{}, {} {}", self.request, point, self.axis);
            let case = (self.case)(point);
            let measured = session.measure(&case, self.contenders, session.rounds.min(ROUNDS))?;
            Ok((point, measured))
        });
        Ok(CurveResult { curve: self, points: points.collect::<Result<_>>()? })
    }
}

fn count(count: u64) -> usize {
    usize::try_from(count).expect("points are small")
}
