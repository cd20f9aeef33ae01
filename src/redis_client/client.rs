//! Runs commands over one connection that is replaced when it breaks.

use std::{
    fmt,
    future::Future,
    sync::{Arc, Mutex, MutexGuard},
};

use futures_util::{
    FutureExt as _, Stream, StreamExt as _,
    future::{BoxFuture, Shared},
};
use redis::{Cmd, FromRedisValue, Pipeline, RedisError, RedisResult, Script, ToRedisArgs};
use tokio::time::{Instant, timeout};

use super::{
    config::{Config, Timeouts},
    connection::{Connection, Connector},
    connection_state::{ConnectionState, Step},
    error::{ConfigError, Error},
};

/// A client of Redis. A cheap handle: clones share one connection.
#[derive(Clone)]
pub struct RedisClient {
    shared: Arc<Inner>,
}

struct Inner {
    connector: Connector,
    location: Arc<str>,
    timeouts: Timeouts,
    state: Mutex<ConnectionState<Connection, Opening>>,
}

/// An attempt to connect. Those who need the connection await it together; it needs no task.
type Opening = Shared<BoxFuture<'static, Result<Connection, Arc<RedisError>>>>;

impl RedisClient {
    /// A client with these settings. The first command connects.
    ///
    /// Fails if a certificate is malformed.
    pub fn new(config: Config) -> Result<Self, ConfigError> {
        let location = config.location().into();
        let timeouts = config.timeouts;
        let connector = Connector::new(config)?;
        let state = Mutex::new(ConnectionState::new());
        Ok(Self { shared: Arc::new(Inner { connector, location, timeouts, state }) })
    }

    /// Runs a command, which must not block at the server.
    ///
    /// Connects first if necessary, which may take the timeout for connecting; fails at once while the
    /// next attempt to connect has to wait.
    pub async fn run<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, Error> {
        self.execute(|mut connection| async move { command.query_async(&mut connection).await })
            .await
    }

    /// Runs a pipeline, whose keys must share one hash tag because of Clusters.
    pub async fn run_pipeline<T: FromRedisValue>(&self, pipeline: &Pipeline) -> Result<T, Error> {
        self.execute(|mut connection| async move { pipeline.query_async(&mut connection).await })
            .await
    }

    /// Runs a Lua script, and loads it first if the server does not have it.
    ///
    /// `keys` must share one hash tag because of Clusters. A tuple is a convenient type of `arguments`.
    pub async fn run_script<T: FromRedisValue>(
        &self,
        script: &Script,
        keys: &[&str],
        arguments: impl ToRedisArgs,
    ) -> Result<T, Error> {
        let mut invocation = script.prepare_invoke();
        for key in keys {
            invocation.key(*key);
        }
        invocation.arg(arguments);
        self.execute(|mut connection| async move { invocation.invoke_async(&mut connection).await })
            .await
    }

    /// The payloads of a channel's messages, until the connection ends.
    ///
    /// The stream has a connection of its own, and does not reconnect. Messages that are published
    /// meanwhile, or while a connection is dead that the system has not noticed yet, are lost.
    pub async fn subscribe(
        &self,
        channel: &str,
    ) -> Result<impl Stream<Item = Vec<u8>> + Send + Unpin + use<>, Error> {
        if let Some(cause) = self.state().failure(Instant::now()) {
            return Err(self.not_connected(cause));
        }
        let opened = self.shared.connector.open_pubsub().await;
        let mut pubsub = opened.map_err(|error| self.not_connected(Arc::new(error)))?;
        let subscribed = timeout(self.shared.timeouts.command, pubsub.subscribe(channel)).await;
        subscribed.map_err(|_| self.timed_out())?.map_err(|error| self.classify(error))?;
        Ok(pubsub.into_on_message().map(|message| message.get_payload_bytes().to_vec()))
    }

    /// The servers as a URL without credentials, for logs.
    pub fn location(&self) -> &str {
        &self.shared.location
    }

    /// Runs `work` with an open connection, within the timeout of a command.
    async fn execute<T, F>(&self, work: impl FnOnce(Connection) -> F) -> Result<T, Error>
    where
        F: Future<Output = RedisResult<T>>,
    {
        let (connection, generation) = self.connection().await?;
        let result = match timeout(self.shared.timeouts.command, work(connection)).await {
            Ok(result) => result.map_err(|error| self.classify(error)),
            Err(_) => Err(self.timed_out()),
        };
        match &result {
            Err(Error::Disconnected { source, .. } | Error::NotConnected { source, .. }) => {
                self.fail(generation, Arc::clone(source));
            }
            Err(error @ Error::Timeout { .. }) => {
                let cause = std::io::Error::new(std::io::ErrorKind::TimedOut, error.to_string());
                self.fail(generation, Arc::new(cause.into()));
            }
            Ok(_) | Err(Error::Rejected { .. }) => {
                self.state().answered(generation, Instant::now());
            }
        }
        result
    }

    /// An open connection, with its generation.
    async fn connection(&self) -> Result<(Connection, u64), Error> {
        loop {
            let step = self.state().next(Instant::now(), || self.open());
            match step {
                Step::Use { connection, generation } => return Ok((connection, generation)),
                Step::Check { connection, generation } => {
                    if self.is_alive(connection.clone()).await {
                        self.state().answered(generation, Instant::now());
                        return Ok((connection, generation));
                    }
                    self.state().discard(generation);
                }
                Step::Join { attempt, generation } => match attempt.await {
                    Ok(connection) => {
                        self.state().opened(generation, connection.clone(), Instant::now());
                        return Ok((connection, generation));
                    }
                    Err(cause) => {
                        self.fail(generation, Arc::clone(&cause));
                        return Err(self.not_connected(cause));
                    }
                },
                Step::Fail(cause) => return Err(self.not_connected(cause)),
            }
        }
    }

    fn open(&self) -> Opening {
        let connector = self.shared.connector.clone();
        async move { connector.open().await.map_err(Arc::new) }.boxed().shared()
    }

    async fn is_alive(&self, mut connection: Connection) -> bool {
        let ping = redis::cmd("PING");
        let ping = ping.query_async::<()>(&mut connection);
        matches!(timeout(self.shared.timeouts.command, ping).await, Ok(Ok(())))
    }

    fn fail(&self, generation: u64, cause: Arc<RedisError>) {
        self.state().failed(generation, cause, Instant::now(), rand::random());
    }

    fn state(&self) -> MutexGuard<'_, ConnectionState<Connection, Opening>> {
        self.shared.state.lock().expect("nothing panics while it holds this lock")
    }

    fn classify(&self, error: RedisError) -> Error {
        let location = Arc::clone(&self.shared.location);
        if error.is_timeout() {
            return self.timed_out();
        }
        let is_broken = error.is_io_error() || error.is_unrecoverable_error();
        // After a failover the former master is a replica, which rejects writes.
        let is_replica = error.code() == Some("READONLY");
        let source = Arc::new(error);
        match () {
            () if is_replica => Error::NotConnected { location, source },
            () if is_broken => Error::Disconnected { location, source },
            () => Error::Rejected { location, source },
        }
    }

    fn not_connected(&self, source: Arc<RedisError>) -> Error {
        Error::NotConnected { location: Arc::clone(&self.shared.location), source }
    }

    fn timed_out(&self) -> Error {
        let location = Arc::clone(&self.shared.location);
        Error::Timeout { location, timeout: self.shared.timeouts.command }
    }
}

/// Omits the settings, which include credentials.
impl fmt::Debug for RedisClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RedisClient({})", self.location())
    }
}
