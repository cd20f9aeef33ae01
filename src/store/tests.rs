//! The contract of a store, for those that need no server.

#[path = "../../tests/it/store/contract.rs"]
mod contract;

use std::{fs, sync::Arc};

use self::contract::check_contract;
use super::*;
use crate::token::Environment;

#[tokio::test]
async fn file_store_fulfils_the_contract() {
    let folder = tempfile::tempdir().expect("folder");
    let inside = folder.path().join("a/b");
    check_contract(|| Arc::new(FileStore::open(&inside).expect("store"))).await;
    let names = fs::read_dir(inside).expect("folder").map(|it| it.expect("file").file_name());
    let names: Vec<_> = names.map(|name| name.to_string_lossy().into_owned()).collect();
    assert!(!names.iter().any(|name| name.ends_with("-tmp")), "{names:?}");
}

#[tokio::test]
async fn memory_store_fulfils_the_contract() {
    let store = Arc::new(MemoryStore::default());
    check_contract(|| Arc::<MemoryStore>::clone(&store)).await;
}
