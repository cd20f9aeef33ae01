//! An explanation as a text of indented lines.
//!
//! The sentences are the explanation's own; here is only their order and what stands before them.

use crate::engine::explanation::{Explanation, Strategy, Variants};

/// The whole explanation; every line ends.
pub(super) fn tree(told: &Explanation) -> String {
    let mut lines = Lines(String::new());
    lines.explanation(0, told);
    lines.0
}

struct Lines(String);

impl Lines {
    fn add(&mut self, depth: usize, line: &str) {
        self.0.push_str(&"  ".repeat(depth));
        self.0.push_str(line);
        self.0.push('\n');
    }

    fn explanation(&mut self, depth: usize, told: &Explanation) {
        self.add(depth, &told.summary);
        let depth = depth + 1;
        if let Some(payload) = told.variant.as_ref().and_then(|it| it.payload.as_ref()) {
            self.add(depth, &format!("payload ({}): {}", payload.kind, payload.value));
        }
        self.add(depth, if told.switched_on { "switched on" } else { "switched off" });
        for parent in &told.parents {
            self.add(depth, &format!("{} {}", mark(parent.satisfied), parent.why));
            if let Some(explanation) = &parent.explanation {
                self.explanation(depth + 1, explanation);
            }
        }
        for (number, strategy) in (1..).zip(&told.strategies) {
            self.strategy(depth, number, strategy);
        }
        if let Some(variants) = &told.variants {
            self.variants(depth, "variants of the flag", variants);
        }
        for problem in &told.problems {
            self.add(depth, &format!("problem: {problem}"));
        }
    }

    fn strategy(&mut self, depth: usize, number: usize, told: &Strategy) {
        let title = told.title.as_ref().map(|title| format!(" ({title})")).unwrap_or_default();
        let reached = if told.reached { "" } else { ", which is not reached" };
        let name = if told.name.is_empty() { "unreadable" } else { &told.name };
        let matches = mark(told.matches);
        self.add(depth, &format!("{matches} strategy {number}, {name}{title}{reached}"));
        if told.disabled {
            self.add(depth + 1, "marked as disabled, which SDKs do not heed");
        }
        match &told.rule {
            Some(rule) => self.add(depth + 1, &format!("{} {}", mark(rule.holds), rule.why)),
            None => self.add(depth + 1, &told.why),
        }
        for constraint in &told.constraints {
            self.add(depth + 1, &format!("{} {}", mark(constraint.holds), constraint.why));
        }
        for segment in &told.segments {
            self.add(depth + 1, &format!("{} {}", mark(segment.holds), segment.why));
            for constraint in &segment.constraints {
                self.add(depth + 2, &format!("{} {}", mark(constraint.holds), constraint.why));
            }
        }
        if let Some(variants) = &told.variants {
            self.variants(depth + 1, "variants of the strategy", variants);
        }
    }

    fn variants(&mut self, depth: usize, whose: &str, told: &Variants) {
        let counts = if told.decides { "" } else { " (not asked, or nobody's)" };
        self.add(depth, &format!("{whose}{counts}: {}", told.why));
        for share in &told.shares {
            self.add(depth + 1, &format!("{}: weight {}", share.name, share.weight));
        }
    }
}

fn mark(holds: bool) -> &'static str {
    if holds { "[yes]" } else { "[no] " }
}
