//! Rules about the source code, checked on the source text: which module may import which, and which
//! calls are forbidden where.
//!
//! Rules that the compiler can check are lints in `Cargo.toml` or `clippy.toml` instead, for instance
//! who reads the environment. Unit tests at the end of a file are exempt, and so is everything below
//! `tests`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use regex::Regex;

/// The layers, lowest first. A module may import modules of lower layers, and from its own layer those
/// that are listed behind it.
const LAYERS: [&[(&str, &[&str])]; 8] = [
    &[
        ("token", &[]),
        ("protocol", &["token"]),
        ("telemetry", &["protocol", "rate_limit"]),
        ("secret_file", &["protocol"]),
        ("rate_limit", &[]),
        ("backoff", &[]),
        ("cache", &[]),
    ],
    &[("engine", &[])],
    // `served` caches what is built from a snapshot. `usage` compares names with the snapshot's.
    // `upstream` stores its tokens, reads PEM files like the
    // listeners, and is a destination of usage.
    &[
        ("snapshot", &[]),
        ("served", &["snapshot"]),
        ("usage", &["snapshot"]),
        ("store", &[]),
        ("background_writer", &["store"]),
        ("tls", &[]),
        ("upstream", &["background_writer", "store", "tls", "usage"]),
    ],
    // `sync` prewarms the evaluation cache of a snapshot before it is served.
    &[("evaluation", &[]), ("auth", &[]), ("changes", &[]), ("sync", &["evaluation"])],
    &[("control_plane", &[])],
    &[("http", &[])],
    // Above all modules whose settings it collects; only the next layer reads it.
    &[("config", &[])],
    &[("app", &[]), ("commands", &[]), ("probe", &[])],
];

/// The layers within `http`, lowest first.
const HTTP_LAYERS: [&[&str]; 10] = [
    &[
        "client_address",
        "content_encoding",
        "conditional",
        "cors",
        "cpu_bound",
        "routes",
        "shutdown_signal",
    ],
    &["response"],
    &["pipeline"],
    &["failed_request_limiter"],
    &[
        "console",
        "token_validation",
        "server",
        "request_metrics",
        "request_body",
        "metrics_ingest",
        "streaming",
    ],
    &["client_api", "health", "https_redirect", "request_log"],
    &["frontend_api"],
    &["ofrep"],
    &["sdk"],
    // The admin listener implements the whole API of an upstream.
    &["admin"],
];

/// A source file. `code` is its text without comments and unit tests.
struct Source {
    /// Relative to `src`, for instance `http/response.rs`.
    path: String,
    text: String,
    code: String,
}

impl Source {
    /// Its top-level module.
    fn module(&self) -> &str {
        self.path.split(['/', '.']).next().expect("split gives at least one part")
    }

    /// The path of its module, for instance `["http", "response"]`.
    fn module_path(&self) -> Vec<&str> {
        self.path.trim_end_matches(".rs").split('/').collect()
    }

    fn is_below(&self, paths: &[&str]) -> bool {
        paths.iter().any(|path| self.path == *path || self.path.starts_with(&format!("{path}/")))
    }

    /// Every path that begins with `crate::` or `super::`, relative to the crate root; at least its
    /// first two segments.
    fn imports(&self) -> Vec<Vec<String>> {
        let paths =
            Regex::new(r"\b(crate|super)((?:::\s*super)*)::\s*").expect("the pattern is right");
        let (mut imports, mut read_to) = (Vec::new(), 0);
        for found in paths.captures_iter(&self.code) {
            let whole = found.get(0).expect("there is a match");
            // Part of a tree that was parsed already.
            if whole.start() < read_to {
                continue;
            }
            let mut base = self.module_path();
            if &found[1] == "crate" {
                base.clear();
            } else {
                let up = 1 + found[2].matches("super").count();
                base.truncate(base.len().saturating_sub(up));
            }
            let rest = &self.code[whole.end()..];
            read_to = whole.end() + use_tree_end(rest);
            for import in expand_use_tree(rest) {
                let mut path: Vec<String> = base.iter().map(|&it| it.to_owned()).collect();
                for segment in import {
                    match segment.as_str() {
                        "super" => drop(path.pop()),
                        _ => path.push(segment),
                    }
                }
                imports.push(path);
            }
        }
        imports
    }
}

/// The length of the `use` tree at the start of a text; 0 for a plain path.
fn use_tree_end(text: &str) -> usize {
    let mut depth = 0_usize;
    for (at, letter) in text.char_indices() {
        match letter {
            '{' => depth += 1,
            '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth == 0 {
            return at;
        }
    }
    text.len()
}

