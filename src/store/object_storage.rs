//! Access to a bucket of S3, Google Cloud Storage or Azure, with timeouts.
//!
//! After a failure operations fail at once for a while, so that a start that needs several of them does
//! not wait for each. This module knows paths and bytes, but no records.

use std::{
    fmt, io,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use bytes::Bytes;
use object_store::{
    ClientOptions, ObjectMeta, ObjectStore, ObjectStoreExt as _, PutMode, PutOptions, PutPayload,
    RetryConfig, UpdateVersion,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
    azure::{AzureConfigKey, MicrosoftAzureBuilder},
    gcp::{GoogleCloudStorageBuilder, GoogleConfigKey},
    path::Path,
};
use tokio::time::{Instant, timeout};

use super::{
    outage_log::{Access, OutageLog},
    record::{MAX_RECORD_LEN, too_large_error},
    store_trait::Error,
};
use crate::backoff::Backoff;

/// A bucket, and the start of all paths in it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Bucket {
    /// The cloud.
    pub cloud: Cloud,
    /// The name of the bucket, or of Azure's container.
    pub name: String,
    /// A path without slashes at its ends; may be empty.
    pub prefix: String,
}

/// A cloud with object storage. Each has its own environment variables for endpoints and credentials.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Cloud {
    /// Amazon S3 and what is compatible with it (`AWS_*`).
    S3,
    /// Google Cloud Storage (`GOOGLE_*`).
    Gcs,
    /// Azure Blob Storage (`AZURE_*`).
    Azure,
}

impl fmt::Display for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = match self.cloud {
            Cloud::S3 => "s3",
            Cloud::Gcs => "gs",
            Cloud::Azure => "az",
        };
        let separator = if self.prefix.is_empty() { "" } else { "/" };
        write!(f, "{scheme}://{}{separator}{}", self.name, self.prefix)
    }
}

/// The environment variables of the cloud do not fit together, or a part of them is missing.
#[derive(Debug, thiserror::Error)]
#[error("the environment variables for {bucket} cannot be used")]
pub struct BucketError {
    bucket: String,
    source: object_store::Error,
}

/// A client of a bucket.
pub(super) struct ObjectStorage {
    client: Arc<dyn ObjectStore>,
    /// Empty, or a path that ends with a slash.
    prefix: String,
    location: String,
    outage: Mutex<Outage>,
    log: OutageLog,
}

struct Outage {
    until: Option<Instant>,
    backoff: Backoff,
}

/// How long an operation may take, with its retries.
const TIMEOUT: Duration = Duration::from_secs(5);

/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// How long operations fail at once after a failure.
const INITIAL_PAUSE: Duration = Duration::from_secs(1);
const MAX_PAUSE: Duration = Duration::from_secs(10);

/// Why an operation failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// The storage cannot be used: it is away, denies access, or does not have the bucket.
    Unavailable(io::Error),
    /// A condition is not met: the object exists, or has been replaced.
    Conflict,
    /// The object is too large for a record.
    TooLarge(io::Error),
}

impl Failure {
    /// Why, without the class of the failure.
    pub(super) fn into_cause(self) -> io::Error {
        match self {
            Self::Unavailable(source) | Self::TooLarge(source) => source,
            Self::Conflict => io::Error::other("another instance has replaced it"),
        }
    }
}

impl ObjectStorage {
    /// A client of a bucket, with the credentials of the environment. Connects at the first operation.
    pub(super) fn new(bucket: &Bucket, settings: &[(&str, String)]) -> Result<Self, BucketError> {
        let failed = |source| BucketError { bucket: bucket.to_string(), source };
        let client = client(bucket, &bucket.name, settings).map_err(failed)?;
        let path = Path::parse(&bucket.prefix).map_err(|error| failed(error.into()))?;
        let prefix = if path.as_ref().is_empty() { String::new() } else { format!("{path}/") };
        Ok(Self::with_client(client, prefix, bucket.to_string()))
    }

    /// A client that sees only objects whose names begin with a slash, as Unleash Edge names them in S3.
    ///
    /// The library's paths cannot begin with one. It appends them to the name of the bucket and a slash,
    /// so a bucket name that ends with a slash yields two.
    pub(super) fn with_leading_slash(bucket: &Bucket) -> Result<Self, BucketError> {
        let failed = |source| BucketError { bucket: bucket.to_string(), source };
        let client = client(bucket, &format!("{}/", bucket.name), &[]).map_err(failed)?;
        Ok(Self::with_client(client, String::new(), format!("{bucket}/")))
    }

    fn with_client(client: Arc<dyn ObjectStore>, prefix: String, location: String) -> Self {
        let backoff = Backoff::new(INITIAL_PAUSE, MAX_PAUSE);
        let outage = Mutex::new(Outage { until: None, backoff });
        Self { client, prefix, location, outage, log: OutageLog::default() }
    }

    fn path(&self, name: &str) -> Path {
        Path::parse(format!("{}{name}", self.prefix))
            .expect("the prefix was checked, and names have neither slashes nor control characters")
    }

    /// Where an object is, as errors name it.
    pub(super) fn place(&self, name: &str) -> String {
        format!("{}/{name}", self.location)
    }

    /// The object's contents and version; `None` if it does not exist.
    pub(super) async fn get(&self, name: &str) -> Result<Option<(Bytes, UpdateVersion)>, Failure> {
        let path = self.path(name);
        let get = async {
            let found = match self.client.get(&path).await {
                Ok(found) => found,
                Err(object_store::Error::NotFound { .. }) => return Ok(None),
                Err(error) => return Err(classify(error)),
            };
            if found.meta.size > MAX_RECORD_LEN as u64 {
                return Err(Failure::TooLarge(too_large_error(found.meta.size)));
            }
            let version = version(&found.meta);
            Ok(Some((found.bytes().await.map_err(classify)?, version)))
        };
        self.run(get).await
    }

