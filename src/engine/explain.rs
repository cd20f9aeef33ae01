//! Explaining a flag: its definition read again piece by piece, each piece compiled and asked by the
//! very functions that evaluating uses, and all of it kept.
//!
//! Compiling a flag to evaluate it drops what cannot make a difference and what can never hold;
//! people want to see just that. So this starts from the definition. It compares, hashes and draws
//! nothing itself: it only puts what it is told into order and words. It costs far more than
//! evaluating and is not for the request path.

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
    /// What a flag comes to, and why.
    pub(super) fn explain(self, id: FlagId) -> (Outcome, Explanation) {
        let feature = &self.document.features()[id.index()];
        let mut defects = Vec::new();
        if self.document.shadowed().contains(feature.name()) {
            defects.push(Defect::DefinedTwice);
        }
        let mut told = Explanation {
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
            Ok(definition) => self.defined(definition, &mut told, &mut defects),
            Err(error) => {
                defects.push(Defect::Unreadable(error.to_string()));
                Outcome::Off
            }
        };
        told.problems = defects.iter().map(ToString::to_string).collect();
        told.summary = words::summary(&told);
        (outcome, told)
    }

    fn defined(
        self,
        definition: wire::Definition<'_>,
        told: &mut Explanation,
        defects: &mut Vec<Defect>,
    ) -> Outcome {
        told.switched_on = definition.enabled.or_default().unwrap_or_else(|| {
            defects.push(Defect::Malformed(Part::Enabled));
            false
        });
        // Compiling the flag has put all that it reads in here, so that nothing is new to `bound`.
        let mut fields = self.fields.clone();
        let bound = fields.bind(fields.read(self.context));
        let mut table = Vec::new();
        let mut desk = Desk {
            compiler: Compiler {
                segments: self.document.segments(),
                fields: &mut fields,
                table: &mut table,
                defects,
                site: Site::first_of(&told.flag),
            },
            bound: &bound,
            context: self.context,
        };
        let stickiness = strategy::first_stickiness(&definition.variants);
        let (own, variants) = desk.variants(&definition.variants, &told.flag, stickiness);
        told.variants = variants;
        let mut chosen = Vec::new();
        let mut everybody = false;
        match &definition.strategies {
            Loose::Is(list) => {
                everybody = list.is_empty();
                for source in list {
                    let (index, strategy) = desk.strategy(source);
                    chosen.push(index);
                    told.strategies.push(strategy);
                }
            }
            Loose::Missing => desk.compiler.defects.push(Defect::NoStrategies),
            Loose::Malformed => {
                desk.compiler.defects.push(Defect::Malformed(Part::Strategies));
            }
        }
        self.parents(definition.dependencies, told, defects);

        let unsatisfied = told.parents.iter().position(|parent| !parent.satisfied);
        let matching = told.strategies.iter().position(|strategy| strategy.matches);
        let (decision, reached) = match (unsatisfied, matching) {
            _ if !told.switched_on => (Decision::Switch, 0),
            (Some(index), _) => (Decision::Parent { index }, 0),
            (None, Some(index)) => (Decision::Strategy { index }, index + 1),
            (None, None) if everybody => (Decision::Everybody, 0),
            (None, None) => (Decision::NoStrategy, told.strategies.len()),
        };
        told.decision = decision;
        for strategy in &mut told.strategies[..reached] {
            strategy.reached = true;
        }
        let outcome = match decision {
            Decision::Everybody => on(own, told.variants.as_mut()),
            Decision::Strategy { index } => {
                let strategy = &mut told.strategies[index];
                match chosen[index] {
                    Some(variant) => on(Some(variant), strategy.variants.as_mut()),
                    None => on(own, told.variants.as_mut()),
                }
            }
            Decision::Unreadable
            | Decision::Switch
            | Decision::Parent { .. }
            | Decision::NoStrategy => Outcome::Off,
        };
        told.enabled = outcome.is_on();
        if let Outcome::Variant(index) = outcome {
            let variant::Variant { name, payload } = &table[index as usize];
            let payload = payload.as_ref().map(|payload| Payload {
                kind: payload.kind.to_string(),
                value: payload.value.to_string(),
            });
            told.variant = Some(Variant { name: name.to_string(), payload });
        }
        outcome
    }

    fn parents(
        self,
        source: Loose<Vec<Loose<wire::Dependency<'_>>>>,
        told: &mut Explanation,
        defects: &mut Vec<Defect>,
    ) {
        let list = match source {
            Loose::Is(list) => list,
            Loose::Missing => Vec::new(),
            Loose::Malformed => vec![Loose::Malformed],
        };
        told.parents = list.into_iter().map(|source| self.parent(source, defects)).collect();
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
        let mut told = Parent {
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
                told.satisfied = dependency.admits(&self.flags[id.index()], outcome);
                told.why = words::parent(&dependency, &explanation, told.satisfied);
                told.explanation = Some(Box::new(explanation));
                return told;
            }
        };
        told.why = defect.to_string();
        defects.push(defect);
        told
    }

    /// Whether a flag depends on others itself.
    fn has_parents(self, id: FlagId) -> bool {
        self.document.features()[id.index()].definition().is_ok_and(|definition| {
            compile::dependencies(definition.dependencies).is_none_or(|asked| !asked.is_empty())
        })
    }
}

