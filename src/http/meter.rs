//! Measures requests: by route template, method and status, all from fixed sets.
//!
//! Measuring happens on every request, so it is kept apart from the registry, whose histograms queue
//! each sample until somebody reads them: here a request costs three additions to counters that
//! few threads share, and memory is the same after any number of requests. Nothing else is measured
//! here, and nothing is served: `ops` puts [`Meter::render`] behind the registry's own text.

use std::{
    cell::Cell,
    fmt::{Display, Write as _},
    sync::{
        OnceLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use hyper::{Method, StatusCode};

use super::{
    reply::{self, Reply},
    route::Route,
};
use crate::telemetry::{BYTES, SECONDS};

const REQUESTS: &str = "http_server_requests_total";
const DURATION: &str = "http_server_request_duration_seconds";
const SIZE: &str = "http_server_response_size_bytes";

const METHODS: [&str; 7] = ["GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "other"];

/// The statuses that are told apart; the most frequent first. All others, which only a relayed answer
/// has, are told by their hundreds.
const STATUSES: [u16; 19] =
    [200, 202, 304, 400, 401, 403, 404, 405, 408, 413, 415, 500, 503, 201, 204, 409, 429, 502, 504];
const HUNDREDS: [&str; 5] = ["1xx", "2xx", "3xx", "4xx", "5xx"];
const ANSWERS: usize = STATUSES.len() + HUNDREDS.len();

/// What a request turned out to be.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Subject<'a> {
    /// A route of ours.
    Route(Route<'a>),
    /// What operators ask, by its template, which is one that the meter was made with.
    Operation(&'static str),
    /// A browser's preflight.
    Preflight,
    /// Nothing of ours.
    Unknown,
}

/// What the labels of routes are followed by.
const OTHERS: [&str; 2] = ["preflight", "unknown"];

/// The series of requests; each is made when it is first needed.
#[derive(Debug)]
pub struct Meter {
    /// Of subjects: those of routes, the two others, and those of operations that no route has.
    labels: Box<[&'static str]>,
    series: Box<[OnceLock<Box<Series>>]>,
}

/// One series, in lanes that threads share as little as they can.
#[derive(Debug, Default)]
struct Series([Lane; LANES]);

/// More than the threads of most machines that this runs on: a thread beyond shares a lane, which
/// costs it time and nothing else.
const LANES: usize = 16;

/// On cache lines of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Lane {
    /// In nanoseconds.
    durations: Histogram<{ SECONDS.len() + 1 }>,
    /// In bytes.
    sizes: Histogram<{ BYTES.len() + 1 }>,
}

/// How many values fell below each bound but not below the one before, the last being infinity, and
/// their sum.
#[derive(Debug)]
struct Histogram<const BUCKETS: usize> {
    buckets: [AtomicU64; BUCKETS],
    sum: AtomicU64,
}

impl Default for Meter {
    fn default() -> Self {
        Self::new([])
    }
}

impl Meter {
    /// One that tells the operations of these templates apart, besides the routes.
    pub fn new(operations: impl IntoIterator<Item = &'static str>) -> Self {
        let mut labels = [&Route::TEMPLATES[..], &OTHERS].concat();
        for template in operations {
            if !labels.contains(&template) {
                labels.push(template);
            }
        }
        let count = labels.len() * METHODS.len() * ANSWERS;
        let series = (0..count).map(|_| OnceLock::new()).collect();
        Self { labels: labels.into(), series }
    }

    /// Counts one answered request.
    #[expect(clippy::cast_precision_loss, reason = "bodies are far below 2^52 bytes")]
    pub fn record(&self, subject: Subject<'_>, method: &Method, reply: &Reply, took: Duration) {
        let (series, size) = (self.index(subject, method, reply.status()), reply::length(reply));
        let lane = &self.series[series].get_or_init(Box::default).0[lane()];
        let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        lane.durations.record(bucket(&SECONDS, took.as_secs_f64()), nanoseconds);
        lane.sizes.record(bucket(&BYTES, size as f64), size);
    }

    /// Everything measured so far, in Prometheus's text format.
    #[expect(clippy::cast_precision_loss, reason = "nanoseconds of a century are below 2^62")]
    pub fn render(&self) -> String {
        let measured: Vec<_> = self
            .series
            .iter()
            .enumerate()
            .filter_map(|(index, series)| Some((self.labels(index), series.get()?)))
            .collect();
        let mut text = Exposition::default();

        text.family(REQUESTS, "counter", "Requests answered, by route, method and status");
        for (labels, series) in &measured {
            let requests: u64 = series.total(|lane| &lane.durations).0.iter().sum();
            text.line(REQUESTS, labels, requests);
        }

        text.family(DURATION, "histogram", "Time from a request's head to its answer");
        for (labels, series) in &measured {
            let (buckets, sum) = series.total(|lane| &lane.durations);
            text.histogram(DURATION, labels, &SECONDS, &buckets, sum as f64 / 1e9);
        }

        text.family(SIZE, "histogram", "Size of answers' bodies as they went out");
        for (labels, series) in &measured {
            let (buckets, sum) = series.total(|lane| &lane.sizes);
            text.histogram(SIZE, labels, &BYTES, &buckets, sum);
        }
        text.0
    }

    /// The place of a series, in the mixed base of its labels.
    fn index(&self, subject: Subject<'_>, method: &Method, status: StatusCode) -> usize {
        let unknown = Route::TEMPLATES.len() + 1;
        let subject = match subject {
            Subject::Route(route) => route.index(),
            Subject::Preflight => Route::TEMPLATES.len(),
            Subject::Unknown => unknown,
            Subject::Operation(template) => {
                self.labels.iter().position(|label| *label == template).unwrap_or(unknown)
            }
        };
        let method = METHODS.iter().position(|it| *it == method.as_str());
        let method = method.unwrap_or(METHODS.len() - 1);
        let status = status.as_u16();
        let answer = STATUSES.iter().position(|it| *it == status).unwrap_or_else(|| {
            let hundreds = usize::from(status / 100).clamp(1, HUNDREDS.len());
            STATUSES.len() + hundreds - 1
        });
        (subject * METHODS.len() + method) * ANSWERS + answer
    }

    /// The labels of the series at `index`; no value has a character that would need escaping.
    fn labels(&self, index: usize) -> String {
        let answer = index % ANSWERS;
        let status = match STATUSES.get(answer) {
            Some(status) => status.to_string(),
            None => HUNDREDS[answer - STATUSES.len()].to_owned(),
        };
        let method = METHODS[index / ANSWERS % METHODS.len()];
        let route = self.labels[index / ANSWERS / METHODS.len()];
        format!(
            r#"http_route="{route}",http_request_method="{method}",http_response_status_code="{status}""#
        )
    }
}

impl Series {
    fn total<const BUCKETS: usize>(
        &self,
        part: impl Fn(&Lane) -> &Histogram<BUCKETS>,
    ) -> ([u64; BUCKETS], u64) {
        let mut total = ([0; BUCKETS], 0);
        for histogram in self.0.iter().map(part) {
            for (sum, bucket) in total.0.iter_mut().zip(&histogram.buckets) {
                *sum += bucket.load(Ordering::Relaxed);
            }
            total.1 += histogram.sum.load(Ordering::Relaxed);
        }
        total
    }
}

impl<const BUCKETS: usize> Default for Histogram<BUCKETS> {
    fn default() -> Self {
        Self { buckets: [const { AtomicU64::new(0) }; BUCKETS], sum: AtomicU64::new(0) }
    }
}

impl<const BUCKETS: usize> Histogram<BUCKETS> {
    fn record(&self, bucket: usize, value: u64) {
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        if value > 0 {
            self.sum.fetch_add(value, Ordering::Relaxed);
        }
    }
}

/// The first bucket whose bound the value does not exceed. Most values are small: no search is
/// faster than looking at the bounds in turn.
fn bucket(bounds: &[f64], value: f64) -> usize {
    bounds.iter().position(|bound| value <= *bound).unwrap_or(bounds.len())
}

/// The lane of the thread that asks.
fn lane() -> usize {
    static THREADS: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static LANE: Cell<usize> = Cell::new(THREADS.fetch_add(1, Ordering::Relaxed) % LANES);
    }
    LANE.get()
}

/// Prometheus's text format, version 0.0.4.
#[derive(Debug, Default)]
struct Exposition(String);

impl Exposition {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.write(format_args!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
    }

    fn line(&mut self, name: &str, labels: &str, value: impl Display) {
        self.write(format_args!("{name}{{{labels}}} {value}\n"));
    }

    fn histogram(
        &mut self,
        name: &str,
        labels: &str,
        bounds: &[f64],
        buckets: &[u64],
        sum: impl Display,
    ) {
        let bounds = bounds.iter().map(ToString::to_string).chain(["+Inf".to_owned()]);
        let mut count = 0;
        for (bound, bucket) in bounds.zip(buckets) {
            count += bucket;
            self.write(format_args!("{name}_bucket{{{labels},le=\"{bound}\"}} {count}\n"));
        }
        self.write(format_args!("{name}_sum{{{labels}}} {sum}\n"));
        self.write(format_args!("{name}_count{{{labels}}} {count}\n"));
    }

    fn write(&mut self, text: std::fmt::Arguments<'_>) {
        self.0.write_fmt(text).expect("writing to a string cannot fail");
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use hyper::Response;

    use super::*;

    fn reply(status: u16, size: usize) -> Reply {
        let mut reply = Response::new(Bytes::from(vec![b'x'; size]).into());
        *reply.status_mut() = StatusCode::from_u16(status).unwrap();
        reply
    }

    #[test]
    fn what_threads_record_adds_up_in_the_text() {
        let meter = Meter::default();
        let subject = Subject::Route(Route::ClientFeatures);
        std::thread::scope(|scope| {
            for _ in 0..LANES + 3 {
                scope.spawn(|| {
                    meter.record(
                        subject,
                        &Method::GET,
                        &reply(200, 300),
                        Duration::from_micros(50),
                    );
                    meter.record(subject, &Method::GET, &reply(200, 256), Duration::from_mins(1));
                });
            }
        });
        let text = meter.render();
        let labels = r#"http_route="/api/client/features",http_request_method="GET",http_response_status_code="200""#;
        for (line, value) in [
            (format!("http_server_requests_total{{{labels}}}"), "38"),
            (
                format!("http_server_request_duration_seconds_bucket{{{labels},le=\"0.00005\"}}"),
                "19",
            ),
            (format!("http_server_request_duration_seconds_bucket{{{labels},le=\"10\"}}"), "19"),
            (format!("http_server_request_duration_seconds_bucket{{{labels},le=\"+Inf\"}}"), "38"),
            (format!("http_server_request_duration_seconds_sum{{{labels}}}"), "1140.00095"),
            (format!("http_server_request_duration_seconds_count{{{labels}}}"), "38"),
            (format!("http_server_response_size_bytes_bucket{{{labels},le=\"256\"}}"), "19"),
            (format!("http_server_response_size_bytes_sum{{{labels}}}"), "10564"),
        ] {
            assert!(text.lines().any(|it| it == format!("{line} {value}")), "{line}:\n{text}");
        }
    }

    #[test]
    fn every_series_has_labels_of_its_own() {
        let meter = Meter::new(["/status", "/internal-backstage/health", "/status"]);
        let labels: std::collections::HashSet<_> =
            (0..meter.series.len()).map(|index| meter.labels(index)).collect();
        assert_eq!(labels.len(), meter.series.len());
        let check = |subject, method, status, expect: &str| {
            let labels = meter.labels(meter.index(subject, &method, status));
            assert!(labels.contains(expect), "{labels}");
        };
        let unknown = r#""unknown",http_request_method="other""#;
        let teapot = format!(r#"{unknown},http_response_status_code="4xx""#);
        check(Subject::Unknown, Method::PATCH, StatusCode::IM_A_TEAPOT, &teapot);
        for (status, expect) in [(502, "\"502\""), (507, "\"5xx\""), (999, "\"5xx\"")] {
            let status = StatusCode::from_u16(status).unwrap();
            check(Subject::Operation("/status"), Method::GET, status, expect);
        }
        let operation = r#""/status",http_request_method="PUT",http_response_status_code="409""#;
        check(Subject::Operation("/status"), Method::PUT, StatusCode::CONFLICT, operation);
        check(Subject::Operation("/other"), Method::PATCH, StatusCode::OK, unknown);
        assert_eq!(
            meter.index(Subject::Route(Route::Health), &Method::GET, StatusCode::OK),
            meter.index(
                Subject::Operation("/internal-backstage/health"),
                &Method::GET,
                StatusCode::OK
            )
        );
    }
}
