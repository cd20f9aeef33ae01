//! The data of an explanation: the outcome of one flag for one context, and the result of every part of
//! the flag's definition.
//!
//! These types are serialized as JSON in camel case, for people and programs; the format is Parapet's
//! own. Each part has its facts as fields and as a sentence (`why`). The types contain no logic;
//! `explain` fills them in.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The outcome of a flag for a context, with the reasons.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// The flag's name.
    pub flag: String,
    /// The project that owns the flag.
    pub project: String,
    /// Whether the flag is on for the context.
    pub enabled: bool,
    /// The flag's variant for the context; none stands for the variant `disabled`.
    pub variant: Option<Variant>,
    /// The outcome and its reason in a sentence.
    pub summary: String,
    /// The reason that the flag is on or off.
    pub decision: Decision,
    /// Whether the flag is enabled in this environment. If not, it is off for every context.
    pub switched_on: bool,
    /// The flags that it depends on. All have to be satisfied.
    pub parents: Vec<Parent>,
    /// The strategies in their order. The first that matches decides.
    pub strategies: Vec<Strategy>,
    /// The flag's own variants; none if it has no list of them. They are used if the deciding strategy
    /// does not select a variant.
    pub variants: Option<Variants>,
    /// The problems of the flag's definition as text.
    pub problems: Vec<String>,
}

/// The reason that a flag is on or off.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(tag = "by", rename_all = "camelCase")]
pub enum Decision {
    /// Its definition cannot be read: off.
    Unreadable,
    /// It is disabled in this environment: off.
    Switch,
    /// A parent is not satisfied: off.
    Parent {
        /// The index of the parent, from 0.
        index: usize,
    },
    /// It has no strategies: on for everyone.
    Everybody,
    /// A strategy matches: on.
    Strategy {
        /// The index of the strategy, from 0.
        index: usize,
    },
    /// No strategy matches: off.
    NoStrategy,
}

/// The variant of a flag.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[schemars(rename = "ExplainedVariant")]
pub struct Variant {
    /// Its name.
    pub name: String,
    /// Its payload for the application.
    pub payload: Option<Payload>,
}

/// The payload of a variant.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[schemars(rename = "ExplainedPayload")]
pub struct Payload {
    /// `string`, `json`, `csv` or `number`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The payload, always as text.
    pub value: String,
}

/// A flag that the explained one depends on.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "ExplainedParent")]
pub struct Parent {
    /// The name of the parent; empty if the dependency is malformed.
    pub flag: String,
    /// Whether the parent has to be on (true) or off (false).
    pub wanted: bool,
    /// Unless empty, the parent has to be on with one of these variants.
    pub wanted_variants: Vec<String>,
    /// Whether the parent's outcome satisfies the dependency.
    pub satisfied: bool,
    /// The required and the actual outcome in a sentence.
    pub why: String,
    /// The parent's explanation; none if it is missing or has parents itself. Such a dependency is never
    /// satisfied.
    pub explanation: Option<Box<Explanation>>,
}

/// A strategy. It matches if its rule, its constraints and its segments all hold.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "ExplainedStrategy")]
pub struct Strategy {
    /// Its kind, for instance `flexibleRollout`; empty if it is malformed.
    pub name: String,
    /// Its title.
    pub title: Option<String>,
    /// Whether it is marked as disabled. Unleash does not send disabled strategies. SDKs ignore the
    /// mark, and so does this engine.
    pub disabled: bool,
    /// The rule of its kind; none if the strategy is malformed.
    pub rule: Option<Rule>,
    /// Its own constraints.
    pub constraints: Vec<Constraint>,
    /// The segments that it refers to.
    pub segments: Vec<Segment>,
    /// Whether it matches the context.
    pub matches: bool,
    /// Whether evaluation reached it: the flag is enabled, its parents are satisfied, and no earlier
    /// strategy matches. The strategy that is reached and matches decides.
    pub reached: bool,
    /// Whether it matches, with the reason, in a sentence.
    pub why: String,
    /// Its own variants; none if it has no list of them.
    pub variants: Option<Variants>,
}