/// What a flag that is on comes to with one of these variants, if any.
fn on(index: Option<u32>, list: Option<&mut Variants>) -> Outcome {
    let Some(index) = index else { return Outcome::On };
    if let Some(list) = list {
        list.decides = true;
    }
    Outcome::Variant(index)
}

/// Where one flag's pieces are compiled, and asked at once.
struct Desk<'c, 'b, 'v> {
    compiler: Compiler<'c>,
    bound: &'b Bound<'v>,
    context: &'b Context<'v>,
}

impl Desk<'_, '_, '_> {
    /// One strategy, and the variant of its own that it gives.
    fn strategy(&mut self, source: &Loose<wire::Strategy<'_>>) -> (Option<u32>, Strategy) {
        let text = |text: &Loose<wire::Text<'_>>| text.clone().is().map(String::from);
        let mut told = Strategy {
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
            told.name = text(&strategy.name).unwrap_or_default();
            told.title = text(&strategy.title).filter(|title| !title.is_empty());
            told.disabled = strategy.disabled.is().unwrap_or_default();
        }
        let Some(Parts { strategy, name, parameters }) = Parts::read(source) else {
            told.why = self.complain(Defect::Malformed(Part::Strategy));
            return (None, told);
        };
        let mut obstacles = Vec::new();
        match self.constraints(&strategy.constraints, Part::Strategy) {
            Ok(constraints) => told.constraints = constraints,
            Err(problem) => obstacles.push(problem),
        }
        let failing = told.constraints.iter().filter(|constraint| !constraint.holds);
        obstacles.extend(failing.map(|it| format!("the constraint fails: {}", it.why)));
        match &strategy.segments {
            Loose::Is(ids) => told.segments = ids.iter().map(|id| self.segment(*id)).collect(),
            Loose::Missing => {}
            Loose::Malformed => obstacles.push(self.complain(Defect::Malformed(Part::Strategy))),
        }
        let failing = told.segments.iter().filter(|segment| !segment.holds);
        obstacles.extend(failing.map(|segment| segment.why.clone()));
        let rule = self.rule(name, parameters);
        if !rule.holds {
            obstacles.push(rule.why.clone());
        }
        told.matches = obstacles.is_empty();
        told.why = match obstacles.first() {
            None => format!("matches: {}", rule.why),
            Some(first) => format!("does not match: {first}"),
        };
        told.rule = Some(rule);
        let group = strategy::variant_group(parameters);
        let stickiness = strategy::variant_stickiness(strategy, parameters);
        let (chosen, variants) = self.variants(&strategy.variants, group, stickiness);
        told.variants = variants;
        (chosen, told)
    }

    /// Notes a defect and tells it.
    fn complain(&mut self, defect: Defect) -> String {
        let told = defect.to_string();
        self.compiler.defects.push(defect);
        told
    }

    /// What was noted since there were `before` defects, if anything.
    fn complaints(&self, before: usize) -> Option<String> {
        let defects = &self.compiler.defects[before..];
        let told: Vec<String> = defects.iter().map(ToString::to_string).collect();
        (!told.is_empty()).then(|| told.join("; "))
    }

    /// A list of constraints, or why there is none although there should be.
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
        let Compiler { fields, defects, .. } = &mut self.compiler;
        let compiled = constraint::Constraint::compile(source, fields, defects);
        let problem = self.complaints(before);
        let mut told = Constraint {
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
            told.field = text(&source.context_name).unwrap_or_default();
            told.operator = text(&source.operator).unwrap_or_default();
            told.values = match &source.values {
                Loose::Is(list) if constraint::takes_list(&told.operator) => {
                    list.iter().filter_map(text).collect()
                }
                _ => text(&source.value).into_iter().collect(),
            };
            told.inverted = source.inverted.is().unwrap_or_default();
            told.case_insensitive = source.case_insensitive.is().unwrap_or_default();
            told.context_value = if constraint::is_of_time(&told.operator) {
                Some(self.time())
            } else {
                value_of(self.context, &told.field)
            };
        }
        let is_made_up = self.context.session_is_made_up
            && told.field == FieldId::SESSION_ID_NAME
            && !constraint::is_of_time(&told.operator);
        told.why = words::constraint(&told, &compiled, problem, is_made_up);
        told
    }

    /// The time that dates are compared with, as the context says it.
    fn time(&self) -> String {
        match self.bound.text(FieldId::CURRENT_TIME) {
            None | Some("") => self.context.now.to_string(),
            Some(time) => time.to_owned(),
        }
    }

    fn segment(&mut self, id: Loose<i64>) -> Segment {
        let mut told = Segment {
            id: id.is(),
            name: None,
            missing: false,
            constraints: Vec::new(),
            holds: false,
            why: String::new(),
        };
        let Loose::Is(id) = id else {
            told.why = self.complain(Defect::Malformed(Part::Strategy));
            return told;
        };
        let Some(segment) = self.compiler.segment(id) else {
            told.missing = true;
            told.why = self.complain(Defect::MissingSegment(id));
            return told;
        };
        told.name = segment.name().map(String::from);
        match self.constraints(&segment.constraints(), Part::Segment) {
            Ok(constraints) => told.constraints = constraints,
            Err(problem) => {
                told.why = problem;
                return told;
            }
        }
        let called = match &told.name {
            Some(name) => format!("segment {id} ({})", quoted(name)),
            None => format!("segment {id}"),
        };
        let failing = told.constraints.iter().find(|constraint| !constraint.holds);
        told.why = match failing {
            None => format!("{called} holds"),
            Some(constraint) => format!("{called} fails: {}", constraint.why),
        };
        told.holds = failing.is_none();
        told
    }

    fn rule(&mut self, name: &str, parameters: &Parameters<'_>) -> Rule {
        let before = self.compiler.defects.len();
        let terms = self.compiler.terms(name, parameters);
        let told = |(name, value): (&str, Option<&str>)| Parameter {
            name: name.to_owned(),
            value: value.map(str::to_owned),
        };
        let mut told = Rule {
            parameters: parameters.iter().map(told).collect(),
            percentage: None,
            placement: None,
            holds: false,
            why: String::new(),
        };
        let Some(Terms { rule, group }) = terms else {
            told.why = self
                .complaints(before)
                .unwrap_or_else(|| "its parameters name nobody, or cannot be read".to_owned());
            return told;
        };
        told.holds = rule.holds(self.bound);
        let holds = told.holds;
        told.why = match &rule {
            strategy::Rule::Always => "it is for everybody".to_owned(),
            strategy::Rule::Known(field) => {
                let field = quoted(self.name(*field));
                let there = if holds { "has" } else { "lacks" };
                format!("it is for everybody with {field}, which the context {there}")
            }
            strategy::Rule::Rollout(rollout) => {
                let stickiness = rollout.stickiness;
                let bucket = rollout.bucket(self.bound);
                let placement = self.placement(stickiness, group, bucket, 100);
                let why = words::share(&placement, rollout.percent, holds);
                told.placement = Some(placement);
                told.percentage = Some(rollout.percent);
                why
            }
            strategy::Rule::Lottery { percent, site } => {
                let bucket = Some(strategy::lot(self.bound, *site));
                let placement = self.placement(Stickiness::FirstOf(&[]), None, bucket, 100);
                let why = words::share(&placement, *percent, holds);
                told.placement = Some(placement);
                told.percentage = Some(*percent);
                why
            }
            strategy::Rule::Users(_) => self.listed(FieldId::USER_ID, holds),
            strategy::Rule::Addresses { .. } => self.listed(FieldId::REMOTE_ADDRESS, holds),
            strategy::Rule::Hosts(_) => match self.bound.hostname() {
                Some(name) => {
                    format!("the host {} is {}", quoted(name), in_list(holds))
                }
                None => "the name of the host is not known".to_owned(),
            },
        };
        told
    }

    fn listed(&self, field: FieldId, holds: bool) -> String {
        match self.bound.text(field) {
            Some(value) => {
                format!("{} {} is {}", quoted(self.name(field)), quoted(value), in_list(holds))
            }
            None => format!("the context lacks {}", quoted(self.name(field))),
        }
    }

    /// A list of variants, and the index into the flag's table of the one that it gives.
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
        let given = name.as_deref().map(quoted).unwrap_or_default();
        let (choice, placement, why) = match &choice {
            variant::Choice::Nobody => {
                (Choice::Nobody, None, "no variant has a weight, so nobody gets any".to_owned())
            }
            variant::Choice::Everybody(_) => {
                let why = format!("{given} is the only one with a weight, so everybody gets it");
                (Choice::Everybody, None, why)
            }
            variant::Choice::Lots(lots) => {
                if let Some((field, _)) = lots.overriding(self.bound) {
                    let value = self.bound.text(field).unwrap_or_default();
                    let field = quoted(self.name(field));
                    let why = format!("{given} is reserved for {field} {}", quoted(value));
                    (Choice::Override, None, why)
                } else {
                    let bucket = Some(lots.bucket(self.bound));
                    let placement =
                        self.placement(lots.stickiness, Some(group), bucket, lots.buckets());
                    let why = format!("{}, which is {given}'s", words::placement(&placement));
                    (Choice::Bucket, Some(placement), why)
                }
            }
        };
        let told = Variants { shares, chosen: name, choice, placement, decides: false, why };
        (chosen, Some(told))
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

/// What a context says of a field that no flag may have asked for.
fn value_of(context: &Context<'_>, name: &str) -> Option<String> {
    let mut fields = Fields::new();
    let field = fields.intern(name);
    fields.read(context).text(field).map(str::to_owned)
}

#[cfg(test)]
mod tests;
