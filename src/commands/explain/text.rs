//! Renders an explanation as indented lines of text.
//!
//! The sentences are part of the explanation; this module adds only order, indentation and marks.

use crate::engine::explanation::{Explanation, Strategy, Variants};

/// Renders the whole explanation; every line ends with a newline.
pub(super) fn render(explanation: &Explanation) -> String {
    let mut lines = IndentedLines(String::new());
    lines.explanation(0, explanation);
    lines.0
}

struct IndentedLines(String);

impl IndentedLines {
    fn add(&mut self, depth: usize, line: &str) {
        self.0.push_str(&"  ".repeat(depth));
        self.0.push_str(line);
        self.0.push('\n');
    }

    fn explanation(&mut self, depth: usize, explanation: &Explanation) {
        self.add(depth, &explanation.summary);
        let depth = depth + 1;
        if let Some(payload) = explanation.variant.as_ref().and_then(|it| it.payload.as_ref()) {
            self.add(depth, &format!("payload ({}): {}", payload.kind, payload.value));
        }
        self.add(depth, if explanation.switched_on { "switched on" } else { "switched off" });
        for parent in &explanation.parents {
            self.add(depth, &format!("{} {}", check_mark(parent.satisfied), parent.why));
            if let Some(nested) = &parent.explanation {
                self.explanation(depth + 1, nested);
            }
        }
        for (number, strategy) in (1..).zip(&explanation.strategies) {
            self.strategy(depth, number, strategy);
        }
        if let Some(variants) = &explanation.variants {
            self.variants(depth, "variants of the flag", variants);
        }
        for problem in &explanation.problems {
            self.add(depth, &format!("problem: {problem}"));
        }
    }

    fn strategy(&mut self, depth: usize, number: usize, strategy: &Strategy) {
        let title = strategy.title.as_ref().map(|title| format!(" ({title})")).unwrap_or_default();
        let reached = if strategy.reached { "" } else { ", not reached" };
        let name = if strategy.name.is_empty() { "unreadable" } else { &strategy.name };
        let matches = check_mark(strategy.matches);
        self.add(depth, &format!("{matches} strategy {number}, {name}{title}{reached}"));
        if strategy.disabled {
            self.add(depth + 1, "marked as disabled, which SDKs ignore");
        }
        match &strategy.rule {
            Some(rule) => self.add(depth + 1, &format!("{} {}", check_mark(rule.holds), rule.why)),
            None => self.add(depth + 1, &strategy.why),
        }
        for constraint in &strategy.constraints {
            self.add(depth + 1, &format!("{} {}", check_mark(constraint.holds), constraint.why));
        }
        for segment in &strategy.segments {
            self.add(depth + 1, &format!("{} {}", check_mark(segment.holds), segment.why));
            for constraint in &segment.constraints {
                self.add(
                    depth + 2,
                    &format!("{} {}", check_mark(constraint.holds), constraint.why),
                );
            }
        }
        if let Some(variants) = &strategy.variants {
            self.variants(depth + 1, "variants of the strategy", variants);
        }
    }

    fn variants(&mut self, depth: usize, title: &str, variants: &Variants) {
        let counts = if variants.decides { "" } else { " (not used)" };
        self.add(depth, &format!("{title}{counts}: {}", variants.why));
        for share in &variants.shares {
            self.add(depth + 1, &format!("{}: weight {}", share.name, share.weight));
        }
    }
}

fn check_mark(holds: bool) -> &'static str {
    if holds { "[yes]" } else { "[no] " }
}
