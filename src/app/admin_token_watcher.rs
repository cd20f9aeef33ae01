//! Keeps the admin token current: polls its file, and updates everything that depends on the token.
//!
//! Whether upstream accepts the token is recorded where it is used; this module applies the result to
//! the edge's own admin listener.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use tokio::{
    sync::Notify,
    task::spawn_blocking,
    time::{MissedTickBehavior, interval, sleep},
};
use tracing::{info, warn};

use crate::{
    auth::Authenticator,
    http::sdk::SdkService,
    protocol::tokens::ListedSecret,
    telemetry::error_chain,
    token::{Environment, Grant, Projects, Scope, Token, TokenDigest, TokenKind},
    upstream::{AdminToken, AdminTokenError, AdminTokenState, EnvironmentTokens},
};

/// Interval at which the token's file is read. Comparing contents works on every kind of mount,
/// including the symbolic links of Kubernetes.
const FILE_POLL_INTERVAL: Duration = Duration::from_secs(2);

/// How long a changed file must stay unchanged, in case it is still being written.
const SETTLE_DELAY: Duration = Duration::from_millis(200);

/// Interval between log reminders that upstream rejects the token.
const REMINDER_INTERVAL: Duration = Duration::from_mins(3);

/// The grant of the admin token on the edge's own admin listener.
pub(super) fn admin_grant(token: &Token) -> (TokenDigest, Grant) {
    let scope = Scope { environment: Environment::new("*"), projects: Projects::All };
    (token.digest(), Grant { kind: TokenKind::Admin, scope })
}

/// Keeps the admin token current. A cheap handle.
#[derive(Clone, Debug)]
pub(super) struct AdminTokenWatcher {
    pub(super) admin: AdminToken,
    pub(super) auth: Authenticator,
    pub(super) credentials: EnvironmentTokens,
    /// Triggers an immediate search for environments.
    pub(super) token_added: Arc<Notify>,
    pub(super) data: Arc<SdkService>,
}

impl AdminTokenWatcher {
    /// Runs until dropped.
    pub(super) async fn run(&self) {
        let reencrypt = reencrypt_credentials(&self.admin, &self.credentials);
        tokio::join!(
            self.watch_file(),
            self.apply_changes(),
            reencrypt,
            log_reminders(&self.admin)
        );
    }

    /// Reads the token's file at an interval, and as soon as upstream rejects the token.
    async fn watch_file(&self) {
        let mut step = interval(FILE_POLL_INTERVAL);
        step.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut failure = None;
        loop {
            tokio::select! {
                _ = step.tick() => {}
                () = self.admin.reload_requested() => {}
            }
            let Some(file) = self.admin.file() else { continue };
            match self.read_changed_token(&file).await {
                Ok(None) => failure = None,
                Ok(Some(token)) => {
                    failure = None;
                    info!(
                        token = %token.masked(),
                        file = %file.display(),
                        "The admin token was replaced by its file"
                    );
                    self.admin.replace(token, Some(file));
                }
                Err(error) => {
                    let error = error_chain(&error);
                    if failure.as_ref() != Some(&error) {
                        warn!(error, "Cannot read the admin token's file; the token stays in use");
                    }
                    failure = Some(error);
                }
            }
        }
    }

    /// The token in `file` if it differs from the current one.
    async fn read_changed_token(&self, file: &Path) -> Result<Option<Token>, AdminTokenError> {
        let token = read_token(file.to_owned()).await?;
        if token == *self.admin.current() {
            return Ok(None);
        }
        sleep(SETTLE_DELAY).await;
        Ok((read_token(file.to_owned()).await? == token).then_some(token))
    }

    /// Applies changes of the token, and of whether upstream accepts it.
    async fn apply_changes(&self) {
        let mut changes = self.admin.subscribe();
        let mut before = changes.borrow_and_update().clone();
        // This task may have been restarted in the middle of a change.
        self.update_admin_grant(&before);
        // Whether environments may have been missed for a while.
        let mut interrupted = before.is_refused();
        loop {
            if changes.changed().await.is_err() {
                return;
            }
            let now = changes.borrow_and_update().clone();
            self.update_admin_grant(&now);
            let is_replaced = now.token() != before.token();
            if is_replaced {
                self.data.stream_tickets.replace_token_key(now.token(), Timestamp::now());
                // Reads the token list, which shows whether upstream accepts the token.
                self.auth.revalidate(None);
            }
            if is_replaced || (interrupted && now.is_accepted()) {
                self.token_added.notify_one();
            }
            interrupted = !now.is_accepted() && (interrupted || is_replaced || now.is_refused());
            before = now;
        }
    }

    /// Grants the token access to the edge's own admin listener unless upstream rejects it.
    fn update_admin_grant(&self, state: &AdminTokenState) {
        let grant = (!state.is_refused()).then(|| admin_grant(state.token()));
        self.auth.set_local_tokens(grant);
        if state.is_refused() {
            // Token lists have validated it too.
            self.auth.revoke(&ListedSecret::Full(Token::clone(state.token())));
        }
    }
}

