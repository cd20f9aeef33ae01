//! One-shot commands of the command line, each of which returns a text to print.
//!
//! Serving is in `app`, the health check of a running instance in `probe`.

pub mod backup;
mod explanation_text;
pub mod manage;

use std::{io, path::PathBuf};

use jiff::Timestamp;

use crate::{
    config::ExplainOptions,
    evaluation::explain::{self, UnknownFlag},
    protocol::{context::FrontendContext, features::Document},
    snapshot::Snapshot,
    token::{Projects, Scope},
};

/// Why `parapet explain` failed.
#[derive(Debug, thiserror::Error)]
pub enum ExplainError {
    /// The file of flags cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file contains no valid flags document.
    #[error("{} contains no valid flags", path.display())]
    InvalidDocument {
        /// The file.
        path: PathBuf,
        /// The defect and its position.
        source: serde_json::Error,
    },
    /// The file does not contain the flag.
    #[error("there is no flag `{flag}` in {}{}", path.display(), similar_names_suffix(alike))]
    FlagNotFound {
        /// The requested name.
        flag: String,
        /// The file.
        path: PathBuf,
        /// Similar names in the file.
        alike: Vec<String>,
    },
}

fn similar_names_suffix(alike: &[String]) -> String {
    if alike.is_empty() { String::new() } else { format!("; similar: {}", alike.join(", ")) }
}

/// `parapet explain`: explains the evaluation of a flag in a file, as indented text or as JSON.
///
/// Random rollouts are drawn anew at each call.
pub fn explain(options: &ExplainOptions) -> Result<String, ExplainError> {
    // A directory contains a file per environment, as in standalone mode.
    let path = if options.flags.is_dir() {
        options.flags.join(format!("{}.json", options.environment))
    } else {
        options.flags.clone()
    };
    let text =
        std::fs::read(&path).map_err(|source| ExplainError::Read { path: path.clone(), source })?;
    let document = Document::parse_file(&text)
        .map_err(|source| ExplainError::InvalidDocument { path: path.clone(), source })?;
    let scope = Scope { environment: options.environment.clone(), projects: Projects::All };
    let now = options.at.unwrap_or_else(Timestamp::now);
    let snapshot = Snapshot::build(scope, document, None);
    let text = |text: &Option<String>| text.clone().map(Into::into);
    let properties = options.properties.iter();
    let context = FrontendContext {
        user_id: text(&options.user_id),
        session_id: text(&options.session_id),
        remote_address: text(&options.remote_address),
        properties: properties.map(|(name, value)| (name.into(), value.into())).collect(),
        ..FrontendContext::default()
    };
    match explain::explain(&snapshot, &options.flag, &context, now, rand::random()) {
        Ok(explanation) if options.json => {
            let json = serde_json::to_string_pretty(&explanation);
            Ok(json.expect("an explanation contains only texts and numbers") + "\n")
        }
        Ok(explanation) => Ok(explanation_text::render(&explanation)),
        Err(UnknownFlag { similar_names: alike }) => {
            Err(ExplainError::FlagNotFound { flag: options.flag.clone(), path, alike })
        }
    }
}
