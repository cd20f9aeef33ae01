//! What an explanation tells: the verdict on one flag for one context, and every piece of the flag's
//! definition with what it came to.
//!
//! These types are data for people and programs, as JSON in camel case; this shape is Parapet's own.
//! Each piece has its facts, and the same in a sentence (`why`). They decide nothing; `explain` fills
//! them in.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Why a flag came out as it did.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// The flag's name.
    pub flag: String,
    /// The project that owns it.
    pub project: String,
    /// Whether it is on for the context.
    pub enabled: bool,
    /// Its variant for the context; none stands for the variant `disabled`.
    pub variant: Option<Variant>,
    /// The verdict and what decided it, in a sentence.
    pub summary: String,
    /// What decided whether it is on.
    pub decision: Decision,
    /// Whether it is switched on in this environment; off wins over everything else.
    pub switched_on: bool,
    /// The flags that it depends on, all of which have to be as it wants.
    pub parents: Vec<Parent>,
    /// Its strategies in their order; the first that matches decides.
    pub strategies: Vec<Strategy>,
    /// The flag's own variants, which count where the deciding strategy has none for the context;
    /// none where it has no list of them.
    pub variants: Option<Variants>,
    /// Everything that is wrong with its definition, in words.
    pub problems: Vec<String>,
}

/// What decided whether a flag is on.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(tag = "by", rename_all = "camelCase")]
pub enum Decision {
    /// Its definition cannot be read: off.
    Unreadable,
    /// It is switched off.
    Switch,
    /// A parent is not as the flag wants it: off.
    Parent {
        /// Its place among the parents, from 0.
        index: usize,
    },
    /// It has no strategies: on for everybody.
    Everybody,
    /// A strategy matches: on.
    Strategy {
        /// Its place among the strategies, from 0.
        index: usize,
    },
    /// No strategy matches: off.
    NoStrategy,
}

/// The value that a flag takes.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[schemars(rename = "ExplainedVariant")]
pub struct Variant {
    /// Its name.
    pub name: String,
    /// What it carries to the application.
    pub payload: Option<Payload>,
}

/// What a variant carries.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[schemars(rename = "ExplainedPayload")]
pub struct Payload {
    /// `string`, `json`, `csv` or `number`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The payload, always as text.
    pub value: String,
}

/// A flag that another one depends on.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "ExplainedParent")]
pub struct Parent {
    /// Its name; empty where the dependency cannot be read.
    pub flag: String,
    /// Whether it has to be on, or off.
    pub wanted: bool,
    /// If any are named, it has to be on with one of these variants.
    pub wanted_variants: Vec<String>,
    /// Whether it is as wanted.
    pub satisfied: bool,
    /// The same in a sentence.
    pub why: String,
    /// How it came out; none where it is missing or has parents itself, which never satisfies.
    pub explanation: Option<Box<Explanation>>,
}

/// One strategy: it matches where its rule, its constraints and its segments all hold.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "ExplainedStrategy")]
pub struct Strategy {
    /// Its kind, for instance `flexibleRollout`; empty where it cannot be read.
    pub name: String,
    /// What its author calls it.
    pub title: Option<String>,
    /// Whether it is marked as disabled. Unleash sends no such strategies; SDKs, and so this
    /// engine, do not heed the mark on those that they find.
    pub disabled: bool,
    /// What its kind asks; none where the strategy cannot be read.
    pub rule: Option<Rule>,
    /// Its own constraints.
    pub constraints: Vec<Constraint>,
    /// The segments that it refers to.
    pub segments: Vec<Segment>,
    /// Whether it matches the context.
    pub matches: bool,
    /// Whether evaluation came to it: the flag is switched on, its parents are satisfied, and no
    /// strategy before it matches. The one that is reached and matches is the one that decided.
    pub reached: bool,
    /// Whether it matches, and why, in a sentence.
    pub why: String,
    /// Its own variants; none where it has no list of them.
    pub variants: Option<Variants>,
}

