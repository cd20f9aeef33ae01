//! Operations on usage data: applications, and the hourly usage of flags.

use jiff::{SignedDuration, Timestamp};

use super::{operation::MAX_USAGE_HOURS, request::QueryParams};
use crate::{
    control_plane::{ApplicationSummary, ControlPlane, UsageHour},
    http::response::{self, HttpError, HttpResponse},
    protocol::admin::{self as wire, FieldErrors, Rfc3339Millis},
};

/// The default period of flag usage, in hours.
const DEFAULT_USAGE_HOURS: u32 = 24;

/// Lists the applications that use flags.
pub(super) async fn list_applications(control: &ControlPlane) -> Result<HttpResponse, HttpError> {
    let applications = control.applications().await?;
    let applications: Vec<_> = applications.into_iter().map(application_json).collect();
    let total = applications.len();
    Ok(response::json_document(&wire::Applications { applications, total }))
}

fn application_json(application: ApplicationSummary) -> wire::Application {
    wire::Application {
        app_name: application.name,
        environments: application.environments,
        sdk_versions: application.sdk_versions,
        strategies: application.strategies,
        instances: application.instances,
        created_at: Rfc3339Millis(application.created_at),
        seen_at: Rfc3339Millis(application.seen_at),
    }
}

/// The usage of a flag, by hour.
pub(super) async fn flag_usage(
    control: &ControlPlane,
    flag: &str,
    query: &QueryParams<'_>,
) -> Result<HttpResponse, HttpError> {
    let mut problems = FieldErrors::default();
    let hours =
        query.number(&mut problems, "hoursBack", 1, MAX_USAGE_HOURS).unwrap_or(DEFAULT_USAGE_HOURS);
    problems.finish()?;
    let since = Timestamp::now() - SignedDuration::from_hours(i64::from(hours));
    let data = control.flag_usage(flag, since).await?.into_iter().map(usage_hour_json).collect();
    let feature_name = flag.to_owned();
    Ok(response::json_document(&wire::FlagUsage {
        version: 1,
        maturity: "stable",
        feature_name,
        data,
    }))
}

fn usage_hour_json(hour: UsageHour) -> wire::UsageHour {
    wire::UsageHour {
        feature_name: hour.flag,
        app_name: hour.app_name,
        environment: hour.environment,
        timestamp: Rfc3339Millis(hour.hour),
        yes: hour.yes,
        no: hour.no,
        variants: hour.variants,
    }
}
