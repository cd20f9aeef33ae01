//! The command line in a shell: exit codes, and which stream an output goes to.

use std::process::Output;

use tempfile::TempDir;

use crate::rig::parapet_command;

/// Runs the binary in an empty directory and an empty environment.
fn parapet(args: &[&str]) -> Output {
    let folder = TempDir::new().expect("a temporary folder");
    parapet_command(&folder).args(args).output().expect("the binary runs")
}

#[test]
fn invalid_configuration_exits_64_and_lists_errors_on_stderr() {
    let output = parapet(&["--port", "x", "edge", "--admin-port", "y"]);
    let printed = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), printed.lines().count()), (Some(64), 3), "{printed}");
    assert_eq!(output.stdout, b"");
    assert_eq!(parapet(&["--no-such-flag"]).status.code(), Some(64));
    let args = ["standalone", "--flags", "config/flags.json"];
    assert_eq!(parapet(&args).status.code(), Some(64), "there are no flags here");
    let misspelt = parapet(&["edge", "-u", "http://u", "--log", "debugg"]);
    assert_eq!(misspelt.status.code(), Some(64), "{misspelt:?}");
}

#[test]
fn requested_output_goes_to_stdout() {
    for args in [
        &["--help"][..],
        &["--version"],
        &["edge", "--version"],
        &["edge", "-u", "http://u", "--check-config"],
    ] {
        let output = parapet(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert!(output.stdout.ends_with(b"\n") && output.stderr.is_empty(), "{output:?}");
    }
}

#[test]
fn flag_of_a_file_is_explained_as_text_or_json() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("production.json");
    let flags = r#"{"features":[{"name":"cart","enabled":true,"strategies":[
        {"name":"flexibleRollout","parameters":{"rollout":"50","stickiness":"userId","groupId":"gr1"},
         "constraints":[{"contextName":"plan","operator":"IN","values":["gold"]},
                        {"contextName":"t","operator":"DATE_AFTER","value":"2030-01-01"}]},
        {"name":"default","title":"The rest"}]}]}"#;
    std::fs::write(&path, flags).unwrap();
    let (file, folder) = (path.to_str().unwrap(), folder.path().to_str().unwrap());
    let target = ["--flag", "cart", "--user-id", "123", "--property", "plan=gold"];
    let explain = |more: &[&str]| parapet(&[&["explain"], &target[..], more].concat());

    let output = explain(&["--flags", file, "--at", "2030-06-01T00:00:00Z"]);
    assert_eq!((output.status.code(), &*output.stderr), (Some(0), &b""[..]));
    // The bucket is the one in the documentation of the official SDKs.
    let expect = "\
`cart` is on: strategy 2 (`The rest`) matches: it is for everybody
  switched on
  [no]  strategy 1, flexibleRollout
    [no]  `userId` `123` of group `gr1` is in bucket 73 of 100, beyond the rollout's 50 %
    [yes] `plan` is one of `gold`; it is `gold`; this holds
    [yes] the time is after `2030-01-01`; it is `2030-06-01T00:00:00Z`; this holds
  [yes] strategy 2, default (The rest)
    [yes] it is for everybody
";
    assert_eq!(String::from_utf8(output.stdout).unwrap(), expect);

    let output = explain(&["--flags", folder, "--environment", "production", "--json"]);
    let printed: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(printed["decision"], serde_json::json!({ "by": "strategy", "index": 1 }));
    assert_eq!(printed["strategies"][0]["rule"]["placement"]["bucket"], 73);

    let check = |args: &[&str], code: i32, expect: &str| {
        let output = parapet(args);
        let printed = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{printed}");
        assert!(printed.contains(expect), "{printed}");
    };
    check(&["explain", "--flags", file, "--flag", "Cart2"], 1, "; similar: cart");
    check(&["explain", "--flags", "/nowhere", "--flag", "cart"], 1, "cannot read /nowhere");
    check(&["explain", "--flag", "cart"], 64, "--flags");
    let args = ["explain", "--flags", file, "--flag", "cart"];
    check(&[&args[..], &["--at", "soon"]].concat(), 64, "--at: expected a time");
    check(&[&args[..], &["--property", "plan"]].concat(), 64, "--property: expected NAME=VALUE");
    check(&[&args[..], &["--port", "1"]].concat(), 64, "--port: does not apply to `explain`");
}

#[test]
fn probe_of_unreachable_address_exits_1_with_one_line() {
    // Nothing is reachable at port 0.
    let output = parapet(&["health", "--edge-url", "http://127.0.0.1:0"]);
    let printed = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), printed.lines().count()), (Some(1), 1), "{printed}");
}
