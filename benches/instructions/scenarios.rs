//! The scenarios: whole requests, and their pure parts.

use std::hint::black_box;
use std::time::Duration;

use futures_util::FutureExt as _;
use parapet::auth::{self, Authenticator, Validator};
use parapet::engine::{Context, Engine};
use parapet::protocol::context::FrontendContext;
use parapet::protocol::features::Document;
use parapet::served::ServedSnapshot;
use parapet::snapshot::prepared_body::ContentCoding;
use parapet::snapshot::{Filter, SegmentFormat};
use parapet::token::{Environment, Grant, Projects, Scope, Token, TokenKind};

use crate::counted;
use crate::flags::document;
use crate::requests::{self, Server};

/// Work that is repeated.
#[derive(Debug)]
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    /// The number of counted iterations.
    pub(crate) iterations: u64,
    run: Run,
}

#[derive(Debug)]
enum Run {
    /// A request to Parapet or to the baseline.
    Request(&'static requests::Request, Server),
    /// Prepares a closure, which is then called repeatedly.
    Work(fn() -> Box<dyn FnMut()>),
}

/// The number of flags.
const FLAGS: usize = 350;

/// A request to Parapet, or the same response from bare hyper.
const fn request(
    name: &'static str,
    request: &'static requests::Request,
    server: Server,
) -> Scenario {
    Scenario { name, iterations: 200, run: Run::Request(request, server) }
}

const fn work(name: &'static str, iterations: u64, prepare: fn() -> Box<dyn FnMut()>) -> Scenario {
    Scenario { name, iterations, run: Run::Work(prepare) }
}

use requests::{
    FEATURES, FEATURES_GZIP, FEATURES_UNCHANGED, FRONTEND, FRONTEND_NEW_USERS, FRONTEND_UNCHANGED,
    METRICS, UNKNOWN_TOKEN,
};

/// In the order of the table.
pub(crate) const SCENARIOS: &[Scenario] = &[
    request("features, 304", &FEATURES_UNCHANGED, Server::Parapet),
    request("features, 304: bare hyper", &FEATURES_UNCHANGED, Server::Bare),
    request("features, 200", &FEATURES, Server::Parapet),
    request("features, 200: bare hyper", &FEATURES, Server::Bare),
    request("features, 200, gzip", &FEATURES_GZIP, Server::Parapet),
    request("features, 200, gzip: bare hyper", &FEATURES_GZIP, Server::Bare),
    request("frontend, same context", &FRONTEND, Server::Parapet),
    request("frontend, same context: bare hyper", &FRONTEND, Server::Bare),
    request("frontend, 304", &FRONTEND_UNCHANGED, Server::Parapet),
    request("frontend, 304: bare hyper", &FRONTEND_UNCHANGED, Server::Bare),
    request("frontend, new user each time", &FRONTEND_NEW_USERS, Server::Parapet),
    request("frontend, new user each time: bare hyper", &FRONTEND_NEW_USERS, Server::Bare),
    request("metrics, 202", &METRICS, Server::Parapet),
    request("metrics, 202: bare hyper", &METRICS, Server::Bare),
    request("unknown token, 401", &UNKNOWN_TOKEN, Server::Parapet),
    request("unknown token, 401: bare hyper", &UNKNOWN_TOKEN, Server::Bare),
    work("token verdict, 1 token", 500, || authenticate(1)),
    work("token verdict, 100,000 tokens", 500, || authenticate(100_000)),
    work("context from a query", 500, context_from_query),
    work("context from JSON", 500, context_from_json),
    work("bind a context", 500, bind_context),
    work("evaluate 350 flags", 50, evaluate),
    work("parse 350 flags", 5, parse),
    work("compile 350 flags", 5, compile),
    work("list 350 flags", 5, list_features),
    work("refresh 350 flags", 5, refresh),
];

impl Scenario {
    /// Runs it once to fill all caches, then as often as it is counted.
    pub(crate) fn run(&self) {
        match self.run {
            Run::Request(request, server) => request.run(server, FLAGS, self.iterations),
            Run::Work(prepare) => {
                let mut work = prepare();
                work();
                for _ in 0..self.iterations {
                    counted(&mut work);
                }
            }
        }
    }
}

/// An authenticator that knows these tokens.
pub(crate) fn authenticator(tokens: impl IntoIterator<Item = (Token, TokenKind)>) -> Authenticator {
    const LONG: Duration = Duration::from_hours(1);
    let config = auth::Config {
        revalidate_after: LONG,
        forget_invalid_after: LONG,
        list_interval: LONG,
        deadline: LONG,
        capacity: 1_000_000,
    };
    let authenticator = Authenticator::new(config, Validator::StaticOnly, []);
    for (token, kind) in tokens {
        authenticator.import(&token, &Grant { kind, scope: scope() });
    }
    authenticator
}

/// All projects of `development`.
pub(crate) fn scope() -> Scope {
    Scope { environment: Environment::new("development"), projects: Projects::All }
}

/// A snapshot with this number of flags.
pub(crate) fn snapshot(flags: usize) -> ServedSnapshot {
    ServedSnapshot::build(scope(), parsed(&document(flags)), None)
}

fn parsed(text: &str) -> Document {
    Document::parse(text.as_bytes()).expect("the document is sound")
}

fn authenticate(count: usize) -> Box<dyn FnMut()> {
    let token = |n: usize| format!("*:development.{n:032x}{n:032x}");
    let parse = |n| Token::parse(&token(n)).expect("sound");
    let authenticator = authenticator((0..count).map(|n| (parse(n), TokenKind::Client)));
    let header = token(count / 2);
    Box::new(move || {
        let verdict = authenticator.authenticate(black_box(&header)).now_or_never();
        assert!(verdict.is_some_and(|it| it.is_ok()), "known tokens are accepted at once");
    })
}

fn context_from_query() -> Box<dyn FnMut()> {
    let query = requests::query("user-4711");
    Box::new(move || {
        let context = FrontendContext::from_query(black_box(&query));
        assert!(black_box(context).is_ok());
    })
}

fn context_from_json() -> Box<dyn FnMut()> {
    let body = serde_json::json!({
        "userId": "user-4711", "sessionId": "5f2b6a", "environment": "v3", "appName": "v5",
        "properties": { "country": "v7", "plan": "v12", "version": "1.5.2" },
    });
    let body = body.to_string();
    Box::new(move || {
        let context = FrontendContext::from_json(black_box(body.as_bytes()));
        assert!(black_box(context).is_ok());
    })
}

/// A context with all fields.
fn context() -> Context<'static> {
    Context {
        user_id: Some("user-4711"),
        session_id: Some("5f2b6a"),
        environment: Some("v3"),
        app_name: Some("v5"),
        properties: &[("country", "v7"), ("plan", "v12"), ("version", "1.5.2")],
        ..Context::default()
    }
}

