//! Compiles a document into the parts of an engine.
//!
//! Flags are compiled one by one without their dependencies, then linked to their parents. Invalid parts
//! are reported and left out; compilation does not fail.
//!
//! If a document replaces another, unchanged flags are reused. They keep their indexes into the
//! [`ContextSchema`], so the schema is reused, too, with entries that no flag refers to any longer. Once
//! the schema has more than doubled, everything is compiled again.

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

/// The parts of an engine.
#[derive(Clone, Debug)]
pub(super) struct Compilation {
    pub(super) fields: Fields,
    pub(super) flags: Vec<Flag>,
    /// The plan of each flag. Separate from [`Flag`], so that evaluation touches little memory.
    pub(super) plans: Vec<Plan>,
    /// The flags that depend on others, in order.
    dependants: Vec<FlagId>,
    /// The length of the schema after the last full compilation.
    needed: usize,
}

/// The previous compilation with its document and problems.
pub(super) struct Earlier<'e> {
    pub(super) compiled: &'e Compilation,
    pub(super) document: &'e Document,
    pub(super) problems: &'e [Problem],
}

/// Number of additional schema entries that do not cause a full compilation.
const FEW: usize = 256;

impl<'e> Earlier<'e> {
    /// Whether flags can be reused at all.
    fn serves(&self, document: &Document) -> bool {
        // A segment is compiled into each flag that refers to it.
        document.segments() == self.document.segments()
            && self.compiled.fields.len() <= 2 * self.compiled.needed + FEW
    }

    /// Whether the flag with this id can be reused for `feature`, which has the same name.
    fn admits(&self, id: FlagId, before: &wire::Feature, feature: &wire::Feature) -> bool {
        // The plan of a flag with parents refers to them.
        before == feature && self.compiled.dependants.binary_search(&id).is_err()
    }

    /// The problems in the definition of a flag.
    fn problems_of(&self, name: &str) -> impl Iterator<Item = &'e Problem> {
        let start = self.problems.partition_point(|it| *it.flag < *name);
        let own = self.problems[start..].iter().take_while(move |it| *it.flag == *name);
        own.filter(|it| !matches!(it.defect, Defect::DefinedTwice | Defect::LeftOut(_)))
    }
}

/// Compiles a document. Returns the problems sorted by flag name.
pub(super) fn compile(
    document: &Document,
    previous: Option<&Earlier<'_>>,
) -> (Compilation, Vec<Problem>) {
    let previous = previous.filter(|it| it.serves(document));
    let mut builder = Draft::new(document, previous.map(|it| it.compiled));
    let before = previous.map_or_else(Default::default, |it| it.document.features());
    let before = before.iter().enumerate();
    for pair in before.merge_join_by(document.features(), |(_, a), b| a.name().cmp(b.name())) {
        match (pair, previous) {
            (Both((at, before), feature), Some(previous))
                if previous.admits(FlagId::new(at), before, feature) =>
            {
                builder.take_over(previous, FlagId::new(at));
            }
            (Both(_, feature) | Right(feature), _) => builder.flag(feature),
            (Left(_), _) => {}
        }
    }
    let (mut compiled, problems) = builder.finish();
    compiled.needed = previous.map_or(compiled.fields.len(), |it| it.compiled.needed);
    (compiled, problems)
}

/// Builds a [`CompiledFlags`] flag by flag.
struct Draft<'d> {
    segments: &'d [wire::Segment],
    fields: Fields,
    flags: Vec<Flag>,
    plans: Vec<Plan>,
    /// The flags that depend on others, with their dependencies.
    dependants: Vec<(FlagId, Vec<Dependency<'d>>)>,
    problems: Vec<Problem>,
}

/// A condition on another flag.
pub(super) struct Dependency<'d> {
    pub(super) parent: wire::Text<'d>,
    pub(super) enabled: bool,
    /// Unless empty, the other flag has to be on with one of these variants.
    pub(super) variants: Vec<wire::Text<'d>>,
}

impl<'d> Draft<'d> {
    fn new(document: &'d Document, previous: Option<&Compilation>) -> Self {
        let duplicate = |flag| Problem { flag: Arc::clone(flag), defect: Defect::DefinedTwice };
        let left_out = |flag: &wire::Unreadable| Problem {
            flag: format!("#{}", flag.position).into(),
            defect: Defect::LeftOut(flag.reason.clone()),
        };
        let problems = document.unreadable().iter().map(left_out);
        let flags = document.features().len();
        Self {
            segments: document.segments(),
            fields: previous.map_or_else(Fields::new, |it| it.fields.clone()),
            flags: Vec::with_capacity(flags),
            plans: Vec::with_capacity(flags),
            dependants: Vec::new(),
            problems: problems.chain(document.shadowed().iter().map(duplicate)).collect(),
        }
    }

    /// Reuses a flag without parents.
    fn take_over(&mut self, previous: &Earlier<'_>, id: FlagId) {
        let (compiled, index) = (previous.compiled, id.index());
        let flag = compiled.flags[index].clone();
        self.problems.extend(previous.problems_of(&flag.name).cloned());
        self.flags.push(flag);
        self.plans.push(compiled.plans[index].clone());
    }

    /// Compiles one flag without its dependencies.
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
        let mut all_variants = Vec::new();
        let mut compiler = Compiler {
            segments: self.segments,
            fields: &mut self.fields,
            table: &mut all_variants,
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
            Some(list) if list.is_empty() => {}
            Some(list) => self.dependants.push((FlagId::new(self.flags.len()), list)),
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
            variants: all_variants.into(),
        };
        (flag, plan)
    }

    /// Links flags to their parents.
    fn finish(mut self) -> (Compilation, Vec<Problem>) {
        let dependants = std::mem::take(&mut self.dependants);
        for (id, dependencies) in &dependants {
            let parents = self.parents(*id, dependencies, &dependants);
            let plan = &mut self.plans[id.index()];
            match parents {
                None => *plan = Plan::Fixed(Outcome::Off),
                Some(parents) if parents.is_empty() => {}
                Some(parents) => plan.depend_on(parents),
            }
        }
        self.problems.sort_by(|a, b| a.flag.cmp(&b.flag));
        let Self { fields: schema, flags, plans, problems, .. } = self;
        let dependants = dependants.into_iter().map(|(id, _)| id).collect();
        (Compilation { fields: schema, flags, plans, dependants, needed: 0 }, problems)
    }

    /// The conditions on other flags that depend on the context; `None` if they can never be satisfied.
    fn parents(
        &mut self,
        id: FlagId,
        dependencies: &[Dependency<'_>],
        dependants: &[(FlagId, Vec<Dependency<'_>>)],
    ) -> Option<Vec<Parent>> {
        let mut parents = Some(Vec::new());
        for dependency in dependencies {
            let found = flag::find(&self.flags, &dependency.parent);
            let is_nested =
                |parent| dependants.binary_search_by_key(&parent, |(id, _)| *id).is_ok();
            let defect = match found {
                None => Defect::MissingParent(dependency.parent.clone().into_owned()),
                Some(parent) if is_nested(parent) => {
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

    /// Whether `outcome` of `parent` satisfies the dependency.
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

/// Reads the dependencies of a flag; `None` if any is malformed.
pub(super) fn dependencies(
    source: Loose<Vec<Loose<wire::Dependency<'_>>>>,
) -> Option<Vec<Dependency<'_>>> {
    source.or_default()?.into_iter().map(dependency).collect()
}

/// Reads one dependency; `None` if it is malformed.
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
