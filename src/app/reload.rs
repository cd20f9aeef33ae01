//! Applies a configuration that was read again while the instance runs.
//!
//! A configuration with a mistake changes nothing. Of a sound one some settings are applied; others need
//! a restart, and are reported as often as they differ.

use std::sync::Arc;

use jiff::Timestamp;
use tokio::sync::{Notify, watch};
use tracing::{error, info, warn};

use super::alone::given;
use crate::{
    auth::Authenticator,
    config::{Config, Credentials, Effective, Mistakes, Mode},
    http::data::Data,
    sync::files::Rereader,
    telemetry,
    token::Token,
    upstream::AdminToken,
};

const LOG: &str = "log";
const ADMIN_TOKEN: &str = "upstream-admin-token";
const TOKENS: &str = "tokens";
const OFFLINE_TOKENS: [&str; 3] = ["client-tokens", "frontend-tokens", "init-admin-api-tokens"];
const TICKET_SECRET: &str = "ofrep-ticket-secret";

/// What of a mode can change while it runs.
#[derive(Debug)]
pub(super) enum Live {
    /// An edge, which has environments looked for, and their flags fetched, by `refetch`.
    Edge { tokens: EdgeTokens, refetch: Arc<Notify> },
    /// Flags of a file, and the given tokens.
    Offline(Rereader),
    /// Flags of files.
    Standalone(Rereader),
}

/// The tokens that an edge was given.
#[derive(Debug)]
pub(super) enum EdgeTokens {
    Admin(AdminToken),
    Backend(watch::Sender<Vec<Token>>),
}

/// Applies configurations.
#[derive(Debug)]
pub(super) struct Reload {
    live: Live,
    auth: Authenticator,
    effective: Effective,
    warnings: Vec<String>,
}

impl Reload {
    /// The instance runs by `config`.
    pub(super) fn new(
        live: Live,
        auth: Authenticator,
        effective: Effective,
        warnings: Vec<String>,
    ) -> Self {
        Self { live, auth, effective, warnings }
    }

    /// Applies what can be applied of a configuration, and logs in one line what became of it.
    pub(super) fn apply(&mut self, loaded: Result<Box<Config>, Mistakes>, data: &Data) {
        let config = match loaded {
            Ok(config) => *config,
            Err(mistakes) => {
                let mistakes: Vec<_> = mistakes.iter().map(ToString::to_string).collect();
                error!("Nothing is reloaded, the configuration is wrong: {}", mistakes.join("; "));
                return;
            }
        };
        for warning in config.warnings.iter().filter(|it| !self.warnings.contains(it)) {
            warn!("{warning}");
        }
        self.warnings.clone_from(&config.warnings);
        let (mut applied, mut waiting) = (Vec::new(), Vec::new());
        for name in config.effective.changed_since(&self.effective) {
            if self.apply_one(name, &config, data) {
                self.effective.update(name, &config.effective);
                applied.push(name);
            } else {
                waiting.push(name);
            }
        }
        self.reread(&config, &mut applied);
        let mut line = match &applied[..] {
            [] => "nothing has changed".to_owned(),
            applied => applied.join(", "),
        };
        if !waiting.is_empty() {
            line = format!("{line}; needs a restart: {}", waiting.join(", "));
        }
        line.push_str(match self.live {
            Live::Edge { .. } => "; flags and tokens are asked for again",
            Live::Offline(_) | Live::Standalone(_) => "; flags are read again",
        });
        info!("Reloaded: {line}");
    }

    /// Applies one changed setting; false where that takes a restart.
    fn apply_one(&self, name: &str, config: &Config, data: &Data) -> bool {
        match (&self.live, &config.mode) {
            _ if name == LOG => telemetry::set_log_filter(&config.log),
            _ if name == TICKET_SECRET => {
                if let Some(key) = config.data.ticket_key.clone() {
                    data.tickets.replace_key(key, Timestamp::now());
                }
                return config.data.ticket_key.is_some();
            }
            (Live::Edge { tokens, .. }, Mode::Edge(edge)) => {
                match (tokens, &edge.credentials) {
                    // Applied below, also where it differs from what its file held meanwhile.
                    (EdgeTokens::Admin(_), Credentials::Admin { .. }) if name == ADMIN_TOKEN => {}
                    (EdgeTokens::Backend(tokens), Credentials::Given(given)) if name == TOKENS => {
                        tokens.send_replace(given.clone());
                    }
                    _ => return false,
                }
            }
            (Live::Offline(rereader), Mode::Offline(offline)) if OFFLINE_TOKENS.contains(&name) => {
                let (given, environments) = given(offline);
                self.auth.set_given(given);
                rereader.serve(environments);
            }
            _ => return false,
        }
        true
    }

    /// Takes over what may have changed without a setting.
    fn reread(&self, config: &Config, applied: &mut Vec<&'static str>) {
        match (&self.live, &config.mode) {
            (Live::Edge { tokens, refetch }, Mode::Edge(edge)) => {
                if let (EdgeTokens::Admin(admin), Credentials::Admin { token, file, .. }) =
                    (tokens, &edge.credentials)
                    && admin.replace(token.clone(), file.clone())
                    && !applied.contains(&ADMIN_TOKEN)
                {
                    applied.push(ADMIN_TOKEN);
                }
                self.auth.reconsider(None);
                refetch.notify_one();
            }
            (Live::Offline(rereader) | Live::Standalone(rereader), _) => rereader.reread(),
            (Live::Edge { .. }, Mode::Offline(_) | Mode::Standalone(_)) => {}
        }
    }
}
