//! The command line of `parapet token` and `parapet account`.
//!
//! Both work on the database of a standalone instance, which they find by its settings and which need
//! not run, or on a running server by its admin API.

use clap::{Arg, ArgAction, ArgMatches, Command, parser::ValueSource};
use jiff::Timestamp;
use reqwest::Url;

use super::error::ConfigError;
use crate::{
    control_plane::{RootRole, TokenPermission},
    protocol::rfc3339,
    token::{Environment, TokenKind},
};

/// A task of `token` or `account`.
#[derive(Clone, Debug)]
pub enum ManageTask {
    /// `token create`
    CreateToken {
        /// The name of the token.
        name: String,
        /// The kind of the token.
        kind: TokenKind,
        /// The environment that it can access.
        environment: String,
        /// The projects that it can access; empty is all.
        projects: Vec<String>,
        /// The time when it expires.
        expires_at: Option<Timestamp>,
    },
    /// `token list`
    ListTokens {
        /// List only tokens of this name.
        name: Option<String>,
    },
    /// `token revoke`
    RevokeToken {
        /// The identifier of the token; `None` reads it, or the token itself, from the standard input.
        identifier: Option<String>,
    },
    /// `account add`
    AddAccount {
        /// The name to sign in with.
        username: String,
        /// The role of the account.
        role: RootRole,
        /// The display name.
        name: Option<String>,
        /// The email address of the owner.
        email: Option<String>,
        /// The source of the password.
        password: PasswordSource,
    },
    /// `account list`
    ListAccounts,
    /// `account grant`
    Grant {
        /// The account.
        username: String,
        /// The permissions to grant or revoke.
        permissions: Vec<TokenPermission>,
        /// Whether to revoke them instead of granting them.
        revoke: bool,
    },
    /// `account password`
    SetPassword {
        /// The account.
        username: String,
        /// The source of the new password.
        password: PasswordSource,
    },
}

/// A parsed command line: the task, the server if there is one, and the output format.
#[derive(Clone, Debug)]
pub(super) struct ManageArgs {
    pub(super) task: ManageTask,
    pub(super) json: bool,
    /// `None` is the database of a standalone instance.
    pub(super) server: Option<RemoteServer>,
}

/// A running server with an admin API.
#[derive(Clone, Debug)]
pub struct RemoteServer {
    /// The base URL of its admin API.
    pub url: Url,
    /// The file with the admin token in its first line; `-` is the standard input. The token is never an
    /// argument, because other users of the machine can see arguments.
    pub token_file: String,
    /// Hosts that are reached without a proxy, as in `NO_PROXY`.
    pub no_proxy: String,
}

/// The source of a password; never an argument, because other users of the machine can see arguments.
#[derive(Clone, Debug)]
pub enum PasswordSource {
    /// It is generated, and printed once.
    Generated,
    /// The first line of this file; `-` is the standard input.
    File(String),
}

