//! Explains a flag: reads its definition again part by part, and compiles and evaluates each part with
//! the functions of normal evaluation.
//!
//! Compilation drops parts that cannot make a difference or can never match, but an explanation has to
//! show them. So this starts from the definition. It does not compare, hash or draw by itself: it only
//! arranges results and describes them. It costs far more than evaluation and is not for the request
//! path.

mod words;

use self::words::{in_list, quoted};
use super::bucket::Site;
use super::compile;
use super::constraint::{self, Compiled};
use super::context::{Bound, Context, FieldId, Fields};
use super::explanation::{
    Choice, Constraint, Decision, Explanation, Parameter, Parent, Payload, Placement, Rule,
    Segment, Share, Strategy, Variant, Variants,
};
use super::flag::{self, Flag, FlagId, Outcome};
use super::problem::{Defect, Part};
use super::strategy::{self, Compiler, Parts, Terms};
use super::variant::{self, Stickiness};
use crate::wire::features::{self as wire, Document, Loose, Parameters};

/// An engine with the document that it was compiled from, and a context.
#[derive(Clone, Copy, Debug)]
pub(super) struct Case<'a> {
    pub(super) fields: &'a Fields,
    pub(super) flags: &'a [Flag],
    pub(super) document: &'a Document,
    pub(super) context: &'a Context<'a>,
}