/// What a kind of strategy asks beyond constraints.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "ExplainedRule")]
pub struct Rule {
    /// The strategy's parameters in their order, as written.
    pub parameters: Vec<Parameter>,
    /// How many of 100 buckets are in; only of rollouts.
    pub percentage: Option<u32>,
    /// Where the context falls; only of rollouts.
    pub placement: Option<Placement>,
    /// Whether the rule holds.
    pub holds: bool,
    /// The same in a sentence.
    pub why: String,
}

/// One parameter of a strategy.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[schemars(rename = "ExplainedParameter")]
pub struct Parameter {
    /// Its name.
    pub name: String,
    /// Its value; none where it is no text.
    pub value: Option<String>,
}

/// Where a context falls among numbered buckets.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "ExplainedPlacement")]
pub struct Placement {
    /// What it is placed by: a context field, `random`, or `default` for the first of some fields
    /// that the context has.
    pub stickiness: String,
    /// The field that placed it; none where no such field has a value.
    pub field: Option<String>,
    /// The value of that field.
    pub value: Option<String>,
    /// Whether chance decided, so that another evaluation may place it elsewhere: a lot was drawn, or the
    /// context lacks a `sessionId` and one was made up.
    pub drawn: bool,
    /// What the value is hashed with; none where there is only chance.
    pub group: Option<String>,
    /// The bucket, from 1; none where the field that it takes has no value.
    pub bucket: Option<u32>,
    /// The number of buckets: 100, or the sum of the weights of variants.
    pub buckets: u32,
}

/// A condition on one context field.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "ExplainedConstraint")]
pub struct Constraint {
    /// The context field that it looks at; empty where it cannot be read.
    pub field: String,
    /// How it compares, for instance `STR_CONTAINS`; empty where it cannot be read.
    pub operator: String,
    /// What it compares with, as written.
    pub values: Vec<String>,
    /// Whether the result is negated.
    pub inverted: bool,
    /// Whether comparing texts ignores case.
    pub case_insensitive: bool,
    /// What the context says of the field; the time where the operator compares that.
    pub context_value: Option<String>,
    /// Whether it holds.
    pub holds: bool,
    /// The same in a sentence, and why it can never hold where that is so.
    pub why: String,
}

/// A reusable list of constraints, all of which have to hold.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "ExplainedSegment")]
pub struct Segment {
    /// Its id; none where the reference to it cannot be read.
    pub id: Option<i64>,
    /// What its author calls it.
    pub name: Option<String>,
    /// Whether there is no such segment, so that the strategy never matches.
    pub missing: bool,
    /// Its constraints.
    pub constraints: Vec<Constraint>,
    /// Whether all of them hold.
    pub holds: bool,
    /// The same in a sentence.
    pub why: String,
}

/// A list of variants, and which one the context gets.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "ExplainedVariants")]
pub struct Variants {
    /// The variants in their order.
    pub shares: Vec<Share>,
    /// The name of the variant that the context gets of this list, if any.
    pub chosen: Option<String>,
    /// How it was chosen.
    pub choice: Choice,
    /// Where the context falls; none where no bucket was asked for.
    pub placement: Option<Placement>,
    /// Whether the verdict's variant is the one of this list.
    pub decides: bool,
    /// The choice in a sentence.
    pub why: String,
}

/// One variant of a list, and its share.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "ExplainedShare")]
pub struct Share {
    /// The variant's name.
    pub name: String,
    /// How many buckets belong to it.
    pub weight: u32,
    /// The first of its buckets; the next variant's begin behind its last.
    pub first_bucket: u32,
}

/// How a variant was chosen.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "ExplainedChoice")]
pub enum Choice {
    /// No variant of the list has a weight, so nobody gets any.
    Nobody,
    /// Only one has a weight and none is reserved, so everybody gets it.
    Everybody,
    /// An override reserves it for this context.
    Override,
    /// By the bucket that the context falls into.
    Bucket,
}