/// The subcommands `token` and `account`.
pub(super) fn commands() -> [Command; 2] {
    let text = |name: &'static str, value: &'static str, help: &'static str| {
        Arg::new(name).long(name).value_name(value).help(help)
    };
    let positional = |name: &'static str, help: &'static str| {
        Arg::new(name).value_name(name.to_ascii_uppercase()).help(help)
    };
    let password = || {
        text(
            "password-file",
            "PATH",
            "A file with the password in its first line, `-` for the standard input; by default a \
             password is generated and printed once",
        )
    };
    let token = Command::new("token")
        .about("Create, list and revoke API tokens")
        .subcommand_required(true)
        .after_help(
            "Examples:\n  parapet token create --name checkout --type backend --environment \
             production\n  parapet token list\n  parapet token revoke 4Zr1T2x0QmWQ7o9Yv3c8Kg\n  \
             parapet token list --json --url http://127.0.0.1:3064 --token-file admin.token",
        )
        .subcommand(
            Command::new("create")
                .about("Create a token; its secret is printed once")
                .arg(text("name", "TEXT", "The name of the token").required(true))
                .arg(text("type", "TYPE", "backend, frontend or admin").default_value("backend"))
                .arg(
                    text("environment", "NAME", "The environment that it can access")
                        .default_value(Environment::DEFAULT),
                )
                .arg(
                    text(
                        "project",
                        "ID",
                        "A project that it can access; repeatable, all by default",
                    )
                    .action(ArgAction::Append),
                )
                .arg(text("expires", "TIME", "When it expires, as in 2030-01-01T00:00:00Z")),
        )
        .subcommand(Command::new("list").about("List the tokens, without their secrets").arg(text(
            "name",
            "TEXT",
            "List only tokens of this name",
        )))
        .subcommand(
            Command::new("revoke").about("Delete a token").arg(
                // One identifier in 64 begins with a hyphen.
                positional(
                    "identifier",
                    "The identifier from `token list`; `-` reads it, or the token, from stdin",
                )
                .allow_hyphen_values(true)
                .required(true),
            ),
        );
    let account = Command::new("account")
        .about("Manage accounts")
        .subcommand_required(true)
        .after_help(
            "Examples:\n  parapet account add ann --role Editor\n  parapet account grant ann \
             CREATE_API_TOKEN\n  parapet account password admin",
        )
        .subcommand(
            Command::new("add")
                .about("Create an account")
                .arg(positional("username", "The name to sign in with").required(true))
                .arg(text("role", "ROLE", "Admin, Editor or Viewer").default_value("Viewer"))
                .arg(text("name", "TEXT", "The display name"))
                .arg(text("email", "TEXT", "The email address of the owner"))
                .arg(password()),
        )
        .subcommand(Command::new("list").about("List the accounts"))
        .subcommand(
            Command::new("grant")
                .about("Grant permissions beyond the role of an account")
                .arg(positional("username", "The account").required(true))
                .arg(
                    positional("permission", "A permission, as in CREATE_CLIENT_API_TOKEN")
                        .required(true)
                        .num_args(1..),
                )
                .arg(
                    Arg::new("revoke")
                        .long("revoke")
                        .action(ArgAction::SetTrue)
                        .help("Revoke the permissions instead of granting them"),
                ),
        )
        .subcommand(
            Command::new("password")
                .about("Set a new password for an account; ends its sessions")
                .arg(positional("username", "The account").required(true))
                .arg(password()),
        );
    [token, account].map(|command| {
        let server = [
            text(
                URL,
                "URL",
                "Use this server instead of a database: the admin listener of a running Parapet (an \
                 edge needs --admin-relay), or Unleash",
            )
            .requires(TOKEN_FILE),
            text(
                TOKEN_FILE,
                "PATH",
                "A file with the token for that server in its first line, `-` for the standard input",
            )
            .requires(URL),
            Arg::new(JSON).long(JSON).action(ArgAction::SetTrue).help("Print JSON instead of text"),
        ];
        command.args(server.map(|arg| arg.global(true)))
    })
}

const URL: &str = "url";
const TOKEN_FILE: &str = "token-file";
const JSON: &str = "json";

/// Parses the arguments of `token` or `account`.
pub(super) fn parse(command: &str, below: &ArgMatches) -> Result<ManageArgs, ConfigError> {
    let task = parse_task(command, below)?;
    let (_, args) = below.subcommand().expect("clap requires one");
    let mistake = |place: &str, reason: &str| {
        Err(ConfigError { location: format!("--{place}"), reason: reason.to_owned() })
    };
    let given = |name| args.get_one::<String>(name);
    let server = match (given(URL), given(TOKEN_FILE)) {
        (Some(url), Some(token_file)) => match url.parse::<Url>() {
            Ok(url) if matches!(url.scheme(), "http" | "https") => {
                Some(RemoteServer { url, token_file: token_file.clone(), no_proxy: String::new() })
            }
            _ => return mistake(URL, "expected a URL, as in http://127.0.0.1:3064"),
        },
        (None, None) => None,
        (Some(_), None) => return mistake(TOKEN_FILE, "is required with --url"),
        (None, Some(_)) => return mistake(URL, "is required with --token-file"),
    };
    let reads_input = match &task {
        ManageTask::RevokeToken { identifier } => identifier.is_none(),
        ManageTask::AddAccount { password, .. } | ManageTask::SetPassword { password, .. } => {
            matches!(password, PasswordSource::File(path) if path == "-")
        }
        _ => false,
    };
    if reads_input && server.as_ref().is_some_and(|server| server.token_file == "-") {
        return mistake(TOKEN_FILE, "the standard input cannot be read twice");
    }
    Ok(ManageArgs { task, json: args.get_flag(JSON), server })
}

