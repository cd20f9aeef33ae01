//! Markdown tables that are readable in a terminal as well.

use std::fmt::Write as _;

/// A table. The first column is text, the others are numbers or short texts.
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
    head: Vec<String>,
}

impl Table {
    pub(crate) fn new(head: &[&str], rows: Vec<Vec<String>>) -> Self {
        Self { head: head.iter().map(|&it| it.to_owned()).collect(), rows }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    pub(crate) fn text(&self) -> String {
        let lines = || std::iter::once(&self.head).chain(&self.rows);
        let width = |column: usize| lines().map(|row| row[column].chars().count()).max();
        let widths: Vec<usize> = (0..self.head.len()).filter_map(width).collect();
        let mut text = String::new();
        for (at, row) in lines().enumerate() {
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                let cell =
                    if column == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") };
                write!(text, "| {cell} ").expect("a string takes all");
            }
            text.push_str("|\n");
            if at == 0 {
                for (column, width) in widths.iter().enumerate() {
                    let (dashes, colon) =
                        ("-".repeat(width + 1), if column == 0 { "-" } else { ":" });
                    write!(text, "|{dashes}{colon}").expect("a string takes all");
                }
                text.push_str("|\n");
            }
        }
        text
    }
}
