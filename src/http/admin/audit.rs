//! Operations on the audit log.

use super::request::QueryParams;
use crate::{
    control_plane::{AuditEvent, ControlPlane, EventKind, EventQuery, Operator},
    http::response::{self, HttpError, HttpResponse},
    protocol::admin::{self as wire, FieldErrors, Rfc3339Millis},
};

/// Lists audit events, newest first.
pub(super) async fn list_events(
    control: &ControlPlane,
    operator: &Operator,
    query: &QueryParams<'_>,
) -> Result<HttpResponse, HttpError> {
    let mut problems = FieldErrors::default();
    let names = query.texts(&mut problems, "type");
    let kinds: Option<Vec<_>> = names.iter().map(|name| EventKind::parse(name)).collect();
    if kinds.is_none() {
        let known = EventKind::ALL.map(EventKind::as_str).join(", ");
        problems.add("type", format!("must be one of {known}"));
    }
    let query = EventQuery {
        kinds: kinds.unwrap_or_default(),
        created_by: query.first_text(&mut problems, "createdBy"),
        environment: query.first_text(&mut problems, "environment"),
        project: query.first_text(&mut problems, "project"),
        since: query.timestamp(&mut problems, "from"),
        until: query.timestamp(&mut problems, "to"),
        before: query.number(&mut problems, "before", 1, u32::MAX).map(i64::from),
        limit: query
            .number(&mut problems, "limit", 1, EventQuery::MAX_LIMIT)
            .unwrap_or(EventQuery::DEFAULT_LIMIT),
        offset: query.number(&mut problems, "offset", 0, u32::MAX).unwrap_or(0),
    };
    problems.finish()?;
    let page = control.events(operator, &query).await?;
    let events = page.events.into_iter().map(event_json).collect();
    Ok(response::json_document(&wire::Events { version: 1, events, total_events: page.total }))
}

fn event_json(event: AuditEvent) -> wire::Event {
    wire::Event {
        id: event.id,
        r#type: event.kind,
        created_by: event.created_by,
        created_by_user_id: event.created_by_user_id,
        created_at: Rfc3339Millis(event.created_at),
        ip: event.ip,
        environment: event.environment,
        project: event.project,
        data: event.data.unwrap_or_default(),
        pre_data: event.pre_data.unwrap_or_default(),
    }
}
