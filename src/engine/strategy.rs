//! Activation strategies, which decide for which contexts a flag is on.
//!
//! A strategy matches if its constraints, those of its segments and the rule of its kind are all
//! satisfied. Compilation drops strategies that can never match and constraints that always match.

use ipnet::IpNet;

use super::bucket::{self, DrawId, HashPrefix, ROLLOUT_SEED};
use super::constraint::{CompiledConstraint, Constraint};
use super::context::{BoundContext, ContextSchema, FieldId, ParsedSlot, StringSet};
use super::inputs::EvaluationInputs;
use super::parse;
use super::problem::{Defect, DefinitionPart};
use super::variant::{self, Stickiness, Variant, VariantSelection};
use crate::protocol::features::{self as wire, Parameters};
use crate::protocol::lenient::Lenient;

/// A strategy that can match.
#[derive(Debug, Clone)]
pub(super) struct Strategy {
    constraints: Box<[Constraint]>,
    rule: Rule,
    variants: VariantSelection,
}

/// The condition of a kind of strategy besides its constraints.
#[derive(Debug, Clone)]
pub(super) enum Rule {
    Always,
    /// The field is present and not empty: a rollout of 100 %.
    FieldPresent(FieldId),
    Rollout(Rollout),
    RandomRollout {
        percent: u32,
        site: DrawId,
    },
    UserIds(StringSet),
    RemoteAddresses {
        texts: StringSet,
        slot: ParsedSlot,
        ranges: Box<[IpNet]>,
    },
    Hostnames(Box<[Box<str>]>),
}

/// A percentage of the contexts that have an identifier. With [`Stickiness::FirstOf`] a context without
/// one is placed at random.
#[derive(Debug, Clone)]
pub(super) struct Rollout {
    pub(super) stickiness: Stickiness,
    prefix: HashPrefix,
    /// The number of included buckets, of 100.
    pub(super) percent: u32,
    draw_id: DrawId,
}

/// The rule of a strategy, parsed from its kind and parameters.
#[derive(Debug)]
pub(super) struct ParsedRule<'p> {
    /// The rule as it is written. It may be one that is always or never satisfied.
    pub(super) rule: Rule,
    /// The group id of a rollout, which is hashed with identifiers.
    pub(super) group: Option<&'p str>,
}

/// The default stickiness of rollouts. A context without any of these is placed at random.
const DEFAULT_STICKINESS: &[FieldId] = &[FieldId::USER_ID, FieldId::SESSION_ID];

/// Compiles the strategies and variants of one flag.
#[derive(Debug)]
pub(super) struct StrategyCompiler<'c> {
    pub(super) segments: &'c [wire::Segment],
    pub(super) schema: &'c mut ContextSchema,
    pub(super) variants: &'c mut Vec<Variant>,
    pub(super) defects: &'c mut Vec<Defect>,
    /// The id of the flag's next random draw.
    pub(super) next_draw_id: DrawId,
}

impl<'c> StrategyCompiler<'c> {
    /// Compiles a strategy; `None` if it can never match.
    pub(super) fn compile_strategy(
        &mut self,
        source: &Lenient<wire::Strategy<'_>>,
    ) -> Option<Strategy> {
        let Some(ParsedStrategy { strategy, name, parameters }) = ParsedStrategy::parse(source)
        else {
            self.defects.push(Defect::Malformed(DefinitionPart::Strategy));
            return None;
        };
        // Compiles everything before returning, so that every defect is reported.
        let constraints = self.compile_constraints(strategy);
        let rule = self.parse_rule(name, parameters).and_then(|it| it.rule.simplify());
        let variants = self.compile_strategy_variants(strategy, parameters);
        Some(Strategy { constraints: constraints?, rule: rule?, variants })
    }

    /// Compiles a list of variants of this flag.
    pub(super) fn compile_variants(
        &mut self,
        source: &Lenient<Vec<Lenient<wire::Variant<'_>>>>,
        group: &str,
        stickiness: Option<&str>,
    ) -> VariantSelection {
        let source = match source {
            Lenient::Valid(list) => &list[..],
            Lenient::Missing => &[],
            Lenient::Malformed => &[Lenient::Malformed],
        };
        let draw_id = self.next_draw_id.take_next();
        variant::compile(
            source,
            group,
            stickiness,
            draw_id,
            self.variants,
            self.schema,
            self.defects,
        )
    }

