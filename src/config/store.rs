//! The settings of the store: a folder, Redis or a bucket.
//!
//! `--store` names one by URL. The options of Unleash Edge (`--redis-url` and so on, `--s3-bucket-name`)
//! mean what they mean there.

use std::{fs, path::PathBuf, time::Duration};

use percent_encoding::percent_decode_str;
use zeroize::Zeroizing;

use super::{
    model::{BackupFolder, RedisStoreConfig, StoreConfig},
    option_spec::OptionSpec,
    options::{
        BACKUP_FOLDER, REDIS_HOST, REDIS_MODE, REDIS_PASSWORD, REDIS_PORT,
        REDIS_READ_CONNECTION_TIMEOUT_MILLISECONDS, REDIS_SCHEME, REDIS_SECURE, REDIS_URL,
        REDIS_USERNAME, REDIS_WRITE_CONNECTION_TIMEOUT_MILLISECONDS, S3_BUCKET_NAME, STORE,
        STORE_CA_FILE,
    },
    raw::RawSettings,
    values::{EXPECTED_FILE, existing_file},
};
use crate::{
    redis_client::{Config, Credentials, Server, Timeouts, Tls, Topology},
    store::{Bucket, Cloud, RedisStoreTimeouts},
};

/// The start of all keys in Redis, unless the URL names another.
const DEFAULT_PREFIX: &str = "parapet";

const REDIS_DEFAULT_PORT: u16 = 6379;
const SENTINEL_DEFAULT_PORT: u16 = 26379;

/// The store of an edge. `folder` is the one without any option, or of `--backup-folder`.
pub(super) fn edge_store(s: &mut RawSettings, folder: BackupFolder) -> Option<StoreConfig> {
    let places = [&STORE, &REDIS_URL, &REDIS_HOST, &S3_BUCKET_NAME, &BACKUP_FOLDER];
    let mut set = places.into_iter().filter(|key| {
        // An empty folder counts as not set.
        s.is_set(key) && s.text(key).is_some_and(|text| !text.is_empty())
    });
    let Some(first) = set.next() else {
        warn_of_unused(s);
        return Some(StoreConfig::Folder(folder));
    };
    let others: Vec<_> = set.collect();
    for other in others {
        // Unleash Edge ignores the host if there is a URL.
        if (first.name, other.name) == (REDIS_URL.name, REDIS_HOST.name) {
            s.warnings.push("--redis-host has no effect with --redis-url".to_owned());
        } else {
            s.report_error(other, format!("cannot be combined with --{}", first.name));
        }
    }
    match first.name {
        name if name == STORE.name => {
            warn_of_unused(s);
            store_url(s)
        }
        name if name == S3_BUCKET_NAME.name => {
            warn_of_unused(s);
            bucket_name(s)
        }
        name if name == BACKUP_FOLDER.name => {
            warn_of_unused(s);
            Some(StoreConfig::Folder(folder))
        }
        _ => edge_redis(s, first),
    }
}

/// The store that `--store` names, if it is set.
pub(super) fn store_url(s: &mut RawSettings) -> Option<StoreConfig> {
    if !s.is_set(&STORE) {
        return None;
    }
    let text = Zeroizing::new(s.text(&STORE)?.trim().to_owned());
    match parse(&text) {
        Ok(Location::Folder(path)) => Some(StoreConfig::Folder(BackupFolder::Configured(path))),
        Ok(Location::Bucket(bucket)) => Some(StoreConfig::Bucket(bucket)),
        Ok(Location::Redis(url)) => {
            let RedisUrl { topology, credentials, is_tls, database, prefix } = url;
            redis(s, topology, credentials, is_tls, database, prefix)
        }
        Err(reason) => {
            s.report_error(&STORE, reason);
            None
        }
    }
}

fn bucket_name(s: &mut RawSettings) -> Option<StoreConfig> {
    let name = s.parse_optional(&S3_BUCKET_NAME, "the name of a bucket", |text| {
        is_bucket_name(text).then(|| text.to_owned())
    })?;
    Some(StoreConfig::Bucket(Bucket { cloud: Cloud::S3, name, prefix: String::new() }))
}

