//! Programs: where ours are, running any with a time limit, and ending what lives in a namespace.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use crate::host::lock;
use crate::netns;
use crate::patience;
use crate::syscalls::{self, Interference, Traced};

/// How long a program may run unless told otherwise, before [`patience`].
pub const TIME_LIMIT: Duration = Duration::from_secs(10);

/// The path of one of Husk's programs, built next to the running one.
///
/// # Errors
/// When it has not been built; the error says how to.
pub fn binary(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().context("finding the path of the running program")?;
    own.ancestors()
        .skip(1)
        .take(3)
        .map(|directory| directory.join(name))
        .find(|candidate| candidate.is_file())
        .with_context(|| {
            let directory = own.parent().unwrap_or(Path::new("/")).display();
            format!("{name} was not found in {directory} or above: run `cargo build --workspace` or hack/test first")
        })
}

/// What a program that has ended said.
#[derive(Debug, Clone)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

/// A program with its arguments, input, time limit and place.
#[derive(Debug)]
pub struct Program<'a> {
    command: Command,
    stdin: Vec<u8>,
    limit: Duration,
    net: Option<&'a File>,
    mounts: Option<&'a File>,
}

impl<'a> Program<'a> {
    /// A program that will run in the caller's namespaces.
    #[must_use]
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self { command: Command::new(program), stdin: Vec::new(), limit: patience(TIME_LIMIT), net: None, mounts: None }
    }

    /// A program that waits, stopped, until it is traced.
    pub(crate) fn stopped(program: impl AsRef<OsStr>) -> Self {
        Self::new("/bin/sh").args([OsStr::new("-c"), OsStr::new(syscalls::STOPPED), program.as_ref()])
    }

    /// Appends arguments.
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.command.args(arguments);
        self
    }

    /// Replaces the whole environment.
    #[must_use]
    pub fn environment(mut self, variables: impl IntoIterator<Item = (String, OsString)>) -> Self {
        self.command.env_clear().envs(variables);
        self
    }

    /// Gives the program this standard input; it is empty otherwise.
    #[must_use]
    pub fn stdin(mut self, input: impl AsRef<[u8]>) -> Self {
        input.as_ref().clone_into(&mut self.stdin);
        self
    }

    /// Changes the time limit.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Runs it in a network namespace.
    #[must_use]
    pub fn in_netns(mut self, net: &'a File) -> Self {
        self.net = Some(net);
        self
    }

    /// Runs it in a mount namespace too.
    #[must_use]
    pub fn in_mounts(mut self, mounts: &'a File) -> Self {
        self.mounts = Some(mounts);
        self
    }

    /// Starts it without waiting; its standard output and standard error go to `log`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(mut self, log: &File) -> Result<Child> {
        let duplicate = || log.try_clone().context("duplicating the log file");
        self.command.stdin(Stdio::null()).stdout(duplicate()?).stderr(duplicate()?);
        self.start()
    }

    /// Runs it to its end, whatever its exit status.
    ///
    /// # Errors
    /// When it cannot be started, or does not end within the time limit and is killed.
    pub fn run(mut self) -> Result<Output> {
        let (input, limit, what) = (std::mem::take(&mut self.stdin), self.limit, self.to_string());
        // A group of its own, so that the time limit ends what the program started too.
        self.command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let mut child = self.start()?;
        let stdin = child.stdin.take();
        thread::spawn(move || {
            // A program need not read its input; a broken pipe is its right.
            stdin.map(|mut pipe| pipe.write_all(&input))
        });
        let stdout = child.stdout.take().map(Collector::start);
        let stderr = child.stderr.take().map(Collector::start);
        let status = wait(&mut child, limit).with_context(|| format!("waiting for `{what}`"))?;
        let text = |pipe: Option<Collector>| pipe.map(Collector::text).unwrap_or_default();
        let (stdout, stderr) = (text(stdout), text(stderr));
        match status {
            Some(status) => Ok(Output { status, stdout, stderr }),
            None => bail!("`{what}` did not end within {limit:?} and was killed; it said: {stdout}{stderr}"),
        }
    }

    /// Runs it to its end under ptrace; it must have been made by [`Program::stopped`].
    pub(crate) fn trace(mut self, interference: Option<Interference>) -> Result<Traced> {
        let (input, limit, what) = (std::mem::take(&mut self.stdin), self.limit, self.to_string());
        self.command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        syscalls::trace(self.start()?, &input, interference, limit).with_context(|| format!("tracing `{what}`"))
    }

    /// Runs it to success and returns its standard output.
    ///
    /// # Errors
    /// As [`Program::run`], and when the exit status is not 0.
    pub fn check(self) -> Result<String> {
        let what = self.to_string();
        let output = self.run()?;
        if !output.status.success() {
            bail!("`{what}` failed ({}): {}{}", output.status, output.stderr.trim(), output.stdout.trim());
        }
        Ok(output.stdout)
    }

    fn start(mut self) -> Result<Child> {
        let what = self.to_string();
        let (net, mounts) = (self.net, self.mounts);
        let started = match net {
            Some(net) => netns::enter(net, mounts, || self.command.spawn())?,
            None => self.command.spawn(),
        };
        started.with_context(|| format!("starting `{what}`"))
    }
}

