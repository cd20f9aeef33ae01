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

use super::bucket::DrawId;
use super::context::ContextSchema;
use super::flag::{self, Flag, FlagId, Outcome};
use super::plan::{Conditions, FlagPlan, Parent};
use super::problem::{Defect, DefinitionPart, Problem};
use super::strategy::{self, Strategy, StrategyCompiler};
use crate::protocol::features::{self as wire, Document};
use crate::protocol::lenient::{Lenient, Text};

/// The parts of an engine.
#[derive(Clone, Debug)]
pub(super) struct CompiledFlags {
    pub(super) schema: ContextSchema,
    pub(super) flags: Vec<Flag>,
    /// The plan of each flag. Separate from [`Flag`], so that evaluation touches little memory.
    pub(super) plans: Vec<FlagPlan>,
    /// The flags that depend on others, in order.
    dependants: Vec<FlagId>,
    /// The length of the schema after the last full compilation.
    schema_len_when_full: usize,
}

/// The previous compilation with its document and problems.
pub(super) struct Previous<'e> {
    pub(super) compiled: &'e CompiledFlags,
    pub(super) document: &'e Document,
    pub(super) problems: &'e [Problem],
}

/// Number of additional schema entries that do not cause a full compilation.
const RECOMPILE_SLACK: usize = 256;

impl<'e> Previous<'e> {
    /// Whether flags can be reused at all.
    fn is_reusable_for(&self, document: &Document) -> bool {
        // A segment is compiled into each flag that refers to it.
        document.segments() == self.document.segments()
            && self.compiled.schema.len()
                <= 2 * self.compiled.schema_len_when_full + RECOMPILE_SLACK
    }

    /// Whether the flag with this id can be reused for `feature`, which has the same name.
    fn can_reuse(&self, id: FlagId, before: &wire::Feature, feature: &wire::Feature) -> bool {
        // The plan of a flag with parents refers to them.
        before == feature && self.compiled.dependants.binary_search(&id).is_err()
    }

    /// The problems in the definition of a flag.
    fn problems_of(&self, name: &str) -> impl Iterator<Item = &'e Problem> {
        let start = self.problems.partition_point(|it| *it.flag < *name);
        let own = self.problems[start..].iter().take_while(move |it| *it.flag == *name);
        own.filter(|it| !matches!(it.defect, Defect::DuplicateName | Defect::UnreadableName(_)))
    }
}

/// Compiles a document. Returns the problems sorted by flag name.
pub(super) fn compile(
    document: &Document,
    previous: Option<&Previous<'_>>,
) -> (CompiledFlags, Vec<Problem>) {
    let previous = previous.filter(|it| it.is_reusable_for(document));
    let mut builder = Builder::new(document, previous.map(|it| it.compiled));
    let before = previous.map_or_else(Default::default, |it| it.document.features());
    let before = before.iter().enumerate();
    for pair in before.merge_join_by(document.features(), |(_, a), b| a.name().cmp(b.name())) {
        match (pair, previous) {
            (Both((at, before), feature), Some(previous))
                if previous.can_reuse(FlagId::new(at), before, feature) =>
            {
                builder.reuse(previous, FlagId::new(at));
            }
            (Both(_, feature) | Right(feature), _) => builder.add_flag(feature),
            (Left(_), _) => {}
        }
    }
    let (mut compiled, problems) = builder.finish();
    compiled.schema_len_when_full =
        previous.map_or(compiled.schema.len(), |it| it.compiled.schema_len_when_full);
    (compiled, problems)
}

/// Builds a [`CompiledFlags`] flag by flag.
struct Builder<'d> {
    segments: &'d [wire::Segment],
    schema: ContextSchema,
    flags: Vec<Flag>,
    plans: Vec<FlagPlan>,
    /// The flags that depend on others, with their dependencies.
    dependants: Vec<(FlagId, Vec<Dependency<'d>>)>,
    problems: Vec<Problem>,
}