/// Redis as the options of Unleash Edge describe it.
fn edge_redis(s: &mut RawSettings, place: &'static OptionSpec) -> Option<StoreConfig> {
    let is_cluster = s.parse_or_default(&REDIS_MODE, "single or cluster", |text| match text {
        "single" => Some(false),
        "cluster" => Some(true),
        _ => None,
    });
    let is_tls_scheme = s.parse_or_default(
        &REDIS_SCHEME,
        "redis, rediss, tcp or tls; sockets of Unix are not supported",
        |text| match text {
            "redis" | "tcp" => Some(false),
            "rediss" | "tls" => Some(true),
            _ => None,
        },
    );
    let is_secure = s.switch(&REDIS_SECURE);
    let port = s.parse_optional(&REDIS_PORT, "a port, 1 to 65535", |text| {
        text.parse().ok().filter(|&port: &u16| port > 0)
    });
    let mut urls = if place.name == REDIS_URL.name {
        let mut urls = Vec::new();
        for text in s.texts(&REDIS_URL) {
            match parse(&text) {
                Ok(Location::Redis(url)) if matches!(url.topology, Topology::Single(_)) => {
                    urls.push(url);
                }
                Ok(_) => s.report_error(&REDIS_URL, EXPECTED_REDIS_URL),
                Err(reason) => s.report_error(&REDIS_URL, reason),
            }
        }
        urls
    } else {
        let host = s.text(&REDIS_HOST)?.trim();
        let server = parse_server(host, REDIS_DEFAULT_PORT);
        let Ok(server) = server else {
            s.report_error(&REDIS_HOST, "expected the name or address of a host");
            return None;
        };
        vec![RedisUrl::plain(Topology::Single(server), is_tls_scheme)]
    };
    if urls.is_empty() {
        return None;
    }
    if urls.len() > 1 && !is_cluster {
        s.warnings.push(
            "--redis-url has several values, of which only the first is used without --redis-mode cluster"
                .to_owned(),
        );
        urls.truncate(1);
    }
    let servers: Vec<_> = urls
        .iter()
        .filter_map(|url| match &url.topology {
            Topology::Single(server) => {
                Some(Server { port: port.unwrap_or(server.port), ..server.clone() })
            }
            Topology::Cluster(_) | Topology::Sentinel { .. } => None,
        })
        .collect();
    let RedisUrl { mut credentials, is_tls, database, prefix, .. } = urls.swap_remove(0);
    if let Some(username) = s.text(&REDIS_USERNAME).map(str::to_owned) {
        credentials.username = Some(username);
    }
    if let Some(password) = s.text(&REDIS_PASSWORD).map(str::to_owned) {
        credentials.password = Some(Zeroizing::new(password));
    }
    let topology = if is_cluster {
        Topology::Cluster(servers)
    } else {
        Topology::Single(servers.into_iter().next()?)
    };
    redis(s, topology, credentials, is_tls || is_secure, database, prefix)
}

/// The settings that both forms have in common.
fn redis(
    s: &mut RawSettings,
    topology: Topology,
    credentials: Credentials,
    is_tls: bool,
    database: u16,
    prefix: String,
) -> Option<StoreConfig> {
    let ca_file = s.parse_optional(&STORE_CA_FILE, EXPECTED_FILE, existing_file);
    let ca = match ca_file.map(fs::read).transpose() {
        Ok(ca) => ca,
        Err(error) => {
            s.report_error(&STORE_CA_FILE, format!("expected a file that can be read: {error}"));
            return None;
        }
    };
    if ca.is_some() && !is_tls {
        s.report_error(&STORE_CA_FILE, "applies to a Redis with TLS (rediss://)");
    }
    let mut milliseconds = |key| {
        s.parse_or_default(key, "a number of milliseconds above 0, at most an hour", |text| {
            let value = text.parse().ok().filter(|value| (1..=3_600_000).contains(value))?;
            Some(Duration::from_millis(value))
        })
    };
    let load = milliseconds(&REDIS_READ_CONNECTION_TIMEOUT_MILLISECONDS);
    let save = milliseconds(&REDIS_WRITE_CONNECTION_TIMEOUT_MILLISECONDS);
    let longest = load.max(save);
    Some(StoreConfig::Redis(Box::new(RedisStoreConfig {
        client: Config {
            topology,
            credentials,
            tls: is_tls.then_some(Tls { ca }),
            database,
            timeouts: Timeouts { connect: longest, command: longest },
        },
        prefix,
        timeouts: RedisStoreTimeouts { load, save },
    })))
}

