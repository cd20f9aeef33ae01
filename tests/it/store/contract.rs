//! The contract of a store, as a test that every implementation passes.
//!
//! Unit tests include this file too, for the stores that need no servers.

use std::sync::Arc;

use bytes::Bytes;

use super::{Environment, ProcessSlot, RecordKey, Store};

/// Checks an implementation. Each call of `open` opens the same store, which is empty at first.
pub(super) async fn check_contract(open: impl Fn() -> Arc<dyn Store>) {
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
    let other = open().try_lock(second).await.expect("lock").expect("not locked");
    assert!(lock.renew().await.expect("renewal"));
    assert!(open().try_lock(first).await.expect("lock").is_none());
    other.release().await.expect("release");
    open().save(first, Bytes::from_static(b"unlocked")).await.expect("save");
    assert_eq!(store.load(first).await.expect("load").as_deref(), Some(&b"unlocked"[..]));
    lock.release().await.expect("release");
    let lock = open().try_lock(first).await.expect("lock").expect("not locked");
    assert!(store.try_lock(first).await.expect("lock").is_none());
    assert!(lock.renew().await.expect("renewal"));
    lock.release().await.expect("release");
    assert_eq!(open().list().await.expect("list"), keys, "a lock is not a record");
}