    /// The constraints with those of the segments, cheap ones first; `None` if they are never satisfied.
    fn compile_constraints(&mut self, strategy: &wire::Strategy<'_>) -> Option<Box<[Constraint]>> {
        let mut tests = Some(Vec::new());
        self.add_constraints(&strategy.constraints, DefinitionPart::Strategy, &mut tests);
        match &strategy.segments {
            Lenient::Valid(ids) => {
                for id in ids {
                    let Lenient::Valid(id) = id else {
                        self.defects.push(Defect::Malformed(DefinitionPart::Strategy));
                        tests = None;
                        continue;
                    };
                    if let Some(segment) = self.find_segment(*id) {
                        self.add_constraints(
                            &segment.constraints(),
                            DefinitionPart::Segment,
                            &mut tests,
                        );
                    } else {
                        self.defects.push(Defect::MissingSegment(*id));
                        tests = None;
                    }
                }
            }
            Lenient::Missing => {}
            Lenient::Malformed => {
                self.defects.push(Defect::Malformed(DefinitionPart::Strategy));
                tests = None;
            }
        }
        let mut tests = tests?;
        tests.sort_by_key(Constraint::cost);
        Some(tests.into())
    }

    /// The segment with this id.
    pub(super) fn find_segment(&self, id: i64) -> Option<&'c wire::Segment> {
        let at = self.segments.binary_search_by_key(&id, wire::Segment::id).ok()?;
        Some(&self.segments[at])
    }

    fn add_constraints(
        &mut self,
        source: &Lenient<Vec<Lenient<wire::Constraint<'_>>>>,
        part: DefinitionPart,
        tests: &mut Option<Vec<Constraint>>,
    ) {
        match source {
            Lenient::Valid(list) => {
                for constraint in list {
                    match Constraint::compile(constraint, self.schema, self.defects) {
                        CompiledConstraint::Always => {}
                        CompiledConstraint::Never => *tests = None,
                        CompiledConstraint::Test(test) => {
                            if let Some(tests) = tests {
                                tests.push(test);
                            }
                        }
                    }
                }
            }
            Lenient::Missing => {}
            Lenient::Malformed => {
                self.defects.push(Defect::Malformed(part));
                *tests = None;
            }
        }
    }

    /// Parses the rule of a strategy; `None` if its parameters are invalid or can never match.
    pub(super) fn parse_rule<'p>(
        &mut self,
        name: &str,
        parameters: &'p Parameters<'_>,
    ) -> Option<ParsedRule<'p>> {
        let text = |name| parameters.get(name).or_default();
        let rule = match name {
            "default" => Rule::Always,
            "flexibleRollout" => {
                let percent = self.percent(parameters, "rollout")?;
                // The Node SDK and Unleash itself do not fall back to the flag's name.
                let group = parameters.get("groupId").valid().unwrap_or_default();
                let stickiness = match text("stickiness")? {
                    "" | "default" => Stickiness::FirstOf(DEFAULT_STICKINESS),
                    "random" => Stickiness::FirstOf(&[]),
                    field => Stickiness::Field(self.schema.intern_field(field)),
                };
                return Some(self.rollout(stickiness, group, percent));
            }
            "gradualRolloutUserId" => return self.gradual_rollout(parameters, FieldId::USER_ID),
            "gradualRolloutSessionId" => {
                return self.gradual_rollout(parameters, FieldId::SESSION_ID);
            }
            "gradualRolloutRandom" => {
                let percent = self.percent(parameters, "percentage")?;
                Rule::RandomRollout { percent, site: self.next_draw_id.take_next() }
            }
            "userWithId" => {
                let users = text("userIds")?;
                let users = (!users.is_empty()).then(|| parse::split_at_commas(users));
                Rule::UserIds(StringSet::new(self.schema, users.into_iter().flatten()))
            }
            "remoteAddress" => {
                let addresses = text("IPs")?;
                if addresses.is_empty() {
                    return None;
                }
                // Equal texts match as in the Node SDK, networks of IPv4 and IPv6 as in Unleash Edge.
                let networks = addresses.split(',').map(str::trim).filter_map(parse::network);
                Rule::RemoteAddresses {
                    ranges: networks.collect(),
                    texts: StringSet::new(self.schema, parse::split_at_commas(addresses)),
                    slot: self.schema.address_slot(FieldId::REMOTE_ADDRESS),
                }
            }
            "applicationHostname" => {
                let hosts = text("hostNames")?.to_lowercase();
                if hosts.is_empty() {
                    return None;
                }
                Rule::Hostnames(parse::split_at_commas(&hosts).map(Box::from).collect())
            }
            unknown => {
                self.defects.push(Defect::UnknownStrategy(unknown.to_owned()));
                return None;
            }
        };
        Some(ParsedRule { rule, group: None })
    }

    /// The older rollouts that `flexibleRollout` replaced. Their group is empty by default.
    fn gradual_rollout<'p>(
        &mut self,
        parameters: &'p Parameters<'_>,
        field: FieldId,
    ) -> Option<ParsedRule<'p>> {
        let percent = self.percent(parameters, "percentage")?;
        let group = parameters.get("groupId").or_default()?;
        Some(self.rollout(Stickiness::Field(field), group, percent))
    }

    fn rollout<'p>(
        &mut self,
        stickiness: Stickiness,
        group: &'p str,
        percent: u32,
    ) -> ParsedRule<'p> {
        let prefix = HashPrefix::new(group, ROLLOUT_SEED);
        let rollout =
            Rollout { stickiness, prefix, percent, draw_id: self.next_draw_id.take_next() };
        ParsedRule { rule: Rule::Rollout(rollout), group: Some(group) }
    }

    /// A percentage as a number of buckets, of 100.
    fn percent(&mut self, parameters: &Parameters<'_>, name: &str) -> Option<u32> {
        let text = parameters.get(name).valid();
        let Some(percent) = text.and_then(parse::number) else {
            self.defects.push(Defect::InvalidPercentage(text.unwrap_or_default().to_owned()));
            return None;
        };
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 100")]
        let buckets = percent.clamp(0.0, 100.0) as u32;
        Some(buckets)
    }

    /// Compiles the strategy's own variants.
    fn compile_strategy_variants(
        &mut self,
        strategy: &wire::Strategy<'_>,
        parameters: &Parameters<'_>,
    ) -> VariantSelection {
        let stickiness = variant_stickiness(strategy, parameters);
        self.compile_variants(&strategy.variants, variant_group(parameters), stickiness)
    }
}