/// Warns of options that describe a Redis which no option names.
fn warn_of_unused(s: &mut RawSettings) {
    for key in [&REDIS_PORT, &REDIS_USERNAME, &REDIS_PASSWORD] {
        if s.is_set(key) {
            let warning =
                format!("--{} has no effect without --redis-url or --redis-host", key.name);
            s.warnings.push(warning);
        }
    }
}

/// A store, as its URL names it.
#[derive(Debug, Eq, PartialEq)]
enum Location {
    Folder(PathBuf),
    Redis(RedisUrl),
    Bucket(Bucket),
}

/// The parts of a Redis URL.
#[derive(Debug, Eq, PartialEq)]
struct RedisUrl {
    topology: Topology,
    credentials: Credentials,
    is_tls: bool,
    database: u16,
    prefix: String,
}

impl RedisUrl {
    fn plain(topology: Topology, is_tls: bool) -> Self {
        let (credentials, prefix) = (Credentials::default(), DEFAULT_PREFIX.to_owned());
        Self { topology, credentials, is_tls, database: 0, prefix }
    }
}

const EXPECTED_URL: &str = "expected file:<folder>, redis://, rediss://, redis+cluster://, \
     redis+sentinel://, s3://<bucket>, gs://<bucket> or az://<container>";
const EXPECTED_REDIS_URL: &str =
    "expected redis://user:password@host:port/database, or rediss:// for TLS";
const EXPECTED_CLUSTER_URL: &str = "expected redis+cluster://user:password@host:port,host:port";
const EXPECTED_SENTINEL_URL: &str =
    "expected redis+sentinel://user:password@host:port,host:port/master/database";
const EXPECTED_PARAMETERS: &str =
    "expected no parameters but prefix, sentinel_username and sentinel_password";

/// Parses the URL of a store. An error is a sentence that does not contain the URL, which may include a
/// password.
fn parse(text: &str) -> Result<Location, &'static str> {
    let (scheme, rest) = text.split_once(':').ok_or(EXPECTED_URL)?;
    if scheme == "file" {
        let path = rest.strip_prefix("//").unwrap_or(rest);
        return if path.is_empty() { Err(EXPECTED_URL) } else { Ok(Location::Folder(path.into())) };
    }
    let rest = rest.strip_prefix("//").ok_or(EXPECTED_URL)?;
    let cloud = match scheme {
        "s3" => Cloud::S3,
        "gs" => Cloud::Gcs,
        "az" => Cloud::Azure,
        _ => return parse_redis(scheme, rest).map(Location::Redis),
    };
    let (name, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let prefix = prefix.trim_matches('/').to_owned();
    let is_path = prefix.split('/').all(|part| !matches!(part, "." | ".."))
        && !prefix.contains("//")
        && !prefix.contains(|c: char| c.is_control() || "?#".contains(c));
    if is_bucket_name(name) && is_path {
        Ok(Location::Bucket(Bucket { cloud, name: name.to_owned(), prefix }))
    } else {
        Err("expected <scheme>://<bucket>/<path>; credentials are read from the environment")
    }
}

fn is_bucket_name(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
}

