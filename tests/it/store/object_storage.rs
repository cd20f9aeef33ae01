//! Object storage as a store: S3 and Azure. Google Cloud Storage has no stand-in that checks conditions.

use super::contract::check_contract;
use super::*;

/// A store below a path of a bucket.
pub(super) fn open(
    cloud: Cloud,
    name: &str,
    path: &str,
    settings: &[(&str, String)],
) -> Arc<dyn Store> {
    // The same provider may be installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let bucket = Bucket { cloud, name: name.to_owned(), prefix: path.to_owned() };
    Arc::new(BucketStore::with_settings(&bucket, settings).unwrap())
}

#[tokio::test]
#[ignore = "needs moto: tests/run installs it"]
async fn s3_fulfils_the_contract_and_sets_damaged_records_aside() {
    let s3 = S3Server::start().await;
    s3.create_bucket("flags").await;
    check_contract(|| open(Cloud::S3, "flags", "some/path", &s3.settings())).await;

    s3.create_bucket("damaged").await;
    s3.put("damaged", "some/path/verdicts.parapet", "damaged").await;
    let store = open(Cloud::S3, "damaged", "some/path", &s3.settings());
    let error = store.load(&RecordKey::TokenCache).await.unwrap_err();
    assert!(matches!(error, Error::Damaged { .. }), "{error:?}");
    assert_eq!(store.load(&RecordKey::TokenCache).await.unwrap(), None);
    assert!(s3.list("damaged").await.contains("some/path/verdicts.damaged"));

    let missing = open(Cloud::S3, "missing", "some/path", &s3.settings());
    let error = missing.save(&RecordKey::TokenCache, Bytes::new()).await.unwrap_err();
    assert!(error.is_unavailable(), "{error:?}");
}

#[tokio::test]
#[ignore = "needs Azurite: tests/run installs it"]
async fn azure_fulfils_the_contract_and_errors_hide_its_signature() {
    let azure = AzureServer::start().await;
    azure.create_container("flags").await;
    check_contract(|| open(Cloud::Azure, "flags", "some/path", &azure.settings())).await;

    // A shared access signature is part of each URL.
    let [endpoint, account, _] = azure.settings().try_into().unwrap();
    let signature = "sv=2021-08-06&ss=b&srt=sco&sp=rwdl&se=2030-01-01&sig=s3cr3tsignature";
    let settings = [endpoint, account, ("azure_storage_sas_token", signature.to_owned())];
    let error = open(Cloud::Azure, "flags", "some/path", &settings).list().await.unwrap_err();
    let text = format!("{error:?} {}", parapet::telemetry::error_chain(&error));
    assert!(error.is_unavailable() && !text.contains("s3cr3tsignature"), "{text}");
}
