//! The command line as a shell sees it: exit statuses, and which stream tells what.

use std::process::{Command, Output};

use tempfile::TempDir;

/// Runs the binary in an empty folder and an empty environment.
fn parapet(args: &[&str]) -> Output {
    let folder = TempDir::new().expect("a temporary folder");
    let mut command = Command::new(env!("CARGO_BIN_EXE_parapet"));
    command.args(args).env_clear().current_dir(folder.path()).output().expect("the binary runs")
}

#[test]
fn a_wrong_configuration_exits_64_and_lists_its_mistakes_on_standard_error() {
    let output = parapet(&["--port", "x", "edge", "--admin-port", "y"]);
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), told.lines().count()), (Some(64), 3), "{told}");
    assert_eq!(output.stdout, b"");
    assert_eq!(parapet(&["--no-such-flag"]).status.code(), Some(64));
    assert_eq!(parapet(&["standalone"]).status.code(), Some(64), "there are no flags here");
}

#[test]
fn what_was_asked_for_is_told_on_standard_output() {
    for args in [&["--help"][..], &["--version"], &["edge", "-u", "http://u", "--check-config"]] {
        let output = parapet(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert!(output.stdout.ends_with(b"\n") && output.stderr.is_empty(), "{output:?}");
    }
}

#[test]
fn a_probe_of_nobody_exits_1_with_one_line() {
    // The port of an address that nothing can be reached at.
    let output = parapet(&["health", "--edge-url", "http://127.0.0.1:0"]);
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), told.lines().count()), (Some(1), 1), "{told}");
}
