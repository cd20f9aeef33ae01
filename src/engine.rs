//! The evaluation engine: who gets which flag, with which variant.
//!
//! [`Engine::compile`] turns a client-features document into data; [`Engine::bind`] reads a context
//! once for all flags; [`Engine::evaluate`] then costs a few comparisons per flag. Compiling never
//! fails as a whole: what is wrong with a definition makes that part never match and is reported
//! as a [`Problem`].
//!
//! What flags mean follows Unleash's client specification; where that is silent, the Node SDK,
//! which the Unleash server itself evaluates with.
//!
//! The engine is pure. It has no clock and no randomness (both arrive in [`Context`]), does no
//! input or output, knows no async, and neither logs nor counts.

mod bucket;
mod constraint;
mod context;
mod pattern;
mod problem;
mod reads;
mod scalar;
mod strategy;
mod variant;

use std::sync::Arc;

pub use self::context::{Bound, Context, FieldId, Fields};
pub use self::problem::{Defect, Part, Problem};
pub use self::reads::Reads;
use self::strategy::{Compiler, Strategy};
use self::variant::Choice;
pub use self::variant::{Payload, Variant};
use crate::wire::features::{self as wire, Document, Loose};

/// The flags of one environment, compiled.
#[derive(Debug, Clone)]
pub struct Engine {
    fields: Fields,
    flags: Vec<Flag>,
    /// What decides each flag; apart from [`Flag`] so that evaluating many touches little memory.
    plans: Vec<Plan>,
}

/// A flag's place in its engine, the same as in the document it was compiled from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlagId(u32);

impl FlagId {
    /// The index into [`Engine::flags`] and [`Document::features`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// What evaluating a flag comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The flag is off; its variant is `disabled`.
    Off,
    /// The flag is on without a variant; its variant is `disabled`.
    On,
    /// The flag is on with the variant at this index of [`Flag::variants`].
    Variant(u32),
}

impl Outcome {
    /// Whether the flag is on.
    pub fn is_on(self) -> bool {
        !matches!(self, Self::Off)
    }

    /// A number for each outcome of a flag, dense from 0: off, on, then the variants.
    pub fn ordinal(self) -> usize {
        match self {
            Self::Off => 0,
            Self::On => 1,
            Self::Variant(index) => 2 + index as usize,
        }
    }
}

/// What is known of a flag beside how it is decided.
#[derive(Debug, Clone)]
pub struct Flag {
    name: Arc<str>,
    project: Arc<str>,
    enabled: bool,
    impression_data: bool,
    variants: Box<[Variant]>,
    reads: Reads,
}

impl Flag {
    /// The name, unique in the engine.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// The project that owns the flag.
    pub fn project(&self) -> &Arc<str> {
        &self.project
    }

    /// Whether the flag is switched on in this environment, whatever its strategies say.
    pub fn enabled(&self) -> bool {
        self.enabled
    }

    /// Whether SDKs should report each evaluation to the application.
    pub fn impression_data(&self) -> bool {
        self.impression_data
    }

    /// The variants of the flag itself, then those of its strategies.
    pub fn variants(&self) -> &[Variant] {
        &self.variants
    }

    /// The variant of an outcome; none stands for Unleash's variant `disabled`.
    pub fn variant(&self, outcome: Outcome) -> Option<&Variant> {
        match outcome {
            Outcome::Off | Outcome::On => None,
            Outcome::Variant(index) => self.variants.get(index as usize),
        }
    }

    /// The number of different outcomes, all of whose ordinals are below it.
    pub fn outcomes(&self) -> usize {
        2 + self.variants.len()
    }

    /// What the outcome depends on.
    pub fn reads(&self) -> &Reads {
        &self.reads
    }
}

/// How a flag is decided.
#[derive(Debug, Clone)]
enum Plan {
    /// The same for everybody.
    Fixed(Outcome),
    Depends(Box<Conditions>),
}

#[derive(Debug, Clone)]
struct Conditions {
    parents: Box<[Parent]>,
    strategies: Box<[Strategy]>,
    variants: Choice,
}

/// A condition on another flag's outcome.
#[derive(Debug, Clone)]
struct Parent {
    flag: FlagId,
    /// The outcomes that satisfy the condition, by ordinal.
    admitted: Box<[bool]>,
}

