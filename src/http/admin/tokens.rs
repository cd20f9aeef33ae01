//! Operations on API tokens: list, create, change the expiry, delete.

use bytes::Bytes;
use jiff::Timestamp;

use super::{flag_catalogue::FlagCatalogue, request};
use crate::{
    control_plane::{Actor, ControlPlane, NewToken, TokenMetadata},
    http::response::{self, HttpError, HttpResponse},
    protocol::admin::{
        self as wire, Field, FieldErrors, Rfc3339, Rfc3339Millis, ScopeId, SecretOrIdentifier,
    },
    token::{Environment, Project, Projects, TokenKind},
};

/// Selects the tokens of a list.
#[derive(Clone, Copy, Debug)]
pub(super) enum TokenFilter<'a> {
    /// All tokens.
    All,
    /// Tokens with this name.
    Named(&'a str),
    /// Tokens with access to this project.
    InProject(&'a str),
}

/// Lists the tokens that the caller may see.
pub(super) fn list(control: &ControlPlane, actor: &Actor, filter: TokenFilter<'_>) -> HttpResponse {
    let is_selected = |token: &TokenMetadata| match filter {
        TokenFilter::All => true,
        TokenFilter::Named(name) => token.name == name,
        TokenFilter::InProject(project) => is_visible_in(token, project),
    };
    let tokens = control.tokens(&actor.operator).into_iter().filter(is_selected).map(token_json);
    response::json_document(&wire::ApiTokens { tokens: tokens.collect() })
}

fn is_visible_in(token: &TokenMetadata, project: &str) -> bool {
    match &token.projects {
        Projects::All => true,
        Projects::Only(ids) => ids.contains(project),
    }
}

/// Creates a token. Only this response contains its secret. With `project`, the token has access to that
/// project only.
pub(super) async fn create(
    control: &ControlPlane,
    actor: &Actor,
    catalogue: &FlagCatalogue,
    project: Option<&str>,
    body: &Bytes,
) -> Result<HttpResponse, HttpError> {
    let request: wire::CreateToken = request::parse_object(body)?;
    let kind = match &request.r#type {
        Field::Valid(kind) => Some(kind.0),
        Field::Missing | Field::Invalid(_) => None,
    };
    // A missing permission is reported before errors of the body.
    control.require_create_token(actor, kind).await?;
    let new = parse_new_token(request, catalogue, project)?;
    let (token, created) = control.create_token(actor, new).await?;
    let created =
        wire::ApiToken { secret: SecretOrIdentifier::Secret(token), ..token_json(created) };
    Ok(response::created(&created, "api-tokens"))
}

