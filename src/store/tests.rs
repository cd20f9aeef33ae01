//! The contract of a store, which every implementation fulfils.

use std::{fs, sync::Arc};

use bytes::Bytes;

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

/// Checks an implementation. Each call of `open` opens the same store, which is empty at first.
async fn check_contract(open: impl Fn() -> Arc<dyn Store>) {
    let store = open();
    assert_eq!(store.list().await.expect("list"), []);
    assert_eq!(store.load(&RecordKey::TokenCache).await.expect("load"), None);
    for bytes in [&b"one"[..], b"", b"two\nlines\xff"] {
        store.save(&RecordKey::TokenCache, Bytes::from_static(bytes)).await.expect("save");
        let loaded = open().load(&RecordKey::TokenCache).await.expect("load");
        assert_eq!(loaded.as_deref(), Some(bytes));
    }

    let environments = ["../été/%", "Dev", "dev", "production"].map(Environment::new);
    let slots = [0, 2].map(|n| ProcessSlot::all().nth(n).expect("slot"));
    let keys: Vec<_> = [
        &environments.each_ref().map(|it| RecordKey::Flags(it.clone()))[..],
        &[RecordKey::TokenCache],
        &environments.map(RecordKey::Credentials),
        &[RecordKey::Registry],
        &slots.map(RecordKey::Usage),
    ]
    .concat();
    for key in keys.iter().rev() {
        store.save(key, format!("{key:?}").into()).await.expect("save");
    }
    assert_eq!(open().list().await.expect("list"), keys);
    for key in &keys {
        let loaded = open().load(key).await.expect("load");
        assert_eq!(loaded, Some(format!("{key:?}").into_bytes()));
    }

    let [first, second] = [&keys[0], &keys[1]];
    let lock = store.try_lock(first).await.expect("lock").expect("not locked");
    assert!(open().try_lock(first).await.expect("lock").is_none());
    assert!(open().try_lock(second).await.expect("lock").is_some());
    open().save(first, Bytes::from_static(b"unlocked")).await.expect("save");
    assert_eq!(store.load(first).await.expect("load").as_deref(), Some(&b"unlocked"[..]));
    drop(lock);
    assert!(open().try_lock(first).await.expect("lock").is_some());
    assert_eq!(open().list().await.expect("list"), keys, "a lock is not a record");
}
