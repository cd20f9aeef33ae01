//! The subcommands of `parapet`, as a shell runs them.

use std::path::Path;
use std::process::Command;

/// `parapet` in this directory, with an empty environment.
pub(crate) fn parapet_command(directory: impl AsRef<Path>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_parapet"));
    command.env_clear().current_dir(directory);
    command
}

/// The standard output of `parapet` with these arguments, or its standard error if it fails.
pub(crate) fn run_parapet(arguments: &[&str], input: &str) -> Result<String, String> {
    use std::io::Write;
    use std::process::Stdio;
    let mut command = parapet_command(std::env::temp_dir());
    command.args(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = command.spawn().unwrap();
    process.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = process.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

/// A file with this text in its first line.
pub(crate) fn temp_file_with(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), format!("{text}\n")).unwrap();
    file
}