/// A strategy with its name and parameters.
pub(super) struct ParsedStrategy<'s, 'a> {
    pub(super) strategy: &'s wire::Strategy<'a>,
    pub(super) name: &'s str,
    pub(super) parameters: &'s Parameters<'a>,
}

impl<'s, 'a> ParsedStrategy<'s, 'a> {
    /// The strategy, if name and parameters are well-formed.
    pub(super) fn parse(source: &'s Lenient<wire::Strategy<'a>>) -> Option<Self> {
        let Lenient::Valid(strategy) = source else {
            return None;
        };
        let Lenient::Valid(name) = &strategy.name else {
            return None;
        };
        let parameters = match &strategy.parameters {
            Lenient::Valid(parameters) => parameters,
            Lenient::Missing => Parameters::EMPTY,
            Lenient::Malformed => return None,
        };
        Some(Self { strategy, name, parameters })
    }
}

/// The stickiness of a list of variants is that of the first.
pub(super) fn first_stickiness<'v>(
    variants: &'v Lenient<Vec<Lenient<wire::Variant<'_>>>>,
) -> Option<&'v str> {
    let Lenient::Valid(variants) = variants else {
        return None;
    };
    match variants.first()? {
        Lenient::Valid(wire::Variant { stickiness: Lenient::Valid(stickiness), .. }) => {
            Some(stickiness)
        }
        Lenient::Valid(_) | Lenient::Missing | Lenient::Malformed => None,
    }
}

/// The group that is hashed with identifiers for a strategy's variants.
///
/// Without a group the Node SDK, and with it Unleash, hashes JavaScript's `undefined` as text.
pub(super) fn variant_group<'p>(parameters: &'p Parameters<'_>) -> &'p str {
    parameters.get("groupId").valid().unwrap_or("undefined")
}

/// The stickiness of a strategy's variants: that of the first variant, else that of the strategy.
pub(super) fn variant_stickiness<'p>(
    strategy: &'p wire::Strategy<'_>,
    parameters: &'p Parameters<'_>,
) -> Option<&'p str> {
    let own = first_stickiness(&strategy.variants).filter(|field| !field.is_empty());
    own.or(parameters.get("stickiness").valid())
}

impl Strategy {
    /// A strategy that matches every context, for a flag with an empty list of strategies.
    pub(super) fn unconditional() -> Self {
        Self { constraints: Box::default(), rule: Rule::Always, variants: VariantSelection::None }
    }

