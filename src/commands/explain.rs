//! `parapet explain`: the evaluation of one flag of a file, with every strategy, constraint and bucket.
//!
//! It reads the file only; no instance needs to run.

mod text;

use std::{io, path::PathBuf};

use jiff::Timestamp;

use crate::{
    config::ExplainOptions,
    evaluation::explain::{UnknownFlag, explain},
    protocol::{context::FrontendContext, features::Document},
    snapshot::Snapshot,
    token::{Projects, Scope},
};

/// Why `parapet explain` failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
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

/// Explains the evaluation of a flag in a file, as indented text or as JSON.
///
/// Random rollouts are drawn anew at each call.
pub fn run(options: &ExplainOptions) -> Result<String, Error> {
    // A directory contains a file per environment, as in standalone mode.
    let path = if options.flags.is_dir() {
        options.flags.join(format!("{}.json", options.environment))
    } else {
        options.flags.clone()
    };
    let file = std::fs::read(&path).map_err(|source| Error::Read { path: path.clone(), source })?;
    let document = Document::parse_file(&file)
        .map_err(|source| Error::InvalidDocument { path: path.clone(), source })?;
    let scope = Scope { environment: options.environment.clone(), projects: Projects::All };
    let now = options.at.unwrap_or_else(Timestamp::now);
    let snapshot = Snapshot::build(scope, document);
    let owned = |text: &Option<String>| text.clone().map(Into::into);
    let properties = options.properties.iter();
    let context = FrontendContext {
        user_id: owned(&options.user_id),
        session_id: owned(&options.session_id),
        remote_address: owned(&options.remote_address),
        properties: properties.map(|(name, value)| (name.into(), value.into())).collect(),
        ..FrontendContext::default()
    };
    match explain(&snapshot, &options.flag, &context, now, rand::random()) {
        Ok(explanation) if options.json => {
            let json = serde_json::to_string_pretty(&explanation);
            Ok(json.expect("an explanation contains only texts and numbers") + "\n")
        }
        Ok(explanation) => Ok(text::render(&explanation)),
        Err(UnknownFlag { similar_names }) => {
            Err(Error::FlagNotFound { flag: options.flag.clone(), path, alike: similar_names })
        }
    }
}
