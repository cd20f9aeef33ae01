//! From a document to an engine's parts.
//!
//! Flags are compiled one by one as if they depended on nothing, then tied to their parents. What
//! is wrong with a definition is noted and left out; nothing here fails.
//!
//! Where a document takes the place of another, flags that did not change are taken over as they are,
//! and refer to fields and texts by the numbers that they have. Numbers which nobody refers to any more
//! stay until they are as many as the others; then everything is compiled.

use std::sync::Arc;

use itertools::EitherOrBoth::{Both, Left, Right};
use itertools::Itertools as _;

use super::bucket::Site;
use super::context::Fields;
use super::flag::{self, Flag, FlagId, Outcome};
use super::plan::{Conditions, Parent, Plan};
use super::problem::{Defect, Part, Problem};
use super::strategy::{self, Compiler, Strategy};
use crate::wire::features::{self as wire, Document, Loose};

/// What an engine consists of.
#[derive(Clone, Debug)]
pub(super) struct Compilation {
    pub(super) fields: Fields,
    pub(super) flags: Vec<Flag>,
    /// What decides each flag; apart from [`Flag`] so that evaluating many touches little memory.
    pub(super) plans: Vec<Plan>,
    /// The flags that depend on others, in order.
    dependants: Vec<FlagId>,
    /// How many numbers there were when everything was compiled last.
    needed: usize,
}

/// What was compiled before, from what, and with which problems.
pub(super) struct Earlier<'e> {
    pub(super) compiled: &'e Compilation,
    pub(super) document: &'e Document,
    pub(super) problems: &'e [Problem],
}

/// How many numbers are no reason to compile everything.
const FEW: usize = 256;

impl<'e> Earlier<'e> {
    /// Whether anything can be taken over from it.
    fn serves(&self, document: &Document) -> bool {
        // A segment is compiled into each flag that refers to it.
        document.segments() == self.document.segments()
            && self.compiled.fields.len() <= 2 * self.compiled.needed + FEW
    }

    /// Whether the flag that stands in it there can be taken over in the place of one of its name.
    fn admits(&self, id: FlagId, before: &wire::Feature, feature: &wire::Feature) -> bool {
        // What somebody asks of others is tied to these others.
        before == feature && self.compiled.dependants.binary_search(&id).is_err()
    }

    /// What is wrong with the definition of a flag.
    fn problems_of(&self, name: &str) -> impl Iterator<Item = &'e Problem> {
        let start = self.problems.partition_point(|it| *it.flag < *name);
        let own = self.problems[start..].iter().take_while(move |it| *it.flag == *name);
        own.filter(|it| !matches!(it.defect, Defect::DefinedTwice | Defect::LeftOut(_)))
    }
}

/// Compiles a document; the problems are in the order of the flags' names.
pub(super) fn compile(
    document: &Document,
    earlier: Option<&Earlier<'_>>,
) -> (Compilation, Vec<Problem>) {
    let earlier = earlier.filter(|it| it.serves(document));
    let mut draft = Draft::new(document, earlier.map(|it| it.compiled));
    let before = earlier.map_or_else(Default::default, |it| it.document.features());
    let before = before.iter().enumerate();
    for pair in before.merge_join_by(document.features(), |(_, a), b| a.name().cmp(b.name())) {
        match (pair, earlier) {
            (Both((at, before), feature), Some(earlier))
                if earlier.admits(FlagId::new(at), before, feature) =>
            {
                draft.take_over(earlier, FlagId::new(at));
            }
            (Both(_, feature) | Right(feature), _) => draft.flag(feature),
            (Left(_), _) => {}
        }
    }
    let (mut compiled, problems) = draft.finish();
    compiled.needed = earlier.map_or(compiled.fields.len(), |it| it.compiled.needed);
    (compiled, problems)
}

/// A compilation in the making.
struct Draft<'d> {
    segments: &'d [wire::Segment],
    fields: Fields,
    flags: Vec<Flag>,
    plans: Vec<Plan>,
    /// The flags that depend on others, with what they ask of them.
    dependants: Vec<(FlagId, Vec<Dependency<'d>>)>,
    problems: Vec<Problem>,
}

/// What a flag asks of another.
pub(super) struct Dependency<'d> {
    pub(super) parent: wire::Text<'d>,
    pub(super) enabled: bool,
    /// Where any are named, the other flag has to be on with one of these.
    pub(super) variants: Vec<wire::Text<'d>>,
}

impl<'d> Draft<'d> {
    fn new(document: &'d Document, earlier: Option<&Compilation>) -> Self {
        let twice = |flag| Problem { flag: Arc::clone(flag), defect: Defect::DefinedTwice };
        let left_out = |flag: &wire::Unreadable| Problem {
            flag: format!("#{}", flag.position).into(),
            defect: Defect::LeftOut(flag.reason.clone()),
        };
        let problems = document.unreadable().iter().map(left_out);
        let flags = document.features().len();
        Self {
            segments: document.segments(),
            fields: earlier.map_or_else(Fields::new, |it| it.fields.clone()),
            flags: Vec::with_capacity(flags),
            plans: Vec::with_capacity(flags),
            dependants: Vec::new(),
            problems: problems.chain(document.shadowed().iter().map(twice)).collect(),
        }
    }

