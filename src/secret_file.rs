//! Files with secrets: read as container platforms mount them, and written with mode 0600.
//!
//! The text is wiped on drop, and no error contains it. This module does not validate the text; the
//! caller does.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
};

use tempfile::NamedTempFile;
use zeroize::Zeroizing;

use crate::protocol::byte_order_mark::without_byte_order_mark;

/// The largest accepted file, in bytes: far more than any list of tokens.
const MAX_LEN: u64 = 1 << 20;

/// Why a secret cannot be read. The message names the file and never its contents.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file is larger than any secret.
    #[error("{} is larger than {MAX_LEN} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The file contains only white space.
    #[error("{} is empty", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

/// Reads the secret in `path`, without a byte order mark and surrounding white space.
///
/// Blocks the thread during file IO.
pub fn read(path: &Path) -> Result<Zeroizing<String>, Error> {
    let failed = |source| Error::Read { path: path.to_owned(), source };
    let mut bytes = Zeroizing::new(Vec::new());
    File::open(path).map_err(failed)?.take(MAX_LEN + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_LEN {
        return Err(Error::TooLarge { path: path.to_owned() });
    }
    let not_text = |_| failed(io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8"));
    let text = str::from_utf8(without_byte_order_mark(&bytes)).map_err(not_text)?.trim();
    if text.is_empty() {
        return Err(Error::Empty { path: path.to_owned() });
    }
    Ok(Zeroizing::new(text.to_owned()))
}

/// Writes a file with mode 0600 atomically, replacing an existing one.
///
/// Blocks the thread during file IO.
pub fn write(path: &Path, secret: &[u8]) -> io::Result<()> {
    let mut file = NamedTempFile::new_in(parent_dir(path))?;
    file.write_all(secret)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}

/// The folder of a file, as a path that can be opened: `.` for a bare file name.
pub fn parent_dir(path: &Path) -> &Path {
    path.parent().filter(|it| !it.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::error_chain;

    fn read_bytes(bytes: &[u8]) -> Result<String, Error> {
        let file = NamedTempFile::new().expect("file");
        std::fs::write(file.path(), bytes).expect("write");
        read(file.path()).map(|text| text.to_string())
    }

    #[test]
    fn byte_order_mark_and_white_space_are_not_part_of_a_secret() {
        for bytes in ["secret", " secret\r\n", "\u{feff}secret\n", "\u{feff} secret"] {
            assert_eq!(read_bytes(bytes.as_bytes()).expect("a secret"), "secret");
        }
        assert_eq!(read_bytes(b"one\ntwo\n").expect("a list"), "one\ntwo");
    }

    #[test]
    fn unusable_file_is_an_error_that_names_it() {
        for bytes in [&b""[..], b" \n", "\u{feff}\n".as_bytes()] {
            assert!(matches!(read_bytes(bytes), Err(Error::Empty { .. })), "{bytes:?}");
        }
        let error = read_bytes(b"secret \xff").expect_err("not UTF-8");
        assert!(error_chain(&error).ends_with("it is not UTF-8"), "{error}");
        let large = vec![b'x'; usize::try_from(MAX_LEN).expect("small") + 1];
        assert!(matches!(read_bytes(&large), Err(Error::TooLarge { .. })));
        let error = read(Path::new("/nowhere/secret")).expect_err("no file");
        assert_eq!(error.to_string(), "cannot read /nowhere/secret");
    }
}