/// A condition on another flag.
pub(super) struct Dependency<'d> {
    pub(super) parent: Text<'d>,
    pub(super) enabled: bool,
    /// Unless empty, the other flag has to be on with one of these variants.
    pub(super) variants: Vec<Text<'d>>,
}

impl<'d> Builder<'d> {
    fn new(document: &'d Document, previous: Option<&CompiledFlags>) -> Self {
        let duplicate = |flag| Problem { flag: Arc::clone(flag), defect: Defect::DuplicateName };
        let left_out = |flag: &wire::UnreadableFlag| Problem {
            flag: format!("#{}", flag.position).into(),
            defect: Defect::UnreadableName(flag.reason.clone()),
        };
        let problems = document.unreadable().iter().map(left_out);
        let flags = document.features().len();
        Self {
            segments: document.segments(),
            schema: previous.map_or_else(ContextSchema::new, |it| it.schema.clone()),
            flags: Vec::with_capacity(flags),
            plans: Vec::with_capacity(flags),
            dependants: Vec::new(),
            problems: problems.chain(document.duplicates().iter().map(duplicate)).collect(),
        }
    }

    /// Reuses a flag without parents.
    fn reuse(&mut self, previous: &Previous<'_>, id: FlagId) {
        let (compiled, index) = (previous.compiled, id.index());
        let flag = compiled.flags[index].clone();
        self.problems.extend(previous.problems_of(&flag.name).cloned());
        self.flags.push(flag);
        self.plans.push(compiled.plans[index].clone());
    }

    /// Compiles one flag without its dependencies.
    fn add_flag(&mut self, feature: &'d wire::Feature) {
        let mut defects = Vec::new();
        let (flag, plan) = match feature.definition() {
            Ok(definition) => self.compile_definition(feature, definition, &mut defects),
            Err(error) => {
                defects.push(Defect::UnreadableDefinition(error.to_string()));
                let flag = Flag {
                    name: Arc::clone(feature.name()),
                    project: Arc::clone(feature.project()),
                    enabled: false,
                    impression_data: false,
                    variants: Arc::default(),
                };
                (flag, FlagPlan::Constant(Outcome::Off))
            }
        };
        let problem = |defect| Problem { flag: Arc::clone(feature.name()), defect };
        self.problems.extend(defects.into_iter().map(problem));
        self.flags.push(flag);
        self.plans.push(plan);
    }

    fn compile_definition(
        &mut self,
        feature: &wire::Feature,
        definition: wire::Definition<'d>,
        defects: &mut Vec<Defect>,
    ) -> (Flag, FlagPlan) {
        let enabled = definition.enabled.or_default().unwrap_or_else(|| {
            defects.push(Defect::Malformed(DefinitionPart::Enabled));
            false
        });
        let mut all_variants = Vec::new();
        let mut compiler = StrategyCompiler {
            segments: self.segments,
            schema: &mut self.schema,
            variants: &mut all_variants,
            defects,
            next_draw_id: DrawId::first_of_flag(feature.name()),
        };
        let stickiness = strategy::first_stickiness(&definition.variants);
        let variants = compiler.compile_variants(&definition.variants, feature.name(), stickiness);
        let strategies = match &definition.strategies {
            Lenient::Valid(list) if list.is_empty() => vec![Strategy::unconditional()],
            Lenient::Valid(list) => {
                list.iter().filter_map(|source| compiler.compile_strategy(source)).collect()
            }
            Lenient::Missing => {
                compiler.defects.push(Defect::NoStrategies);
                Vec::new()
            }
            Lenient::Malformed => {
                compiler.defects.push(Defect::Malformed(DefinitionPart::Strategies));
                Vec::new()
            }
        };
        let mut plan = if enabled {
            Conditions { parents: Box::default(), strategies: strategies.into(), variants }
                .simplify()
        } else {
            FlagPlan::Constant(Outcome::Off)
        };
        match read_dependencies(definition.dependencies) {
            Some(list) if list.is_empty() => {}
            Some(list) => self.dependants.push((FlagId::new(self.flags.len()), list)),
            None => {
                defects.push(Defect::Malformed(DefinitionPart::Dependency));
                self.dependants.push((FlagId::new(self.flags.len()), Vec::new()));
                plan = FlagPlan::Constant(Outcome::Off);
            }
        }
        let flag = Flag {
            name: Arc::clone(feature.name()),
            project: Arc::clone(feature.project()),
            enabled,
            impression_data: definition.impression_data.valid().unwrap_or_default(),
            variants: all_variants.into(),
        };
        (flag, plan)
    }

