//! Explains a flag: reads its definition again part by part, and compiles and evaluates each part with
//! the functions of normal evaluation.
//!
//! Compilation drops parts that cannot make a difference or can never match, but an explanation has to
//! show them. So this starts from the definition. It does not compare, hash or draw by itself: it only
//! arranges results and describes them. It costs far more than evaluation and is not for the request
//! path.

mod sentences;

use self::sentences::{membership, quoted};
use super::bucket::DrawId;
use super::compile;
use super::constraint::{self, CompiledConstraint, Operator};
use super::context::{BoundContext, Context, ContextSchema, FieldId};
use super::explanation::{
    BucketAssignment, Constraint, Decision, Explanation, Parameter, Parent, Payload, Rule, Segment,
    SelectionReason, Strategy, Variant, VariantShare, Variants,
};
use super::flag::{self, Flag, FlagId, Outcome};
use super::problem::{Defect, DefinitionPart};
use super::strategy::{self, ParsedRule, ParsedStrategy, StrategyCompiler};
use super::variant::{self, Stickiness};
use crate::protocol::features::{self as wire, Document, Parameters};
use crate::protocol::lenient::{Lenient, Text};

/// An engine with the document that it was compiled from, and a context.
#[derive(Clone, Copy, Debug)]
pub(super) struct Explainer<'a> {
    pub(super) schema: &'a ContextSchema,
    pub(super) flags: &'a [Flag],
    pub(super) document: &'a Document,
    pub(super) context: &'a Context<'a>,
}

