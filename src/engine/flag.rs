//! A flag of the engine: names and variants. Its [`FlagPlan`](super::plan::FlagPlan) is separate.

use std::sync::Arc;

use super::variant::Variant;

/// The variant that SDKs report for a flag without variants.
const NO_VARIANT: &str = "disabled";

/// A flag's index in its engine, the same as in the document that the engine was compiled from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlagId(u32);

impl FlagId {
    pub(super) fn new(index: usize) -> Self {
        Self(u32::try_from(index).expect("a document has fewer than 2^32 flags"))
    }

    /// The index into the engine's flags and its document's features.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// The result of evaluating a flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The flag is off; its variant is `disabled`.
    Off,
    /// The flag is on without a variant; its variant is `disabled`.
    On,
    /// The flag is on with the variant at this index of [`Flag::variants`].
    Variant(u32),
}

impl Outcome {
    /// Whether the flag is on.
    pub fn is_on(self) -> bool {
        !matches!(self, Self::Off)
    }

    /// A number for each outcome of a flag, dense from 0: off, on, then the variants.
    pub fn ordinal(self) -> usize {
        match self {
            Self::Off => 0,
            Self::On => 1,
            Self::Variant(index) => 2 + index as usize,
        }
    }
}

/// The properties of a flag that do not depend on the context.
#[derive(Debug, Clone)]
pub struct Flag {
    pub(super) name: Arc<str>,
    pub(super) project: Arc<str>,
    pub(super) enabled: bool,
    pub(super) impression_data: bool,
    pub(super) variants: Arc<[Variant]>,
}

impl Flag {
    /// Whether both are the same instance, because one engine reused the flag of the other.
    pub fn is_same_instance(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.name, &other.name) && Arc::ptr_eq(&self.variants, &other.variants)
    }

    /// The name, unique in the engine.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// The project that owns the flag.
    pub fn project(&self) -> &Arc<str> {
        &self.project
    }

    /// Whether the flag is enabled in this environment. If it is, strategies decide.
    pub fn enabled(&self) -> bool {
        self.enabled
    }

    /// Whether SDKs should report each evaluation to the application.
    pub fn impression_data(&self) -> bool {
        self.impression_data
    }

    /// The variants of the flag itself, then those of its strategies.
    pub fn variants(&self) -> &[Variant] {
        &self.variants
    }

    /// Whether SDKs may report a variant with this name: one of the flag's variants, or `disabled`.
    pub fn has_variant(&self, name: &str) -> bool {
        name == NO_VARIANT || self.variants.iter().any(|variant| &*variant.name == name)
    }

    /// The variant of an outcome; `None` stands for Unleash's variant `disabled`.
    pub fn variant(&self, outcome: Outcome) -> Option<&Variant> {
        match outcome {
            Outcome::Off | Outcome::On => None,
            Outcome::Variant(index) => self.variants.get(index as usize),
        }
    }

    /// The number of possible outcomes. Ordinals are below it.
    pub fn outcome_count(&self) -> usize {
        2 + self.variants.len()
    }

    /// The possible outcomes in the order of their ordinals.
    pub fn possible_outcomes(&self) -> impl Iterator<Item = Outcome> + use<> {
        let variants = (0..self.variants.len()).map_while(|it| u32::try_from(it).ok());
        [Outcome::Off, Outcome::On].into_iter().chain(variants.map(Outcome::Variant))
    }
}

/// The id of the flag with this name, among flags sorted by name.
pub(super) fn find_flag(flags: &[Flag], name: &str) -> Option<FlagId> {
    flags.binary_search_by(|flag| (*flag.name).cmp(name)).ok().map(FlagId::new)
}