impl Case<'_> {
    /// The outcome of a flag with its explanation.
    pub(super) fn explain(self, id: FlagId) -> (Outcome, Explanation) {
        let feature = &self.document.features()[id.index()];
        let mut defects = Vec::new();
        if self.document.shadowed().contains(feature.name()) {
            defects.push(Defect::DefinedTwice);
        }
        let mut explanation = Explanation {
            flag: feature.name().to_string(),
            project: feature.project().to_string(),
            enabled: false,
            variant: None,
            summary: String::new(),
            decision: Decision::Unreadable,
            switched_on: false,
            parents: Vec::new(),
            strategies: Vec::new(),
            variants: None,
            problems: Vec::new(),
        };
        let outcome = match feature.definition() {
            Ok(definition) => self.defined(definition, &mut explanation, &mut defects),
            Err(error) => {
                defects.push(Defect::Unreadable(error.to_string()));
                Outcome::Off
            }
        };
        explanation.problems = defects.iter().map(ToString::to_string).collect();
        explanation.summary = words::summary(&explanation);
        (outcome, explanation)
    }

    fn defined(
        self,
        definition: wire::Definition<'_>,
        explanation: &mut Explanation,
        defects: &mut Vec<Defect>,
    ) -> Outcome {
        explanation.switched_on = definition.enabled.or_default().unwrap_or_else(|| {
            defects.push(Defect::Malformed(Part::Enabled));
            false
        });
        // The schema has all fields of the flag already, so `bound` stays valid as parts are compiled.
        let mut schema = self.fields.clone();
        let bound = schema.bind(schema.read(self.context));
        let mut all_variants = Vec::new();
        let mut explainer = Desk {
            compiler: Compiler {
                segments: self.document.segments(),
                fields: &mut schema,
                table: &mut all_variants,
                defects,
                site: Site::first_of(&explanation.flag),
            },
            bound: &bound,
            context: self.context,
        };
        let stickiness = strategy::first_stickiness(&definition.variants);
        let (own, variants) =
            explainer.variants(&definition.variants, &explanation.flag, stickiness);
        explanation.variants = variants;
        let mut chosen = Vec::new();
        let mut is_unconditional = false;
        match &definition.strategies {
            Loose::Is(list) => {
                is_unconditional = list.is_empty();
                for source in list {
                    let (index, strategy) = explainer.strategy(source);
                    chosen.push(index);
                    explanation.strategies.push(strategy);
                }
            }
            Loose::Missing => explainer.compiler.defects.push(Defect::NoStrategies),
            Loose::Malformed => {
                explainer.compiler.defects.push(Defect::Malformed(Part::Strategies));
            }
        }
        self.parents(definition.dependencies, explanation, defects);

        let unsatisfied = explanation.parents.iter().position(|parent| !parent.satisfied);
        let matching = explanation.strategies.iter().position(|strategy| strategy.matches);
        let (decision, reached) = match (unsatisfied, matching) {
            _ if !explanation.switched_on => (Decision::Switch, 0),
            (Some(index), _) => (Decision::Parent { index }, 0),
            (None, Some(index)) => (Decision::Strategy { index }, index + 1),
            (None, None) if is_unconditional => (Decision::Everybody, 0),
            (None, None) => (Decision::NoStrategy, explanation.strategies.len()),
        };
        explanation.decision = decision;
        for strategy in &mut explanation.strategies[..reached] {
            strategy.reached = true;
        }
        let outcome = match decision {
            Decision::Everybody => on(own, explanation.variants.as_mut()),
            Decision::Strategy { index } => {
                let strategy = &mut explanation.strategies[index];
                match chosen[index] {
                    Some(variant) => on(Some(variant), strategy.variants.as_mut()),
                    None => on(own, explanation.variants.as_mut()),
                }
            }
            Decision::Unreadable
            | Decision::Switch
            | Decision::Parent { .. }
            | Decision::NoStrategy => Outcome::Off,
        };
        explanation.enabled = outcome.is_on();
        if let Outcome::Variant(index) = outcome {
            let variant::Variant { name, payload } = &all_variants[index as usize];
            let payload = payload.as_ref().map(|payload| Payload {
                kind: payload.kind.to_string(),
                value: payload.value.to_string(),
            });
            explanation.variant = Some(Variant { name: name.to_string(), payload });
        }
        outcome
    }

    fn parents(
        self,
        source: Loose<Vec<Loose<wire::Dependency<'_>>>>,
        explanation: &mut Explanation,
        defects: &mut Vec<Defect>,
    ) {
        let list = match source {
            Loose::Is(list) => list,
            Loose::Missing => Vec::new(),
            Loose::Malformed => vec![Loose::Malformed],
        };
        explanation.parents = list.into_iter().map(|source| self.parent(source, defects)).collect();
    }

    fn parent(self, source: Loose<wire::Dependency<'_>>, defects: &mut Vec<Defect>) -> Parent {
        let Some(dependency) = compile::dependency(source) else {
            let defect = Defect::Malformed(Part::Dependency);
            let why = defect.to_string();
            defects.push(defect);
            let (flag, wanted_variants) = (String::new(), Vec::new());
            return Parent {
                flag,
                wanted: true,
                wanted_variants,
                satisfied: false,
                why,
                explanation: None,
            };
        };
        let name = dependency.parent.clone().into_owned();
        let mut parent = Parent {
            flag: name.clone(),
            wanted: dependency.enabled,
            wanted_variants: dependency.variants.iter().map(ToString::to_string).collect(),
            satisfied: false,
            why: String::new(),
            explanation: None,
        };
        let defect = match flag::find(self.flags, &name) {
            None => Defect::MissingParent(name),
            Some(id) if self.has_parents(id) => Defect::NestedParent(name),
            Some(id) => {
                let (outcome, explanation) = self.explain(id);
                parent.satisfied = dependency.admits(&self.flags[id.index()], outcome);
                parent.why = words::parent(&dependency, &explanation, parent.satisfied);
                parent.explanation = Some(Box::new(explanation));
                return parent;
            }
        };
        parent.why = defect.to_string();
        defects.push(defect);
        parent
    }

    /// Whether a flag depends on others itself.
    fn has_parents(self, id: FlagId) -> bool {
        self.document.features()[id.index()].definition().is_ok_and(|definition| {
            compile::dependencies(definition.dependencies).is_none_or(|list| !list.is_empty())
        })
    }
}

/// The outcome of a flag that is on, with the selected variant of `list`, if any.
fn on(index: Option<u32>, list: Option<&mut Variants>) -> Outcome {
    let Some(index) = index else { return Outcome::On };
    if let Some(list) = list {
        list.decides = true;
    }
    Outcome::Variant(index)
}

/// Compiles and evaluates the parts of one flag.
struct Desk<'c, 'b, 'v> {
    compiler: Compiler<'c>,
    bound: &'b Bound<'v>,
    context: &'b Context<'v>,
}

