//! Running `nft`, bounded in time.

use std::io::{Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use husk_overlay::marks;
use serde_json::Value;

use crate::error::Error;

/// How long `nft` may take. A transaction of a large ruleset takes a fraction of a second; another program that holds the
/// nftables lock for longer than this is stuck.
const TIME_LIMIT: Duration = Duration::from_secs(10);

/// Most bytes that are taken of what `nft` prints about a ruleset: some hundred bytes a rule, which take several times as many in memory
/// once they are parsed, of the 512 MiB that the daemon's container has with all that runs in it (manifests/base/daemonset.yaml).
const MOST_BYTES: u64 = 48 << 20;

const PROGRAM: &str = "nft";

/// Runs `nft -j` with arguments about an object and returns the JSON it prints.
pub(super) fn query(operation: &'static str, object: &str, arguments: &[&str]) -> Result<Value, Error> {
    let output = execute(&Task { operation, object, arguments, input: None }, PROGRAM, TIME_LIMIT, MOST_BYTES)?;
    serde_json::from_slice(&output).map_err(|error| Error::Malformed {
        operation,
        object: object.to_owned(),
        reason: format!("{PROGRAM} did not print JSON: {error}"),
    })
}

/// Runs one transaction on the table.
pub(super) fn run(operation: &'static str, transaction: &Value) -> Result<(), Error> {
    let input = Some(transaction.to_string());
    execute(&Task { operation, object: &table(), arguments: &["-f", "-"], input }, PROGRAM, TIME_LIMIT, MOST_BYTES)
        .map(drop)
}

/// The table in words.
pub(super) fn table() -> String {
    format!("table inet {}", marks::NFT_TABLE)
}

/// What the program is run for.
struct Task<'a> {
    operation: &'static str,
    object: &'a str,
    arguments: &'a [&'a str],
    input: Option<String>,
}

fn execute(task: &Task<'_>, program: &str, limit: Duration, most: u64) -> Result<Vec<u8>, Error> {
    let (operation, object) = (task.operation, task.object.to_owned());
    let failed = |reason: String| Error::Program { operation, object: object.clone(), program: PROGRAM, reason };
    let deadline = Instant::now() + limit;
    let mut child = spawn(program, task.arguments, task.input.is_some()).map_err(|error| {
        if error.kind() == std::io::ErrorKind::NotFound {
            let remedy = "install the package nftables";
            Error::NoProgram { operation, object: object.clone(), program: PROGRAM, remedy }
        } else {
            failed(format!("it cannot be started: {error}"))
        }
    })?;
    let writer = child.stdin.take().zip(task.input.clone()).map(|(mut stdin, input)| {
        // A child that ends early closes the pipe; why is then in what it printed.
        thread::spawn(move || drop(stdin.write_all(input.as_bytes())))
    });
    // One more tells whether there was more.
    let output = collect(child.stdout.take(), most + 1);
    let errors = collect(child.stderr.take(), most);
    let collected = receive(&output, deadline).and_then(|out| receive(&errors, deadline).map(|err| (out, err)));
    let Some((output, errors)) = collected else {
        stop(&mut child);
        return Err(failed(format!("it did not end within {} s and was stopped", limit.as_secs_f64())));
    };
    if output.len() as u64 > most {
        stop(&mut child);
        return Err(failed(format!("it printed more than {most} bytes, which nobody has the memory to look through")));
    }
    // Both pipes are closed: it has ended, or is about to.
    let status = wait(&mut child, deadline).map_err(&failed)?;
    if let Some(writer) = writer {
        // The reader is gone, so the writer returns.
        drop(writer.join());
    }
    if status.success() { Ok(output) } else { Err(failed(complaint(status, &errors))) }
}

fn spawn(program: &str, arguments: &[&str], input: bool) -> std::io::Result<Child> {
    // Daemons are often started without the directories of administration programs.
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    Command::new(program)
        .arg("-j")
        .args(arguments)
        .env("PATH", path)
        .env("LC_ALL", "C")
        .stdin(if input { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
}

/// Reads a pipe on a thread of its own, so that no pipe can fill up and block the child: to its end, or until it has read so much and
/// closes it.
fn collect<R: Read + Send + 'static>(pipe: Option<R>, most: u64) -> Receiver<Vec<u8>> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(pipe) = pipe {
            // What was read before an error is all there is to say.
            drop(pipe.take(most).read_to_end(&mut bytes));
        }
        drop(sender.send(bytes));
    });
    receiver
}

