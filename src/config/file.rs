//! The configuration file: a flat TOML table whose keys are the options' names with underscores.
//!
//! Values become texts, as on the command line, so that `check` reads each form of a setting in
//! one place.

use std::{io, path::Path};

use toml::de::{DeTable, DeValue};

use super::{
    keys::{CONFIG, KEYS, Key, Shape, split},
    mistake::Mistake,
};
use crate::wire::text::remove_byte_order_mark;

/// One line of the file.
pub(super) struct Entry {
    pub(super) key: &'static Key,
    pub(super) texts: Vec<String>,
    /// The line's number, from 1.
    pub(super) line: usize,
}

/// Reads `path`; what cannot be understood becomes mistakes.
pub(super) fn read(path: &Path, mistakes: &mut Vec<Mistake>) -> Vec<Entry> {
    match read_text(path) {
        Ok(text) => parse(path, &text, mistakes),
        Err(error) => {
            let reason = format!("expected a readable file: {error}");
            mistakes.push(Mistake { place: path.display().to_string(), reason });
            Vec::new()
        }
    }
}

/// The text of a file, without the byte order mark that editors may put in front.
pub(super) fn read_text(path: &Path) -> io::Result<String> {
    let mut text = std::fs::read_to_string(path)?;
    remove_byte_order_mark(&mut text);
    Ok(text)
}

fn parse(path: &Path, text: &str, mistakes: &mut Vec<Mistake>) -> Vec<Entry> {
    let line_at = |offset: usize| 1 + text[..offset].matches('\n').count();
    let mut mistake = |line: usize, reason: String| {
        mistakes.push(Mistake { place: format!("{}:{line}", path.display()), reason });
    };
    let table = match DeTable::parse(text) {
        Ok(table) => table.into_inner(),
        Err(error) => {
            // Only the message: the error's own text quotes the line, which may hold a token.
            let line = error.span().map_or(1, |span| line_at(span.start));
            mistake(line, format!("expected TOML: {}", error.message()));
            return Vec::new();
        }
    };
    let mut entries: Vec<_> = table
        .iter()
        .filter_map(|(name, value)| {
            let line = line_at(name.span().start);
            let name = name.get_ref();
            let known =
                KEYS.iter().find(|key| key.file_name() == **name && key.name != CONFIG.name);
            let Some(&key) = known else {
                mistake(line, format!("unknown key `{name}`"));
                return None;
            };
            let texts = texts(key, value.get_ref());
            if texts.is_none() {
                mistake(line, format!("`{name}`: expected {}", form(key)));
            }
            Some(Entry { key, texts: texts?, line })
        })
        .collect();
    entries.sort_by_key(|entry| entry.line);
    entries
}

fn form(key: &Key) -> &'static str {
    match key.shape {
        Shape::One => "a string or a number",
        Shape::List => "an array of strings, or a string with commas",
        Shape::Switch => "true or false",
    }
}

fn texts(key: &Key, value: &DeValue<'_>) -> Option<Vec<String>> {
    match (key.shape, value) {
        (Shape::List, DeValue::Array(items)) => {
            items.iter().map(|item| scalar(item.get_ref())).collect()
        }
        (Shape::List, DeValue::String(text)) => Some(split(text)),
        (Shape::Switch, DeValue::Boolean(on)) => Some(vec![on.to_string()]),
        (Shape::One, value) => Some(vec![scalar(value)?]),
        (Shape::List | Shape::Switch, _) => None,
    }
}

fn scalar(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.clone().into_owned()),
        DeValue::Integer(number) => Some(number.to_string()),
        DeValue::Float(number) => Some(number.to_string()),
        DeValue::Boolean(_) | DeValue::Datetime(_) | DeValue::Array(_) | DeValue::Table(_) => None,
    }
}
