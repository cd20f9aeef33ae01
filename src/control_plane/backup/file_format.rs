//! The format of a backup file, its writer and its reader.
//!
//! The file consists of lines of JSON, compressed by gzip: a header, then for each table a line with its
//! columns and a line for each of its rows, and finally the number of rows and the SHA-256 of all lines
//! before. This module knows no database.

use std::{
    fs::File,
    io::{self, BufRead as _, BufReader, BufWriter, Write as _},
    path::{Path, PathBuf},
};

use flate2::{Compression, read::MultiGzDecoder, write::GzEncoder};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tempfile::NamedTempFile;

use super::error::BackupError;
use crate::control_plane::cookie_token::base64url;

/// The version of the file format.
pub(super) const FORMAT_VERSION: u32 = 1;

/// A line of the file.
#[derive(Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Line {
    Head(Header),
    Table(TableHeader),
    Row(Vec<Option<Cell>>),
    End(Trailer),
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Header {
    /// The version of the file format.
    pub(super) parapet_backup: u32,
    /// The version of the database's schema.
    pub(super) schema: i64,
    pub(super) created_at: Timestamp,
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct TableHeader {
    pub(super) name: String,
    /// Empty if there are no rows.
    pub(super) columns: Vec<ColumnHeader>,
    /// The last id that the database has generated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) last_id: Option<i64>,
}

#[derive(Deserialize, Serialize)]
pub(super) struct ColumnHeader {
    pub(super) name: String,
    pub(super) kind: ColumnKind,
}

/// The type of a column.
#[derive(Clone, Copy, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum ColumnKind {
    Integer,
    Text,
}

#[derive(Deserialize, Serialize)]
#[serde(untagged)]
pub(super) enum Cell {
    Integer(i64),
    Text(String),
}

#[derive(Deserialize, Serialize)]
pub(super) struct Trailer {
    rows: u64,
    sha256: String,
}

/// Writes a backup file.
pub(super) struct BackupWriter {
    lines: GzEncoder<BufWriter<NamedTempFile>>,
    digest: Sha256,
    pub(super) rows: u64,
}

impl BackupWriter {
    pub(super) fn new(file: NamedTempFile) -> Self {
        let lines = GzEncoder::new(BufWriter::new(file), Compression::default());
        Self { lines, digest: Sha256::new(), rows: 0 }
    }

    pub(super) fn write(&mut self, line: &Line) -> io::Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        self.digest.update(&text);
        self.lines.write_all(&text)
    }

    /// Writes the trailer and syncs the file to disk.
    pub(super) fn finish(mut self) -> io::Result<NamedTempFile> {
        let sha256 = base64url(&self.digest.clone().finalize());
        self.write(&Line::End(Trailer { rows: self.rows, sha256 }))?;
        let file = self.lines.finish()?.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.as_file().sync_all()?;
        Ok(file)
    }
}

/// Reads a backup file.
pub(super) struct BackupReader {
    path: PathBuf,
    lines: BufReader<MultiGzDecoder<BufReader<File>>>,
    digest: Sha256,
    pub(super) rows: u64,
    /// The version of the schema at the time of the backup.
    pub(super) schema: i64,
}

impl BackupReader {
    /// Opens a file and reads its header.
    pub(super) fn open(path: &Path) -> Result<Self, BackupError> {
        let file = File::open(path)
            .map_err(|source| BackupError::Read { path: path.to_owned(), source })?;
        let lines = BufReader::new(MultiGzDecoder::new(BufReader::new(file)));
        let path = path.to_owned();
        let mut input = Self { path, lines, digest: Sha256::new(), rows: 0, schema: 0 };
        match input.read_line()? {
            Some(Line::Head(head)) if head.parapet_backup > FORMAT_VERSION => {
                Err(BackupError::Newer(input.path))
            }
            Some(Line::Head(head)) => {
                input.schema = head.schema;
                Ok(input)
            }
            _ => Err(input.damaged("it has no header")),
        }
    }

    /// The next line; `None` after the trailer has been verified.
    pub(super) fn next_line(&mut self) -> Result<Option<Line>, BackupError> {
        let before = self.digest.clone();
        match self.read_line()? {
            Some(Line::End(end)) => {
                if end.rows != self.rows || end.sha256 != base64url(&before.finalize()) {
                    return Err(self.damaged("its checksum does not match"));
                }
                match self.read_line()? {
                    Some(_) => Err(self.damaged("it continues after its end")),
                    None => Ok(None),
                }
            }
            Some(line) => {
                self.rows += u64::from(matches!(line, Line::Row(_)));
                Ok(Some(line))
            }
            None => Err(self.damaged("it is truncated")),
        }
    }

    fn read_line(&mut self) -> Result<Option<Line>, BackupError> {
        let mut text = Vec::new();
        if let Err(error) = self.lines.read_until(b'\n', &mut text) {
            return Err(match error.kind() {
                io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData => {
                    self.damaged("it cannot be decompressed")
                }
                io::ErrorKind::UnexpectedEof => self.damaged("it is truncated"),
                _ => BackupError::Read { path: self.path.clone(), source: error },
            });
        }
        self.digest.update(&text);
        if text.is_empty() {
            return Ok(None);
        }
        let line = serde_json::from_slice(&text);
        line.map(Some).map_err(|_| self.damaged("it has a line that cannot be read"))
    }

    pub(super) fn damaged(&self, reason: &'static str) -> BackupError {
        BackupError::Damaged { path: self.path.clone(), reason }
    }
}
