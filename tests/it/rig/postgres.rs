//! One private PostgreSQL cluster for the test process: created on first use, without fsync, removed at
//! the end.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

use tokio::sync::OnceCell;

use super::guarded_process::{GuardedProcess, OnParentExit};
use super::net::free_port;

/// A running cluster. Every client on the loopback interface may connect as `postgres`.
#[derive(Debug)]
pub(crate) struct Postgres {
    bin_dir: PathBuf,
    port: u16,
    _server: GuardedProcess,
}

impl Postgres {
    /// The cluster of this test process.
    pub(crate) async fn shared() -> &'static Self {
        static SHARED: OnceCell<Postgres> = OnceCell::const_new();
        SHARED.get_or_init(Self::start).await
    }

    /// Starts a separate cluster.
    pub(crate) async fn start() -> Self {
        let bin_dir = find_bin_dir();
        let directory =
            tempfile::Builder::new().prefix("parapet-postgres-").tempdir().unwrap().keep();
        if is_root() {
            let owned = Command::new("chown").arg("postgres:").arg(&directory).status().unwrap();
            assert!(
                owned.success(),
                "cannot change the owner of {} to postgres",
                directory.display()
            );
        }
        let data = directory.join("data");
        let mut initdb = command_as_postgres(&bin_dir.join("initdb"));
        initdb.current_dir(&directory).arg("--pgdata").arg(&data);
        initdb.args([
            "--username=postgres",
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C.UTF-8",
            "--no-sync",
        ]);
        run_checked(&mut initdb);

        let port = free_port();
        let mut server = command_as_postgres(&bin_dir.join("postgres"));
        server
            .current_dir(&directory)
            .arg("-D")
            .arg(&data)
            .arg("-k")
            .arg(&directory)
            .arg("-p")
            .arg(port.to_string());
        for setting in [
            "listen_addresses=127.0.0.1",
            "fsync=off",
            "synchronous_commit=off",
            "full_page_writes=off",
            "autovacuum=off",
            "max_connections=300",
        ] {
            server.args(["-c", setting]);
        }
        let mut server =
            GuardedProcess::spawn("PostgreSQL", &server, OnParentExit::QuitAndRemove(&directory));
        server
            .wait_until(async || psql(&bin_dir, port, "postgres", "select 1").status.success())
            .await;
        Self { bin_dir, port, _server: server }
    }

    /// Its loopback port.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Creates an empty database and returns its name.
    pub(crate) async fn create_database(&self) -> String {
        self.create("template0").await
    }

    /// Copies a database without open connections, and returns the name of the copy.
    pub(crate) async fn copy_database(&self, original: &str) -> String {
        self.create(original).await
    }

    async fn create(&self, template: &str) -> String {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("parapet_{}", COUNT.fetch_add(1, Ordering::Relaxed));
        self.execute("postgres", &format!("create database {name} template {template}")).await;
        name
    }

    /// Runs SQL in a database; panics if it fails.
    pub(crate) async fn execute(&self, database: &str, sql: &str) {
        let (binaries, port) = (self.bin_dir.clone(), self.port);
        let (database, sql) = (database.to_owned(), sql.to_owned());
        let run = move || psql(&binaries, port, &database, &sql);
        let output = tokio::task::spawn_blocking(run).await.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// The contents of a database, as SQL.
    pub(crate) async fn dump(&self, database: &str) -> String {
        let (port, url) =
            (self.port, format!("postgres://postgres@127.0.0.1:{}/{database}", self.port));
        let mut dump = Command::new(self.bin_dir.join("pg_dump"));
        dump.args(["--dbname", &url, "--inserts"]);
        let output = tokio::task::spawn_blocking(move || dump.output().unwrap()).await.unwrap();
        assert!(output.status.success(), "{port}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }
}

/// Finds the server's programs: Debian keeps them out of the search path, in one directory per major
/// version.
fn find_bin_dir() -> PathBuf {
    let mut versions: Vec<(u32, PathBuf)> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let entry = entry.ok()?;
            Some((entry.file_name().to_str()?.parse().ok()?, entry.path().join("bin")))
        })
        .filter(|(_, binaries)| binaries.join("initdb").exists())
        .collect();
    versions.sort();
    versions.pop().expect("PostgreSQL is not installed: tests/run installs it").1
}

fn is_root() -> bool {
    let id = Command::new("id").arg("-u").output().unwrap();
    id.stdout == b"0\n"
}

/// A command as the user `postgres`, because PostgreSQL refuses to run as root.
fn command_as_postgres(program: &Path) -> Command {
    if !is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]).arg(program);
    command
}

fn psql(binaries: &Path, port: u16, database: &str, sql: &str) -> Output {
    Command::new(binaries.join("psql"))
        .args([
            "--no-psqlrc",
            "--quiet",
            "-h",
            "127.0.0.1",
            "-p",
            &port.to_string(),
            "-U",
            "postgres",
            "-d",
            database,
            "-v",
            "ON_ERROR_STOP=1",
            "-c",
            sql,
        ])
        .output()
        .unwrap()
}

fn run_checked(command: &mut Command) {
    let output =
        command.output().unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