fn parse_new_token(
    request: wire::CreateToken,
    catalogue: &FlagCatalogue,
    project: Option<&str>,
) -> Result<NewToken, HttpError> {
    let mut problems = FieldErrors::default();
    let name = problems.required("tokenName", request.token_name.or_legacy(request.username));
    let kind = problems.required("type", request.r#type).map(|kind| kind.0);
    let expires_at = parse_expiry(&mut problems, request.expires_at);
    let environment = parse_environment(&mut problems, request.environment, kind, catalogue);
    let projects = match project {
        Some(_) if kind == Some(TokenKind::Admin) => {
            problems.add("type", "must not be admin: admin tokens see all projects");
            None
        }
        Some(project) => Some(vec![ScopeId(project.to_owned())]),
        None => parse_projects(&mut problems, request.projects, request.project, kind, catalogue),
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
    Ok(problems.into_result(new())?)
}

fn parse_environment(
    problems: &mut FieldErrors,
    field: Field<ScopeId>,
    kind: Option<TokenKind>,
    catalogue: &FlagCatalogue,
) -> Option<ScopeId> {
    const NAME: &str = "environment";
    let field = match (field, kind) {
        (Field::Missing, Some(TokenKind::Admin)) => Field::Valid(ScopeId("*".to_owned())),
        (Field::Missing, _) => Field::Valid(ScopeId(Environment::DEFAULT.to_owned())),
        (field, _) => field,
    };
    let environment = problems.optional(NAME, field)?;
    let name = environment.0.as_str();
    if let Err(reason) = NewToken::check_environment(kind, name) {
        problems.add(NAME, reason);
    } else if name != "*" && !catalogue.has_environment(name) {
        problems.add(NAME, unknown_name_error(name, &catalogue.environment_names()));
    }
    Some(environment)
}

fn parse_projects(
    problems: &mut FieldErrors,
    listed: Field<Vec<ScopeId>>,
    single: Field<ScopeId>,
    kind: Option<TokenKind>,
    catalogue: &FlagCatalogue,
) -> Option<Vec<ScopeId>> {
    let single = problems.optional("project", single);
    let (path, projects) = match (listed, single) {
        (Field::Missing, Some(single)) => ("project", vec![single]),
        (Field::Missing, None) => ("projects", vec![ScopeId("*".to_owned())]),
        (listed, _) => ("projects", problems.optional("projects", listed)?),
    };
    let ids: Vec<_> = projects.iter().map(|id| id.0.as_str()).collect();
    if let Err(reason) = NewToken::check_projects(kind, &ids) {
        problems.add(path, reason);
    } else if let Some(missing) = ids.iter().find(|id| **id != "*" && !catalogue.has_project(id)) {
        problems.add(path, unknown_name_error(missing, &catalogue.project_ids()));
    }
    Some(projects)
}

/// Parses the time of an expiry.
fn parse_expiry(problems: &mut FieldErrors, field: Field<Option<Rfc3339>>) -> Option<Timestamp> {
    let end = problems.optional("expiresAt", field).flatten()?.0;
    if let Err(reason) = NewToken::check_expiry(end) {
        problems.add("expiresAt", reason);
    }
    Some(end)
}

/// The maximum number of names in an error message.
const MAX_LISTED_NAMES: usize = 10;

fn unknown_name_error(name: &str, known: &[String]) -> String {
    let more = if known.len() > MAX_LISTED_NAMES { ", …" } else { "" };
    let known: Vec<_> = known.iter().take(MAX_LISTED_NAMES).map(String::as_str).collect();
    format!("`{name}` does not exist; existing ones are: {}{more}", known.join(", "))
}

/// Changes the expiry of a token. As in Unleash, a token that does not exist is no error.
pub(super) async fn update(
    control: &ControlPlane,
    actor: &Actor,
    token: &str,
    body: &Bytes,
) -> Result<HttpResponse, HttpError> {
    let request: wire::UpdateToken = request::parse_object(body)?;
    let mut problems = FieldErrors::default();
    let end = problems.required("expiresAt", request.expires_at);
    problems.finish()?;
    let end = end.flatten().map(|end| end.0);
    control.update_token(actor, token, end).await?;
    Ok(response::empty_ok())
}

/// Deletes a token. As in Unleash, a token that does not exist is no error.
pub(super) async fn delete(
    control: &ControlPlane,
    actor: &Actor,
    token: &str,
) -> Result<HttpResponse, HttpError> {
    control.delete_token(actor, token).await?;
    Ok(response::empty_ok())
}

/// Deletes a token that has access to this project only.
pub(super) async fn delete_from_project(
    control: &ControlPlane,
    actor: &Actor,
    project: &str,
    token: &str,
) -> Result<HttpResponse, HttpError> {
    let found = control.token(&actor.operator, token);
    let found =
        found.ok_or_else(|| HttpError::ResourceNotFound("there is no such token".to_owned()))?;
    let only = Projects::Only([Project::new(project)].into());
    if found.projects != only {
        return Err(HttpError::Malformed("the token has access to other projects too".to_owned()));
    }
    delete(control, actor, token).await
}

/// A token without its secret.
fn token_json(token: TokenMetadata) -> wire::ApiToken {
    let projects: Vec<_> = token.projects.to_list().into_iter().map(str::to_owned).collect();
    let project = match projects.as_slice() {
        [one] => one.clone(),
        _ => "[]".to_owned(),
    };
    wire::ApiToken {
        secret: SecretOrIdentifier::Identifier(token.id),
        token_name: token.name,
        r#type: token.kind.as_str(),
        environment: token.environment.as_str().to_owned(),
        project,
        projects,
        expires_at: token.expires_at.map(Rfc3339Millis),
        created_at: Rfc3339Millis(token.created_at),
        created_by: token.created_by,
        seen_at: token.seen_at.map(Rfc3339Millis),
        alias: None,
        secure: true,
        masked: token.masked.to_string(),
    }
}
