//! Evaluated flags for one context, with entity tag and body, from the cache when possible. For OFREP
//! this module computes only the hash of the evaluated flags, not the response.

use std::sync::Arc;

use bytes::Bytes;
use hyper::header::HeaderValue;
use xxhash_rust::xxh3::xxh3_128;

use crate::{
    engine::{Context, FlagId, Key, Outcome, Values},
    snapshot::{
        Fragment, FragmentId, Fragments, Shown, Snapshot, Toggle, View,
        body::{Body, etag_of},
    },
    token::Projects,
};

/// The evaluated flags of one context. The body is written on demand.
#[derive(Debug)]
pub struct Answer<'a> {
    snapshot: &'a Snapshot,
    view: &'a View,
    shown: Shown,
    hash: u128,
    is_settled: bool,
    known: Known<'a>,
}

/// The source of the body.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one per request, on the stack")]
enum Known<'a> {
    /// The fragments of the flags that were just evaluated.
    Fragments(Vec<Fragment<'a>>),
    /// The hash came from the cache. The values are evaluated only if the body is not cached.
    Values(Values<'a>),
}

impl<'a> Answer<'a> {
    /// Evaluates the flags of `view`, which belongs to `snapshot`, for a context, or takes the result
    /// from the cache. Records the request, so that a frequent one is evaluated before the next snapshot
    /// is served.
    pub fn of(
        snapshot: &'a Snapshot,
        view: &'a View,
        context: &Context<'a>,
        include: Shown,
    ) -> Self {
        let flags = Self::unnoted(snapshot, view, context, include);
        if flags.is_settled {
            let is_cached = matches!(flags.known, Known::Values(_));
            let request = (view.projects(), include, context);
            snapshot.answers().note(request, is_cached, flags.hash);
        }
        flags
    }

    /// Like [`EvaluatedFlags::evaluate`], without recording a request.
    pub(super) fn unnoted(
        snapshot: &'a Snapshot,
        view: &'a View,
        context: &Context<'a>,
        include: Shown,
    ) -> Self {
        let (engine, cache) = (snapshot.engine(), snapshot.answers());
        let values = engine.read(context);
        if view.reads().is_random(&values) {
            let fragments = evaluate_once(snapshot, view, values, include);
            let hash = hash_of(&fragments);
            let evaluation = Known::Fragments(fragments);
            return Self {
                snapshot,
                view,
                shown: include,
                hash,
                is_settled: false,
                known: evaluation,
            };
        }
        let mut key = key(view, Words::Toggles(include));
        engine.tell(view.reads(), &values, &mut key);
        let cache_key = cache.known_by(&key);
        let (hash, evaluation) = if let Some(hash) = cache.outcome(cache_key) {
            (hash, Known::Values(values))
        } else {
            let fragments = evaluate(snapshot, view, values, include);
            let hash = hash_of(&fragments);
            cache.remember(cache_key, hash);
            (hash, Known::Fragments(fragments))
        };
        Self { snapshot, view, shown: include, hash, is_settled: true, known: evaluation }
    }

    /// Whether an equal context gets the same result: no outcome is random or reads a generated
    /// `sessionId`.
    pub fn is_settled(&self) -> bool {
        self.is_settled
    }

    /// The hash of the included flags and their outcomes.
    pub fn hash(&self) -> u128 {
        self.hash
    }

    /// The entity tag of the body.
    pub fn etag(&self) -> HeaderValue {
        etag_of(self.hash)
    }

    /// The body, `{"toggles":[…]}`, with flags sorted by name.
    pub fn body(self) -> Arc<Body> {
        let Self { snapshot, view, shown: include, hash, known: evaluation, .. } = self;
        snapshot.answers().body(hash, || {
            let fragments = match evaluation {
                Known::Fragments(fragments) => fragments,
                Known::Values(values) => evaluate(snapshot, view, values, include),
            };
            Body::tagged(write(&fragments), hash)
        })
    }
}

/// The hash of the evaluated flags of `view`, which belongs to `snapshot`, for an OFREP response. `hash`
/// hashes one flag's outcome in OFREP's format.
pub fn reworded(
    snapshot: &Snapshot,
    view: &View,
    context: &Context<'_>,
    hash: impl Fn(FlagId, Outcome) -> u64,
) -> u128 {
    let (engine, cache) = (snapshot.engine(), snapshot.answers());
    let values = engine.read(context);
    let evaluate = |values| {
        let ofrep_hashes = snapshot.fragments().reworded(engine, hash);
        let mut hashes = Vec::with_capacity(view.toggles().len());
        listed(snapshot, view, values, Shown::All, |fragment| {
            hashes.push(ofrep_hashes.hash(fragment).to_le_bytes());
        });
        xxh3_128(hashes.as_flattened())
    };
    if view.reads().is_random(&values) {
        return evaluate(values);
    }
    let mut key = key(view, Words::Others);
    engine.tell(view.reads(), &values, &mut key);
    let cache_key = cache.known_by(&key);
    cache.outcome(cache_key).unwrap_or_else(|| {
        let hash = evaluate(values);
        cache.remember(cache_key, hash);
        hash
    })
}

/// The kind of a cached result.
#[derive(Clone, Copy, Debug)]
enum Words {
    /// Flags in Unleash's format, the included ones only.
    Toggles(Shown),
    /// All flags in OFREP's format.
    Others,
    /// The outcomes of the flags that are [`ScopedFlag::PerContext`].
    Repeatable,
}

/// The beginning of the cache key of a result of a view.
fn key(view: &View, format: Words) -> Key {
    let mut key = Key::from_slice(&view.number().to_le_bytes());
    key.push(match format {
        Words::Toggles(Shown::Enabled) => 0,
        Words::Toggles(Shown::All) => 1,
        Words::Others => 2,
        Words::Repeatable => 3,
    });
    key
}

/// Evaluates the view and returns the fragments of the included flags.
fn evaluate<'a>(
    snapshot: &'a Snapshot,
    view: &View,
    values: Values<'_>,
    include: Shown,
) -> Vec<Fragment<'a>> {
    let all = snapshot.fragments();
    let mut fragments = Vec::with_capacity(view.toggles().len());
    listed(snapshot, view, values, include, |fragment| fragments.push(all.get(fragment)));
    fragments
}