fn parse_task(command: &str, below: &ArgMatches) -> Result<ManageTask, ConfigError> {
    let (verb, args) = below.subcommand().expect("clap requires one");
    let text = |name: &str| args.get_one::<String>(name).cloned();
    let needed = |name: &str| text(name).expect("clap requires it, or it has a default");
    let wrong = |place: &str, reason: String| ConfigError { location: place.to_owned(), reason };
    let password = || text("password-file").map_or(PasswordSource::Generated, PasswordSource::File);
    let expiry = |text: String| {
        let expected = || "expected a time, as in 2030-01-01T00:00:00Z".to_owned();
        rfc3339::parse(&text).ok_or_else(|| wrong("--expires", expected()))
    };
    let is_written = |name| args.value_source(name) == Some(ValueSource::CommandLine);
    Ok(match (command, verb) {
        ("token", "create") => {
            let kind = TokenKind::parse(&needed("type"))
                .ok_or_else(|| wrong("--type", "expected backend, frontend or admin".to_owned()))?;
            let narrowing = ["environment", "project"].into_iter().find(|name| is_written(name));
            if let (TokenKind::Admin, Some(name)) = (kind, narrowing) {
                let reason = "does not apply to an admin token, which can access all".to_owned();
                return Err(wrong(&format!("--{name}"), reason));
            }
            ManageTask::CreateToken {
                name: needed("name"),
                kind,
                environment: needed("environment"),
                projects: args.get_many("project").into_iter().flatten().cloned().collect(),
                expires_at: text("expires").map(expiry).transpose()?,
            }
        }
        ("token", "list") => ManageTask::ListTokens { name: text("name") },
        ("token", _) => {
            ManageTask::RevokeToken { identifier: text("identifier").filter(|text| text != "-") }
        }
        (_, "add") => {
            let name = needed("role");
            let role = RootRole::ALL.into_iter().find(|it| it.name().eq_ignore_ascii_case(&name));
            ManageTask::AddAccount {
                username: needed("username"),
                role: role.ok_or_else(|| {
                    wrong("--role", "expected Admin, Editor or Viewer".to_owned())
                })?,
                name: text("name"),
                email: text("email"),
                password: password(),
            }
        }
        (_, "list") => ManageTask::ListAccounts,
        (_, "grant") => {
            let mut permissions = Vec::new();
            for name in args.get_many::<String>("permission").into_iter().flatten() {
                let granted = TokenPermission::from_grant_name(name).ok_or_else(|| {
                    let known = TokenPermission::ALL.map(TokenPermission::as_str).join(", ");
                    wrong("PERMISSION", format!("expected {known} or CREATE_API_TOKEN"))
                })?;
                permissions.extend(granted);
            }
            let (username, revoke) = (needed("username"), args.get_flag("revoke"));
            ManageTask::Grant { username, permissions, revoke }
        }
        _ => ManageTask::SetPassword { username: needed("username"), password: password() },
    })
}

#[cfg(test)]
mod tests {
    use crate::config::{
        Command, Target,
        tests::{config_file, parse},
    };

    #[test]
    fn manage_reads_database_url_file_and_no_other_file() {
        let (_folder, path) = config_file("postgres://user:secret@host/db\n");
        let other = ("UNLEASH_DEFAULT_ADMIN_PASSWORD_FILE", "/nowhere");
        let env = [("DATABASE_URL_FILE", &*path), other];
        let Ok(Command::Manage(manage)) = parse("token list", &env) else { panic!() };
        assert!(matches!(
            manage.target,
            Target::Database(crate::control_plane::DatabaseLocation::Postgres(_))
        ));
        let line = format!("token list --database-url-file {path}");
        assert!(matches!(parse(&line, &[other]), Ok(Command::Manage(_))));
        assert!(parse("token list", &[("DATABASE_URL_FILE", "/nowhere")]).is_err());
    }

    #[test]
    fn token_identifier_may_begin_with_hyphen() {
        for line in ["token revoke -QRSb0aB --data-dir d", "token revoke --data-dir d -dRSb0aB"] {
            let Ok(Command::Manage(manage)) = parse(line, &[]) else { panic!("{line}") };
            assert!(format!("{manage:?}").contains("RSb0aB"), "{manage:?}");
        }
    }
}
