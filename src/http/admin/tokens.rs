//! API tokens: listing, creating, changing when they end, deleting.

use bytes::Bytes;
use jiff::Timestamp;

use super::{body, catalogue::Catalogue};
use crate::{
    control::{Actor, ApiToken, Control, NewToken},
    http::reply::{self, Failure, Reply},
    token::{Environment, Project, Projects, TokenKind},
    wire::admin::{self as wire, Field, Id, Instant, Problems, Shown, Time},
};

/// The environment of a token for which none is named.
const DEFAULT_ENVIRONMENT: &str = "development";

/// Which tokens a list is of.
#[derive(Clone, Copy, Debug)]
pub(super) enum Wanted<'a> {
    /// All.
    All,
    /// Those of this name.
    Named(&'a str),
    /// Those that see this project.
    Of(&'a str),
}

/// The tokens that the caller may see.
pub(super) fn list(control: &Control, actor: &Actor, wanted: Wanted<'_>) -> Reply {
    let is_wanted = |token: &ApiToken| match wanted {
        Wanted::All => true,
        Wanted::Named(name) => token.name == name,
        Wanted::Of(project) => sees(token, project),
    };
    let tokens = control.tokens(&actor.operator).into_iter().filter(is_wanted).map(shown);
    reply::document(&wire::ApiTokens { tokens: tokens.collect() })
}

fn sees(token: &ApiToken, project: &str) -> bool {
    match &token.projects {
        Projects::All => true,
        Projects::Only(ids) => ids.contains(project),
    }
}

/// Creates a token, whose secret this answer alone holds; with a project, one that sees just that.
pub(super) async fn create(
    control: &Control,
    actor: &Actor,
    catalogue: &Catalogue,
    project: Option<&str>,
    body: &Bytes,
) -> Result<Reply, Failure> {
    let new = parse(body::read(body)?, catalogue, project)?;
    let (token, created) = control.create_token(actor, new).await?;
    let created = wire::ApiToken { secret: Shown::Secret(token), ..shown(created) };
    Ok(reply::created(&created, "api-tokens"))
}

fn parse(
    asked: wire::CreateToken,
    catalogue: &Catalogue,
    project: Option<&str>,
) -> Result<NewToken, Failure> {
    let mut problems = Problems::default();
    let name = problems.required("tokenName", asked.token_name.or(asked.username));
    let kind = problems.required("type", asked.r#type).map(|kind| kind.0);
    let environment = problems.optional("environment", asked.environment).map(|id| id.0);
    let single = problems.optional("project", asked.project);
    let listed = problems.optional("projects", asked.projects);
    let expires_at = ending(&mut problems, asked.expires_at);
    let projects = match (project, listed) {
        (Some(project), _) => vec![Id(project.to_owned())],
        (None, Some(listed)) => listed,
        (None, None) => vec![single.unwrap_or_else(|| Id("*".to_owned()))],
    };
    let environment = match kind {
        Some(TokenKind::Admin) => "*".to_owned(),
        _ => environment.unwrap_or_else(|| DEFAULT_ENVIRONMENT.to_owned()),
    };
    let for_sdks = matches!(kind, Some(TokenKind::Client | TokenKind::Frontend));
    if for_sdks && environment == "*" {
        problems.add("environment", "must be one: only admin tokens see all of them");
    } else if for_sdks && !catalogue.has_environment(&environment) {
        problems.add("environment", unknown(&environment, &catalogue.environment_names()));
    }
    if projects.is_empty() {
        problems.add("projects", "must name at least one, or `*` for all");
    }
    let missing = projects.iter().find(|id| id.0 != "*" && !catalogue.has_project(&id.0));
    if let Some(missing) = missing {
        problems.add("projects", unknown(&missing.0, &catalogue.project_ids()));
    }
    problems.finish().map_err(Failure::Invalid)?;
    // Nothing is missing where there is no problem.
    let (Some(name), Some(kind)) = (name, kind) else { return Err(Failure::Internal) };
    Ok(NewToken {
        name: name.0,
        kind,
        environment: Environment::new(&environment),
        projects: Projects::from_list(projects.iter().map(|id| id.0.as_str())),
        expires_at,
    })
}

/// An end that lies ahead.
fn ending(problems: &mut Problems, field: Field<Option<Instant>>) -> Option<Timestamp> {
    let end = problems.optional("expiresAt", field).flatten()?.0;
    if end <= Timestamp::now() {
        problems.add("expiresAt", "is over already");
    }
    Some(end)
}

/// How many names an error lists.
const MAX_LISTED: usize = 10;

fn unknown(name: &str, known: &[String]) -> String {
    let more = if known.len() > MAX_LISTED { ", …" } else { "" };
    let known: Vec<_> = known.iter().take(MAX_LISTED).map(String::as_str).collect();
    format!("`{name}` does not exist; there is {}{more}", known.join(", "))
}

/// Changes when a token ends; as with Unleash, one that is not there is no error.
pub(super) async fn update(
    control: &Control,
    actor: &Actor,
    token: &str,
    body: &Bytes,
) -> Result<Reply, Failure> {
    let asked: wire::UpdateToken = body::read(body)?;
    let mut problems = Problems::default();
    let end = problems.required("expiresAt", asked.expires_at);
    problems.finish().map_err(Failure::Invalid)?;
    let end = end.flatten().map(|end| end.0);
    control.update_token(actor, token, end).await?;
    Ok(reply::done())
}

/// Deletes a token; as with Unleash, one that is not there is no error.
pub(super) async fn delete(
    control: &Control,
    actor: &Actor,
    token: &str,
) -> Result<Reply, Failure> {
    control.delete_token(actor, token).await?;
    Ok(reply::done())
}

/// Deletes a token that sees this project and no other.
pub(super) async fn delete_of_project(
    control: &Control,
    actor: &Actor,
    project: &str,
    token: &str,
) -> Result<Reply, Failure> {
    let found = control.token(&actor.operator, token);
    let found = found.ok_or_else(|| Failure::Missing("there is no such token".to_owned()))?;
    let only = Projects::Only([Project::new(project)].into());
    if found.projects != only {
        return Err(Failure::Malformed("the token sees other projects too".to_owned()));
    }
    delete(control, actor, token).await
}

/// A token as lists show it.
fn shown(token: ApiToken) -> wire::ApiToken {
    let projects: Vec<_> = token.projects.to_list().into_iter().map(str::to_owned).collect();
    let project = match projects.as_slice() {
        [one] => one.clone(),
        _ => "[]".to_owned(),
    };
    wire::ApiToken {
        secret: Shown::Identifier(token.id),
        token_name: token.name,
        r#type: token.kind.as_str(),
        environment: token.environment.as_str().to_owned(),
        project,
        projects,
        expires_at: token.expires_at.map(Time),
        created_at: Time(token.created_at),
        created_by: token.created_by,
        seen_at: token.seen_at.map(Time),
        alias: None,
        secure: true,
        masked: token.masked.to_string(),
    }
}