impl std::fmt::Display for Program<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.command.get_program().to_string_lossy())?;
        self.command.get_args().try_for_each(|argument| write!(f, " {}", argument.to_string_lossy()))
    }
}

/// Waits for a child; none when it had to be killed, with its process group if it leads one, as the time was over.
///
/// # Errors
/// When the kernel does not let us wait.
pub fn wait(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    let mut pause = Duration::from_micros(200);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            // Without a group of its own there is none of this id, and nothing else is meant.
            let _ = killpg(Pid::from_raw(child.id().try_into()?), Signal::SIGKILL);
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(5));
    }
}

/// A process that was found in a namespace.
#[derive(Debug, Clone)]
pub struct Process {
    /// Its id.
    pub pid: Pid,
    /// Its arguments, separated by blanks.
    pub command: String,
}

impl Process {
    /// Sends it a signal.
    ///
    /// # Errors
    /// When it is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(self.pid, signal).with_context(|| format!("sending {signal} to {} ({})", self.pid, self.command))
    }
}

/// True while a process of this id runs. One that has ended and that nobody waits for, as in a container whose first process
/// does not, stays in the list for ever.
pub(crate) fn exists(pid: u32) -> bool {
    // The state follows the command in parentheses, which may hold any characters (proc(5)).
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")).unwrap_or_default();
    stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().next()).is_some_and(|state| state != "Z")
}

/// The processes whose network namespace is `net`, except this one.
pub(crate) fn in_netns(net: &File) -> Vec<Process> {
    let Ok(wanted) = net.metadata() else { return Vec::new() };
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let lives_there = |directory: &Path| {
        fs::metadata(directory.join("ns/net")).is_ok_and(|it| (it.dev(), it.ino()) == (wanted.dev(), wanted.ino()))
    };
    entries
        .flatten()
        .filter_map(|entry| Some((entry.path(), entry.file_name().to_str()?.parse::<i32>().ok()?)))
        .filter(|(path, pid)| Pid::from_raw(*pid) != Pid::this() && lives_there(path))
        .map(|(path, pid)| {
            let arguments = fs::read(path.join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&arguments).trim_end_matches('\0').replace('\0', " ");
            Process { pid: Pid::from_raw(pid), command }
        })
        .collect()
}

/// Ends every process in a namespace, those included that detached themselves.
pub(crate) fn end_all_in_netns(net: &File) -> Result<()> {
    let deadline = Instant::now() + patience(Duration::from_secs(5));
    loop {
        let remaining = in_netns(net);
        if remaining.is_empty() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            bail!("processes do not end: {remaining:?}");
        }
        for process in remaining {
            // Gone in between is what is wanted.
            let _ = kill(process.pid, Signal::SIGKILL);
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// What comes out of a pipe, read by a thread.
struct Collector {
    bytes: Arc<Mutex<Vec<u8>>>,
    ended: mpsc::Receiver<()>,
}

impl Collector {
    fn start(mut pipe: impl Read + Send + 'static) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let (sender, ended) = mpsc::channel();
        let collected = Arc::clone(&bytes);
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = pipe.read(&mut buffer) {
                lock(&collected).extend_from_slice(&buffer[..length]);
            }
            sender.send(())
        });
        Self { bytes, ended }
    }

    /// Everything, once the program has ended; a detached descendant may hold the pipe open for good.
    fn text(self) -> String {
        let _ = self.ended.recv_timeout(Duration::from_secs(1));
        String::from_utf8_lossy(&lock(&self.bytes)).into_owned()
    }
}
