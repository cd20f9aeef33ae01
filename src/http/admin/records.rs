//! What was done, and what was used: the audit log, applications, and flags' usage.

use jiff::{SignedDuration, Timestamp};

use super::{
    body::Query,
    operation::{MOST_EVENTS, MOST_HOURS},
};
use crate::{
    control::{ApplicationSummary, Control, Event, EventKind, EventQuery, Operator, UsageHour},
    http::reply::{self, Failure, Reply},
    wire::admin::{self as wire, Problems, Time},
};

/// How many events are told where nobody says.
const PAGE: u32 = 100;

/// How far back usage is told where nobody says, in hours.
const DAY: u32 = 24;

/// What was done, newest first.
pub(super) async fn events(
    control: &Control,
    operator: &Operator,
    query: &Query<'_>,
) -> Result<Reply, Failure> {
    let mut problems = Problems::default();
    let names = query.texts(&mut problems, "type");
    let kinds: Option<Vec<_>> = names.iter().map(|name| EventKind::parse(name)).collect();
    if kinds.is_none() {
        let known = EventKind::ALL.map(EventKind::as_str).join(", ");
        problems.add("type", format!("must be of {known}"));
    }
    let asked = EventQuery {
        kinds: kinds.unwrap_or_default(),
        created_by: query.text(&mut problems, "createdBy"),
        environment: query.text(&mut problems, "environment"),
        project: query.text(&mut problems, "project"),
        since: query.time(&mut problems, "from"),
        until: query.time(&mut problems, "to"),
        before: query.number(&mut problems, "before", 1, u32::MAX).map(i64::from),
        limit: query.number(&mut problems, "limit", 1, MOST_EVENTS).unwrap_or(PAGE),
        offset: query.number(&mut problems, "offset", 0, u32::MAX).unwrap_or(0),
    };
    problems.finish()?;
    let page = control.events(operator, &asked).await?;
    let events = page.events.into_iter().map(event).collect();
    Ok(reply::document(&wire::Events { version: 1, events, total_events: page.total }))
}

fn event(event: Event) -> wire::Event {
    wire::Event {
        id: event.id,
        r#type: event.kind,
        created_by: event.created_by,
        created_by_user_id: event.created_by_user_id,
        created_at: Time(event.created_at),
        ip: event.ip,
        environment: event.environment,
        project: event.project,
        data: event.data.unwrap_or_default(),
        pre_data: event.pre_data.unwrap_or_default(),
    }
}

/// The applications that use flags.
pub(super) async fn applications(control: &Control) -> Result<Reply, Failure> {
    let applications: Vec<_> = control.applications().await?.into_iter().map(application).collect();
    let total = applications.len();
    Ok(reply::document(&wire::Applications { applications, total }))
}

fn application(application: ApplicationSummary) -> wire::Application {
    wire::Application {
        app_name: application.name,
        environments: application.environments,
        sdk_versions: application.sdk_versions,
        strategies: application.strategies,
        instances: application.instances,
        created_at: Time(application.created_at),
        seen_at: Time(application.seen_at),
    }
}

/// How often a flag was used, by hour.
pub(super) async fn usage(
    control: &Control,
    flag: &str,
    query: &Query<'_>,
) -> Result<Reply, Failure> {
    let mut problems = Problems::default();
    let hours = query.number(&mut problems, "hoursBack", 1, MOST_HOURS).unwrap_or(DAY);
    problems.finish()?;
    let since = Timestamp::now() - SignedDuration::from_hours(i64::from(hours));
    let data = control.usage_of(flag, since).await?.into_iter().map(hour).collect();
    let feature_name = flag.to_owned();
    Ok(reply::document(&wire::FlagUsage { version: 1, maturity: "stable", feature_name, data }))
}

fn hour(hour: UsageHour) -> wire::UsageHour {
    wire::UsageHour {
        feature_name: hour.flag,
        app_name: hour.app_name,
        environment: hour.environment,
        timestamp: Time(hour.hour),
        yes: hour.yes,
        no: hour.no,
        variants: hour.variants,
    }
}
