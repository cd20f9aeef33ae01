//! A control plane on an empty SQLite or PostgreSQL database, and direct access to that database.

use std::time::Duration;

use parapet::auth::{self, Authenticator, Validator};
use parapet::control_plane::{
    Activity, Actor, BootstrapReport, Config, ControlPlane, CookieToken, DatabaseLocation,
    DatabaseUrl, EventQuery, InitialAccount, InitialTokens, Operator, Password, SignInAttempt,
    SignedIn,
};
use parapet::token::Token;
use sqlx::{AnyConnection, AssertSqlSafe, Connection as _, Executor as _};
use tempfile::TempDir;
use tokio::task::JoinSet;

use crate::rig::Postgres;

/// The password of the first account.
pub(super) const PASSWORD: &str = "correct horse battery";
/// The command line, which has every permission.
pub(super) const SHELL: Actor = Actor { operator: Operator::CommandLine, address: None };

/// An empty database.
pub(super) enum TestDatabase {
    Sqlite(TempDir),
    Postgres { url: String, name: String },
}

impl TestDatabase {
    pub(super) fn sqlite() -> Self {
        Self::Sqlite(tempfile::tempdir().unwrap())
    }

    pub(super) async fn postgres() -> Self {
        let server = Postgres::shared().await;
        let name = server.create_database().await;
        let url = format!("postgres://postgres@127.0.0.1:{}/{name}", server.port());
        Self::Postgres { url, name }
    }

    pub(super) fn config(&self) -> Config {
        let location = match self {
            Self::Sqlite(directory) => {
                DatabaseLocation::Sqlite(directory.path().join("control.db"))
            }
            Self::Postgres { url, .. } => {
                DatabaseLocation::Postgres(DatabaseUrl::parse(url).unwrap())
            }
        };
        Config {
            location,
            initial_tokens: InitialTokens::default(),
            initial_account: InitialAccount {
                username: "admin".to_owned(),
                password: Some(password(PASSWORD)),
            },
            token_limit: 20,
            account_limit: 5,
            session_idle_timeout: Duration::from_hours(8),
            session_lifetime: Duration::from_hours(24),
            event_retention: None,
            usage_retention: Duration::from_hours(24),
        }
    }

    pub(super) async fn open(&self) -> ControlPlane {
        self.open_with(self.config()).await.0
    }

    pub(super) async fn open_with(&self, config: Config) -> (ControlPlane, BootstrapReport) {
        ControlPlane::open(config, None, |_| ()).await.unwrap()
    }

    /// A separate connection to the database.
    pub(super) async fn connect(&self) -> AnyConnection {
        sqlx::any::install_default_drivers();
        let url = match self {
            Self::Sqlite(directory) => {
                format!("sqlite:{}?mode=rwc", directory.path().join("control.db").display())
            }
            Self::Postgres { url, .. } => url.clone(),
        };
        AnyConnection::connect(&url).await.unwrap()
    }

    /// A transaction on another connection that blocks every change which needs a session, until it
    /// ends.
    pub(super) async fn lock(&self) -> AnyConnection {
        let mut connection = self.connect().await;
        let statements = match self {
            Self::Sqlite(_) => &["BEGIN IMMEDIATE"][..],
            Self::Postgres { .. } => &["BEGIN", "LOCK TABLE sessions"],
        };
        for statement in statements {
            connection.execute(*statement).await.unwrap();
        }
        connection
    }

    /// Runs SQL without the control plane's knowledge.
    pub(super) async fn execute(&self, sql: &str) {
        self.connect().await.execute(AssertSqlSafe(sql)).await.unwrap();
    }

    /// The number that a query returns.
    pub(super) async fn count(&self, query: &str) -> i64 {
        let query = sqlx::query_scalar(AssertSqlSafe(query.to_owned()));
        query.fetch_one(&mut self.connect().await).await.unwrap()
    }