impl Engine {
    /// Compiles a document; the problems concern single flags, in the order of their names.
    pub fn compile(document: &Document) -> (Self, Vec<Problem>) {
        let mut compilation = Compilation::new(document);
        for feature in document.features() {
            compilation.flag(feature);
        }
        compilation.finish()
    }

    /// The flags, sorted by name.
    pub fn flags(&self) -> &[Flag] {
        &self.flags
    }

    /// The ids of all flags, in order.
    pub fn ids(&self) -> impl ExactSizeIterator<Item = FlagId> + use<> {
        (0..next_id(self.flags.len()).0).map(FlagId)
    }

    /// The flag with this id, which is one of this engine's.
    pub fn flag(&self, id: FlagId) -> &Flag {
        &self.flags[id.index()]
    }

    /// The id of the flag with this name.
    pub fn find(&self, name: &str) -> Option<FlagId> {
        find(&self.flags, name)
    }

    /// Every context field that any flag reads.
    pub fn fields(&self) -> &Fields {
        &self.fields
    }

    /// Reads a context once, for evaluating any number of flags of this engine.
    pub fn bind<'a>(&self, context: &Context<'a>) -> Bound<'a> {
        self.fields.bind(context)
    }

    /// Evaluates one flag for a context, both of this engine.
    pub fn evaluate(&self, id: FlagId, bound: &Bound<'_>) -> Outcome {
        match &self.plans[id.index()] {
            Plan::Fixed(outcome) => *outcome,
            Plan::Depends(conditions) => {
                let admits = |parent: &Parent| parent.admits(self.evaluate(parent.flag, bound));
                if conditions.parents.iter().all(admits) {
                    conditions.decide(bound)
                } else {
                    Outcome::Off
                }
            }
        }
    }
}

impl Parent {
    fn admits(&self, outcome: Outcome) -> bool {
        self.admitted.get(outcome.ordinal()).copied().unwrap_or(false)
    }
}

impl Conditions {
    /// The outcome once the parents are satisfied.
    fn decide(&self, bound: &Bound<'_>) -> Outcome {
        let Some(strategy) = self.strategies.iter().find(|strategy| strategy.matches(bound)) else {
            return Outcome::Off;
        };
        let own = strategy.variants().choose(bound);
        own.or_else(|| self.variants.choose(bound)).map_or(Outcome::On, Outcome::Variant)
    }

    /// Drops what can make no difference; the result is the outcome where nothing is left to ask.
    fn simplify(mut self) -> Plan {
        if let Some(last) = self.strategies.iter().position(Strategy::is_unconditional) {
            let mut strategies = self.strategies.into_vec();
            strategies.truncate(last + 1);
            self.strategies = strategies.into();
        }
        match &self.strategies[..] {
            [] => Plan::Fixed(Outcome::Off),
            [only] if self.parents.is_empty() && only.is_unconditional() => {
                match (only.variants(), &self.variants) {
                    (Choice::Everybody(index), _) | (Choice::Nobody, Choice::Everybody(index)) => {
                        Plan::Fixed(Outcome::Variant(*index))
                    }
                    (Choice::Nobody, Choice::Nobody) => Plan::Fixed(Outcome::On),
                    (Choice::Lots(_), _) | (Choice::Nobody, Choice::Lots(_)) => {
                        Plan::Depends(Box::new(self))
                    }
                }
            }
            [_, ..] => Plan::Depends(Box::new(self)),
        }
    }

    fn reads(&self) -> Reads {
        let mut reads = Reads::default();
        for strategy in &self.strategies {
            strategy.note_reads(&mut reads);
        }
        self.variants.note_reads(&mut reads);
        reads
    }
}

impl Plan {
    fn reads(&self) -> Reads {
        match self {
            Self::Fixed(_) => Reads::default(),
            Self::Depends(conditions) => conditions.reads(),
        }
    }
}

fn find(flags: &[Flag], name: &str) -> Option<FlagId> {
    flags.binary_search_by(|flag| (*flag.name).cmp(name)).ok().map(next_id)
}

fn next_id(len: usize) -> FlagId {
    FlagId(u32::try_from(len).expect("a document has fewer than 2^32 flags"))
}

