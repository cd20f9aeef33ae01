//! Records all tokens of the rig and all output of Parapet, so that one check can prove that no token
//! was printed.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use super::guarded_process::ProcessOutput;

static SECRETS: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
static OUTPUTS: Mutex<Vec<(String, Arc<ProcessOutput>)>> = Mutex::new(Vec::new());

/// Registers a token that must never be shown.
pub(crate) fn register(token: &str) {
    SECRETS.lock().unwrap_or_else(PoisonError::into_inner).insert(token.to_owned());
}

/// Registers the output of a process.
pub(crate) fn register_output(name: &str, output: &Arc<ProcessOutput>) {
    OUTPUTS
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push((name.to_owned(), Arc::clone(output)));
}

/// The registered tokens whose secret part, behind the dot, is in `text`.
pub(crate) fn leaked_secrets(text: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(text);
    let secrets = SECRETS.lock().unwrap_or_else(PoisonError::into_inner);
    secrets.iter().filter(|token| text.contains(secret_part(token))).cloned().collect()
}

/// The secret part of a token. The selector of a v2 token is not secret: lists show it.
///
/// The selector is cut off by its length, because it may contain underscores.
fn secret_part(token: &str) -> &str {
    const SELECTOR: usize = "v2_".len() + 22;
    let secret = token.rsplit('.').next().unwrap_or(token);
    let after_selector = secret.get(SELECTOR..).filter(|_| secret.starts_with("v2_"));
    match after_selector.and_then(|rest| rest.strip_prefix('_')) {
        Some(verifier) if !verifier.is_empty() => verifier,
        _ => secret,
    }
}

#[test]
fn secret_part_excludes_environment_and_selector() {
    assert_eq!(secret_part("*:development.0123456789abcdef"), "0123456789abcdef");
    assert_eq!(secret_part("0123456789abcdef"), "0123456789abcdef");
    let selector = "AbCd_fGhIjKlMnOpQrStU_";
    assert_eq!(secret_part(&format!("[]:production.v2_{selector}_secret_part")), "secret_part");
    let listed = format!("v2_{selector}_");
    assert_eq!(secret_part(&format!("*:production.{listed}")), listed);
}

/// All files below `directory`, with their names.
pub(crate) fn read_files(directory: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    let Ok(entries) = std::fs::read_dir(directory) else { return files };
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        if path.is_dir() {
            files.extend(read_files(&path));
        } else if let Ok(bytes) = std::fs::read(&path) {
            files.push((path.display().to_string(), bytes));
        }
    }
    files
}

/// Panics if one of these named texts contains a registered token.
pub(crate) fn assert_none_in(name: &str, shown: &[(String, Vec<u8>)]) {
    for (what, text) in shown {
        let leaks = leaked_secrets(text);
        assert!(
            leaks.is_empty(),
            "{what} of {name} shows {} of the tokens it must not",
            leaks.len()
        );
    }
}

/// Panics if a registered process has printed a registered token.
pub(crate) fn assert_none_printed() {
    let outputs: Vec<_> = OUTPUTS.lock().unwrap_or_else(PoisonError::into_inner).clone();
    for (name, output) in outputs {
        assert_none_in(&name, &[("the log".to_owned(), output.text().into_bytes())]);
    }
}
