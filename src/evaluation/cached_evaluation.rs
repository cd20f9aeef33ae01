//! Evaluated flags for one context, with entity tag and body, from the cache when possible. For OFREP
//! this module computes only the hash of the evaluated flags, not the response.

use std::sync::Arc;

use bytes::Bytes;
use hyper::header::HeaderValue;
use xxhash_rust::xxh3::xxh3_128;

use crate::{
    engine::{Context, ContextKey, ContextValues, FlagId, Outcome},
    served::ServedSnapshot,
    snapshot::{
        Fragment, FragmentId, Fragments, FrontendView, Include, ScopedFlag, Snapshot,
        prepared_body::{PreparedBody, etag_from_hash},
    },
    token::Projects,
};

/// The evaluated flags of one context. The body is written on demand.
#[derive(Debug)]
pub struct EvaluatedFlags<'a> {
    snapshot: &'a ServedSnapshot,
    view: &'a FrontendView,
    include: Include,
    hash: u128,
    is_deterministic: bool,
    evaluation: Evaluation<'a>,
}

/// The source of the body.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one per request, on the stack")]
enum Evaluation<'a> {
    /// The fragments of the flags that were just evaluated.
    Fresh(Vec<Fragment<'a>>),
    /// The hash came from the cache. The values are evaluated only if the body is not cached.
    Cached(ContextValues<'a>),
}

impl<'a> EvaluatedFlags<'a> {
    /// Evaluates the flags of `view`, which belongs to `snapshot`, for a context, or takes the result
    /// from the cache. Records the request, so that a frequent one is evaluated before the next snapshot
    /// is served.
    pub fn evaluate(
        snapshot: &'a ServedSnapshot,
        view: &'a FrontendView,
        context: &Context<'a>,
        include: Include,
    ) -> Self {
        let flags = Self::evaluate_untracked(snapshot, view, context, include);
        if flags.is_deterministic {
            let is_cached = matches!(flags.evaluation, Evaluation::Cached(_));
            let request = (view.projects(), include, context);
            snapshot.evaluation_cache().record_request(request, is_cached, flags.hash);
        }
        flags
    }

    /// Like [`EvaluatedFlags::evaluate`], without recording a request.
    pub(super) fn evaluate_untracked(
        snapshot: &'a ServedSnapshot,
        view: &'a FrontendView,
        context: &Context<'a>,
        include: Include,
    ) -> Self {
        let (engine, cache) = (snapshot.engine(), snapshot.evaluation_cache());
        let values = engine.read_context(context);
        if view.inputs().is_random_for(&values) {
            let fragments = evaluate_partly_random(snapshot, view, values, include);
            let hash = hash_fragments(&fragments);
            let evaluation = Evaluation::Fresh(fragments);
            return Self { snapshot, view, include, hash, is_deterministic: false, evaluation };
        }
        let mut key = key_prefix(view, Format::Unleash(include));
        engine.write_context_key(view.inputs(), &values, &mut key);
        let cache_key = cache.cache_key(&key);
        let (hash, evaluation) = if let Some(hash) = cache.result(cache_key) {
            (hash, Evaluation::Cached(values))
        } else {
            let fragments = evaluate_fragments(snapshot, view, values, include);
            let hash = hash_fragments(&fragments);
            cache.insert_result(cache_key, hash);
            (hash, Evaluation::Fresh(fragments))
        };
        Self { snapshot, view, include, hash, is_deterministic: true, evaluation }
    }

    /// Whether an equal context gets the same result: no outcome is random or reads a generated
    /// `sessionId`.
    pub fn is_deterministic(&self) -> bool {
        self.is_deterministic
    }

    /// The hash of the included flags and their outcomes.
    pub fn hash(&self) -> u128 {
        self.hash
    }

    /// The entity tag of the body.
    pub fn etag(&self) -> HeaderValue {
        etag_from_hash(self.hash)
    }

    /// The body, `{"toggles":[…]}`, with flags sorted by name.
    pub fn body(self) -> Arc<PreparedBody> {
        let Self { snapshot, view, include, hash, evaluation, .. } = self;
        snapshot.evaluation_cache().body(hash, || {
            let fragments = match evaluation {
                Evaluation::Fresh(fragments) => fragments,
                Evaluation::Cached(values) => evaluate_fragments(snapshot, view, values, include),
            };
            PreparedBody::with_hash(write_toggles(&fragments), hash)
        })
    }
}

/// The hash of the evaluated flags of `view`, which belongs to `snapshot`, for an OFREP response. `hash`
/// hashes one flag's outcome in OFREP's format.
pub fn ofrep_hash(
    snapshot: &ServedSnapshot,
    view: &FrontendView,
    context: &Context<'_>,
    hash: impl Fn(FlagId, Outcome) -> u64,
) -> u128 {
    let (engine, cache) = (snapshot.engine(), snapshot.evaluation_cache());
    let values = engine.read_context(context);
    let evaluate = |values| {
        let ofrep_hashes = snapshot.fragments().ofrep_hashes(engine, hash);
        let mut hashes = Vec::with_capacity(view.flags().len());
        for_each_flag(snapshot, view, values, Include::All, |fragment| {
            hashes.push(ofrep_hashes.hash(fragment).to_le_bytes());
        });
        xxh3_128(hashes.as_flattened())
    };
    if view.inputs().is_random_for(&values) {
        return evaluate(values);
    }
    let mut key = key_prefix(view, Format::Ofrep);
    engine.write_context_key(view.inputs(), &values, &mut key);
    let cache_key = cache.cache_key(&key);
    cache.result(cache_key).unwrap_or_else(|| {
        let hash = evaluate(values);
        cache.insert_result(cache_key, hash);
        hash
    })
}

/// The kind of a cached result.
#[derive(Clone, Copy, Debug)]
enum Format {
    /// Flags in Unleash's format, the included ones only.
    Unleash(Include),
    /// All flags in OFREP's format.
    Ofrep,
    /// The outcomes of the flags that are [`ScopedFlag::PerContext`].
    Deterministic,
}

/// The beginning of the cache key of a result of a view.
fn key_prefix(view: &FrontendView, format: Format) -> ContextKey {
    let mut key = ContextKey::from_slice(&view.id().to_le_bytes());
    key.push(match format {
        Format::Unleash(Include::Enabled) => 0,
        Format::Unleash(Include::All) => 1,
        Format::Ofrep => 2,
        Format::Deterministic => 3,
    });
    key
}

/// Evaluates the view and returns the fragments of the included flags.
fn evaluate_fragments<'a>(
    snapshot: &'a Snapshot,
    view: &FrontendView,
    values: ContextValues<'_>,
    include: Include,
) -> Vec<Fragment<'a>> {
    let all = snapshot.fragments();
    let mut fragments = Vec::with_capacity(view.flags().len());
    for_each_flag(snapshot, view, values, include, |fragment| fragments.push(all.get(fragment)));
    fragments
}