fn bind_context() -> Box<dyn FnMut()> {
    let (engine, _) = Engine::compile(&parsed(&document(FLAGS)));
    Box::new(move || {
        black_box(engine.bind(black_box(&context())));
    })
}

fn evaluate() -> Box<dyn FnMut()> {
    let (engine, _) = Engine::compile(&parsed(&document(FLAGS)));
    let bound = engine.bind(&context());
    Box::new(move || {
        let on = engine.ids().filter(|id| engine.evaluate(*id, black_box(&bound)).is_on());
        assert!(on.count() > 0);
    })
}

fn parse() -> Box<dyn FnMut()> {
    let text = document(FLAGS);
    Box::new(move || drop(black_box(parsed(black_box(&text)))))
}

fn compile() -> Box<dyn FnMut()> {
    let document = parsed(&document(FLAGS));
    Box::new(move || drop(black_box(Engine::compile(black_box(&document)))))
}

/// A different filter each time, which keeps all flags, so that no result is cached.
fn list_features() -> Box<dyn FnMut()> {
    let snapshot = snapshot(FLAGS);
    let mut n = 0;
    Box::new(move || {
        n += 1;
        let projects =
            ["default", "web", "mobile", &n.to_string()].map(parapet::token::Project::new);
        let filter = Filter { projects: projects.into(), ..Filter::default() };
        let body = snapshot.client_features(&Projects::All, filter, SegmentFormat::Separate);
        assert!(body.get_or_encode(ContentCoding::Identity).bytes.len() > 100_000);
    })
}

/// From upstream's response to the served response.
fn refresh() -> Box<dyn FnMut()> {
    let text = document(FLAGS);
    Box::new(move || {
        let document = parsed(black_box(&text));
        let snapshot = ServedSnapshot::build(scope(), document, None);
        snapshot.client_features(&Projects::All, Filter::default(), SegmentFormat::Separate);
        drop(black_box(snapshot));
    })
}