/// The paths in a `use` tree or a plain path: `{a::B, c::{D}}` is `a::B` and `c::D`.
fn expand_use_tree(text: &str) -> Vec<Vec<String>> {
    let Some(tree) = text.strip_prefix('{') else {
        let name: String = text
            .chars()
            .take_while(|it| it.is_alphanumeric() || *it == '_' || *it == '*')
            .collect();
        let rest = text[name.len()..].trim_start();
        let below = rest.strip_prefix("::").map(str::trim_start);
        let one = || vec![vec![name.clone()]];
        return below.map_or_else(one, |below| {
            let below = expand_use_tree(below).into_iter();
            below.map(|path| std::iter::once(name.clone()).chain(path).collect()).collect()
        });
    };
    let (mut depth, mut items, mut start) = (0_usize, Vec::new(), 0);
    for (at, letter) in tree.char_indices() {
        match letter {
            '{' => depth += 1,
            ',' if depth == 0 => {
                items.push(&tree[start..at]);
                start = at + 1;
            }
            '}' if depth == 0 => {
                items.push(&tree[start..at]);
                break;
            }
            '}' => depth -= 1,
            _ => {}
        }
    }
    items
        .into_iter()
        .map(str::trim)
        .filter(|item| !item.is_empty())
        .flat_map(expand_use_tree)
        .collect()
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut folders, mut sources) = (vec![root.clone()], Vec::new());
    while let Some(folder) = folders.pop() {
        let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        for path in entries.collect::<Vec<PathBuf>>() {
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|it| it == "rs") {
                sources.push(read(&root, &path));
            }
        }
    }
    sources.sort_by(|one, other| one.path.cmp(&other.path));
    sources
}

fn read(root: &Path, path: &Path) -> Source {
    let text = std::fs::read_to_string(path).unwrap();
    let path = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
    let is_test = path.ends_with("/tests.rs") || path.ends_with("/scripted.rs");
    let before_tests = text.split("\n#[cfg(test)]\nmod tests").next().unwrap_or_default();
    // Blank instead of removed, so that line numbers stay.
    let is_comment = |line: &str| line.trim_start().starts_with("//");
    let lines = before_tests.lines().map(|line| if is_comment(line) { "" } else { line });
    let code = if is_test { String::new() } else { lines.collect::<Vec<_>>().join("\n") };
    Source { path, text, code }
}

/// Fails with every line of code that `pattern` matches, except in `allowed` files.
#[track_caller]
fn check_absent(why: &str, pattern: &str, allowed: &[&str]) {
    let pattern = Regex::new(pattern).unwrap();
    let mut found = Vec::new();
    for source in sources().iter().filter(|source| !source.is_below(allowed)) {
        for (number, line) in source.code.lines().enumerate() {
            if pattern.is_match(line) {
                found.push(format!("src/{}:{}: {}", source.path, number + 1, line.trim()));
            }
        }
    }
    assert!(found.is_empty(), "{why}:\n{}", found.join("\n"));
}

#[test]
fn imports_of_every_syntax_are_found() {
    let path = |path: &str| path.split("::").map(str::to_owned).collect::<Vec<_>>();
    let code =
        "use crate::{a::B, c::{self, D as E, f::{G, H}}}; fn x() { super::y(); crate::z::w() }
        use super::{\n    super::up,\n    i::*,\n};";
    let source = Source { path: "m/n.rs".to_owned(), text: String::new(), code: code.to_owned() };
    let expect = ["a::B", "c::self", "c::D", "c::f::G", "c::f::H", "m::y", "z::w", "up", "m::i::*"];
    assert_eq!(source.imports(), expect.map(path));
}

#[test]
fn imports_go_to_lower_layers_only() {
    let height =
        |module: &str| LAYERS.iter().position(|layer| layer.iter().any(|it| it.0 == module));
    let mut upward = Vec::new();
    for source in sources() {
        let module = source.module();
        if ["lib", "main"].contains(&module) {
            continue;
        }
        let own = height(module).unwrap_or_else(|| panic!("{module} is in no layer of the table"));
        let beside = LAYERS[own].iter().find(|it| it.0 == module).map_or(&[][..], |it| it.1);
        for import in source.imports() {
            let other = import[0].as_str();
            let Some(height) = height(other) else {
                panic!("src/{}: {other} is in no layer of the table", source.path)
            };
            if other != module && height >= own && !beside.contains(&other) {
                upward.push(format!("src/{}: {}", source.path, import.join("::")));
            }
        }
    }
    assert!(upward.is_empty(), "these imports do not point down:\n{}", upward.join("\n"));
}

#[test]
fn layer_table_lists_exactly_the_top_level_modules() {
    let root = sources().into_iter().find(|source| source.path == "lib.rs").unwrap();
    let declared = Regex::new(r"(?m)^pub mod (\w+);").unwrap();
    let mut declared: Vec<_> =
        declared.captures_iter(&root.code).map(|it| it[1].to_owned()).collect();
    let mut named: Vec<_> = LAYERS.iter().copied().flatten().map(|it| it.0.to_owned()).collect();
    declared.sort();
    named.sort();
    assert_eq!(named, declared);
}

