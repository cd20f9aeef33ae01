//! From a document to an engine's parts.
//!
//! Flags are compiled one by one as if they depended on nothing, then tied to their parents. What
//! is wrong with a definition is noted and left out; nothing here fails.

use std::sync::Arc;

use super::context::Fields;
use super::flag::{self, Flag, FlagId, Outcome};
use super::plan::{Conditions, Parent, Plan};
use super::problem::{Defect, Part, Problem};
use super::strategy::{self, Compiler, Strategy};
use crate::wire::features::{self as wire, Document, Loose};

/// What an engine consists of, and what is wrong with the definitions.
#[derive(Debug)]
pub(super) struct Compilation {
    pub(super) fields: Fields,
    pub(super) flags: Vec<Flag>,
    pub(super) plans: Vec<Plan>,
    pub(super) sites: Vec<u32>,
    pub(super) problems: Vec<Problem>,
}

/// Compiles a document; the problems are in the order of the flags' names.
pub(super) fn compile(document: &Document) -> Compilation {
    let mut draft = Draft::new(document);
    for feature in document.features() {
        draft.flag(feature);
    }
    draft.finish()
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
    /// How many places had drawn lots before each flag.
    first_sites: Vec<u32>,
    sites: u32,
}

/// What a flag asks of another.
pub(super) struct Dependency<'d> {
    pub(super) parent: wire::Text<'d>,
    pub(super) enabled: bool,
    /// Where any are named, the other flag has to be on with one of these.
    pub(super) variants: Vec<wire::Text<'d>>,
}

impl<'d> Draft<'d> {
    fn new(document: &'d Document) -> Self {
        let twice = |flag| Problem { flag: Arc::clone(flag), defect: Defect::DefinedTwice };
        let left_out = |flag: &wire::Unreadable| Problem {
            flag: format!("#{}", flag.position).into(),
            defect: Defect::LeftOut(flag.reason.clone()),
        };
        let problems = document.unreadable().iter().map(left_out);
        let flags = document.features().len();
        Self {
            segments: document.segments(),
            fields: Fields::new(),
            flags: Vec::with_capacity(flags),
            plans: Vec::with_capacity(flags),
            dependants: Vec::new(),
            first_sites: Vec::with_capacity(flags),
            problems: problems.chain(document.shadowed().iter().map(twice)).collect(),
            sites: 0,
        }
    }

    /// Compiles one flag, as if it had no dependencies.
    fn flag(&mut self, feature: &'d wire::Feature) {
        self.first_sites.push(self.sites);
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
    fn finish(mut self) -> Compilation {
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
        let Self { fields, flags, plans, first_sites: sites, problems, .. } = self;
        Compilation { fields, flags, plans, sites, problems }
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