    /// Links flags to their parents.
    fn finish(mut self) -> (CompiledFlags, Vec<Problem>) {
        let dependants = std::mem::take(&mut self.dependants);
        for (id, dependencies) in &dependants {
            let parents = self.resolve_parents(*id, dependencies, &dependants);
            let plan = &mut self.plans[id.index()];
            match parents {
                None => *plan = FlagPlan::Constant(Outcome::Off),
                Some(parents) if parents.is_empty() => {}
                Some(parents) => plan.add_parents(parents),
            }
        }
        self.problems.sort_by(|a, b| a.flag.cmp(&b.flag));
        let Self { schema, flags, plans, problems, .. } = self;
        let dependants = dependants.into_iter().map(|(id, _)| id).collect();
        (CompiledFlags { schema, flags, plans, dependants, schema_len_when_full: 0 }, problems)
    }

    /// The conditions on other flags that depend on the context; `None` if they can never be satisfied.
    fn resolve_parents(
        &mut self,
        id: FlagId,
        dependencies: &[Dependency<'_>],
        dependants: &[(FlagId, Vec<Dependency<'_>>)],
    ) -> Option<Vec<Parent>> {
        let mut parents = Some(Vec::new());
        for dependency in dependencies {
            let found = flag::find_flag(&self.flags, &dependency.parent);
            let is_nested =
                |parent| dependants.binary_search_by_key(&parent, |(id, _)| *id).is_ok();
            let defect = match found {
                None => Defect::MissingParent(dependency.parent.clone().into_owned()),
                Some(parent) if is_nested(parent) => {
                    Defect::NestedParent(dependency.parent.clone().into_owned())
                }
                Some(flag) => {
                    let parent = Parent {
                        flag,
                        accepted_outcomes: dependency.accepted_outcomes(&self.flags[flag.index()]),
                    };
                    match self.plans[flag.index()] {
                        FlagPlan::Constant(outcome) if parent.is_satisfied_by(outcome) => {}
                        FlagPlan::Constant(_) => parents = None,
                        FlagPlan::Conditional(_) => {
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
    fn accepted_outcomes(&self, parent: &Flag) -> Box<[bool]> {
        let outcomes = [Outcome::Off, Outcome::On];
        let variants = (0..).map(Outcome::Variant).take(parent.variants().len());
        outcomes
            .into_iter()
            .chain(variants)
            .map(|outcome| self.is_satisfied_by(parent, outcome))
            .collect()
    }

    /// Whether `outcome` of `parent` satisfies the dependency.
    pub(super) fn is_satisfied_by(&self, parent: &Flag, outcome: Outcome) -> bool {
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
pub(super) fn read_dependencies(
    source: Lenient<Vec<Lenient<wire::Dependency<'_>>>>,
) -> Option<Vec<Dependency<'_>>> {
    source.or_default()?.into_iter().map(read_dependency).collect()
}

/// Reads one dependency; `None` if it is malformed.
pub(super) fn read_dependency(source: Lenient<wire::Dependency<'_>>) -> Option<Dependency<'_>> {
    let source = source.valid()?;
    let variants = source.variants.or_default()?.into_iter().map(Lenient::valid);
    Some(Dependency {
        parent: source.feature.valid()?,
        enabled: match source.enabled {
            Lenient::Valid(enabled) => enabled,
            Lenient::Missing => true,
            Lenient::Malformed => return None,
        },
        variants: variants.collect::<Option<_>>()?,
    })
}

#[cfg(test)]
mod tests;