/// An engine in the making.
struct Compilation<'d> {
    segments: &'d [wire::Segment],
    engine: Engine,
    /// The flags that depend on others, with what they ask of them.
    dependants: Vec<(FlagId, Vec<Dependency<'d>>)>,
    problems: Vec<Problem>,
    sites: u32,
}

/// What a flag asks of another.
struct Dependency<'d> {
    parent: wire::Text<'d>,
    enabled: bool,
    /// Where any are named, the other flag has to be on with one of these.
    variants: Vec<wire::Text<'d>>,
}

impl<'d> Compilation<'d> {
    fn new(document: &'d Document) -> Self {
        let problem = |flag| Problem { flag: Arc::clone(flag), defect: Defect::DefinedTwice };
        let flags = document.features().len();
        Self {
            segments: document.segments(),
            engine: Engine {
                fields: Fields::new(),
                flags: Vec::with_capacity(flags),
                plans: Vec::with_capacity(flags),
            },
            dependants: Vec::new(),
            problems: document.shadowed().iter().map(problem).collect(),
            sites: 0,
        }
    }

    /// Compiles one flag, as if it had no dependencies.
    fn flag(&mut self, feature: &'d wire::Feature) {
        let mut defects = Vec::new();
        let (flag, plan) = match feature.definition() {
            Ok(definition) => self.defined(feature, definition, &mut defects),
            Err(error) => {
                defects.push(Defect::Unreadable(error.to_string()));
                let flag = Flag {
                    name: Arc::clone(feature.name()),
                    project: Arc::clone(feature.project()),
                    enabled: false,
                    impression_data: false,
                    variants: Box::default(),
                    reads: Reads::default(),
                };
                (flag, Plan::Fixed(Outcome::Off))
            }
        };
        let problem = |defect| Problem { flag: Arc::clone(feature.name()), defect };
        self.problems.extend(defects.into_iter().map(problem));
        self.engine.flags.push(flag);
        self.engine.plans.push(plan);
    }

    fn defined(
        &mut self,
        feature: &wire::Feature,
        definition: wire::Definition<'d>,
        defects: &mut Vec<Defect>,
    ) -> (Flag, Plan) {
        let enabled = definition.enabled.or_default().unwrap_or_else(|| {
            defects.push(Defect::Malformed(Part::Enabled));
            false
        });
        let mut table = Vec::new();
        let mut compiler = Compiler {
            flag: feature.name(),
            segments: self.segments,
            fields: &mut self.engine.fields,
            table: &mut table,
            defects,
            sites: &mut self.sites,
        };
        let stickiness = strategy::first_stickiness(&definition.variants);
        let variants = compiler.choice(&definition.variants, feature.name(), stickiness);
        let strategies = match &definition.strategies {
            Loose::Is(list) if list.is_empty() => vec![Strategy::everybody()],
            Loose::Is(list) => list.iter().filter_map(|source| compiler.strategy(source)).collect(),
            Loose::Missing | Loose::Malformed => {
                compiler.defects.push(Defect::Malformed(Part::Strategies));
                Vec::new()
            }
        };
        let mut plan = if enabled {
            Conditions { parents: Box::default(), strategies: strategies.into(), variants }
                .simplify()
        } else {
            Plan::Fixed(Outcome::Off)
        };
        match dependencies(definition.dependencies) {
            Some(asked) if asked.is_empty() => {}
            Some(asked) => self.dependants.push((next_id(self.engine.flags.len()), asked)),
            None => {
                defects.push(Defect::Malformed(Part::Dependency));
                self.dependants.push((next_id(self.engine.flags.len()), Vec::new()));
                plan = Plan::Fixed(Outcome::Off);
            }
        }
        let flag = Flag {
            name: Arc::clone(feature.name()),
            project: Arc::clone(feature.project()),
            enabled,
            impression_data: definition.impression_data.is().unwrap_or_default(),
            variants: table.into(),
            reads: plan.reads(),
        };
        (flag, plan)
    }

