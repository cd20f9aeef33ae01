//! Every token the rig has seen and everything Parapet has printed, so that one check can prove that they never meet.

use std::collections::BTreeSet;
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
    let secrets = SECRETS.lock().unwrap_or_else(PoisonError::into_inner);
    secrets
        .iter()
        .filter(|token| {
            let secret = token.rsplit('.').next().unwrap_or(token).as_bytes();
            text.windows(secret.len()).any(|window| window == secret)
        })
        .cloned()
        .collect()
}

/// Panics if a watched process has printed a remembered token.
pub(crate) fn assert_none_printed() {
    let outputs: Vec<_> = OUTPUTS.lock().unwrap_or_else(PoisonError::into_inner).clone();
    for (name, output) in outputs {
        let leaks = leaks(output.text().as_bytes());
        assert!(leaks.is_empty(), "{name} printed {} of the tokens it must not show", leaks.len());
    }
}
