//! Parses the URL of a PostgreSQL database: one server, or several of which the first suitable one is
//! used.
//!
//! Connecting is in `postgres`.

use std::{fmt, str::FromStr as _, sync::Arc};

use sqlx::postgres::PgConnectOptions;
use zeroize::Zeroizing;

/// The URL of a PostgreSQL database. `Display` and `Debug` omit user and password. A cheap handle.
#[derive(Clone)]
pub struct DatabaseUrl {
    servers: Arc<[Server]>,
    needs_writable: bool,
    redacted: String,
}

/// One server of a URL.
pub(super) struct Server {
    /// A URL that names this server alone.
    pub(super) url: Zeroizing<String>,
    /// `<host>:<port>`.
    pub(super) name: String,
}

/// Why a text is not a database URL. Never contains the text, which may include a password.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum DatabaseUrlError {
    /// The scheme is missing or another one.
    #[error("the URL does not begin with postgres:// or postgresql://")]
    Scheme,
    /// The rest of the URL is malformed.
    #[error("the URL is not of the form postgres://user:password@host:port/database")]
    Malformed,
    /// `target_session_attrs` selects a read-only server, but Parapet writes to its database.
    #[error("target_session_attrs must be any, read-write or primary")]
    TargetSessionAttrs,
}

impl DatabaseUrl {
    /// Parses `postgres://user:password@host:port/database?sslmode=…`, with several `host:port` of
    /// one database separated by commas.
    ///
    /// Of several servers a writable one is used, unless `target_session_attrs=any` is given. A single
    /// server is checked for writability only if `target_session_attrs` requires it.
    pub fn parse(text: &str) -> Result<Self, DatabaseUrlError> {
        let text = text.trim();
        let (scheme, rest) = text.split_once("://").ok_or(DatabaseUrlError::Scheme)?;
        if !matches!(scheme, "postgres" | "postgresql") {
            return Err(DatabaseUrlError::Scheme);
        }
        let (authority, rest) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
        let (user, hosts) = authority.rsplit_once('@').map_or(("", authority), |(_, hosts)| {
            (&authority[..authority.len() - hosts.len()], hosts)
        });
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let mut session = None;
        let others = query.split('&').filter(|pair| {
            let attrs = pair.strip_prefix("target_session_attrs=");
            session = attrs.or(session);
            attrs.is_none()
        });
        // The driver parses the remaining parameters; it supports one host only.
        let query = Zeroizing::new(others.collect::<Vec<_>>().join("&"));
        let servers = hosts.split(',').map(|host| {
            let url = Zeroizing::new(format!("{scheme}://{user}{host}{path}?{}", *query));
            let options =
                PgConnectOptions::from_str(&url).map_err(|_| DatabaseUrlError::Malformed)?;
            let name = format!("{}:{}", options.get_host(), options.get_port());
            Ok((Server { url, name }, options.get_database().unwrap_or_default().to_owned()))
        });
        let servers: Vec<_> = servers.collect::<Result<_, _>>()?;
        let needs_writable = match session {
            None => servers.len() > 1,
            Some("any") => false,
            Some("read-write" | "primary") => true,
            Some(_) => return Err(DatabaseUrlError::TargetSessionAttrs),
        };
        let database = servers[0].1.clone();
        let servers: Arc<[Server]> = servers.into_iter().map(|(server, _)| server).collect();
        let names: Vec<_> = servers.iter().map(|server| server.name.as_str()).collect();
        let redacted = format!("postgres://{}/{database}", names.join(","));
        Ok(Self { servers, needs_writable, redacted })
    }

    /// The servers, in the order in which they are tried; at least one.
    pub(super) fn servers(&self) -> &[Server] {
        &self.servers
    }

    /// Whether read-only servers are skipped.
    pub(super) fn needs_writable(&self) -> bool {
        self.needs_writable
    }
}

impl fmt::Display for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.redacted)
    }
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DatabaseUrl({})", self.redacted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_and_debug_omit_the_credentials() {
        let url = DatabaseUrl::parse("postgres://ann:s3cr3t@db.example:5433/flags?sslmode=require");
        let url = url.unwrap();
        assert_eq!(url.to_string(), "postgres://db.example:5433/flags");
        assert_eq!(format!("{url:?}"), "DatabaseUrl(postgres://db.example:5433/flags)");
        let error = |text| DatabaseUrl::parse(text).err();
        assert_eq!(error("mysql://localhost/flags"), Some(DatabaseUrlError::Scheme));
        assert_eq!(error("postgres"), Some(DatabaseUrlError::Scheme));
        assert_eq!(error("postgres://host:port/flags"), Some(DatabaseUrlError::Malformed));
        assert_eq!(error("postgres://a:1,b:port/flags"), Some(DatabaseUrlError::Malformed));
    }

    #[test]
    fn several_servers_share_user_database_and_parameters() {
        let text = "postgres://ann:s@cr,et@one:5433,two,[::1]:7/flags\
                    ?target_session_attrs=read-write&sslmode=disable";
        let url = DatabaseUrl::parse(text).unwrap();
        assert_eq!(url.to_string(), "postgres://one:5433,two:5432,[::1]:7/flags");
        assert!(url.needs_writable());
        let urls: Vec<_> = url.servers().iter().map(|server| server.url.as_str()).collect();
        let rest = "/flags?sslmode=disable";
        let user = "postgres://ann:s@cr,et@";
        let expect = ["one:5433", "two", "[::1]:7"].map(|host| format!("{user}{host}{rest}"));
        assert_eq!(urls, expect);
    }

    #[test]
    fn several_servers_need_a_writable_one_unless_any_is_allowed() {
        let needs = |text: &str| DatabaseUrl::parse(text).map(|url| url.needs_writable());
        assert_eq!(needs("postgres://a/f"), Ok(false));
        assert_eq!(needs("postgres://a/f?target_session_attrs=primary"), Ok(true));
        assert_eq!(needs("postgres://a,b/f"), Ok(true));
        assert_eq!(needs("postgres://a,b/f?target_session_attrs=any"), Ok(false));
        let standby = needs("postgres://a,b/f?target_session_attrs=standby");
        assert_eq!(standby, Err(DatabaseUrlError::TargetSessionAttrs));
    }
}
