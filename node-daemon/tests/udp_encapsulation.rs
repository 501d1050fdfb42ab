//! The process that keeps the socket for ESP in UDP open, in a network namespace made for each test. Needs root and
//! unshare(1).

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests may fail like tests")]

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use husk_node_daemon::companion::{Answer, Job, Process};
use husk_overlay::prefix::Family;

const HUSKD: &str = env!("CARGO_BIN_EXE_huskd");
const LIMIT: Duration = Duration::from_secs(20);

fn job(port: u16) -> Job {
    Job::UdpEncapsulation { port, family: Family::Ipv4 }
}

/// Ends with the test, however it does.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(run_directory: &Path, port: u16) -> Running {
    let mut command = Command::new("unshare");
    command.args(["--net", HUSKD, "udp-encapsulation", "--port", &port.to_string(), "--run-directory"]);
    let child =
        command.arg(run_directory).stderr(Stdio::piped()).spawn().expect("unshare(1) of util-linux is installed");
    Running(child)
}

fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < end, "did not happen within {LIMIT:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn the_process_is_found_and_ended_by_whoever_knows_its_run_directory() {
    let directory = tempfile::tempdir().unwrap();
    let process = Process::new(&job(4500), directory.path());
    assert_eq!((process.ask(), process.runs().unwrap()), (Answer::Absent, false));
    let mut running = start(directory.path(), 4500);
    eventually("it is ready", || process.ask() == Answer::Alive);
    assert_eq!(Process::new(&job(4501), directory.path()).ask(), Answer::Hangs, "it serves another port");
    let sockets = std::fs::read_to_string(format!("/proc/{}/net/udp", running.0.id())).unwrap();
    assert!(sockets.contains("00000000:1194"), "it listens on port 4500: {sockets}");

    let mut second = start(directory.path(), 4500);
    let status = second.0.wait().unwrap();
    let mut said = String::new();
    std::io::Read::read_to_string(second.0.stderr.as_mut().unwrap(), &mut said).unwrap();
    assert!(!status.success() && said.contains("already serves ESP in UDP"), "{said}");

    // Reaped as soon as it ends, so that nobody takes its id for a process.
    let reaper = std::thread::spawn(move || running.0.wait().unwrap());
    assert!(process.stop().unwrap());
    assert!(reaper.join().unwrap().success(), "it ends as it was asked to");
    assert_eq!((process.ask(), process.runs().unwrap()), (Answer::Absent, false));
    assert!(!process.stop().unwrap());
}

#[test]
fn one_that_was_killed_leaves_nothing_in_the_way() {
    let directory = tempfile::tempdir().unwrap();
    let process = Process::new(&job(4500), directory.path());
    let mut running = start(directory.path(), 4500);
    eventually("it is ready", || process.ask() == Answer::Alive);
    running.0.kill().unwrap();
    running.0.wait().unwrap();
    assert_eq!(process.ask(), Answer::Absent);
    let _again = start(directory.path(), 4500);
    eventually("another one is ready", || process.ask() == Answer::Alive);
    assert!(process.kill().unwrap());
}