    /// Writes an object; returns its version.
    pub(super) async fn put(
        &self,
        name: &str,
        bytes: impl Into<PutPayload>,
        mode: PutMode,
    ) -> Result<UpdateVersion, Failure> {
        let (path, options) = (self.path(name), PutOptions::from(mode));
        let put = async {
            let put = self.client.put_opts(&path, bytes.into(), options).await.map_err(classify)?;
            Ok(put.into())
        };
        self.run(put).await
    }

    /// Renames an object: readers may see both or the old one for a moment.
    pub(super) async fn rename(&self, from: &str, to: &str) -> Result<(), Failure> {
        let (from, to) = (self.path(from), self.path(to));
        let rename = async {
            match self.client.rename(&from, &to).await {
                // Another instance has renamed it.
                Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
                Err(error) => Err(classify(error)),
            }
        };
        self.run(rename).await
    }

    /// The names of all objects directly below the prefix.
    pub(super) async fn list(&self) -> Result<Vec<String>, Failure> {
        let prefix = self.path("");
        let list = async {
            let found = self.client.list_with_delimiter(Some(&prefix)).await.map_err(classify)?;
            let names = found.objects.iter().filter_map(|object| object.location.filename());
            Ok(names.map(str::to_owned).collect())
        };
        self.run(list).await
    }

    /// The error of the store for a failure: that it is unavailable, or `rejected` with the cause.
    pub(super) fn error(
        &self,
        failure: Failure,
        rejected: impl FnOnce(io::Error) -> Error,
    ) -> Error {
        match failure {
            Failure::Unavailable(source) => {
                Error::Unavailable { store: self.location.clone(), source }
            }
            Failure::TooLarge(_) | Failure::Conflict => rejected(failure.into_cause()),
        }
    }

    /// Logs the beginning or the end of an outage, and returns the result.
    pub(super) fn log<T>(&self, access: Access, result: Result<T, Error>) -> Result<T, Error> {
        self.log.record(&self.location, access, result)
    }

    async fn run<T>(
        &self,
        operation: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        if self.outage().until.is_some_and(|until| Instant::now() < until) {
            let text = "an operation has just failed";
            return Err(Failure::Unavailable(io::Error::other(text)));
        }
        let result = timeout(TIMEOUT, operation).await.unwrap_or_else(|_| {
            let text = format!("it did not respond within {TIMEOUT:?}");
            Err(Failure::Unavailable(io::Error::new(io::ErrorKind::TimedOut, text)))
        });
        let mut outage = self.outage();
        if let Err(Failure::Unavailable(_)) = &result {
            let pause = outage.backoff.next_delay(None, rand::random());
            outage.until = Some(Instant::now() + pause);
        } else {
            outage.backoff.reset();
            outage.until = None;
        }
        result
    }

    fn outage(&self) -> MutexGuard<'_, Outage> {
        self.outage.lock().expect("nothing panics while it holds this lock")
    }
}

impl fmt::Debug for ObjectStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ObjectStorage({})", self.location)
    }
}

/// A client for `bucket`, under this name.
fn client(
    bucket: &Bucket,
    name: &str,
    settings: &[(&str, String)],
) -> object_store::Result<Arc<dyn ObjectStore>> {
    let retry = RetryConfig { max_retries: 2, retry_timeout: TIMEOUT, ..RetryConfig::default() };
    Ok(match bucket.cloud {
        Cloud::S3 => {
            let mut builder = AmazonS3Builder::from_env().with_bucket_name(name).with_retry(retry);
            for (key, value) in settings {
                builder = builder.with_config(key.parse()?, value);
            }
            let endpoint = builder.get_config_value(&AmazonS3ConfigKey::Endpoint);
            Arc::new(builder.with_client_options(client_options(endpoint)).build()?)
        }
        Cloud::Gcs => {
            let mut builder =
                GoogleCloudStorageBuilder::from_env().with_bucket_name(name).with_retry(retry);
            for (key, value) in settings {
                builder = builder.with_config(key.parse()?, value);
            }
            let endpoint = builder.get_config_value(&GoogleConfigKey::BaseUrl);
            Arc::new(builder.with_client_options(client_options(endpoint)).build()?)
        }
        Cloud::Azure => {
            let mut builder =
                MicrosoftAzureBuilder::from_env().with_container_name(name).with_retry(retry);
            for (key, value) in settings {
                builder = builder.with_config(key.parse()?, value);
            }
            let endpoint = builder.get_config_value(&AzureConfigKey::Endpoint);
            Arc::new(builder.with_client_options(client_options(endpoint)).build()?)
        }
    })
}

/// The options for an endpoint, if one is named. An operator who names one without TLS wants that.
fn client_options(endpoint: Option<String>) -> ClientOptions {
    let is_http = endpoint.is_some_and(|url| url.starts_with("http://"));
    let options = ClientOptions::new().with_timeout(TIMEOUT).with_connect_timeout(CONNECT_TIMEOUT);
    options.with_allow_http(is_http)
}

fn version(meta: &ObjectMeta) -> UpdateVersion {
    UpdateVersion { e_tag: meta.e_tag.clone(), version: meta.version.clone() }
}

fn classify(error: object_store::Error) -> Failure {
    use object_store::Error as E;
    match error {
        E::AlreadyExists { .. } | E::Precondition { .. } => Failure::Conflict,
        error => Failure::Unavailable(io::Error::other(error)),
    }
}
