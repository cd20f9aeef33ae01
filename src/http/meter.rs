//! Measures requests: by route template, method and status, all from fixed sets.
//!
//! Every series is looked up once and then kept, so that measuring a request costs a table look-up.

use std::{sync::OnceLock, time::Duration};

use hyper::{Method, StatusCode, body::Body as _};
use metrics::{Counter, Histogram, Unit, counter, describe_counter, describe_histogram, histogram};

use super::{reply::Reply, route::Route};

const REQUESTS: &str = "http_server_requests_total";
const DURATION: &str = "http_server_request_duration_seconds";
const SIZE: &str = "http_server_response_size_bytes";

const METHODS: [&str; 5] = ["GET", "POST", "HEAD", "OPTIONS", "other"];
const STATUSES: [u16; 14] = [200, 202, 304, 400, 401, 403, 404, 405, 408, 413, 415, 500, 503, 0];

/// What a request turned out to be.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Subject<'a> {
    /// A route of ours.
    Route(Route<'a>),
    /// A browser's preflight.
    Preflight,
    /// Nothing of ours.
    Unknown,
}

/// The labels of subjects: those of routes, then the two others.
const SUBJECTS: usize = Route::TEMPLATES.len() + 2;

impl Subject<'_> {
    fn index(self) -> usize {
        match self {
            Self::Route(route) => route.index(),
            Self::Preflight => Route::TEMPLATES.len(),
            Self::Unknown => Route::TEMPLATES.len() + 1,
        }
    }

    fn label(self) -> &'static str {
        match self {
            Self::Route(route) => Route::TEMPLATES[route.index()],
            Self::Preflight => "preflight",
            Self::Unknown => "unknown",
        }
    }
}

/// The series of one listener's requests.
#[derive(Debug)]
pub struct Meter(Box<[OnceLock<Series>]>);

#[derive(Debug)]
struct Series {
    requests: Counter,
    duration: Histogram,
    size: Histogram,
}

impl Default for Meter {
    fn default() -> Self {
        describe_counter!(REQUESTS, "Requests answered, by route, method and status");
        describe_histogram!(DURATION, Unit::Seconds, "Time from a request's head to its answer");
        describe_histogram!(SIZE, Unit::Bytes, "Size of answers' bodies as they went out");
        let count = SUBJECTS * METHODS.len() * STATUSES.len();
        Self((0..count).map(|_| OnceLock::new()).collect())
    }
}

impl Meter {
    /// Counts one answered request.
    #[expect(clippy::cast_precision_loss, reason = "bodies are far below 2^52 bytes")]
    pub fn record(&self, subject: Subject<'_>, method: &Method, reply: &Reply, took: Duration) {
        let series = self.series(subject, method, reply.status());
        series.requests.increment(1);
        series.duration.record(took.as_secs_f64());
        series.size.record(reply.body().size_hint().lower() as f64);
    }

    fn series(&self, subject: Subject<'_>, method: &Method, status: StatusCode) -> &Series {
        let method = METHODS.iter().position(|it| *it == method.as_str());
        let method = method.unwrap_or(METHODS.len() - 1);
        let status = STATUSES.iter().position(|it| *it == status.as_u16());
        let status = status.unwrap_or(STATUSES.len() - 1);
        let index = (subject.index() * METHODS.len() + method) * STATUSES.len() + status;
        self.0[index]
            .get_or_init(|| Series::new(subject.label(), METHODS[method], STATUSES[status]))
    }
}

impl Series {
    fn new(subject: &'static str, method: &'static str, status: u16) -> Self {
        let status = if status == 0 { "other".to_owned() } else { status.to_string() };
        let labels = [
            ("http_route", subject.to_owned()),
            ("http_request_method", method.to_owned()),
            ("http_response_status_code", status),
        ];
        Self {
            requests: counter!(REQUESTS, &labels),
            duration: histogram!(DURATION, &labels),
            size: histogram!(SIZE, &labels),
        }
    }
}