impl Desk<'_, '_, '_> {
    /// Explains a strategy. Also returns the variant selected from the strategy's list, if any.
    fn strategy(&mut self, source: &Loose<wire::Strategy<'_>>) -> (Option<u32>, Strategy) {
        let text = |text: &Loose<wire::Text<'_>>| text.clone().is().map(String::from);
        let mut explained = Strategy {
            name: String::new(),
            title: None,
            disabled: false,
            rule: None,
            constraints: Vec::new(),
            segments: Vec::new(),
            matches: false,
            reached: false,
            why: String::new(),
            variants: None,
        };
        if let Loose::Is(strategy) = source {
            explained.name = text(&strategy.name).unwrap_or_default();
            explained.title = text(&strategy.title).filter(|title| !title.is_empty());
            explained.disabled = strategy.disabled.is().unwrap_or_default();
        }
        let Some(Parts { strategy, name, parameters }) = Parts::read(source) else {
            explained.why = self.complain(Defect::Malformed(Part::Strategy));
            return (None, explained);
        };
        let mut obstacles = Vec::new();
        match self.constraints(&strategy.constraints, Part::Strategy) {
            Ok(constraints) => explained.constraints = constraints,
            Err(problem) => obstacles.push(problem),
        }
        let failing = explained.constraints.iter().filter(|constraint| !constraint.holds);
        obstacles.extend(failing.map(|it| format!("the constraint fails: {}", it.why)));
        match &strategy.segments {
            Loose::Is(ids) => explained.segments = ids.iter().map(|id| self.segment(*id)).collect(),
            Loose::Missing => {}
            Loose::Malformed => obstacles.push(self.complain(Defect::Malformed(Part::Strategy))),
        }
        let failing = explained.segments.iter().filter(|segment| !segment.holds);
        obstacles.extend(failing.map(|segment| segment.why.clone()));
        let rule = self.rule(name, parameters);
        if !rule.holds {
            obstacles.push(rule.why.clone());
        }
        explained.matches = obstacles.is_empty();
        explained.why = match obstacles.first() {
            None => format!("matches: {}", rule.why),
            Some(first) => format!("does not match: {first}"),
        };
        explained.rule = Some(rule);
        let group = strategy::variant_group(parameters);
        let stickiness = strategy::variant_stickiness(strategy, parameters);
        let (chosen, variants) = self.variants(&strategy.variants, group, stickiness);
        explained.variants = variants;
        (chosen, explained)
    }

    /// Adds a defect and returns its text.
    fn complain(&mut self, defect: Defect) -> String {
        let text = defect.to_string();
        self.compiler.defects.push(defect);
        text
    }

    /// The text of the defects after the first `before`, if any.
    fn complaints(&self, before: usize) -> Option<String> {
        let defects = &self.compiler.defects[before..];
        let texts: Vec<String> = defects.iter().map(ToString::to_string).collect();
        (!texts.is_empty()).then(|| texts.join("; "))
    }

    /// Explains a list of constraints. Fails with the text of the defect if the list is malformed.
    fn constraints(
        &mut self,
        source: &Loose<Vec<Loose<wire::Constraint<'_>>>>,
        part: Part,
    ) -> Result<Vec<Constraint>, String> {
        match source {
            Loose::Is(list) => Ok(list.iter().map(|source| self.constraint(source)).collect()),
            Loose::Missing => Ok(Vec::new()),
            Loose::Malformed => Err(self.complain(Defect::Malformed(part))),
        }
    }

    fn constraint(&mut self, source: &Loose<wire::Constraint<'_>>) -> Constraint {
        let before = self.compiler.defects.len();
        let Compiler { fields: schema, defects, .. } = &mut self.compiler;
        let compiled = constraint::Constraint::compile(source, schema, defects);
        let problem = self.complaints(before);
        let mut explained = Constraint {
            field: String::new(),
            operator: String::new(),
            values: Vec::new(),
            inverted: false,
            case_insensitive: false,
            context_value: None,
            holds: match &compiled {
                Compiled::Always => true,
                Compiled::Never => false,
                Compiled::Test(test) => test.holds(self.bound),
            },
            why: String::new(),
        };
        if let Loose::Is(source) = source {
            let text = |text: &Loose<wire::Text<'_>>| text.clone().is().map(String::from);
            explained.field = text(&source.context_name).unwrap_or_default();
            explained.operator = text(&source.operator).unwrap_or_default();
            explained.values = match &source.values {
                Loose::Is(list) if constraint::takes_list(&explained.operator) => {
                    list.iter().filter_map(text).collect()
                }
                _ => text(&source.value).into_iter().collect(),
            };
            explained.inverted = source.inverted.is().unwrap_or_default();
            explained.case_insensitive = source.case_insensitive.is().unwrap_or_default();
            explained.context_value = if constraint::is_of_time(&explained.operator) {
                Some(self.time())
            } else {
                value_of(self.context, &explained.field)
            };
        }
        let is_generated = self.context.session_is_made_up
            && explained.field == FieldId::SESSION_ID_NAME
            && !constraint::is_of_time(&explained.operator);
        explained.why = words::constraint(&explained, &compiled, problem, is_generated);
        explained
    }

    /// The time that date operators compare with, as in the context.
    fn time(&self) -> String {
        match self.bound.text(FieldId::CURRENT_TIME) {
            None | Some("") => self.context.now.to_string(),
            Some(time) => time.to_owned(),
        }
    }

    fn segment(&mut self, id: Loose<i64>) -> Segment {
        let mut explained = Segment {
            id: id.is(),
            name: None,
            missing: false,
            constraints: Vec::new(),
            holds: false,
            why: String::new(),
        };
        let Loose::Is(id) = id else {
            explained.why = self.complain(Defect::Malformed(Part::Strategy));
            return explained;
        };
        let Some(segment) = self.compiler.segment(id) else {
            explained.missing = true;
            explained.why = self.complain(Defect::MissingSegment(id));
            return explained;
        };
        explained.name = segment.name().map(String::from);
        match self.constraints(&segment.constraints(), Part::Segment) {
            Ok(constraints) => explained.constraints = constraints,
            Err(problem) => {
                explained.why = problem;
                return explained;
            }
        }
        let title = match &explained.name {
            Some(name) => format!("segment {id} ({})", quoted(name)),
            None => format!("segment {id}"),
        };
        let failing = explained.constraints.iter().find(|constraint| !constraint.holds);
        explained.why = match failing {
            None => format!("{title} holds"),
            Some(constraint) => format!("{title} fails: {}", constraint.why),
        };
        explained.holds = failing.is_none();
        explained
    }

    fn rule(&mut self, name: &str, parameters: &Parameters<'_>) -> Rule {
        let before = self.compiler.defects.len();
        let parsed = self.compiler.terms(name, parameters);
        let parameter = |(name, value): (&str, Option<&str>)| Parameter {
            name: name.to_owned(),
            value: value.map(str::to_owned),
        };
        let mut explained = Rule {
            parameters: parameters.iter().map(parameter).collect(),
            percentage: None,
            placement: None,
            holds: false,
            why: String::new(),
        };
        let Some(Terms { rule, group }) = parsed else {
            explained.why = self
                .complaints(before)
                .unwrap_or_else(|| "its parameters are empty or invalid".to_owned());
            return explained;
        };
        explained.holds = rule.holds(self.bound);
        let holds = explained.holds;
        explained.why = match &rule {
            strategy::Rule::Always => "it is for everybody".to_owned(),
            strategy::Rule::Known(field) => {
                let field = quoted(self.name(*field));
                let verb = if holds { "has" } else { "lacks" };
                format!("it is for everybody with {field}, which the context {verb}")
            }
            strategy::Rule::Rollout(rollout) => {
                let stickiness = rollout.stickiness;
                let bucket = rollout.bucket(self.bound);
                let placement = self.placement(stickiness, group, bucket, 100);
                let why = words::share(&placement, rollout.percent, holds);
                explained.placement = Some(placement);
                explained.percentage = Some(rollout.percent);
                why
            }
            strategy::Rule::Lottery { percent, site } => {
                let bucket = Some(strategy::lot(self.bound, *site));
                let placement = self.placement(Stickiness::FirstOf(&[]), None, bucket, 100);
                let why = words::share(&placement, *percent, holds);
                explained.placement = Some(placement);
                explained.percentage = Some(*percent);
                why
            }
            strategy::Rule::Users(_) => self.listed(FieldId::USER_ID, holds),
            strategy::Rule::Addresses { .. } => self.listed(FieldId::REMOTE_ADDRESS, holds),
            strategy::Rule::Hosts(_) => match self.bound.hostname() {
                Some(name) => {
                    format!("the host {} is {}", quoted(name), in_list(holds))
                }
                None => "the hostname is unknown".to_owned(),
            },
        };
        explained
    }

    fn listed(&self, field: FieldId, holds: bool) -> String {
        match self.bound.text(field) {
            Some(value) => {
                format!("{} {} is {}", quoted(self.name(field)), quoted(value), in_list(holds))
            }
            None => format!("the context lacks {}", quoted(self.name(field))),
        }
    }

    /// Explains a list of variants. Also returns the selected one, as an index into all variants of the
    /// flag.
    fn variants(
        &mut self,
        source: &Loose<Vec<Loose<wire::Variant<'_>>>>,
        group: &str,
        stickiness: Option<&str>,
    ) -> (Option<u32>, Option<Variants>) {
        let choice = self.compiler.choice(source, group, stickiness);
        let chosen = choice.choose(self.bound);
        let list = match source {
            Loose::Is(list) if !list.is_empty() => list,
            Loose::Is(_) | Loose::Missing | Loose::Malformed => return (chosen, None),
        };
        let (mut shares, mut total) = (Vec::new(), 0);
        for source in list {
            if let Some((_, name, weight)) = variant::read(source, total) {
                shares.push(Share { name: name.to_owned(), weight, first_bucket: total + 1 });
                total += weight;
            }
        }
        let name = chosen.map(|index| self.compiler.table[index as usize].name.to_string());
        let selected = name.as_deref().map(quoted).unwrap_or_default();
        let (choice, placement, why) = match &choice {
            variant::Choice::Nobody => {
                (Choice::Nobody, None, "no variant has a weight, so none is selected".to_owned())
            }
            variant::Choice::Everybody(_) => {
                let why = format!(
                    "{selected} is the only variant with a weight, so it is always selected"
                );
                (Choice::Everybody, None, why)
            }
            variant::Choice::Lots(weighted) => {
                if let Some((field, _)) = weighted.overriding(self.bound) {
                    let value = self.bound.text(field).unwrap_or_default();
                    let field = quoted(self.name(field));
                    let why = format!("{selected} is reserved for {field} {}", quoted(value));
                    (Choice::Override, None, why)
                } else {
                    let bucket = Some(weighted.bucket(self.bound));
                    let placement = self.placement(
                        weighted.stickiness,
                        Some(group),
                        bucket,
                        weighted.buckets(),
                    );
                    let why = format!("{}, which is {selected}'s", words::placement(&placement));
                    (Choice::Bucket, Some(placement), why)
                }
            }
        };
        let explained = Variants { shares, chosen: name, choice, placement, decides: false, why };
        (chosen, Some(explained))
    }

    fn placement(
        &self,
        stickiness: Stickiness,
        group: Option<&str>,
        bucket: Option<u32>,
        buckets: u32,
    ) -> Placement {
        let source = stickiness.source(self.bound);
        let name = match stickiness {
            Stickiness::FirstOf([]) => "random",
            Stickiness::FirstOf(_) => "default",
            Stickiness::Field(field) => self.name(field),
        };
        Placement {
            stickiness: name.to_owned(),
            field: source.map(|(field, _)| self.name(field).to_owned()),
            value: source.map(|(_, value)| value.to_owned()),
            drawn: bucket.is_some()
                && source.is_none_or(|(field, _)| self.bound.values().is_made_up(field)),
            group: group.map(str::to_owned),
            bucket,
            buckets,
        }
    }

    fn name(&self, field: FieldId) -> &str {
        &self.compiler.fields.names()[field.index()]
    }
}

/// The value of any field of a context, even one that no flag reads.
fn value_of(context: &Context<'_>, name: &str) -> Option<String> {
    let mut schema = Fields::new();
    let field = schema.intern(name);
    schema.read(context).text(field).map(str::to_owned)
}

#[cfg(test)]
mod tests;
