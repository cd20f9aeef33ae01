//! What the command line does by itself: commands that answer and end.
//!
//! They print one text. Serving is `app`'s, asking an instance for its health `probe`'s.

pub mod archive;
pub mod manage;
mod tree;

use std::{io, path::PathBuf};

use jiff::Timestamp;

use crate::{
    answers::explained::{self, Missing},
    config::Explain,
    snapshot::Snapshot,
    token::{Projects, Scope},
    wire::{context::FrontendContext, features::Document},
};

/// Why there is no explanation.
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
    /// The file holds no flags.
    #[error("{} holds no flags that can be read", path.display())]
    Document {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        source: serde_json::Error,
    },
    /// The file has no such flag.
    #[error("there is no flag `{flag}` in {}{}", path.display(), offer(alike))]
    Missing {
        /// The name that was asked for.
        flag: String,
        /// The file.
        path: PathBuf,
        /// Names that are spelt alike.
        alike: Vec<String>,
    },
}

fn offer(alike: &[String]) -> String {
    if alike.is_empty() { String::new() } else { format!("; similar: {}", alike.join(", ")) }
}

/// `parapet explain`: why a flag of a file comes out as it does, as an indented text or as JSON.
///
/// Lots are drawn anew at each call.
pub fn explain(asked: &Explain) -> Result<String, Error> {
    // A folder has a file per environment, as in standalone mode.
    let path = if asked.flags.is_dir() {
        asked.flags.join(format!("{}.json", asked.environment))
    } else {
        asked.flags.clone()
    };
    let text = std::fs::read(&path).map_err(|source| Error::Read { path: path.clone(), source })?;
    let document = Document::parse_file(&text)
        .map_err(|source| Error::Document { path: path.clone(), source })?;
    let scope = Scope { environment: asked.environment.clone(), projects: Projects::All };
    let now = asked.at.unwrap_or_else(Timestamp::now);
    let snapshot = Snapshot::build(scope, document, None);
    let text = |text: &Option<String>| text.clone().map(Into::into);
    let properties = asked.properties.iter();
    let context = FrontendContext {
        user_id: text(&asked.user_id),
        session_id: text(&asked.session_id),
        remote_address: text(&asked.remote_address),
        properties: properties.map(|(name, value)| (name.into(), value.into())).collect(),
        ..FrontendContext::default()
    };
    match explained::explain(&snapshot, &asked.flag, &context, now, rand::random()) {
        Ok(told) if asked.json => {
            let json = serde_json::to_string_pretty(&told);
            Ok(json.expect("an explanation has texts and numbers only") + "\n")
        }
        Ok(told) => Ok(tree::tree(&told)),
        Err(Missing { alike }) => Err(Error::Missing { flag: asked.flag.clone(), path, alike }),
    }
}
