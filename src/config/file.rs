//! The configuration file: a flat TOML table whose keys are the option names with underscores.
//!
//! Values become strings, as on the command line, so that `from_raw` parses every source alike.

use std::{io, path::Path};

use toml::de::{DeTable, DeValue};

use super::{
    error::ConfigError,
    option_spec::{Arity, OptionSpec, split_list},
    options::{CONFIG, OPTIONS},
};
use crate::protocol::byte_order_mark::remove_byte_order_mark;

/// A key of the file with its values.
pub(super) struct Entry {
    pub(super) key: &'static OptionSpec,
    pub(super) texts: Vec<String>,
    /// The line number, counted from 1.
    pub(super) line: usize,
}

/// Reads the file; adds an error for each key that is unknown or has a value of the wrong type.
pub(super) fn read(path: &Path, errors: &mut Vec<ConfigError>) -> Vec<Entry> {
    match read_text(path) {
        Ok(text) => parse(path, &text, errors),
        Err(error) => {
            let reason = format!("expected a readable file: {error}");
            errors.push(ConfigError { location: path.display().to_string(), reason });
            Vec::new()
        }
    }
}

/// The text of a file, without a leading byte order mark.
pub(super) fn read_text(path: &Path) -> io::Result<String> {
    let mut text = std::fs::read_to_string(path)?;
    remove_byte_order_mark(&mut text);
    Ok(text)
}

fn parse(path: &Path, text: &str, errors: &mut Vec<ConfigError>) -> Vec<Entry> {
    let line_at = |offset: usize| 1 + text[..offset].matches('\n').count();
    let mut report = |line: usize, reason: String| {
        errors.push(ConfigError { location: format!("{}:{line}", path.display()), reason });
    };
    let table = match DeTable::parse(text) {
        Ok(table) => table.into_inner(),
        Err(error) => {
            // Only the message: the error's own text quotes the line, which may contain a token.
            let line = error.span().map_or(1, |span| line_at(span.start));
            report(line, format!("expected TOML: {}", error.message()));
            return Vec::new();
        }
    };
    let mut entries: Vec<_> = table
        .iter()
        .filter_map(|(name, value)| {
            let line = line_at(name.span().start);
            let name = name.get_ref();
            let known =
                OPTIONS.iter().find(|key| key.toml_name() == **name && key.name != CONFIG.name);
            let Some(&key) = known else {
                report(line, format!("unknown key `{name}`"));
                return None;
            };
            let texts = value_texts(key, value.get_ref());
            if texts.is_none() {
                report(line, format!("`{name}`: expected {}", expected_form(key)));
            }
            Some(Entry { key, texts: texts?, line })
        })
        .collect();
    entries.sort_by_key(|entry| entry.line);
    entries
}

fn expected_form(key: &OptionSpec) -> &'static str {
    match key.arity {
        Arity::One => "a string or a number",
        Arity::List => "an array of strings, or a string with commas",
        Arity::Switch => "true or false",
    }
}

fn value_texts(key: &OptionSpec, value: &DeValue<'_>) -> Option<Vec<String>> {
    match (key.arity, value) {
        (Arity::List, DeValue::Array(items)) => {
            items.iter().map(|item| scalar_text(item.get_ref())).collect()
        }
        (Arity::List, DeValue::String(text)) => Some(split_list(text)),
        (Arity::Switch, DeValue::Boolean(on)) => Some(vec![on.to_string()]),
        (Arity::One, value) => Some(vec![scalar_text(value)?]),
        (Arity::List | Arity::Switch, _) => None,
    }
}

fn scalar_text(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.clone().into_owned()),
        DeValue::Integer(number) => Some(number.to_string()),
        DeValue::Float(number) => Some(number.to_string()),
        DeValue::Boolean(_) | DeValue::Datetime(_) | DeValue::Array(_) | DeValue::Table(_) => None,
    }
}
