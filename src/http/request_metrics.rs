//! Request metrics by route template, method and status, all from fixed sets.
//!
//! Every request is recorded, so these metrics bypass the shared registry, whose histograms queue each
//! sample until the next scrape. Here a request costs three additions to sharded counters, and memory
//! does not grow with the number of requests. This module records nothing else and serves nothing:
//! `health` appends [`RequestMetrics::render`] to the registry's own text.

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
    response::{self, HttpResponse},
    routes::{ROUTES, Route},
};
use crate::telemetry::{BYTES_BUCKETS, SECONDS_BUCKETS};

const REQUESTS: &str = "http_server_requests_total";
const DURATION: &str = "http_server_request_duration_seconds";
const SIZE: &str = "http_server_response_size_bytes";

const METHODS: [&str; 7] = ["GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "other"];

/// The statuses with a label value each, the most frequent first. Other statuses, which only relayed
/// responses have, are labelled by class.
const STATUSES: [u16; 19] =
    [200, 202, 304, 400, 401, 403, 404, 405, 408, 413, 415, 500, 503, 201, 204, 409, 429, 502, 504];
const STATUS_CLASSES: [&str; 5] = ["1xx", "2xx", "3xx", "4xx", "5xx"];
const STATUS_LABELS: usize = STATUSES.len() + STATUS_CLASSES.len();

/// The endpoint of a request, as a label.
#[derive(Clone, Copy, Debug)]
pub enum EndpointLabel {
    /// A route of the SDK port.
    Route(&'static Route),
    /// An admin operation, by its path template, which must be one of those passed to
    /// [`RequestMetrics::new`].
    AdminOperation(&'static str),
    /// A CORS preflight.
    Preflight,
    /// No known endpoint.
    Unknown,
}

impl EndpointLabel {
    /// The label value: a path template, `preflight` or `unknown`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Route(route) => route.path,
            Self::AdminOperation(template) => template,
            Self::Preflight => OTHER_LABELS[0],
            Self::Unknown => OTHER_LABELS[1],
        }
    }
}

/// The label values that follow those of routes.
const OTHER_LABELS: [&str; 2] = ["preflight", "unknown"];

/// Request counters and histograms; each series is allocated on first use.
#[derive(Debug)]
pub struct RequestMetrics {
    /// The label values of endpoints: routes, then [`OTHER_LABELS`], then admin operations whose
    /// template is not that of a route.
    endpoints: Box<[&'static str]>,
    series: Box<[OnceLock<Box<Series>>]>,
}

/// One series, sharded to reduce contention between threads.
#[derive(Debug, Default)]
struct Series([Shard; SHARDS]);

/// More than the number of threads on most machines. Further threads share a shard, which only costs
/// time.
const SHARDS: usize = 16;

/// Aligned so that no two shards share a cache line.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Shard {
    /// In nanoseconds.
    durations: Histogram<{ SECONDS_BUCKETS.len() + 1 }>,
    /// In bytes.
    sizes: Histogram<{ BYTES_BUCKETS.len() + 1 }>,
}

/// The number of values in each bucket, the last of which has no upper bound, and the sum of the values.
#[derive(Debug)]
struct Histogram<const BUCKETS: usize> {
    buckets: [AtomicU64; BUCKETS],
    sum: AtomicU64,
}

impl Default for RequestMetrics {
    fn default() -> Self {
        Self::new([])
    }
}

impl RequestMetrics {
    /// Metrics with a label value for each route and for each of these admin operation templates.
    pub fn new(operations: impl IntoIterator<Item = &'static str>) -> Self {
        let routes = ROUTES.iter().map(|route| route.path);
        let mut labels: Vec<_> = routes.chain(OTHER_LABELS).collect();
        for template in operations {
            if !labels.contains(&template) {
                labels.push(template);
            }
        }
        let count = labels.len() * METHODS.len() * STATUS_LABELS;
        let series = (0..count).map(|_| OnceLock::new()).collect();
        Self { endpoints: labels.into(), series }
    }

    /// Records one request and its response.
    #[expect(clippy::cast_precision_loss, reason = "bodies are far below 2^52 bytes")]
    pub fn record(
        &self,
        label: EndpointLabel,
        method: &Method,
        reply: &HttpResponse,
        took: Duration,
    ) {
        let (series, size) =
            (self.series_index(label, method, reply.status()), response::body_length(reply));
        let shard = &self.series[series].get_or_init(Box::default).0[shard_index()];
        let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        shard.durations.record(bucket_index(&SECONDS_BUCKETS, took.as_secs_f64()), nanoseconds);
        shard.sizes.record(bucket_index(&BYTES_BUCKETS, size as f64), size);
    }

    /// All series in Prometheus's text format.
    #[expect(clippy::cast_precision_loss, reason = "nanoseconds of a century are below 2^62")]
    pub fn render(&self) -> String {
        let measured: Vec<_> = self
            .series
            .iter()
            .enumerate()
            .filter_map(|(index, series)| Some((self.labels(index), series.get()?)))
            .collect();
        let mut text = Exposition::default();

        text.family(REQUESTS, "counter", "Requests served, by route, method and status");
        for (labels, series) in &measured {
            let requests: u64 = series.total(|shard| &shard.durations).0.iter().sum();
            text.sample(REQUESTS, labels, requests);
        }

        text.family(DURATION, "histogram", "Time from a request's head to its response");
        for (labels, series) in &measured {
            let (buckets, sum) = series.total(|shard| &shard.durations);
            text.histogram(DURATION, labels, &SECONDS_BUCKETS, &buckets, sum as f64 / 1e9);
        }

        text.family(SIZE, "histogram", "Size of response bodies as sent, after compression");
        for (labels, series) in &measured {
            let (buckets, sum) = series.total(|shard| &shard.sizes);
            text.histogram(SIZE, labels, &BYTES_BUCKETS, &buckets, sum);
        }
        text.0
    }

    /// The index of a series, computed from the indices of its three labels.
    fn series_index(&self, label: EndpointLabel, method: &Method, status: StatusCode) -> usize {
        let unknown = ROUTES.len() + 1;
        let label = match label {
            EndpointLabel::Route(route) => route.index,
            EndpointLabel::Preflight => ROUTES.len(),
            EndpointLabel::Unknown => unknown,
            EndpointLabel::AdminOperation(template) => {
                self.endpoints.iter().position(|label| *label == template).unwrap_or(unknown)
            }
        };
        let method = METHODS.iter().position(|it| *it == method.as_str());
        let method = method.unwrap_or(METHODS.len() - 1);
        let status = status.as_u16();
        let status = STATUSES.iter().position(|it| *it == status).unwrap_or_else(|| {
            let class = usize::from(status / 100).clamp(1, STATUS_CLASSES.len());
            STATUSES.len() + class - 1
        });
        (label * METHODS.len() + method) * STATUS_LABELS + status
    }

    /// The labels of the series at `index`. No label value needs escaping.
    fn labels(&self, index: usize) -> String {
        let status = index % STATUS_LABELS;
        let status = match STATUSES.get(status) {
            Some(status) => status.to_string(),
            None => STATUS_CLASSES[status - STATUSES.len()].to_owned(),
        };
        let method = METHODS[index / STATUS_LABELS % METHODS.len()];
        let route = self.endpoints[index / STATUS_LABELS / METHODS.len()];
        format!(
            r#"http_route="{route}",http_request_method="{method}",http_response_status_code="{status}""#
        )
    }
}

impl Series {
    fn total<const BUCKETS: usize>(
        &self,
        part: impl Fn(&Shard) -> &Histogram<BUCKETS>,
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

/// The index of the first bucket whose bound the value does not exceed. A linear search is fastest,
/// because most values are small.
fn bucket_index(bounds: &[f64], value: f64) -> usize {
    bounds.iter().position(|bound| value <= *bound).unwrap_or(bounds.len())
}

/// The shard of the current thread.
fn shard_index() -> usize {
    static THREADS: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static LANE: Cell<usize> = Cell::new(THREADS.fetch_add(1, Ordering::Relaxed) % SHARDS);
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

    fn sample(&mut self, name: &str, labels: &str, value: impl Display) {
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

    fn reply(status: u16, size: usize) -> HttpResponse {
        let mut reply = Response::new(Bytes::from(vec![b'x'; size]).into());
        *reply.status_mut() = StatusCode::from_u16(status).unwrap();
        reply
    }

    #[test]
    fn counts_of_all_threads_are_summed_in_the_exposition() {
        let meter = RequestMetrics::default();
        let label = EndpointLabel::Route(&ROUTES[0]);
        std::thread::scope(|scope| {
            for _ in 0..SHARDS + 3 {
                scope.spawn(|| {
                    meter.record(label, &Method::GET, &reply(200, 300), Duration::from_micros(50));
                    meter.record(label, &Method::GET, &reply(200, 256), Duration::from_mins(1));
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
    fn labels_of_each_series_are_unique() {
        let meter = RequestMetrics::new(["/status", "/internal-backstage/health", "/status"]);
        let labels: std::collections::HashSet<_> =
            (0..meter.series.len()).map(|index| meter.labels(index)).collect();
        assert_eq!(labels.len(), meter.series.len());
        let check = |label, method, status, expect: &str| {
            let labels = meter.labels(meter.series_index(label, &method, status));
            assert!(labels.contains(expect), "{labels}");
        };
        let unknown = r#""unknown",http_request_method="other""#;
        let teapot = format!(r#"{unknown},http_response_status_code="4xx""#);
        check(EndpointLabel::Unknown, Method::PATCH, StatusCode::IM_A_TEAPOT, &teapot);
        for (status, expect) in [(502, "\"502\""), (507, "\"5xx\""), (999, "\"5xx\"")] {
            let status = StatusCode::from_u16(status).unwrap();
            check(EndpointLabel::AdminOperation("/status"), Method::GET, status, expect);
        }
        let operation = r#""/status",http_request_method="PUT",http_response_status_code="409""#;
        check(
            EndpointLabel::AdminOperation("/status"),
            Method::PUT,
            StatusCode::CONFLICT,
            operation,
        );
        check(EndpointLabel::AdminOperation("/other"), Method::PATCH, StatusCode::OK, unknown);
        let health = ROUTES.iter().find(|route| route.path == "/internal-backstage/health");
        let health = health.expect("it is a route");
        assert_eq!(
            meter.series_index(EndpointLabel::Route(health), &Method::GET, StatusCode::OK),
            meter.series_index(
                EndpointLabel::AdminOperation("/internal-backstage/health"),
                &Method::GET,
                StatusCode::OK
            )
        );
    }
}
