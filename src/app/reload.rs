//! Applies a configuration that is read again at run time.
//!
//! A configuration with errors changes nothing. Of a valid one some options are applied. The others
//! require a restart and are reported at each reload while they differ.

use std::sync::Arc;

use jiff::Timestamp;
use tokio::sync::{Notify, watch};
use tracing::{error, info, warn};

use super::configured_tokens::offline_tokens;
use crate::{
    auth::Authenticator,
    config::{Config, ConfigErrors, Credentials, Mode, SettingsDigests},
    http::sdk::SdkService,
    sync::file_source::ReloadHandle,
    telemetry,
    token::Token,
    upstream::AdminToken,
};

const LOG_OPTION: &str = "log";
const ADMIN_TOKEN_OPTION: &str = "upstream-admin-token";
const TOKENS_OPTION: &str = "tokens";
const OFFLINE_TOKEN_OPTIONS: [&str; 3] =
    ["client-tokens", "frontend-tokens", "init-admin-api-tokens"];
const TICKET_SECRET_OPTION: &str = "ofrep-ticket-secret";

/// The parts of a mode that can be reconfigured at run time.
#[derive(Debug)]
pub(super) enum Reloadable {
    /// Edge mode. `refetch` triggers a search for environments and a fetch of their flags.
    Edge { tokens: EdgeTokens, refetch: Arc<Notify> },
    /// Offline mode: flags of a file, and the configured tokens.
    Offline(ReloadHandle),
    /// Standalone mode: flags of files.
    Standalone(ReloadHandle),
}

/// The configured tokens of an edge.
#[derive(Debug)]
pub(super) enum EdgeTokens {
    Admin(AdminToken),
    Backend(watch::Sender<Vec<Token>>),
}

/// Applies configurations.
#[derive(Debug)]
pub(super) struct Reloader {
    reloadable: Reloadable,
    auth: Authenticator,
    settings_digests: SettingsDigests,
    warnings: Vec<String>,
}

impl Reloader {
    /// For an instance that runs with these options and warnings.
    pub(super) fn new(
        reloadable: Reloadable,
        auth: Authenticator,
        settings_digests: SettingsDigests,
        warnings: Vec<String>,
    ) -> Self {
        Self { reloadable, auth, settings_digests, warnings }
    }

    /// Applies the options that can change at run time, and logs the result in one line.
    pub(super) fn apply(&mut self, loaded: Result<Box<Config>, ConfigErrors>, data: &SdkService) {
        let config = match loaded {
            Ok(config) => *config,
            Err(mistakes) => {
                let mistakes: Vec<_> = mistakes.iter().map(ToString::to_string).collect();
                error!("Reload rejected, the configuration has errors: {}", mistakes.join("; "));
                return;
            }
        };
        for warning in config.warnings.iter().filter(|it| !self.warnings.contains(it)) {
            warn!("{warning}");
        }
        self.warnings.clone_from(&config.warnings);
        let (mut applied, mut need_restart) = (Vec::new(), Vec::new());
        for name in config.settings_digests.changed_since(&self.settings_digests) {
            if self.apply_option(name, &config, data) {
                self.settings_digests.update(name, &config.settings_digests);
                applied.push(name);
            } else {
                need_restart.push(name);
            }
        }
        self.refresh_sources(&config, &mut applied);
        let mut line = match &applied[..] {
            [] => "nothing has changed".to_owned(),
            applied => applied.join(", "),
        };
        if !need_restart.is_empty() {
            line = format!("{line}; needs a restart: {}", need_restart.join(", "));
        }
        line.push_str(match self.reloadable {
            Reloadable::Edge { .. } => "; flags and tokens are fetched again",
            Reloadable::Offline(_) | Reloadable::Standalone(_) => "; flags are read again",
        });
        info!("Reloaded: {line}");
    }

    /// Applies one changed option; false if it requires a restart.
    fn apply_option(&self, name: &str, config: &Config, data: &SdkService) -> bool {
        match (&self.reloadable, &config.mode) {
            _ if name == LOG_OPTION => telemetry::set_log_filter(&config.log),
            _ if name == TICKET_SECRET_OPTION => {
                if let Some(key) = config.data.stream_ticket_key.clone() {
                    data.stream_tickets.replace_key(key, Timestamp::now());
                }
                return config.data.stream_ticket_key.is_some();
            }
            (Reloadable::Edge { tokens, .. }, Mode::Edge(edge)) => {
                match (tokens, &edge.credentials) {
                    // Applied below, also if the token's file has changed without the option.
                    (EdgeTokens::Admin(_), Credentials::Admin { .. })
                        if name == ADMIN_TOKEN_OPTION => {}
                    (EdgeTokens::Backend(tokens), Credentials::BackendTokens(configured))
                        if name == TOKENS_OPTION =>
                    {
                        tokens.send_replace(configured.clone());
                    }
                    _ => return false,
                }
            }
            (Reloadable::Offline(reload_handle), Mode::Offline(offline))
                if OFFLINE_TOKEN_OPTIONS.contains(&name) =>
            {
                let (tokens, environments) = offline_tokens(offline);
                self.auth.set_local_tokens(tokens);
                reload_handle.set_environments(environments);
            }
            _ => return false,
        }
        true
    }

    /// Refreshes what may have changed without an option.
    fn refresh_sources(&self, config: &Config, applied: &mut Vec<&'static str>) {
        match (&self.reloadable, &config.mode) {
            (Reloadable::Edge { tokens, refetch }, Mode::Edge(edge)) => {
                if let (EdgeTokens::Admin(admin), Credentials::Admin { token, file, .. }) =
                    (tokens, &edge.credentials)
                    && admin.replace(token.clone(), file.clone())
                    && !applied.contains(&ADMIN_TOKEN_OPTION)
                {
                    applied.push(ADMIN_TOKEN_OPTION);
                }
                self.auth.revalidate(None);
                refetch.notify_one();
            }
            (Reloadable::Offline(reload_handle) | Reloadable::Standalone(reload_handle), _) => {
                reload_handle.reload();
            }
            (Reloadable::Edge { .. }, Mode::Offline(_) | Mode::Standalone(_)) => {}
        }
    }
}