/// Encrypts the stored credentials with each new token.
///
/// Separate from [`AdminTokenWatcher::apply_changes`], because it may have to wait for upstream.
async fn reencrypt_credentials(admin: &AdminToken, credentials: &EnvironmentTokens) {
    let mut changes = admin.subscribe();
    let mut before = Arc::clone(changes.borrow_and_update().token());
    while changes.changed().await.is_ok() {
        let now = Arc::clone(changes.borrow_and_update().token());
        if now != before {
            credentials.reencrypt().await;
            before = now;
        }
    }
}

/// Logs reminders while upstream rejects the token, but none soon after the first rejection, which is logged
/// by itself.
async fn log_reminders(admin: &AdminToken) {
    loop {
        sleep(REMINDER_INTERVAL).await;
        if let Some(duration) = admin.refused_for().filter(|it| *it >= REMINDER_INTERVAL) {
            let minutes = duration.as_secs() / 60;
            warn!(
                minutes,
                "Upstream still rejects the admin token: tokens are not listed and new environments are not found until it is replaced"
            );
        }
    }
}

async fn read_token(file: PathBuf) -> Result<Token, AdminTokenError> {
    let read = spawn_blocking(move || AdminToken::read(&file)).await;
    read.expect("reading a file does not panic")
}

#[cfg(test)]
mod tests {
    use std::{
        io,
        sync::{Mutex, PoisonError},
    };

    use tokio::time::timeout;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::{
        background_writer::BackgroundWriter,
        store::{FileStore, RecordKey, Store as _},
        upstream::{Upstream, scripted_server::config},
    };

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl Log {
        fn take(&self) -> String {
            let mut log = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            String::from_utf8(std::mem::take(&mut *log)).expect("text")
        }
    }

    impl io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn rejected_admin_token_is_logged_repeatedly_until_replaced() {
        let log = Log::default();
        let writer = log.clone();
        let lines = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
        let _guard = tracing::subscriber::set_default(lines);
        let token = |text| Token::parse(text).expect("token");
        let admin = AdminToken::new(token("*:*.first"), None);
        let reminders = timeout(4 * REMINDER_INTERVAL, log_reminders(&admin));
        admin.mark_refused_for_test();
        log.take();
        assert!(reminders.await.is_err(), "it does not end");
        let logged = log.take();
        assert!(logged.matches("still rejects the admin token").count() >= 3, "{logged}");
        assert!(!logged.contains("first"), "{logged}");
        admin.replace(token("*:*.second"), None);
        assert!(timeout(4 * REMINDER_INTERVAL, log_reminders(&admin)).await.is_err());
        assert_eq!(log.take(), "");
    }

    /// A token for the environment `dev`, encrypted with the admin token `*:*.admin` for the fleet
    /// `main`.
    const RECORD: &[u8] =
        br#"{"version":1,"minted":true,"selector":null,"projects":["*"],"sealed":[
        198, 183, 113, 121, 8, 160, 54, 149, 170, 79, 162, 3, 217, 40, 35, 18, 78, 192,
        187, 218, 82, 147, 167, 179, 133, 52, 40, 101, 195, 239, 215, 198, 23, 61, 31,
        131, 50, 185, 83, 122, 174, 16, 94, 71, 42, 226, 130, 226, 151, 117, 218, 221,
        244, 123, 133, 146, 224, 254, 8, 50, 72, 117, 76, 151, 10, 54, 70, 253, 206, 67]}"#;

    #[tokio::test(start_paused = true)]
    async fn credential_is_reencrypted_once_the_disk_works_again() {
        let folder = tempfile::tempdir().expect("folder");
        let (disk, elsewhere) = (folder.path().join("disk"), folder.path().join("elsewhere"));
        let store = Arc::new(FileStore::open(&disk).expect("store"));
        let (writer, stop) =
            (BackgroundWriter::new(Arc::<FileStore>::clone(&store)), CancellationToken::new());
        let dev = Environment::new("dev");
        store.save(&RecordKey::Credentials(dev.clone()), RECORD.into()).await.expect("saved");
        let admin = |text| AdminToken::new(Token::parse(text).expect("token"), None);
        let edge = |admin: &AdminToken| {
            let unreachable = Upstream::new(config("http://127.0.0.1:1")).expect("client");
            EnvironmentTokens::with_admin(admin.clone(), "main", unreachable, writer.clone())
        };
        let first = admin("*:*.admin");
        let credentials = edge(&first);
        let stored = credentials.obtain(&dev).await.expect("the stored token");
        let second = Token::parse("*:*.second").expect("token");
        let replace = async {
            std::fs::rename(&disk, &elsewhere).expect("moved");
            first.replace(second, None);
            sleep(Duration::from_mins(1)).await;
            std::fs::rename(&elsewhere, &disk).expect("moved");
            sleep(Duration::from_mins(1)).await;
        };
        tokio::select! {
            biased;
            () = reencrypt_credentials(&first, &credentials) => panic!("it does not end"),
            () = writer.run(&stop) => panic!("it does not end"),
            () = replace => {}
        }
        // Upstream is unreachable.
        let restarted = edge(&admin("*:*.second")).obtain(&dev).await;
        assert_eq!(restarted.expect("the stored token"), stored);
    }
}