/// Like [`evaluate_fragments`], for a context for which some outcomes are valid for this request only.
/// The outcomes of [`ScopedFlag::PerContext`] flags come from the cache when possible.
fn evaluate_partly_random<'a>(
    snapshot: &'a ServedSnapshot,
    view: &FrontendView,
    values: ContextValues<'_>,
    include: Include,
) -> Vec<Fragment<'a>> {
    let (engine, all) = (snapshot.engine(), snapshot.fragments());
    let mut fragments = Vec::with_capacity(view.flags().len());
    let mut key = key_prefix(view, Format::Deterministic);
    engine.write_context_key(view.deterministic_inputs(), &values, &mut key);
    let bound = engine.bind_values(values);
    let cache = snapshot.evaluation_cache();
    let deterministic = cache.deterministic_outcomes(cache.cache_key(&key), || {
        let outcomes = view.flags().iter().filter_map(|flag| match *flag {
            ScopedFlag::PerContext(flag) => Some(engine.evaluate(flag, &bound)),
            ScopedFlag::Constant { .. } | ScopedFlag::PerRequest(_) => None,
        });
        outcomes.collect()
    });
    let mut deterministic = deterministic.iter();
    let cached = |_| *deterministic.next().expect("there is one outcome for each such flag");
    let evaluated = |flag| engine.evaluate(flag, &bound);
    for_each_flag_with(all, view, include, (cached, evaluated), |fragment| {
        fragments.push(all.get(fragment));
    });
    fragments
}

