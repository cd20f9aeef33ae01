//! Rules about the source code, checked on the source text: which module may import which, and which
//! calls are forbidden where.
//!
//! Rules that the compiler can check are lints in `Cargo.toml` or `clippy.toml` instead, for instance
//! who reads the environment. Unit tests at the end of a file are exempt, and so is everything below
//! `tests`.

use std::collections::{BTreeMap, BTreeSet};
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
        ("shutdown_signal", &[]),
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
        ("redis_client", &[]),
        ("store", &["redis_client"]),
        ("background_writer", &["store"]),
        ("tls", &[]),
        ("upstream", &["background_writer", "store", "tls", "usage"]),
    ],
    // `sync` prewarms the evaluation cache of a snapshot before it is served, and in a fleet takes flags from
    // the leader, as `auth` does tokens. `auth` and `sync` learn from upstream's event log what has changed.
    &[
        ("evaluation", &[]),
        ("event_log", &[]),
        ("fleet", &[]),
        ("auth", &["event_log", "fleet"]),
        ("changes", &[]),
        ("sync", &["evaluation", "event_log", "fleet"]),
    ],
    &[("control_plane", &[]), ("server", &[])],
    &[("http", &[])],
    // Above all modules whose settings it collects; only the next layer reads it.
    &[("config", &[])],
    &[("app", &[]), ("commands", &[]), ("probe", &[])],
];

