//! Health, readiness and metrics endpoints, for probes and scrapes. None needs a token.

use std::sync::Arc;

use metrics::{Unit, describe_counter, describe_gauge, gauge};
use metrics_exporter_prometheus::PrometheusHandle;
use serde_json::json;
use tokio::time::Instant;

use super::{
    request_metrics::RequestMetrics,
    response::{self, HttpResponse},
    routes::ProbeEndpoint,
};
use crate::{control_plane::ControlPlane, served::Snapshots, telemetry::Readiness, usage::Usage};

const SNAPSHOT_AGE: &str = "parapet_snapshot_age_seconds";
const SNAPSHOT_REVISION: &str = "parapet_snapshot_revision";
const SNAPSHOT_FLAGS: &str = "parapet_snapshot_flags";
const SNAPSHOT_PROBLEMS: &str = "parapet_snapshot_problems";

/// Health, readiness and metrics of the instance.
#[derive(Clone, Debug)]
pub struct HealthEndpoints {
    readiness: Readiness,
    registry: PrometheusHandle,
    snapshots: Snapshots,
    usage: Usage,
    request_metrics: Arc<RequestMetrics>,
    control: Option<ControlPlane>,
}

impl HealthEndpoints {
    /// Endpoints over these services; registers the descriptions of the snapshot metrics.
    pub fn new(
        readiness: Readiness,
        registry: PrometheusHandle,
        snapshots: Snapshots,
        usage: Usage,
        request_metrics: Arc<RequestMetrics>,
        control: Option<ControlPlane>,
    ) -> Self {
        describe_gauge!(
            SNAPSHOT_AGE,
            Unit::Seconds,
            "Time since the source last confirmed the flags; infinite if it has not since the start"
        );
        describe_gauge!(SNAPSHOT_REVISION, "Revision of the flags at their source");
        describe_counter!(
            "parapet_snapshot_swaps_total",
            "Number of times that changed flags replaced those served"
        );
        describe_gauge!(SNAPSHOT_FLAGS, "Flags in the environment");
        describe_gauge!(SNAPSHOT_PROBLEMS, "Malformed parts of flags, none of which ever matches");
        Self { readiness, registry, snapshots, usage, request_metrics, control }
    }

    /// Whether the instance accepts requests.
    pub fn is_ready(&self) -> bool {
        self.readiness.is_ready()
    }

    /// The response of one of these endpoints.
    pub fn respond(&self, endpoint: ProbeEndpoint) -> HttpResponse {
        match endpoint {
            ProbeEndpoint::Health => self.liveness(),
            ProbeEndpoint::Ready => self.ready(),
            ProbeEndpoint::Metrics => self.prometheus(),
        }
    }

    /// Always 200: the process is alive if it answers.
    pub fn liveness(&self) -> HttpResponse {
        response::json_text(r#"{"status":"OK"}"#)
    }

    /// 200 once the first flags are there (on an edge, of every environment that it knows at the start),
    /// until the instance drains; 503 before and after. An unreachable database does not make it unready, because flags are still
    /// served; the body then has a warning.
    pub fn ready(&self) -> HttpResponse {
        if self.readiness.is_ready() {
            let unreachable_since = self
                .control
                .as_ref()
                .and_then(|control| control.database_status().unreachable_since);
            return match unreachable_since {
                None => response::probe(true, r#"{"status":"READY"}"#),
                Some(since) => {
                    let warning = format!("the database has not answered since {since}");
                    let status = json!({"status": "READY", "warning": warning});
                    response::probe(true, status.to_string())
                }
            };
        }
        if self.readiness.is_draining() {
            return response::probe(
                false,
                r#"{"status":"DRAINING","error":"Parapet is shutting down"}"#,
            );
        }
        let error =
            format!("waiting for {}", self.readiness.pending_conditions().join(", and for "));
        response::probe(false, json!({"status": "NOTREADY", "error": error}).to_string())
    }

    /// The Prometheus exposition. Gauges of changing values, such as ages, are set here, at scrape time.
    #[expect(clippy::cast_precision_loss, reason = "counts and revisions are far below 2^52")]
    pub fn prometheus(&self) -> HttpResponse {
        let now = Instant::now();
        for (environment, snapshot) in &*self.snapshots.all() {
            let labels = [("environment", environment.as_str().to_owned())];
            let age = snapshot.age(now).map_or(f64::INFINITY, |age| age.as_secs_f64());
            gauge!(SNAPSHOT_AGE, &labels).set(age);
            gauge!(SNAPSHOT_FLAGS, &labels).set(snapshot.document().features().len() as f64);
            gauge!(SNAPSHOT_PROBLEMS, &labels).set(snapshot.problems().len() as f64);
            if let Some(revision) = snapshot.document().revision() {
                gauge!(SNAPSHOT_REVISION, &labels).set(revision as f64);
            }
        }
        self.usage.update_gauges();
        if let Some(control) = &self.control {
            control.database_status().record_metrics();
        }
        let mut text = self.registry.render();
        text.push_str(&self.request_metrics.render());
        response::prometheus(text)
    }
}