/// Evaluates every flag of the view and calls `visit` with the fragment of each included flag.
pub(super) fn for_each_flag(
    snapshot: &Snapshot,
    view: &FrontendView,
    values: ContextValues<'_>,
    include: Include,
    visit: impl FnMut(FragmentId),
) {
    let engine = snapshot.engine();
    let bound = engine.bind_values(values);
    let evaluate = |flag| engine.evaluate(flag, &bound);
    for_each_flag_with(snapshot.fragments(), view, include, (evaluate, evaluate), visit);
}

/// Calls `visit` with the fragment of each included flag, in the order of the view. The two functions
/// return the outcomes of [`ScopedFlag::PerContext`] and [`ScopedFlag::PerRequest`] flags.
fn for_each_flag_with(
    all: &Fragments,
    view: &FrontendView,
    include: Include,
    (mut per_context, mut per_request): (
        impl FnMut(FlagId) -> Outcome,
        impl FnMut(FlagId) -> Outcome,
    ),
    mut visit: impl FnMut(FragmentId),
) {
    for flag in view.flags() {
        let (flag, outcome) = match *flag {
            ScopedFlag::Constant { on, fragment } => {
                if on || include == Include::All {
                    visit(fragment);
                }
                continue;
            }
            ScopedFlag::PerContext(flag) => (flag, per_context(flag)),
            ScopedFlag::PerRequest(flag) => (flag, per_request(flag)),
        };
        if outcome.is_on() || include == Include::All {
            visit(all.id(flag, outcome));
        }
    }
}

/// Hashes the content of a body without writing it. Equal bodies have equal hashes on every instance and
/// across snapshots.
fn hash_fragments(fragments: &[Fragment<'_>]) -> u128 {
    let hashes: Vec<_> = fragments.iter().map(|it| it.hash().to_le_bytes()).collect();
    xxh3_128(hashes.as_flattened())
}

fn write_toggles(fragments: &[Fragment<'_>]) -> Bytes {
    let (opening, end) = (r#"{"toggles":["#, "]}");
    let length =
        fragments.iter().map(|it| it.json_with_comma().len()).sum::<usize>().saturating_sub(1);
    // The exact size, so that the text is not copied as it grows.
    let mut text = String::with_capacity(opening.len() + length + end.len());
    text.push_str(opening);
    if let Some((last, others)) = fragments.split_last() {
        text.extend(others.iter().map(|it| it.json_with_comma()));
        text.push_str(last.json());
    }
    text.push_str(end);
    Bytes::from(text)
}

/// The body for one flag; `None` if there is no such flag in `projects`.
pub fn evaluate_flag(
    snapshot: &Snapshot,
    projects: &Projects,
    context: &Context<'_>,
    name: &str,
) -> Option<PreparedBody> {
    let engine = snapshot.engine();
    let flag = engine.find(name)?;
    if !projects.contains(engine.flag(flag).project()) {
        return None;
    }
    let outcome = engine.evaluate(flag, &engine.bind(context));
    let fragments = snapshot.fragments();
    let json = fragments.get(fragments.id(flag, outcome)).json();
    Some(PreparedBody::new(Bytes::copy_from_slice(json.as_bytes())))
}

#[cfg(test)]
mod tests;