fn parse_redis(scheme: &str, rest: &str) -> Result<RedisUrl, &'static str> {
    #[derive(Clone, Copy)]
    enum Kind {
        Single,
        Cluster,
        Sentinel,
    }
    let (scheme, kind) = match scheme.split_once('+') {
        None => (scheme, Kind::Single),
        Some((scheme, "cluster")) => (scheme, Kind::Cluster),
        Some((scheme, "sentinel")) => (scheme, Kind::Sentinel),
        Some(_) => return Err(EXPECTED_URL),
    };
    let is_tls = match scheme {
        "redis" | "valkey" => false,
        "rediss" | "valkeys" => true,
        _ => return Err(EXPECTED_URL),
    };
    let (expected, default_port) = match kind {
        Kind::Single => (EXPECTED_REDIS_URL, REDIS_DEFAULT_PORT),
        Kind::Cluster => (EXPECTED_CLUSTER_URL, REDIS_DEFAULT_PORT),
        Kind::Sentinel => (EXPECTED_SENTINEL_URL, SENTINEL_DEFAULT_PORT),
    };
    if rest.contains('#') {
        return Err("expected no fragment (#); certificates are always verified");
    }
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let (user, hosts) = authority.rsplit_once('@').unwrap_or(("", authority));
    let credentials = parse_credentials(user).ok_or(expected)?;
    let servers = hosts
        .split(',')
        .map(|host| parse_server(host, default_port).map_err(|()| expected))
        .collect::<Result<Vec<_>, _>>()?;
    let mut prefix = DEFAULT_PREFIX.to_owned();
    let mut sentinel_credentials = Credentials::default();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').ok_or(EXPECTED_PARAMETERS)?;
        let value = decode(value).ok_or(EXPECTED_PARAMETERS)?;
        match (name, kind) {
            ("prefix", _) if is_prefix(&value) => prefix = value.to_string(),
            ("prefix", _) => return Err("expected letters, digits, `-`, `_` or `.` as prefix"),
            ("sentinel_username", Kind::Sentinel) => {
                sentinel_credentials.username = Some(value.to_string());
            }
            ("sentinel_password", Kind::Sentinel) => sentinel_credentials.password = Some(value),
            _ => return Err(EXPECTED_PARAMETERS),
        }
    }
    let parse_database = |text: &str| match text {
        "" => Ok(0),
        text => text.parse().map_err(|_| expected),
    };
    let (topology, database) = match kind {
        Kind::Single => {
            let [server] = servers.try_into().map_err(
                |_| "expected one host; several are redis+cluster:// or redis+sentinel://",
            )?;
            (Topology::Single(server), parse_database(path)?)
        }
        Kind::Cluster if path.is_empty() => (Topology::Cluster(servers), 0),
        Kind::Cluster => return Err(expected),
        Kind::Sentinel => {
            let (master, database) = path.split_once('/').unwrap_or((path, ""));
            if master.is_empty() {
                return Err(expected);
            }
            let topology = Topology::Sentinel {
                sentinels: servers,
                master: master.to_owned(),
                credentials: sentinel_credentials,
            };
            (topology, parse_database(database)?)
        }
    };
    Ok(RedisUrl { topology, credentials, is_tls, database, prefix })
}

fn is_prefix(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
}

/// Parses `user:password`, `:password`, `user` or nothing.
fn parse_credentials(text: &str) -> Option<Credentials> {
    let (username, password) = match text.split_once(':') {
        None => (text, None),
        Some((username, password)) => (username, Some(decode(password)?)),
    };
    let username = decode(username)?;
    let username = (!username.is_empty()).then(|| username.to_string());
    Some(Credentials { username, password })
}

fn decode(text: &str) -> Option<Zeroizing<String>> {
    let decoded = percent_decode_str(text).decode_utf8().ok()?;
    Some(Zeroizing::new(decoded.into_owned()))
}

/// Parses `host`, `host:port` or `[address]:port`.
fn parse_server(text: &str, default_port: u16) -> Result<Server, ()> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']').ok_or(())?;
            (host, if port.is_empty() { None } else { Some(port.strip_prefix(':').ok_or(())?) })
        }
        None => match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        },
    };
    let port = port.map_or(Ok(default_port), |port| port.parse().map_err(|_| ()))?;
    let is_host =
        !host.is_empty() && host.chars().all(|c| c.is_alphanumeric() || "-_.:%".contains(c));
    if is_host { Ok(Server { host: host.to_owned(), port }) } else { Err(()) }
}

#[cfg(test)]
mod tests;