/// The condition of a kind of strategy besides its constraints.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "ExplainedRule")]
pub struct Rule {
    /// The strategy's parameters in their order, as written.
    pub parameters: Vec<Parameter>,
    /// The number of included buckets, of 100; for rollouts only.
    pub percentage: Option<u32>,
    /// The bucket of the context; for rollouts only.
    pub placement: Option<BucketAssignment>,
    /// Whether the rule holds.
    pub holds: bool,
    /// The result and its reason in a sentence.
    pub why: String,
}

/// One parameter of a strategy.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[schemars(rename = "ExplainedParameter")]
pub struct Parameter {
    /// Its name.
    pub name: String,
    /// Its value; none if it is not a text.
    pub value: Option<String>,
}

/// The bucket of a context, and how it is computed.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "ExplainedPlacement")]
pub struct BucketAssignment {
    /// The stickiness: a context field, `random`, or `default` for the first of some fields that the
    /// context has.
    pub stickiness: String,
    /// The field that is hashed; none if no such field has a value.
    pub field: Option<String>,
    /// The value of that field.
    pub value: Option<String>,
    /// Whether the bucket is random, so that another evaluation may have a different one: it was drawn,
    /// or the context lacks a `sessionId` and one was generated.
    pub drawn: bool,
    /// The group that the value is hashed with; none if the bucket is always random.
    pub group: Option<String>,
    /// The bucket, from 1; none if the required field has no value.
    pub bucket: Option<u32>,
    /// The number of buckets: 100, or the sum of the weights of variants.
    pub buckets: u32,
}

/// A condition on one context field.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "ExplainedConstraint")]
pub struct Constraint {
    /// The context field; empty if it is malformed.
    pub field: String,
    /// The operator, for instance `STR_CONTAINS`; empty if it is malformed.
    pub operator: String,
    /// The operands, as written.
    pub values: Vec<String>,
    /// Whether the result is negated.
    pub inverted: bool,
    /// Whether comparing texts ignores case.
    pub case_insensitive: bool,
    /// The value of the field in the context; the time for operators that compare dates.
    pub context_value: Option<String>,
    /// Whether it holds.
    pub holds: bool,
    /// The result in a sentence, with the reason if it can never hold.
    pub why: String,
}

/// A reusable list of constraints, all of which have to hold.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "ExplainedSegment")]
pub struct Segment {
    /// Its id; none if the reference to it is malformed.
    pub id: Option<i64>,
    /// Its name.
    pub name: Option<String>,
    /// Whether the segment is missing, so that the strategy never matches.
    pub missing: bool,
    /// Its constraints.
    pub constraints: Vec<Constraint>,
    /// Whether all of them hold.
    pub holds: bool,
    /// The result and its reason in a sentence.
    pub why: String,
}

/// A list of variants, and the one that is selected for the context.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "ExplainedVariants")]
pub struct Variants {
    /// The variants in their order.
    pub shares: Vec<VariantShare>,
    /// The name of the variant that is selected for the context, if any.
    pub chosen: Option<String>,
    /// The reason of the selection.
    pub choice: SelectionReason,
    /// The bucket of the context; none if the selection does not need one.
    pub placement: Option<BucketAssignment>,
    /// Whether the flag's variant is the selected one of this list.
    pub decides: bool,
    /// The selection and its reason in a sentence.
    pub why: String,
}

/// The share of one variant of a list.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "ExplainedShare")]
pub struct VariantShare {
    /// The variant's name.
    pub name: String,
    /// The number of its buckets.
    pub weight: u32,
    /// The first of its buckets. The next variant's buckets begin after its last.
    pub first_bucket: u32,
}

/// The reason for which a variant is selected.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "ExplainedChoice")]
pub enum SelectionReason {
    /// No variant of the list has a weight, so none is selected.
    Nobody,
    /// Only one variant has a weight and there are no overrides, so it is always selected.
    Everybody,
    /// An override reserves the variant for this context.
    Override,
    /// The bucket of the context belongs to the variant.
    Bucket,
}