#[test]
fn http_imports_go_to_lower_layers_only() {
    let height = |module: &str| HTTP_LAYERS.iter().position(|layer| layer.contains(&module));
    let mut upward = Vec::new();
    for source in sources().iter().filter(|source| source.path.starts_with("http/")) {
        let module = source.module_path()[1];
        let own = height(module).unwrap_or_else(|| panic!("http/{module} is not in the table"));
        for import in source.imports().into_iter().filter(|import| import[0] == "http") {
            let other = import[1].as_str();
            if other != module && height(other).is_none_or(|height| height >= own) {
                upward.push(format!("src/{}: {}", source.path, import.join("::")));
            }
        }
    }
    assert!(upward.is_empty(), "these imports do not point down:\n{}", upward.join("\n"));
}

#[test]
fn child_modules_import_nothing_that_their_parent_declares() {
    let all = sources();
    // A child may import its siblings, but not what its parent declares below its `mod` lines.
    let children = |parent: &[&str]| -> Vec<String> {
        let folder = parent.join("/") + "/";
        let paths = all.iter().filter_map(|source| source.path.strip_prefix(&folder));
        paths.map(|path| path.split(['/', '.']).next().unwrap_or(path).to_owned()).collect()
    };
    let mut upward: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for source in &all {
        let path = source.module_path();
        let [parent @ .., _] = &path[..] else { continue };
        if parent.is_empty() {
            continue;
        }
        let children = children(parent);
        for import in source.imports() {
            let Some(name) = import.get(parent.len()) else { continue };
            if import[..parent.len()].iter().eq(parent.iter()) && !children.contains(name) {
                upward.entry(source.path.clone()).or_default().push(import.join("::"));
            }
        }
    }
    assert!(upward.is_empty(), "{upward:#?}");
}

#[test]
fn engine_has_no_side_effects() {
    let outside = r"\b(tokio|std::(time|fs|io|env|thread|process)|Tcp\w+|Udp\w+|rand|tracing|metrics|async)\b|::now\(";
    let others: Vec<_> =
        sources().into_iter().filter(|it| it.module() != "engine").map(|it| it.path).collect();
    let others: Vec<_> = others.iter().map(String::as_str).collect();
    check_absent(
        "time, randomness and all other input are part of the engine's context",
        outside,
        &others,
    );
}

#[test]
fn every_file_begins_with_module_docs() {
    for source in sources() {
        assert!(source.text.starts_with("//! "), "src/{} does not begin with `//!`", source.path);
        assert!(!source.path.ends_with("mod.rs"), "src/{} must have another name", source.path);
    }
}

#[test]
fn only_http_chooses_status_codes() {
    let allowed = ["http", "upstream", "upstream.rs", "probe.rs"];
    check_absent("only `http` chooses a status", r"\bStatusCode\b", &allowed);
}

#[test]
fn errors_are_logged_with_their_causes() {
    check_absent(
        "errors are logged by `error_chain`, with their causes",
        r"%error\b|error = %",
        &[],
    );
}

#[test]
fn detached_tasks_are_spawned_in_app_and_listener_only() {
    let spawning = r"\b(tokio|task|thread)::spawn\b|Handle::spawn";
    check_absent("a task belongs to a JoinSet", spawning, &["app.rs", "app", "http/server.rs"]);
}

#[test]
fn ages_and_intervals_use_a_monotonic_clock() {
    // These need the time of day: dates in constraints, hours of usage, expiries, revisions, and times
    // for people to read.
    let allowed = [
        "app.rs",
        "app/admin_token.rs",
        "app/reload.rs",
        "auth/token_cache.rs",
        "commands/explain.rs",
        "config/tls.rs",
        "control_plane",
        "http/admin",
        "http/sdk",
        "http/sdk.rs",
        "http/frontend_api",
        "http/ofrep.rs",
        "http/metrics_ingest.rs",
        "snapshot.rs",
        "sync/publish.rs",
        "tls/watch.rs",
        "upstream",
    ];
    let wall_clock = r"\b(Timestamp|SystemTime|Zoned)::now\b";
    check_absent("an age is measured by `Instant`", wall_clock, &allowed);
}

#[test]
fn plaintext_tokens_are_exposed_in_few_modules_only() {
    // The session sets its own cookies.
    let cookies = "http/admin/session.rs";
    let allowed =
        ["token.rs", "protocol", "upstream", "auth", "app", "commands", "control_plane", cookies];
    check_absent("only these modules expose plaintext tokens", r"\.expose\(\)", &allowed);
}
