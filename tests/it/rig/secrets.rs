//! Every token the rig has seen and everything Parapet has printed, so that one check can prove that they never meet.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use super::process::Output;

static SECRETS: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
static OUTPUTS: Mutex<Vec<(String, Arc<Output>)>> = Mutex::new(Vec::new());

/// Remembers a token that must never show.
pub(crate) fn remember(token: &str) {
    SECRETS.lock().unwrap_or_else(PoisonError::into_inner).insert(token.to_owned());
}

/// Remembers what a process prints from now on.
pub(crate) fn watch(name: &str, output: &Arc<Output>) {
    OUTPUTS
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push((name.to_owned(), Arc::clone(output)));
}

/// The secrets among the remembered ones that `text` holds: the part of a token behind its dot, which must show nowhere.
pub(crate) fn leaks(text: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(text);
    let secrets = SECRETS.lock().unwrap_or_else(PoisonError::into_inner);
    secrets.iter().filter(|token| text.contains(secret_of(token))).cloned().collect()
}

/// What makes a token secret. The selector of a v2 token does not: lists show it.
fn secret_of(token: &str) -> &str {
    let secret = token.rsplit('.').next().unwrap_or(token);
    match secret.strip_prefix("v2_").and_then(|rest| rest.split_once('_')) {
        Some((_selector, secret)) if !secret.is_empty() => secret,
        _ => secret,
    }
}

/// Every file under `directory`, with its name.
pub(crate) fn files(directory: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    let Ok(entries) = std::fs::read_dir(directory) else { return files };
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        if path.is_dir() {
            files.extend(self::files(&path));
        } else if let Ok(bytes) = std::fs::read(&path) {
            files.push((path.display().to_string(), bytes));
        }
    }
    files
}

/// Panics if a remembered token stands in one of these texts, each with its name.
pub(crate) fn assert_none_in(name: &str, shown: &[(String, Vec<u8>)]) {
    for (what, text) in shown {
        let leaks = leaks(text);
        assert!(
            leaks.is_empty(),
            "{what} of {name} shows {} of the tokens it must not",
            leaks.len()
        );
    }
}

/// Panics if a watched process has printed a remembered token.
pub(crate) fn assert_none_printed() {
    let outputs: Vec<_> = OUTPUTS.lock().unwrap_or_else(PoisonError::into_inner).clone();
    for (name, output) in outputs {
        assert_none_in(&name, &[("the log".to_owned(), output.text().into_bytes())]);
    }
}