/// Like [`evaluate_fragments`], for a context for which some outcomes are valid for this request only.
/// The outcomes of [`ScopedFlag::PerContext`] flags come from the cache when possible.
fn evaluate_once<'a>(
    snapshot: &'a Snapshot,
    view: &View,
    values: Values<'_>,
    include: Shown,
) -> Vec<Fragment<'a>> {
    let (engine, all) = (snapshot.engine(), snapshot.fragments());
    let mut fragments = Vec::with_capacity(view.toggles().len());
    let mut key = key(view, Words::Repeatable);
    engine.tell(view.repeatable_reads(), &values, &mut key);
    let bound = engine.bind_values(values);
    let cache = snapshot.answers();
    let deterministic = cache.repeatable(cache.known_by(&key), || {
        let outcomes = view.toggles().iter().filter_map(|toggle| match *toggle {
            Toggle::Varies(flag) => Some(engine.evaluate(flag, &bound)),
            Toggle::Fixed { .. } | Toggle::Draws(_) => None,
        });
        outcomes.collect()
    });
    let mut deterministic = deterministic.iter();
    let cached = |_| *deterministic.next().expect("there is one outcome for each such flag");
    let evaluated = |flag| engine.evaluate(flag, &bound);
    listed_by(all, view, include, (cached, evaluated), |fragment| {
        fragments.push(all.get(fragment))
    });
    fragments
}

/// Evaluates every flag of the view and calls `visit` with the fragment of each included flag.
pub(super) fn listed(
    snapshot: &Snapshot,
    view: &View,
    values: Values<'_>,
    include: Shown,
    visit: impl FnMut(FragmentId),
) {
    let engine = snapshot.engine();
    let bound = engine.bind_values(values);
    let evaluate = |flag| engine.evaluate(flag, &bound);
    listed_by(snapshot.fragments(), view, include, (evaluate, evaluate), visit);
}

/// Calls `visit` with the fragment of each included flag, in the order of the view. The two functions
/// return the outcomes of [`ScopedFlag::PerContext`] and [`ScopedFlag::PerRequest`] flags.
fn listed_by(
    all: &Fragments,
    view: &View,
    include: Shown,
    (mut per_context, mut per_request): (
        impl FnMut(FlagId) -> Outcome,
        impl FnMut(FlagId) -> Outcome,
    ),
    mut visit: impl FnMut(FragmentId),
) {
    for toggle in view.toggles() {
        let (flag, outcome) = match *toggle {
            Toggle::Fixed { on, fragment } => {
                if on || include == Shown::All {
                    visit(fragment);
                }
                continue;
            }
            Toggle::Varies(flag) => (flag, per_context(flag)),
            Toggle::Draws(flag) => (flag, per_request(flag)),
        };
        if outcome.is_on() || include == Shown::All {
            visit(all.id(flag, outcome));
        }
    }
}

/// Hashes the content of a body without writing it. Equal bodies have equal hashes on every instance and
/// across snapshots.
fn hash_of(fragments: &[Fragment<'_>]) -> u128 {
    let hashes: Vec<_> = fragments.iter().map(|it| it.hash().to_le_bytes()).collect();
    xxh3_128(hashes.as_flattened())
}

fn write(fragments: &[Fragment<'_>]) -> Bytes {
    let (opening, end) = (r#"{"toggles":["#, "]}");
    let length = fragments.iter().map(|it| it.with_comma().len()).sum::<usize>().saturating_sub(1);
    // The exact size, so that the text is not copied as it grows.
    let mut text = String::with_capacity(opening.len() + length + end.len());
    text.push_str(opening);
    if let Some((last, others)) = fragments.split_last() {
        text.extend(others.iter().map(|it| it.with_comma()));
        text.push_str(last.json());
    }
    text.push_str(end);
    Bytes::from(text)
}

/// The body for one flag; `None` if there is no such flag in `projects`.
pub fn one(
    snapshot: &Snapshot,
    projects: &Projects,
    context: &Context<'_>,
    name: &str,
) -> Option<Body> {
    let engine = snapshot.engine();
    let flag = engine.find(name)?;
    if !projects.contains(engine.flag(flag).project()) {
        return None;
    }
    let outcome = engine.evaluate(flag, &engine.bind(context));
    let fragments = snapshot.fragments();
    let json = fragments.get(fragments.id(flag, outcome)).json();
    Some(Body::new(Bytes::copy_from_slice(json.as_bytes())))
}

#[cfg(test)]
mod tests;