    /// Takes over a flag that depends on no other.
    fn take_over(&mut self, earlier: &Earlier<'_>, id: FlagId) {
        let (compiled, index) = (earlier.compiled, id.index());
        let flag = compiled.flags[index].clone();
        self.problems.extend(earlier.problems_of(&flag.name).cloned());
        self.flags.push(flag);
        self.plans.push(compiled.plans[index].clone());
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
                    variants: Arc::default(),
                };
                (flag, Plan::Fixed(Outcome::Off))
            }
        };
        let problem = |defect| Problem { flag: Arc::clone(feature.name()), defect };
        self.problems.extend(defects.into_iter().map(problem));
        self.flags.push(flag);
        self.plans.push(plan);
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
            segments: self.segments,
            fields: &mut self.fields,
            table: &mut table,
            defects,
            site: Site::first_of(feature.name()),
        };
        let stickiness = strategy::first_stickiness(&definition.variants);
        let variants = compiler.choice(&definition.variants, feature.name(), stickiness);
        let strategies = match &definition.strategies {
            Loose::Is(list) if list.is_empty() => vec![Strategy::everybody()],
            Loose::Is(list) => list.iter().filter_map(|source| compiler.strategy(source)).collect(),
            Loose::Missing => {
                compiler.defects.push(Defect::NoStrategies);
                Vec::new()
            }
            Loose::Malformed => {
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
            Some(asked) => self.dependants.push((FlagId::new(self.flags.len()), asked)),
            None => {
                defects.push(Defect::Malformed(Part::Dependency));
                self.dependants.push((FlagId::new(self.flags.len()), Vec::new()));
                plan = Plan::Fixed(Outcome::Off);
            }
        }
        let flag = Flag {
            name: Arc::clone(feature.name()),
            project: Arc::clone(feature.project()),
            enabled,
            impression_data: definition.impression_data.is().unwrap_or_default(),
            variants: table.into(),
        };
        (flag, plan)
    }

    /// Ties the flags that depend on others to them.
    fn finish(mut self) -> (Compilation, Vec<Problem>) {
        let dependants = std::mem::take(&mut self.dependants);
        for (id, asked) in &dependants {
            let parents = self.parents(*id, asked, &dependants);
            let plan = &mut self.plans[id.index()];
            match parents {
                None => *plan = Plan::Fixed(Outcome::Off),
                Some(parents) if parents.is_empty() => {}
                Some(parents) => plan.depend_on(parents),
            }
        }
        self.problems.sort_by(|a, b| a.flag.cmp(&b.flag));
        let Self { fields, flags, plans, problems, .. } = self;
        let dependants = dependants.into_iter().map(|(id, _)| id).collect();
        (Compilation { fields, flags, plans, dependants, needed: 0 }, problems)
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
            let found = flag::find(&self.flags, &dependency.parent);
            let nested = |parent| dependants.binary_search_by_key(&parent, |(id, _)| *id).is_ok();
            let defect = match found {
                None => Defect::MissingParent(dependency.parent.clone().into_owned()),
                Some(parent) if nested(parent) => {
                    Defect::NestedParent(dependency.parent.clone().into_owned())
                }
                Some(flag) => {
                    let parent =
                        Parent { flag, admitted: dependency.admitted(&self.flags[flag.index()]) };
                    match self.plans[flag.index()] {
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
            let flag = Arc::clone(self.flags[id.index()].name());
            self.problems.push(Problem { flag, defect });
            parents = None;
        }
        parents
    }
}

impl Dependency<'_> {
    /// The outcomes of `parent` that satisfy the dependency, by ordinal.
    fn admitted(&self, parent: &Flag) -> Box<[bool]> {
        let outcomes = [Outcome::Off, Outcome::On];
        let variants = (0..).map(Outcome::Variant).take(parent.variants().len());
        outcomes.into_iter().chain(variants).map(|outcome| self.admits(parent, outcome)).collect()
    }

    /// Whether the dependency is satisfied where `parent` comes to `outcome`.
    pub(super) fn admits(&self, parent: &Flag, outcome: Outcome) -> bool {
        match (self.enabled, &self.variants[..]) {
            (false, _) => !outcome.is_on(),
            (true, []) => outcome.is_on(),
            (true, names) => {
                let name = parent.variant(outcome).map_or("disabled", |variant| &*variant.name);
                outcome.is_on() && names.iter().any(|other| other == name)
            }
        }
    }
}

/// What a flag asks of others; `None` if it cannot be read.
pub(super) fn dependencies(
    source: Loose<Vec<Loose<wire::Dependency<'_>>>>,
) -> Option<Vec<Dependency<'_>>> {
    source.or_default()?.into_iter().map(dependency).collect()
}

/// What a flag asks of another; `None` if it cannot be read.
pub(super) fn dependency(source: Loose<wire::Dependency<'_>>) -> Option<Dependency<'_>> {
    let source = source.is()?;
    let variants = source.variants.or_default()?.into_iter().map(Loose::is);
    Some(Dependency {
        parent: source.feature.is()?,
        enabled: match source.enabled {
            Loose::Is(enabled) => enabled,
            Loose::Missing => true,
            Loose::Malformed => return None,
        },
        variants: variants.collect::<Option<_>>()?,
    })
}

#[cfg(test)]
mod tests;