/// The layers within `http`, lowest first.
const HTTP_LAYERS: [&[&str]; 10] = [
    &["client_address", "content_encoding", "conditional", "cors", "cpu_bound", "routes"],
    &["response"],
    &["authorizer"],
    &["failed_request_limiter"],
    &[
        "console",
        "token_validation",
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

/// The files below `http`, but outside `server` and `upstream`, that use hyper: entity tags are prepared
/// as header values.
const ENTITY_TAGS: [&str; 2] = ["evaluation/cached_evaluation.rs", "snapshot/prepared_body.rs"];

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
    let is_test = path.ends_with("/tests.rs") || path.ends_with("/scripted_server.rs");
    let before_tests = text.split("\n#[cfg(test)]\nmod tests {").next().unwrap_or_default();
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

/// As [`check_absent`], but the files in `left` must match still.
#[track_caller]
fn check_absent_except(why: &str, pattern: &str, allowed: &[&str], left: &[&str]) {
    check_absent(why, pattern, &[allowed, left].concat());
    let matches = Regex::new(pattern).unwrap();
    for path in left {
        let source = sources().into_iter().find(|source| source.path == *path);
        let is_left = source.is_some_and(|source| matches.is_match(&source.code));
        assert!(is_left, "{path} is no longer an exception: delete it from the list");
    }
}

/// An import of a sibling: the path of the module, and the sibling's name.
type SiblingImport = (String, String);

fn sibling_imports(all: &[Source]) -> BTreeSet<SiblingImport> {
    let modules: BTreeSet<Vec<&str>> = all.iter().map(Source::module_path).collect();
    let mut found = BTreeSet::new();
    for source in all {
        let own = source.module_path();
        for import in source.imports() {
            let import: Vec<_> = import.iter().map(String::as_str).collect();
            let common = own.iter().zip(&import).take_while(|(one, other)| one == other).count();
            let is_sibling = common < own.len()
                && import.get(..=common).is_some_and(|module| modules.contains(module));
            if is_sibling {
                found.insert((own[..=common].join("/"), import[common].to_owned()));
            }
        }
    }
    found
}

/// The imports that are part of a circle.
fn circular_imports(imports: &BTreeSet<SiblingImport>) -> BTreeSet<&SiblingImport> {
    let path = |(from, to): &SiblingImport| match from.rsplit_once('/') {
        Some((parent, _)) => format!("{parent}/{to}"),
        None => to.clone(),
    };
    let leads_back = |import: &&SiblingImport| {
        let (mut seen, mut next) = (BTreeSet::new(), vec![path(import)]);
        while let Some(module) = next.pop() {
            let further = imports.iter().filter(|(from, _)| *from == module).map(path);
            next.extend(further.filter(|it| seen.insert(it.clone())));
        }
        seen.contains(&import.0)
    };
    imports.iter().filter(leads_back).collect()
}

#[test]
fn siblings_do_not_import_each_other_in_circles() {
    let imports = sibling_imports(&sources());
    let circular = circular_imports(&imports);
    assert!(circular.is_empty(), "these imports are parts of circles: {circular:#?}");
}

#[test]
fn circular_imports_are_found_and_only_those() {
    let imports = [("p/a", "b"), ("p/b", "c"), ("p/c", "b"), ("p/c", "d"), ("e", "f"), ("f", "e")];
    let imports = imports.map(|(from, to)| (from.to_owned(), to.to_owned())).into();
    let found = circular_imports(&imports);
    let found: Vec<_> = found.iter().map(|(from, to)| (from.as_str(), to.as_str())).collect();
    assert_eq!(found, [("e", "f"), ("f", "e"), ("p/b", "c"), ("p/c", "b")]);
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
    let allowed = ["http", "server/service.rs", "upstream", "upstream.rs", "probe.rs"];
    check_absent("only `http` chooses a status", r"\bStatusCode\b", &allowed);
}

#[test]
fn hyper_is_used_in_http_server_and_upstream_only() {
    let below: Vec<_> = LAYERS.iter().take_while(|layer| layer[0].0 != "http").copied().collect();
    let below = below.concat();
    let others: Vec<_> = sources().into_iter().map(|it| it.path).collect();
    let is_exempt = |path: &&str| {
        let module = path.split(['/', '.']).next().expect("split gives at least one part");
        ["server", "upstream"].contains(&module) || !below.iter().any(|it| it.0 == module)
    };
    let exempt: Vec<_> = others.iter().map(String::as_str).filter(is_exempt).collect();
    let hyper = r"\b(hyper|hyper_util|http_body_util)::";
    check_absent_except(
        "HTTP is for `http`, `server` and `upstream`",
        hyper,
        &exempt,
        &ENTITY_TAGS,
    );
}

#[test]
fn backoffs_and_rate_limiters_have_one_module_each() {
    let own = r"\bstruct \w*(Backoff|RateLimiter)\b";
    let allowed = ["backoff.rs", "rate_limit.rs"];
    check_absent("`backoff` and `rate_limit` have it", own, &allowed);
}

/// The sentences that open with a relative clause and are no questions, in Markdown texts. Each has the
/// name of its text.
fn indirect_sentences(texts: &[(String, String)]) -> Vec<(&str, String)> {
    let opening = r"(?:^|[.:;!?|)`*] +)((?:What|Who|Whom|Whoever|Whose)\b[^.?!]*[.?!]?)";
    let opening = Regex::new(opening).expect("the pattern is right");
    let mut found = Vec::new();
    for (name, text) in texts {
        for paragraph in paragraphs(text) {
            let sentences = opening.captures_iter(&paragraph).map(|it| it[1].trim().to_owned());
            let sentences = sentences.filter(|sentence| !sentence.ends_with('?'));
            found.extend(sentences.map(|sentence| (name.as_str(), sentence)));
        }
    }
    found
}

/// The paragraphs of a Markdown text without its code blocks. An item of a list and a row of a table are
/// paragraphs of their own.
fn paragraphs(text: &str) -> Vec<String> {
    let (mut paragraphs, mut is_code) = (vec![String::new()], false);
    for line in text.lines().map(str::trim) {
        let is_fence = line.starts_with("```");
        is_code ^= is_fence;
        let begins = line.starts_with(['*', '-', '|', '#', '>']) || line.is_empty();
        if begins || is_fence {
            paragraphs.push(String::new());
        }
        if !is_code && !is_fence {
            let paragraph = paragraphs.last_mut().expect("there is one");
            paragraph.push_str(line.trim_start_matches(['*', '-', '|', '#', '>', ' ']));
            paragraph.push(' ');
        }
    }
    paragraphs.retain(|paragraph| !paragraph.trim().is_empty());
    paragraphs
}

#[test]
fn sentences_open_with_their_subject() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let docs = std::fs::read_dir(root.join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let pages = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"].map(|name| root.join(name));
    let pages = docs.filter(|path| path.extension().is_some_and(|it| it == "md")).chain(pages);
    let mut texts: Vec<_> = pages
        .map(|path| (path.display().to_string(), std::fs::read_to_string(&path).unwrap()))
        .collect();
    for source in sources() {
        let comment = |line: &str| {
            let line = line.trim_start();
            let text = line.strip_prefix("///").or_else(|| line.strip_prefix("//!"));
            text.unwrap_or_default().to_owned() + "\n"
        };
        texts.push((source.path, source.text.lines().map(comment).collect()));
    }
    let found = indirect_sentences(&texts);
    assert!(found.is_empty(), "these do not open with their subject: {found:#?}");
}

#[test]
fn sentences_that_open_with_a_relative_clause_are_found() {
    let text = "* What is sent.\n  It ends. Who\n  polls waits.\n\n```\nWhat now\n```\nWho is it? Whatever.\n| a | What b |\n";
    let texts = [("page".to_owned(), text.to_owned())];
    let expect = ["What is sent.", "Who polls waits.", "What b |"];
    assert_eq!(indirect_sentences(&texts), expect.map(|it| ("page", it.to_owned())));
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
    check_absent("a task belongs to a JoinSet", spawning, &["app.rs", "app", "server.rs"]);
}

#[test]
fn ages_and_intervals_use_a_monotonic_clock() {
    // These need the time of day: dates in constraints, hours of usage, expiries, revisions, and times
    // for people to read.
    let allowed = [
        "app.rs",
        "app/admin_token_watcher.rs",
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
