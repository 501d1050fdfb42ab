//! When `huskctl` uses colours: on a terminal, or when told to; never where a script reads.

// clippy.toml allows this in test functions; what they call belongs to the test as well.
#![allow(clippy::unwrap_used)]

#[allow(dead_code, reason = "a part of what all tests of huskctl share")]
mod canned;

use std::process::{Command, Output};

use husk_overlay::ipc::Response;

/// A peer that stands out.
fn refused() -> Response {
    let peer = serde_json::json!({
        "node": "beta", "state": "refused", "reason": "it has this node's key", "endpoint": null, "publicKey": null,
        "handshakeAge": null, "receivedAge": null, "received": null, "sent": null, "mtu": null, "paths": {}, "blocks": []
    });
    Response::Report { report: serde_json::json!([peer]) }
}

fn ask(program: &[&str], environment: &[(&str, &str)]) -> Output {
    let directory = tempfile::tempdir().unwrap();
    let server = canned::answer_once(directory.path(), refused());
    let run = directory.path().display();
    let (name, arguments) = program.split_first().unwrap();
    let line =
        |text: &&str| text.replace("HUSKCTL", &format!("{} --run-directory {run}", env!("CARGO_BIN_EXE_huskctl")));
    let arguments = arguments.iter().map(line);
    let mut command = Command::new(name);
    for variable in ["NO_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "HUSK_RUN_DIRECTORY", "CI"] {
        command.env_remove(variable);
    }
    let output = command.args(arguments).env("TERM", "xterm").envs(environment.iter().copied()).output().unwrap();
    server.join().unwrap();
    output
}

/// Whether the answer is coloured.
fn coloured(program: &[&str], environment: &[(&str, &str)]) -> bool {
    let output = ask(program, environment);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("REFUSED") || text.contains("refused"), "{text}");
    assert!(!text.contains('\u{206c}') && !text.contains('\u{206f}'), "marks are not for readers: {text}");
    text.contains('\u{1b}')
}

#[test]
fn a_pipe_gets_none_unless_told_to() {
    let peers = ["sh", "-c", "exec HUSKCTL peers"];
    assert!(!coloured(&peers, &[]));
    assert!(coloured(&peers, &[("CLICOLOR_FORCE", "1")]));
    assert!(!coloured(&peers, &[("CLICOLOR_FORCE", "1"), ("NO_COLOR", "1")]));
    assert!(
        coloured(&["sh", "-c", "exec HUSKCTL peers --color always"], &[("NO_COLOR", "1")]),
        "an option is stronger"
    );
    assert!(!coloured(&["sh", "-c", "exec HUSKCTL peers --color never"], &[("CLICOLOR_FORCE", "1")]));
    assert!(!coloured(&["sh", "-c", "exec HUSKCTL peers -o json --color always"], &[]), "JSON is never painted");
}

#[test]
fn a_terminal_gets_them_unless_told_not_to() {
    // script(1), of Debian's essential bsdutils, runs a command on a terminal of its own.
    let peers = ["script", "--quiet", "--return", "--command", "HUSKCTL peers", "/dev/null"];
    assert!(coloured(&peers, &[]));
    assert!(coloured(&peers, &[("NO_COLOR", "")]), "empty is as if it were not there");
    assert!(!coloured(&peers, &[("NO_COLOR", "1")]));
    assert!(!coloured(&peers, &[("TERM", "dumb")]));
    let never = ["script", "--quiet", "--return", "--command", "HUSKCTL peers --color never", "/dev/null"];
    assert!(!coloured(&never, &[]));
}