impl Explainer<'_> {
    /// The outcome of a flag with its explanation.
    pub(super) fn explain(self, id: FlagId) -> (Outcome, Explanation) {
        let feature = &self.document.features()[id.index()];
        let mut defects = Vec::new();
        if self.document.duplicates().contains(feature.name()) {
            defects.push(Defect::DuplicateName);
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
            Ok(definition) => self.explain_definition(definition, &mut explanation, &mut defects),
            Err(error) => {
                defects.push(Defect::UnreadableDefinition(error.to_string()));
                Outcome::Off
            }
        };
        explanation.problems = defects.iter().map(ToString::to_string).collect();
        explanation.summary = sentences::summary(&explanation);
        (outcome, explanation)
    }

    fn explain_definition(
        self,
        definition: wire::Definition<'_>,
        explanation: &mut Explanation,
        defects: &mut Vec<Defect>,
    ) -> Outcome {
        explanation.switched_on = definition.enabled.or_default().unwrap_or_else(|| {
            defects.push(Defect::Malformed(DefinitionPart::Enabled));
            false
        });
        // The schema has all fields of the flag already, so `bound` stays valid as parts are compiled.
        let mut schema = self.schema.clone();
        let bound = schema.bind(schema.read(self.context));
        let mut all_variants = Vec::new();
        let mut explainer = FlagExplainer {
            compiler: StrategyCompiler {
                segments: self.document.segments(),
                schema: &mut schema,
                variants: &mut all_variants,
                defects,
                next_draw_id: DrawId::first_of_flag(&explanation.flag),
            },
            bound: &bound,
            context: self.context,
        };
        let stickiness = strategy::first_stickiness(&definition.variants);
        let (own, variants) =
            explainer.explain_variants(&definition.variants, &explanation.flag, stickiness);
        explanation.variants = variants;
        let mut chosen = Vec::new();
        let mut is_unconditional = false;
        match &definition.strategies {
            Lenient::Valid(list) => {
                is_unconditional = list.is_empty();
                for source in list {
                    let (index, strategy) = explainer.explain_strategy(source);
                    chosen.push(index);
                    explanation.strategies.push(strategy);
                }
            }
            Lenient::Missing => explainer.compiler.defects.push(Defect::NoStrategies),
            Lenient::Malformed => {
                explainer.compiler.defects.push(Defect::Malformed(DefinitionPart::Strategies));
            }
        }
        self.explain_parents(definition.dependencies, explanation, defects);

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
            Decision::Everybody => outcome_with_variant(own, explanation.variants.as_mut()),
            Decision::Strategy { index } => {
                let strategy = &mut explanation.strategies[index];
                match chosen[index] {
                    Some(variant) => {
                        outcome_with_variant(Some(variant), strategy.variants.as_mut())
                    }
                    None => outcome_with_variant(own, explanation.variants.as_mut()),
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

    fn explain_parents(
        self,
        source: Lenient<Vec<Lenient<wire::Dependency<'_>>>>,
        explanation: &mut Explanation,
        defects: &mut Vec<Defect>,
    ) {
        let list = match source {
            Lenient::Valid(list) => list,
            Lenient::Missing => Vec::new(),
            Lenient::Malformed => vec![Lenient::Malformed],
        };
        explanation.parents =
            list.into_iter().map(|source| self.explain_parent(source, defects)).collect();
    }

    fn explain_parent(
        self,
        source: Lenient<wire::Dependency<'_>>,
        defects: &mut Vec<Defect>,
    ) -> Parent {
        let Some(dependency) = compile::read_dependency(source) else {
            let defect = Defect::Malformed(DefinitionPart::Dependency);
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
        let defect = match flag::find_flag(self.flags, &name) {
            None => Defect::MissingParent(name),
            Some(id) if self.has_parents(id) => Defect::NestedParent(name),
            Some(id) => {
                let (outcome, explanation) = self.explain(id);
                parent.satisfied = dependency.is_satisfied_by(&self.flags[id.index()], outcome);
                parent.why = sentences::parent(&dependency, &explanation, parent.satisfied);
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
            compile::read_dependencies(definition.dependencies).is_none_or(|list| !list.is_empty())
        })
    }
}

/// The outcome of a flag that is on, with the selected variant of `list`, if any.
fn outcome_with_variant(index: Option<u32>, list: Option<&mut Variants>) -> Outcome {
    let Some(index) = index else { return Outcome::On };
    if let Some(list) = list {
        list.decides = true;
    }
    Outcome::Variant(index)
}

/// Compiles and evaluates the parts of one flag.
struct FlagExplainer<'c, 'b, 'v> {
    compiler: StrategyCompiler<'c>,
    bound: &'b BoundContext<'v>,
    context: &'b Context<'v>,
}

impl FlagExplainer<'_, '_, '_> {
    /// Explains a strategy. Also returns the variant selected from the strategy's list, if any.
    fn explain_strategy(
        &mut self,
        source: &Lenient<wire::Strategy<'_>>,
    ) -> (Option<u32>, Strategy) {
        let text = |text: &Lenient<Text<'_>>| text.clone().valid().map(String::from);
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
        if let Lenient::Valid(strategy) = source {
            explained.name = text(&strategy.name).unwrap_or_default();
            explained.title = text(&strategy.title).filter(|title| !title.is_empty());
            explained.disabled = strategy.disabled.valid().unwrap_or_default();
        }
        let Some(ParsedStrategy { strategy, name, parameters }) = ParsedStrategy::parse(source)
        else {
            explained.why = self.report_problem(Defect::Malformed(DefinitionPart::Strategy));
            return (None, explained);
        };
        let mut obstacles = Vec::new();
        match self.explain_constraints(&strategy.constraints, DefinitionPart::Strategy) {
            Ok(constraints) => explained.constraints = constraints,
            Err(problem) => obstacles.push(problem),
        }
        let failing = explained.constraints.iter().filter(|constraint| !constraint.holds);
        obstacles.extend(failing.map(|it| format!("the constraint fails: {}", it.why)));
        match &strategy.segments {
            Lenient::Valid(ids) => {
                explained.segments = ids.iter().map(|id| self.explain_segment(*id)).collect();
            }
            Lenient::Missing => {}
            Lenient::Malformed => {
                obstacles.push(self.report_problem(Defect::Malformed(DefinitionPart::Strategy)));
            }
        }
        let failing = explained.segments.iter().filter(|segment| !segment.holds);
        obstacles.extend(failing.map(|segment| segment.why.clone()));
        let rule = self.explain_rule(name, parameters);
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
        let (chosen, variants) = self.explain_variants(&strategy.variants, group, stickiness);
        explained.variants = variants;
        (chosen, explained)
    }

    /// Adds a defect and returns its text.
    fn report_problem(&mut self, defect: Defect) -> String {
        let text = defect.to_string();
        self.compiler.defects.push(defect);
        text
    }

    /// The text of the defects after the first `before`, if any.
    fn problems_since(&self, before: usize) -> Option<String> {
        let defects = &self.compiler.defects[before..];
        let texts: Vec<String> = defects.iter().map(ToString::to_string).collect();
        (!texts.is_empty()).then(|| texts.join("; "))
    }

    /// Explains a list of constraints. Fails with the text of the defect if the list is malformed.
    fn explain_constraints(
        &mut self,
        source: &Lenient<Vec<Lenient<wire::Constraint<'_>>>>,
        part: DefinitionPart,
    ) -> Result<Vec<Constraint>, String> {
        match source {
            Lenient::Valid(list) => {
                Ok(list.iter().map(|source| self.explain_constraint(source)).collect())
            }
            Lenient::Missing => Ok(Vec::new()),
            Lenient::Malformed => Err(self.report_problem(Defect::Malformed(part))),
        }
    }

    fn explain_constraint(&mut self, source: &Lenient<wire::Constraint<'_>>) -> Constraint {
        let before = self.compiler.defects.len();
        let StrategyCompiler { schema, defects, .. } = &mut self.compiler;
        let compiled = constraint::Constraint::compile(source, schema, defects);
        let problem = self.problems_since(before);
        let mut explained = Constraint {
            field: String::new(),
            operator: String::new(),
            values: Vec::new(),
            inverted: false,
            case_insensitive: false,
            context_value: None,
            holds: match &compiled {
                CompiledConstraint::Always => true,
                CompiledConstraint::Never => false,
                CompiledConstraint::Test(test) => test.is_satisfied(self.bound),
            },
            why: String::new(),
        };
        let mut operator = None;
        if let Lenient::Valid(source) = source {
            let text = |text: &Lenient<Text<'_>>| text.clone().valid().map(String::from);
            explained.field = text(&source.context_name).unwrap_or_default();
            explained.operator = text(&source.operator).unwrap_or_default();
            operator = Operator::parse(&explained.operator);
            explained.values = match &source.values {
                Lenient::Valid(list) if operator.is_some_and(Operator::compares_with_list) => {
                    list.iter().filter_map(text).collect()
                }
                _ => text(&source.value).into_iter().collect(),
            };
            explained.inverted = source.inverted.valid().unwrap_or_default();
            explained.case_insensitive = source.case_insensitive.valid().unwrap_or_default();
            explained.context_value = if operator.is_some_and(Operator::compares_time) {
                Some(self.evaluation_time())
            } else {
                context_value(self.context, &explained.field)
            };
        }
        let is_generated = self.context.session_is_generated
            && explained.field == FieldId::SESSION_ID_NAME
            && !operator.is_some_and(Operator::compares_time);
        explained.why =
            sentences::constraint(&explained, operator, &compiled, problem, is_generated);
        explained
    }

    /// The time that date operators compare with, as in the context.
    fn evaluation_time(&self) -> String {
        match self.bound.text(FieldId::CURRENT_TIME) {
            None | Some("") => self.context.now.to_string(),
            Some(time) => time.to_owned(),
        }
    }

    fn explain_segment(&mut self, id: Lenient<i64>) -> Segment {
        let mut explained = Segment {
            id: id.valid(),
            name: None,
            missing: false,
            constraints: Vec::new(),
            holds: false,
            why: String::new(),
        };
        let Lenient::Valid(id) = id else {
            explained.why = self.report_problem(Defect::Malformed(DefinitionPart::Strategy));
            return explained;
        };
        let Some(segment) = self.compiler.find_segment(id) else {
            explained.missing = true;
            explained.why = self.report_problem(Defect::MissingSegment(id));
            return explained;
        };
        explained.name = segment.name().map(String::from);
        match self.explain_constraints(&segment.constraints(), DefinitionPart::Segment) {
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

    fn explain_rule(&mut self, name: &str, parameters: &Parameters<'_>) -> Rule {
        let before = self.compiler.defects.len();
        let parsed = self.compiler.parse_rule(name, parameters);
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
        let Some(ParsedRule { rule, group }) = parsed else {
            explained.why = self
                .problems_since(before)
                .unwrap_or_else(|| "its parameters are empty or invalid".to_owned());
            return explained;
        };
        explained.holds = rule.is_satisfied(self.bound);
        let holds = explained.holds;
        explained.why = match &rule {
            strategy::Rule::Always => "it is for everybody".to_owned(),
            strategy::Rule::FieldPresent(field) => {
                let field = quoted(self.field_name(*field));
                let verb = if holds { "has" } else { "lacks" };
                format!("it is for everybody with {field}, which the context {verb}")
            }
            strategy::Rule::Rollout(rollout) => {
                let stickiness = rollout.stickiness;
                let bucket = rollout.bucket(self.bound);
                let placement = self.bucket_assignment(stickiness, group, bucket, 100);
                let why = sentences::rollout(&placement, rollout.percent, holds);
                explained.placement = Some(placement);
                explained.percentage = Some(rollout.percent);
                why
            }
            strategy::Rule::RandomRollout { percent, site } => {
                let bucket = Some(strategy::random_percent(self.bound, *site));
                let placement = self.bucket_assignment(Stickiness::FirstOf(&[]), None, bucket, 100);
                let why = sentences::rollout(&placement, *percent, holds);
                explained.placement = Some(placement);
                explained.percentage = Some(*percent);
                why
            }
            strategy::Rule::UserIds(_) => self.describe_membership(FieldId::USER_ID, holds),
            strategy::Rule::RemoteAddresses { .. } => {
                self.describe_membership(FieldId::REMOTE_ADDRESS, holds)
            }
            strategy::Rule::Hostnames(_) => match self.bound.hostname() {
                Some(name) => {
                    format!("the host {} is {}", quoted(name), membership(holds))
                }
                None => "the hostname is unknown".to_owned(),
            },
        };
        explained
    }

    fn describe_membership(&self, field: FieldId, holds: bool) -> String {
        match self.bound.text(field) {
            Some(value) => {
                format!(
                    "{} {} is {}",
                    quoted(self.field_name(field)),
                    quoted(value),
                    membership(holds)
                )
            }
            None => format!("the context lacks {}", quoted(self.field_name(field))),
        }
    }

    /// Explains a list of variants. Also returns the selected one, as an index into all variants of the
    /// flag.
    fn explain_variants(
        &mut self,
        source: &Lenient<Vec<Lenient<wire::Variant<'_>>>>,
        group: &str,
        stickiness: Option<&str>,
    ) -> (Option<u32>, Option<Variants>) {
        let choice = self.compiler.compile_variants(source, group, stickiness);
        let chosen = choice.select(self.bound);
        let list = match source {
            Lenient::Valid(list) if !list.is_empty() => list,
            Lenient::Valid(_) | Lenient::Missing | Lenient::Malformed => return (chosen, None),
        };
        let (mut shares, mut total) = (Vec::new(), 0);
        for source in list {
            if let Some((_, name, weight)) = variant::parse_variant(source, total) {
                shares.push(VariantShare {
                    name: name.to_owned(),
                    weight,
                    first_bucket: total + 1,
                });
                total += weight;
            }
        }
        let name = chosen.map(|index| self.compiler.variants[index as usize].name.to_string());
        let selected = name.as_deref().map(quoted).unwrap_or_default();
        let (choice, placement, why) = match &choice {
            variant::VariantSelection::None => (
                SelectionReason::Nobody,
                None,
                "no variant has a weight, so none is selected".to_owned(),
            ),
            variant::VariantSelection::Always(_) => {
                let why = format!(
                    "{selected} is the only variant with a weight, so it is always selected"
                );
                (SelectionReason::Everybody, None, why)
            }
            variant::VariantSelection::Weighted(weighted) => {
                if let Some((field, _)) = weighted.matching_override(self.bound) {
                    let value = self.bound.text(field).unwrap_or_default();
                    let field = quoted(self.field_name(field));
                    let why = format!("{selected} is reserved for {field} {}", quoted(value));
                    (SelectionReason::Override, None, why)
                } else {
                    let bucket = Some(weighted.bucket(self.bound));
                    let placement = self.bucket_assignment(
                        weighted.stickiness,
                        Some(group),
                        bucket,
                        weighted.bucket_count(),
                    );
                    let why = format!(
                        "{}, which is {selected}'s",
                        sentences::bucket_assignment(&placement)
                    );
                    (SelectionReason::Bucket, Some(placement), why)
                }
            }
        };
        let explained = Variants { shares, chosen: name, choice, placement, decides: false, why };
        (chosen, Some(explained))
    }

    fn bucket_assignment(
        &self,
        stickiness: Stickiness,
        group: Option<&str>,
        bucket: Option<u32>,
        buckets: u32,
    ) -> BucketAssignment {
        let source = stickiness.field_and_identifier(self.bound);
        let name = match stickiness {
            Stickiness::FirstOf([]) => "random",
            Stickiness::FirstOf(_) => "default",
            Stickiness::Field(field) => self.field_name(field),
        };
        BucketAssignment {
            stickiness: name.to_owned(),
            field: source.map(|(field, _)| self.field_name(field).to_owned()),
            value: source.map(|(_, value)| value.to_owned()),
            drawn: bucket.is_some()
                && source.is_none_or(|(field, _)| self.bound.values().is_generated(field)),
            group: group.map(str::to_owned),
            bucket,
            buckets,
        }
    }

    fn field_name(&self, field: FieldId) -> &str {
        &self.compiler.schema.names()[field.index()]
    }
}

/// The value of any field of a context, even one that no flag reads.
fn context_value(context: &Context<'_>, name: &str) -> Option<String> {
    let mut schema = ContextSchema::new();
    let field = schema.intern_field(name);
    schema.read(context).text(field).map(str::to_owned)
}

#[cfg(test)]
mod tests;
