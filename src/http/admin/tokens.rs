//! API tokens: listing, creating, changing when they end, deleting.

use bytes::Bytes;
use jiff::Timestamp;

use super::{body, catalogue::Catalogue};
use crate::{
    control::{Actor, ApiToken, Control, NewToken},
    http::reply::{self, Failure, Reply},
    token::{Environment, Project, Projects, TokenKind},
    wire::admin::{self as wire, Field, Id, Instant, MAX_PROJECTS, Problems, Shown, Time},
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
    let asked: wire::CreateToken = body::read(body)?;
    let kind = match &asked.r#type {
        Field::Is(kind) => Some(kind.0),
        Field::Missing | Field::Wrong(_) => None,
    };
    // Whoever may not do this at all is told that before anything else.
    control.require_create(actor, kind).await?;
    let new = parse(asked, catalogue, project)?;
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
    let expires_at = ending(&mut problems, asked.expires_at);
    let environment = environment(&mut problems, asked.environment, kind, catalogue);
    let projects = match project {
        Some(_) if kind == Some(TokenKind::Admin) => {
            problems.add("type", "must be another than admin, which sees all projects");
            None
        }
        Some(project) => Some(vec![Id(project.to_owned())]),
        None => projects(&mut problems, asked.projects, asked.project, kind, catalogue),
    };
    let new = || {
        Some(NewToken {
            name: name?.0,
            kind: kind?,
            environment: Environment::new(&environment?.0),
            projects: Projects::from_list(projects?.iter().map(|id| id.0.as_str())),
            expires_at,
        })
    };
    Ok(problems.or(new())?)
}

/// Why an admin token is for nothing less: whoever asks for less must not get more.
const SEES_ALL: &str = "must be *: admin tokens see all";

fn environment(
    problems: &mut Problems,
    field: Field<Id>,
    kind: Option<TokenKind>,
    catalogue: &Catalogue,
) -> Option<Id> {
    const NAME: &str = "environment";
    let field = match (field, kind) {
        (Field::Missing, Some(TokenKind::Admin)) => Field::Is(Id("*".to_owned())),
        (Field::Missing, _) => Field::Is(Id(DEFAULT_ENVIRONMENT.to_owned())),
        (field, _) => field,
    };
    let environment = problems.optional(NAME, field)?;
    match (kind, environment.0.as_str()) {
        (Some(TokenKind::Admin) | None, "*") => {}
        (Some(TokenKind::Admin), _) => problems.add(NAME, SEES_ALL),
        (Some(TokenKind::Client | TokenKind::Frontend), "*") => {
            problems.add(NAME, "must be one: only admin tokens see all of them");
        }
        (_, name) if !catalogue.has_environment(name) => {
            problems.add(NAME, unknown(name, &catalogue.environment_names()));
        }
        _ => {}
    }
    Some(environment)
}

fn projects(
    problems: &mut Problems,
    listed: Field<Vec<Id>>,
    single: Field<Id>,
    kind: Option<TokenKind>,
    catalogue: &Catalogue,
) -> Option<Vec<Id>> {
    let single = problems.optional("project", single);
    let (path, projects) = match (listed, single) {
        (Field::Missing, Some(single)) => ("project", vec![single]),
        (Field::Missing, None) => ("projects", vec![Id("*".to_owned())]),
        (listed, _) => ("projects", problems.optional("projects", listed)?),
    };
    if projects.is_empty() || projects.len() > MAX_PROJECTS {
        problems.add(path, format!("must name 1 to {MAX_PROJECTS}, or `*` for all"));
    } else if kind == Some(TokenKind::Admin) && projects.iter().any(|id| id.0 != "*") {
        problems.add(path, SEES_ALL);
    } else if let Some(missing) =
        projects.iter().find(|id| id.0 != "*" && !catalogue.has_project(&id.0))
    {
        problems.add(path, unknown(&missing.0, &catalogue.project_ids()));
    }
    Some(projects)
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
    problems.finish()?;
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