    /// Whether it matches every context.
    pub(super) fn is_unconditional(&self) -> bool {
        self.constraints.is_empty() && matches!(self.rule, Rule::Always)
    }

    /// Whether a bucket decides the match or the variant.
    pub(super) fn is_bucketed(&self) -> bool {
        matches!(self.rule, Rule::Rollout(_) | Rule::RandomRollout { .. })
            || self.variants.is_bucketed()
    }

    /// The selection among its own variants.
    pub(super) fn variants(&self) -> &VariantSelection {
        &self.variants
    }

    /// Whether it matches this context.
    pub(super) fn matches(&self, bound: &BoundContext<'_>) -> bool {
        self.constraints.iter().all(|constraint| constraint.is_satisfied(bound))
            && self.rule.is_satisfied(bound)
    }

    /// Adds everything that it depends on to `inputs`.
    pub(super) fn collect_inputs(&self, inputs: &mut EvaluationInputs) {
        for constraint in &self.constraints {
            constraint.collect_inputs(inputs);
        }
        self.rule.collect_inputs(inputs);
        self.variants.collect_inputs(inputs);
    }
}

impl Rule {
    /// The simplest equivalent rule; `None` if it is never satisfied.
    fn simplify(self) -> Option<Self> {
        match self {
            Self::Rollout(Rollout { percent: 0, .. }) | Self::RandomRollout { percent: 0, .. } => {
                None
            }
            Self::RandomRollout { percent: 100, .. } => Some(Self::Always),
            Self::Rollout(Rollout { percent: 100, stickiness, .. }) => Some(match stickiness {
                Stickiness::FirstOf(_) => Self::Always,
                Stickiness::Field(field) => Self::FieldPresent(field),
            }),
            Self::UserIds(users) if users.is_empty() => None,
            rule => Some(rule),
        }
    }

    /// Whether the context satisfies the rule.
    pub(super) fn is_satisfied(&self, bound: &BoundContext<'_>) -> bool {
        match self {
            Self::Always => true,
            Self::FieldPresent(field) => bound.text(*field).is_some_and(|text| !text.is_empty()),
            Self::Rollout(rollout) => rollout.is_satisfied(bound),
            Self::RandomRollout { percent, site } => random_percent(bound, *site) <= *percent,
            Self::UserIds(users) => users.contains(bound.interned(FieldId::USER_ID)),
            Self::RemoteAddresses { texts, slot, ranges } => {
                texts.contains(bound.interned(FieldId::REMOTE_ADDRESS))
                    || bound
                        .address(*slot)
                        .is_some_and(|address| ranges.iter().any(|it| it.contains(&address)))
            }
            Self::Hostnames(hosts) => bound
                .hostname()
                .is_some_and(|name| hosts.iter().any(|host| host.eq_ignore_ascii_case(name))),
        }
    }

    fn collect_inputs(&self, inputs: &mut EvaluationInputs) {
        match self {
            // The hostname does not change, so it is not part of cache keys.
            Self::Always | Self::Hostnames(_) => {}
            Self::FieldPresent(field) => inputs.add_presence(*field),
            Self::Rollout(rollout) => match rollout.stickiness {
                Stickiness::FirstOf(fields) => {
                    inputs.add_first_of(fields);
                    inputs.add_random_source(fields);
                }
                Stickiness::Field(field) => inputs.add_text(field),
            },
            Self::RandomRollout { .. } => inputs.add_random_source(&[]),
            Self::UserIds(_) => inputs.add_membership(FieldId::USER_ID),
            Self::RemoteAddresses { .. } => inputs.add_text(FieldId::REMOTE_ADDRESS),
        }
    }
}

impl Rollout {
    fn is_satisfied(&self, bound: &BoundContext<'_>) -> bool {
        self.bucket(bound).is_some_and(|bucket| bucket <= self.percent)
    }

    /// The bucket of the context, 1 to 100; `None` if the stickiness field is missing.
    pub(super) fn bucket(&self, bound: &BoundContext<'_>) -> Option<u32> {
        match (self.stickiness.identifier(bound), self.stickiness) {
            (Some(identifier), _) => Some(self.prefix.bucket(identifier, 100)),
            (None, Stickiness::FirstOf(_)) => Some(random_percent(bound, self.draw_id)),
            (None, Stickiness::Field(_)) => None,
        }
    }
}

/// A random number from 1 to 100 for this context.
pub(super) fn random_percent(bound: &BoundContext<'_>, draw_id: DrawId) -> u32 {
    bucket::random_bucket(bound.random_seed(), draw_id, 100)
}