    /// Ties the flags that depend on others to them.
    fn finish(mut self) -> (Engine, Vec<Problem>) {
        let dependants = std::mem::take(&mut self.dependants);
        for (id, asked) in &dependants {
            let parents = self.parents(*id, asked, &dependants);
            let plan = &mut self.engine.plans[id.index()];
            let mut reads = Reads::default();
            match parents {
                None => *plan = Plan::Fixed(Outcome::Off),
                Some(parents) if parents.is_empty() => {}
                Some(parents) => {
                    for parent in &parents {
                        reads.all_of(&self.engine.flags[parent.flag.index()].reads);
                    }
                    plan.depend_on(parents);
                }
            }
            reads.all_of(&plan.reads());
            if let Plan::Fixed(_) = plan {
                reads = Reads::default();
            }
            self.engine.flags[id.index()].reads = reads;
        }
        for flag in &mut self.engine.flags {
            flag.reads = std::mem::take(&mut flag.reads).finish();
        }
        self.problems.sort_by(|a, b| a.flag.cmp(&b.flag));
        (self.engine, self.problems)
    }

    /// What remains to be asked of other flags; `None` if that can never be satisfied.
    fn parents(
        &mut self,
        id: FlagId,
        asked: &[Dependency<'_>],
        dependants: &[(FlagId, Vec<Dependency<'_>>)],
    ) -> Option<Vec<Parent>> {
        let mut parents = Some(Vec::new());
        for dependency in asked {
            let found = find(&self.engine.flags, &dependency.parent);
            let nested = |parent| dependants.binary_search_by_key(&parent, |(id, _)| *id).is_ok();
            let defect = match found {
                None => Defect::MissingParent(dependency.parent.clone().into_owned()),
                Some(parent) if nested(parent) => {
                    Defect::NestedParent(dependency.parent.clone().into_owned())
                }
                Some(flag) => {
                    let parent =
                        Parent { flag, admitted: dependency.admitted(self.engine.flag(flag)) };
                    match self.engine.plans[flag.index()] {
                        Plan::Fixed(outcome) if parent.admits(outcome) => {}
                        Plan::Fixed(_) => parents = None,
                        Plan::Depends(_) => {
                            if let Some(parents) = &mut parents {
                                parents.push(parent);
                            }
                        }
                    }
                    continue;
                }
            };
            let flag = Arc::clone(self.engine.flag(id).name());
            self.problems.push(Problem { flag, defect });
            parents = None;
        }
        parents
    }
}

impl Plan {
    /// Adds conditions on other flags.
    fn depend_on(&mut self, parents: Vec<Parent>) {
        let own = std::mem::replace(self, Self::Fixed(Outcome::Off));
        *self = match own {
            Self::Fixed(Outcome::Off) => return,
            Self::Fixed(outcome) => Self::Depends(Box::new(Conditions {
                parents: parents.into(),
                strategies: [Strategy::everybody()].into(),
                variants: match outcome {
                    Outcome::Off | Outcome::On => Choice::Nobody,
                    Outcome::Variant(index) => Choice::Everybody(index),
                },
            })),
            Self::Depends(mut conditions) => {
                conditions.parents = parents.into();
                Self::Depends(conditions)
            }
        };
    }
}

impl Dependency<'_> {
    /// The outcomes of `parent` that satisfy the dependency, by ordinal.
    fn admitted(&self, parent: &Flag) -> Box<[bool]> {
        let outcomes = [Outcome::Off, Outcome::On];
        let variants = (0..).map(Outcome::Variant).take(parent.variants.len());
        let admits = |outcome: Outcome| match (self.enabled, &self.variants[..]) {
            (false, _) => !outcome.is_on(),
            (true, []) => outcome.is_on(),
            (true, names) => {
                let name = parent.variant(outcome).map_or("disabled", |variant| &*variant.name);
                outcome.is_on() && names.iter().any(|other| other == name)
            }
        };
        outcomes.into_iter().chain(variants).map(admits).collect()
    }
}

/// What a flag asks of others; `None` if it cannot be read.
fn dependencies<'a>(
    source: Loose<Vec<Loose<wire::Dependency<'a>>>>,
) -> Option<Vec<Dependency<'a>>> {
    let read = |dependency: Loose<wire::Dependency<'a>>| -> Option<Dependency<'a>> {
        let dependency = dependency.is()?;
        let variants = dependency.variants.or_default()?.into_iter().map(Loose::is);
        Some(Dependency {
            parent: dependency.feature.is()?,
            enabled: match dependency.enabled {
                Loose::Is(enabled) => enabled,
                Loose::Missing => true,
                Loose::Malformed => return None,
            },
            variants: variants.collect::<Option<_>>()?,
        })
    };
    source.or_default()?.into_iter().map(read).collect()
}