    /// The whole contents of the database, as bytes in which texts can be found.
    pub(super) async fn dump(&self) -> Vec<u8> {
        match self {
            Self::Sqlite(directory) => {
                let files = std::fs::read_dir(directory.path()).unwrap();
                files.flat_map(|file| std::fs::read(file.unwrap().path()).unwrap()).collect()
            }
            Self::Postgres { url, .. } => {
                let mut connection = sqlx::PgConnection::connect(url).await.unwrap();
                let tables: Vec<String> = sqlx::query_scalar(
                    "SELECT table_name::text FROM information_schema.tables \
                     WHERE table_schema = 'public'",
                )
                .fetch_all(&mut connection)
                .await
                .unwrap();
                let mut dump = Vec::new();
                for table in tables {
                    let rows = format!("SELECT it::text FROM {table} it");
                    let rows: Vec<String> = sqlx::query_scalar(AssertSqlSafe(rows))
                        .fetch_all(&mut connection)
                        .await
                        .unwrap();
                    dump.extend(rows.join("\n").into_bytes());
                }
                dump
            }
        }
    }
}

/// A running instance, to test which tokens it accepts.
pub(super) struct RunningInstance {
    auth: Authenticator,
    _running: JoinSet<()>,
}

impl RunningInstance {
    /// Runs `control`.
    pub(super) fn start(control: &ControlPlane) -> Self {
        let config = auth::Config {
            revalidate_after: Duration::from_mins(1),
            forget_invalid_after: Duration::from_mins(1),
            list_interval: Duration::from_mins(1),
            deadline: Duration::from_secs(1),
            capacity: 100,
        };
        let auth = Authenticator::new(config, Validator::StaticOnly, control.grants());
        let mut running = JoinSet::new();
        let (control, listener) = (control.clone(), auth.clone());
        running.spawn(async move { control.run(&listener).await });
        Self { auth, _running: running }
    }

    pub(super) async fn accepts(&self, token: &Token) -> bool {
        self.auth.authenticate(token.expose()).await.is_ok()
    }

    /// Waits until `token` is accepted or rejected, for at most one second, which is the promised limit.
    pub(super) async fn wait_until(&self, token: &Token, admitted: bool) {
        let what = format!("{token:?} is {}", if admitted { "admitted" } else { "refused" });
        let poll = async || (self.accepts(token).await == admitted).then_some(());
        crate::rig::wait_until(&what, Duration::from_secs(1), poll).await;
    }
}

pub(super) fn password(text: &str) -> Password {
    Password::parse(text).unwrap()
}

/// An attempt to sign in, from a fixed address.
pub(super) fn sign_in_attempt<'a>(username: &'a str, password: &'a Password) -> SignInAttempt<'a> {
    SignInAttempt { username, password, address: [192, 0, 2, 1].into(), device: None }
}

/// The first account, signed in.
pub(super) async fn sign_in_first_admin(control: &ControlPlane) -> SignedIn {
    control.sign_in(sign_in_attempt("admin", &password(PASSWORD))).await.unwrap()
}

/// The account of a session, as the actor of a change.
pub(super) async fn actor_of_session(control: &ControlPlane, session: &CookieToken) -> Actor {
    let address = [192, 0, 2, 1].into();
    let session =
        control.session(session.expose(), address, Activity::Interactive).await.unwrap().unwrap();
    Actor { operator: session.operator(), address: Some(address) }
}

/// Signs in with this name and password, and returns the account as the actor of a change.
pub(super) async fn sign_in_actor(
    control: &ControlPlane,
    username: &str,
    password: &Password,
) -> Actor {
    let signed_in = control.sign_in(sign_in_attempt(username, password)).await.unwrap();
    actor_of_session(control, &signed_in.session).await
}

/// The kinds of all events, oldest first.
pub(super) async fn event_kinds(control: &ControlPlane) -> Vec<String> {
    let query = EventQuery { limit: 1000, ..EventQuery::default() };
    let page = control.events(&SHELL.operator, &query).await.unwrap();
    page.events.into_iter().rev().map(|event| event.kind).collect()
}
