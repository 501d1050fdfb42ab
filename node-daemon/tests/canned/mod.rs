//! The command `huskctl`, and a daemon that gives canned answers.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output};
use std::thread::JoinHandle;

use husk_overlay::ipc::{Request, Response, SOCKET_FILE, read_message, write_message};
use serde::Serialize;

pub(crate) fn huskctl(run_directory: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_huskctl"))
        .arg("--run-directory")
        .arg(run_directory)
        .args(arguments)
        .env_remove("HUSK_RUN_DIRECTORY")
        .output()
        .expect("cargo built huskctl")
}

/// Answers one connection; returns what was asked.
pub(crate) fn answer_once(directory: &Path, response: Response) -> JoinHandle<Request> {
    let listener = UnixListener::bind(directory.join(SOCKET_FILE)).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let request = read_message(&mut stream).unwrap();
        write_message(&mut stream, &response).unwrap();
        request
    })
}

pub(crate) struct Ran {
    pub(crate) request: Request,
    pub(crate) status: i32,
    pub(crate) text: String,
    pub(crate) errors: String,
}

pub(crate) fn run_against(response: Response, arguments: &[&str]) -> Ran {
    let directory = tempfile::tempdir().unwrap();
    let server = answer_once(directory.path(), response);
    let output = huskctl(directory.path(), arguments);
    Ran {
        request: server.join().unwrap(),
        status: output.status.code().unwrap(),
        text: String::from_utf8(output.stdout).unwrap(),
        errors: String::from_utf8(output.stderr).unwrap(),
    }
}

pub(crate) fn run(report: &impl Serialize, arguments: &[&str]) -> Ran {
    run_against(Response::Report { report: serde_json::to_value(report).unwrap() }, arguments)
}

/// Lines with runs of spaces made one: the columns' words, not their widths.
pub(crate) fn words(text: &str) -> Vec<String> {
    let squeeze = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    text.lines().map(squeeze).filter(|line| !line.is_empty()).collect()
}

/// Runs against a daemon that gives these answers one after the other, the last one for ever.
pub(crate) fn run_along(reports: Vec<serde_json::Value>, arguments: &[&str]) -> Ran {
    let directory = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(directory.path().join(SOCKET_FILE)).unwrap();
    std::thread::spawn(move || {
        let mut answers = reports.into_iter().peekable();
        while let Ok((mut stream, _)) = listener.accept() {
            let _: Request = read_message(&mut stream).unwrap();
            let report = answers.peek().cloned().unwrap();
            if answers.len() > 1 {
                answers.next();
            }
            write_message(&mut stream, &Response::Report { report }).unwrap();
        }
    });
    let output = huskctl(directory.path(), arguments);
    Ran {
        request: Request::RotateKeys,
        status: output.status.code().unwrap(),
        text: String::from_utf8(output.stdout).unwrap(),
        errors: String::from_utf8(output.stderr).unwrap(),
    }
}