fn receive(receiver: &Receiver<Vec<u8>>, deadline: Instant) -> Option<Vec<u8>> {
    receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok()
}

fn wait(child: &mut Child, deadline: Instant) -> Result<ExitStatus, String> {
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Ok(status),
            Ok(None) if Instant::now() < deadline => thread::sleep(Duration::from_micros(200)),
            Ok(None) => {
                stop(child);
                return Err("it closed its output and did not end".to_owned());
            }
            Err(error) => return Err(format!("its end cannot be awaited: {error}")),
        }
    }
}

fn stop(child: &mut Child) {
    // It may have ended by itself just now; waiting reaps it in either case.
    drop(child.kill());
    drop(child.wait());
}

/// What `nft` complained about, without the copy of the input it marks the place in.
fn complaint(status: ExitStatus, errors: &[u8]) -> String {
    let text = String::from_utf8_lossy(errors);
    let lines: Vec<&str> =
        text.lines().filter_map(|line| line.find("Error: ").map(|at| &line[at + "Error: ".len()..])).collect();
    match lines.as_slice() {
        [] if text.trim().is_empty() => format!("it failed with {status}"),
        [] => text.trim().to_owned(),
        [first] => (*first).to_owned(),
        // One refused command makes every other one of the transaction fail, too.
        [first, rest @ ..] => format!("{first} (and {} more messages)", rest.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, limit: Duration) -> Result<Vec<u8>, Error> {
        shell_up_to(script, limit, MOST_BYTES)
    }

    fn shell_up_to(script: &str, limit: Duration, most: u64) -> Result<Vec<u8>, Error> {
        let directory = tempdir();
        let path = directory.join("program");
        // Written by a process of its own: what another test forks meanwhile would inherit a descriptor of ours, and no
        // program runs that is open for writing.
        let write = r#"printf '#!/bin/sh\n%s\n' "$1" > "$0" && chmod 700 "$0""#;
        assert!(Command::new("sh").args(["-c", write, path.to_str().unwrap(), script]).status().unwrap().success());
        let input = Some("x".repeat(1 << 20));
        let task = Task { operation: "change", object: "it", arguments: &["-f", "-"], input };
        let result = execute(&task, path.to_str().unwrap(), limit, most);
        std::fs::remove_dir_all(directory).unwrap();
        result
    }

    fn tempdir() -> std::path::PathBuf {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("husk-nft-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        path
    }

    #[test]
    fn a_missing_program_names_the_package() {
        let task = Task { operation: "read", object: "it", arguments: &[], input: None };
        let error = execute(&task, "husk-no-such-program", TIME_LIMIT, MOST_BYTES).unwrap_err();
        assert_eq!(error.to_string(), "cannot read it: the program nft is not installed");
        assert_eq!(error.remedy(), "install the package nftables");
    }

    #[test]
    fn a_program_that_hangs_is_stopped() {
        let started = Instant::now();
        let error = shell("exec sleep 60", Duration::from_millis(200)).unwrap_err().to_string();
        assert!(error.contains("did not end"), "{error}");
        assert!(started.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn neither_unread_input_nor_long_output_blocks() {
        let output = shell("head -c 1000000 /dev/zero; head -c 1000000 /dev/zero >&2", TIME_LIMIT).unwrap();
        assert_eq!(output.len(), 1_000_000);
    }

    #[test]
    fn a_program_that_prints_more_than_there_is_memory_for_is_stopped() {
        let error = shell_up_to("exec cat /dev/zero", TIME_LIMIT, 1 << 20).unwrap_err().to_string();
        assert!(error.contains("it printed more than 1048576 bytes"), "{error}");
        assert_eq!(shell_up_to("head -c 1048576 /dev/zero", TIME_LIMIT, 1 << 20).unwrap().len(), 1 << 20);
    }

    #[test]
    fn a_failure_is_told_in_the_programs_words() {
        let script =
            "echo 'internal:0:0-0: Error: Could not process rule: File exists' >&2; echo 'Error: x' >&2; exit 1";
        let error = shell(script, TIME_LIMIT).unwrap_err().to_string();
        assert!(error.contains("Could not process rule: File exists (and 1 more"), "{error}");
    }
}
