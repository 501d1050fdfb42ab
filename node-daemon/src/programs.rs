//! Programs of others, run within limits of time and size: one that hangs or never stops talking costs what it was asked for, and
//! nothing else.

use std::io::{self, Read};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// Where to look for programs besides the caller's PATH, which may lack those of administrators.
const PROGRAMS: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Pause between looks at a program that has closed its output and is about to end.
const POLL: Duration = Duration::from_millis(5);

/// Most of a program's complaints that is kept, in bytes.
const COMPLAINT: u64 = 2 << 10;

/// Limits of one run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Time the program may take.
    pub(crate) time: Duration,
    /// Most bytes of its output that are kept.
    pub(crate) bytes: u64,
}

/// Which part is kept where there is too much.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keep {
    /// The beginning; the program is not waited for any longer than that.
    Beginning,
    /// The end.
    End,
}

/// What a program wrote, as far as it is kept.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Kept {
    pub(crate) content: Vec<u8>,
    /// There is more of it.
    pub(crate) truncated: bool,
}

/// A program that has ended.
#[derive(Debug)]
pub(crate) struct Ran {
    /// Its standard output.
    pub(crate) output: Kept,
    /// What it wrote on standard error, the beginning, trimmed.
    pub(crate) complaint: String,
    /// Its exit status; none if a signal ended it.
    pub(crate) status: Option<i32>,
}

/// Why a program did not do its work.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error("{0} is not installed")]
    Missing(String),
    #[error("cannot start {0}: {1}")]
    Start(String, io::Error),
    #[error("{0} took longer than {1} s, and was stopped")]
    TookLonger(String, f64),
}

/// The caller's PATH and [`PROGRAMS`].
pub(crate) fn search_path() -> String {
    std::env::var("PATH").map_or_else(|_| PROGRAMS.to_owned(), |path| format!("{path}:{PROGRAMS}"))
}

/// How a shell finds this very program: by the name alone where that leads to it, else by its path.
pub(crate) fn own_name(name: &str) -> String {
    let Ok(own) = std::env::current_exe().and_then(std::fs::canonicalize) else { return name.to_owned() };
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|directory| directory.join(name)).find(|it| it.is_file());
    let leads_here = found.is_some_and(|found| std::fs::canonicalize(found).is_ok_and(|found| found == own));
    if leads_here { name.to_owned() } else { own.display().to_string() }
}

/// Runs a program to its end. What is left of it when its time is over is killed, with all that it has started.
///
/// # Errors
/// When it is not there, cannot be started or takes too long; not when it fails.
pub(crate) fn run(command: &mut Command, keep: Keep, limits: Limits) -> Result<Ran, Failure> {
    let name = Path::new(command.get_program()).display().to_string();
    let over = Instant::now() + limits.time;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // A group of its own, so that what it started can be ended too.
        .process_group(0)
        .spawn()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Failure::Missing(name.clone()),
            _ => Failure::Start(name.clone(), error),
        })?;
    let output = reader(child.stdout.take(), move |out| match keep {
        Keep::Beginning => first(out, limits.bytes),
        Keep::End => last(out, limits.bytes),
    });
    let complaint = reader(child.stderr.take(), |out| first(out, COMPLAINT));
    let output = output.recv_timeout(limits.time);
    let (Ok(output), Some(status)) = (output, wait(&mut child, over)) else {
        return Err(Failure::TookLonger(name, limits.time.as_secs_f64()));
    };
    // Something that it has left behind may hold the pipe open.
    let complaint = complaint.recv_timeout(over.saturating_duration_since(Instant::now()));
    let complaint = complaint.map(|it| String::from_utf8_lossy(&it.content).trim().to_owned()).unwrap_or_default();
    Ok(Ran { output, complaint, status })
}

/// Reads a pipe on a thread of its own, which ends with the program.
fn reader(
    pipe: Option<impl Read + Send + 'static>,
    read: impl FnOnce(&mut dyn Read) -> Kept + Send + 'static,
) -> mpsc::Receiver<Kept> {
    let (sender, receiver) = mpsc::channel();
    if let Some(mut pipe) = pipe {
        // Nobody waits for what came too late.
        thread::spawn(move || drop(sender.send(read(&mut pipe))));
    }
    receiver
}

/// The beginning; the pipe is closed after that.
fn first(pipe: &mut dyn Read, most: u64) -> Kept {
    let mut content = Vec::new();
    let _ = pipe.take(most + 1).read_to_end(&mut content);
    let truncated = content.len() as u64 > most;
    content.truncate(usize::try_from(most).unwrap_or(usize::MAX));
    Kept { content, truncated }
}

/// The end; never holds more than twice as much.
fn last(pipe: &mut dyn Read, most: u64) -> Kept {
    let most = usize::try_from(most).unwrap_or(usize::MAX);
    let (mut content, mut truncated) = (Vec::new(), false);
    while Read::take(&mut *pipe, most as u64).read_to_end(&mut content).is_ok_and(|read| read > 0) {
        if content.len() > most {
            content.drain(..content.len() - most);
            truncated = true;
        }
    }
    Kept { content, truncated }
}

/// The exit status of a program whose output is read; it is killed when its time is over. The inner one is none if a signal
/// ended it, the outer one if it did not end in time.
fn wait(child: &mut Child, over: Instant) -> Option<Option<i32>> {
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status.code()),
            Ok(None) if Instant::now() < over => thread::sleep(POLL),
            _ => break,
        }
    }
    if let Ok(id) = i32::try_from(child.id()) {
        let _ = killpg(Pid::from_raw(id), Signal::SIGKILL);
    }
    let _ = child.wait();
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Limits = Limits { time: Duration::from_millis(200), bytes: 1000 };
    const LONG: Limits = Limits { time: Duration::from_secs(60), bytes: 1000 };

    fn shell(script: &str, keep: Keep, limits: Limits) -> Result<Ran, String> {
        run(Command::new("sh").args(["-c", script]), keep, limits).map_err(|failure| failure.to_string())
    }

    #[test]
    fn one_that_hangs_is_ended_with_all_that_it_has_started() {
        // The second one leaves another behind that holds the pipe, the third one has closed it.
        for script in ["sleep 600", "sleep 600 & sleep 600", "exec >&- 2>&-; sleep 600"] {
            let error = shell(script, Keep::Beginning, SHORT).unwrap_err();
            assert_eq!(error, "sh took longer than 0.2 s, and was stopped", "{script}");
        }
    }

    #[test]
    fn what_it_says_is_bounded_and_its_status_told() {
        let count = "i=0; while [ $i -lt 1000 ]; do echo line $i; i=$((i+1)); done";
        let beginning = shell(count, Keep::Beginning, LONG).unwrap().output;
        assert!(beginning.truncated && beginning.content.starts_with(b"line 0\n") && beginning.content.len() == 1000);
        let end = shell(count, Keep::End, LONG).unwrap().output;
        assert!(end.truncated && end.content.ends_with(b"line 999\n") && end.content.len() == 1000);
        let failed = shell("echo no such thing >&2; exit 7", Keep::Beginning, LONG).unwrap();
        assert_eq!((failed.complaint.as_str(), failed.status), ("no such thing", Some(7)));
        let missing = run(&mut Command::new("/nonexistent"), Keep::Beginning, LONG).unwrap_err();
        assert_eq!(missing.to_string(), "/nonexistent is not installed");
    }

    #[test]
    fn a_program_that_no_shell_would_find_is_named_by_its_path() {
        let own = std::env::current_exe().unwrap();
        assert_eq!(own_name("huskctl"), std::fs::canonicalize(own).unwrap().display().to_string());
    }
}
