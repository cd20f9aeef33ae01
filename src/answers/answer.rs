//! What a context's flags come to, from memory or evaluated; its entity tag, and its body. In other
//! words than those of frontends' SDKs: what identifies it.

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

/// What a context's flags came to; its body is not written yet.
#[derive(Debug)]
pub struct Answer<'a> {
    snapshot: &'a Snapshot,
    view: &'a View,
    shown: Shown,
    hash: u128,
    is_settled: bool,
    known: Known<'a>,
}

/// What there is to write a body from.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one per request, on the stack")]
enum Known<'a> {
    /// The flags were evaluated now, to these.
    Fragments(Vec<Fragment<'a>>),
    /// They were before, for a context that this one equals.
    Values(Values<'a>),
}

impl<'a> Answer<'a> {
    /// What the flags of `view`, which is one of the snapshot's, come to for a context.
    pub fn of(snapshot: &'a Snapshot, view: &'a View, context: &Context<'a>, shown: Shown) -> Self {
        let answer = Self::unnoted(snapshot, view, context, shown);
        if answer.is_settled {
            let is_known = matches!(answer.known, Known::Values(_));
            let question = (view.projects(), shown, context);
            snapshot.answers().note(question, is_known, answer.hash);
        }
        answer
    }

    /// The same for somebody who only wants to know beforehand.
    pub(super) fn unnoted(
        snapshot: &'a Snapshot,
        view: &'a View,
        context: &Context<'a>,
        shown: Shown,
    ) -> Self {
        let (engine, answers) = (snapshot.engine(), snapshot.answers());
        let values = engine.read(context);
        if view.reads().is_random(&values) {
            let fragments = evaluate_once(snapshot, view, values, shown);
            let hash = hash_of(&fragments);
            let known = Known::Fragments(fragments);
            return Self { snapshot, view, shown, hash, is_settled: false, known };
        }
        let mut key = key(view, Words::Toggles(shown));
        engine.tell(view.reads(), &values, &mut key);
        let known_by = answers.known_by(&key);
        let (hash, known) = if let Some(hash) = answers.outcome(known_by) {
            (hash, Known::Values(values))
        } else {
            let fragments = evaluate(snapshot, view, values, shown);
            let hash = hash_of(&fragments);
            answers.remember(known_by, hash);
            (hash, Known::Fragments(fragments))
        };
        Self { snapshot, view, shown, hash, is_settled: true, known }
    }

    /// Whether the context decided it, and no lots.
    pub fn is_settled(&self) -> bool {
        self.is_settled
    }

    /// What identifies the answer, its flags and what they came to.
    pub fn hash(&self) -> u128 {
        self.hash
    }

    /// The entity tag of the answer.
    pub fn etag(&self) -> HeaderValue {
        etag_of(self.hash)
    }

    /// `{"toggles":[…]}`, flags sorted by name.
    pub fn body(self) -> Arc<Body> {
        let Self { snapshot, view, shown, hash, known, .. } = self;
        snapshot.answers().body(hash, || {
            let fragments = match known {
                Known::Fragments(fragments) => fragments,
                Known::Values(values) => evaluate(snapshot, view, values, shown),
            };
            Body::tagged(write(&fragments), hash)
        })
    }
}

/// What identifies what all flags of `view`, which is one of the snapshot's, come to for a context in
/// the words of the one other protocol, of which `hash` hashes each flag's for an outcome.
pub fn reworded(
    snapshot: &Snapshot,
    view: &View,
    context: &Context<'_>,
    hash: impl Fn(FlagId, Outcome) -> u64,
) -> u128 {
    let (engine, answers) = (snapshot.engine(), snapshot.answers());
    let values = engine.read(context);
    let evaluated = |values| {
        let words = snapshot.fragments().reworded(engine, hash);
        let mut hashes = Vec::with_capacity(view.toggles().len());
        listed(snapshot, view, values, Shown::All, |fragment| {
            hashes.push(words.hash(fragment).to_le_bytes());
        });
        xxh3_128(hashes.as_flattened())
    };
    if view.reads().is_random(&values) {
        return evaluated(values);
    }
    let mut key = key(view, Words::Others);
    engine.tell(view.reads(), &values, &mut key);
    let known_by = answers.known_by(&key);
    answers.outcome(known_by).unwrap_or_else(|| {
        let hash = evaluated(values);
        answers.remember(known_by, hash);
        hash
    })
}

/// In which words an answer is given.
#[derive(Clone, Copy, Debug)]
enum Words {
    /// As a list of flags, some of which are shown.
    Toggles(Shown),
    /// In those of the one other protocol.
    Others,
    /// As outcomes of the flags that are [`Toggle::Varies`], to be repeated.
    Repeatable,
}

/// What begins the key of whatever is asked of a view.
fn key(view: &View, words: Words) -> Key {
    let mut key = Key::from_slice(&view.number().to_le_bytes());
    key.push(match words {
        Words::Toggles(Shown::Enabled) => 0,
        Words::Toggles(Shown::All) => 1,
        Words::Others => 2,
        Words::Repeatable => 3,
    });
    key
}

/// What every flag of the view that is shown comes to.
fn evaluate<'a>(
    snapshot: &'a Snapshot,
    view: &View,
    values: Values<'_>,
    shown: Shown,
) -> Vec<Fragment<'a>> {
    let all = snapshot.fragments();
    let mut fragments = Vec::with_capacity(view.toggles().len());
    listed(snapshot, view, values, shown, |fragment| fragments.push(all.get(fragment)));
    fragments
}

/// The same for a context of which some outcomes are good for this request only. The flags that always
/// have equal outcomes for equal contexts are evaluated once for all such requests.
fn evaluate_once<'a>(
    snapshot: &'a Snapshot,
    view: &View,
    values: Values<'_>,
    shown: Shown,
) -> Vec<Fragment<'a>> {
    let (engine, all) = (snapshot.engine(), snapshot.fragments());
    let mut fragments = Vec::with_capacity(view.toggles().len());
    let mut key = key(view, Words::Repeatable);
    engine.tell(view.repeatable_reads(), &values, &mut key);
    let bound = engine.bind_values(values);
    let answers = snapshot.answers();
    let repeatable = answers.repeatable(answers.known_by(&key), || {
        let varying = view.toggles().iter().filter_map(|toggle| match *toggle {
            Toggle::Varies(flag) => Some(engine.evaluate(flag, &bound)),
            Toggle::Fixed { .. } | Toggle::Draws(_) => None,
        });
        varying.collect()
    });
    let mut repeatable = repeatable.iter();
    let repeat = |_| *repeatable.next().expect("there is one outcome for each such flag");
    let draw = |flag| engine.evaluate(flag, &bound);
    listed_by(all, view, shown, (repeat, draw), |fragment| fragments.push(all.get(fragment)));
    fragments
}

/// Evaluates every flag of the view, and tells of those that are shown what they come to.
pub(super) fn listed(
    snapshot: &Snapshot,
    view: &View,
    values: Values<'_>,
    shown: Shown,
    tell: impl FnMut(FragmentId),
) {
    let engine = snapshot.engine();
    let bound = engine.bind_values(values);
    let evaluate = |flag| engine.evaluate(flag, &bound);
    listed_by(snapshot.fragments(), view, shown, (evaluate, evaluate), tell);
}

/// Tells of the flags of the view that are shown, with the outcomes that these say of those that are
/// [`Toggle::Varies`] and [`Toggle::Draws`], in the order of the view.
fn listed_by(
    all: &Fragments,
    view: &View,
    shown: Shown,
    (mut varies, mut draws): (impl FnMut(FlagId) -> Outcome, impl FnMut(FlagId) -> Outcome),
    mut tell: impl FnMut(FragmentId),
) {
    for toggle in view.toggles() {
        let (flag, outcome) = match *toggle {
            Toggle::Fixed { on, fragment } => {
                if on || shown == Shown::All {
                    tell(fragment);
                }
                continue;
            }
            Toggle::Varies(flag) => (flag, varies(flag)),
            Toggle::Draws(flag) => (flag, draws(flag)),
        };
        if outcome.is_on() || shown == Shown::All {
            tell(all.id(flag, outcome));
        }
    }
}

/// What the body is made of, hashed without writing it: equal bodies have equal tags on every instance
/// and across snapshots.
fn hash_of(fragments: &[Fragment<'_>]) -> u128 {
    let hashes: Vec<_> = fragments.iter().map(|it| it.hash().to_le_bytes()).collect();
    xxh3_128(hashes.as_flattened())
}

fn write(fragments: &[Fragment<'_>]) -> Bytes {
    let (opening, end) = (r#"{"toggles":["#, "]}");
    let length = fragments.iter().map(|it| it.with_comma().len()).sum::<usize>().saturating_sub(1);
    // Exactly the right size: nothing is copied again.
    let mut text = String::with_capacity(opening.len() + length + end.len());
    text.push_str(opening);
    if let Some((last, others)) = fragments.split_last() {
        text.extend(others.iter().map(|it| it.with_comma()));
        text.push_str(last.json());
    }
    text.push_str(end);
    Bytes::from(text)
}

/// The answer about one flag that `projects` see; `None` if there is no such flag.
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
