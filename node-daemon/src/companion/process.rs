//! The life of the process as its parent and its peers see it: starting, finding, asking, ending.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use zeroize::Zeroizing;

use super::job::Job;

/// A log of this size is emptied before the next start; the file lives in memory.
const LOG_LIMIT: u64 = 256 * 1024;

/// How often something another process does is looked for.
const POLL: Duration = Duration::from_millis(5);

/// How long a process may take to answer a question: it does so within milliseconds.
const ANSWER_LIMIT: Duration = Duration::from_secs(1);

/// How long a process may take to end after SIGTERM before it gets SIGKILL, and after that.
const STOP_PATIENCE: Duration = Duration::from_secs(3);

/// What a process says when it is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// It works.
    Alive,
    /// Nobody listens on the control socket.
    Absent,
    /// Somebody listens and does not answer within a second.
    Hangs,
}

/// The process that does a job, running or not.
#[derive(Debug, Clone)]
pub struct Process {
    job: Job,
    /// Directory of its lock and its log.
    directory: PathBuf,
}

/// Makes a directory that only root may look into, with its parents. One that exists stays as it is.
pub(crate) fn private_directory(path: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("cannot create {}", path.display()))
}

impl Process {
    /// The process of the daemon with that run directory.
    #[must_use]
    pub fn new(job: &Job, run_directory: &Path) -> Self {
        // The process works in another directory than who starts it.
        let run_directory = std::path::absolute(run_directory).unwrap_or_else(|_| run_directory.to_owned());
        Self { job: job.clone(), directory: run_directory.join(job.directory()) }
    }

    /// Where a process from [`Self::spawn`] writes what it has to say.
    #[must_use]
    pub fn log_path(&self) -> PathBuf {
        self.directory.join(format!("{}.log", self.job.stem()))
    }

    pub(super) fn job(&self) -> &Job {
        &self.job
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(super) fn lock_path(&self) -> PathBuf {
        self.directory.join(format!("{}.lock", self.job.stem()))
    }

    /// Starts the process so that nothing that happens to the caller reaches it: it leads a session of its own by the time
    /// [`Self::wait_ready`] returns, and its output goes to a file, because a pipe that nobody reads would stop it.
    ///
    /// The process makes the session itself. It must not be given a process group here: a group's leader may not do that.
    ///
    /// Dropping the returned child does not end the process; should it end before the caller does, the runtime reaps it. A
    /// service manager that kills the whole control group on stop (systemd's default) needs `KillMode=process`.
    ///
    /// # Errors
    /// When the log file or the process cannot be made.
    pub fn spawn(&self, program: &Path) -> Result<Child> {
        private_directory(&self.directory)?;
        let log = self.open_log()?;
        let run_directory = self.directory.parent().unwrap_or(Path::new("/"));
        Command::new(program)
            // The program may be named `/proc/self/exe`, which tells nobody who it is.
            .arg0("huskd")
            .arg(self.job.subcommand())
            .args(self.job.arguments())
            .arg("--run-directory")
            .arg(run_directory)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .kill_on_drop(false)
            .spawn()
            .with_context(|| format!("cannot start {} as {}", program.display(), self.job))
    }

    fn open_log(&self) -> Result<File> {
        let path = self.log_path();
        let open = || -> std::io::Result<File> {
            let file = OpenOptions::new().create(true).append(true).mode(0o600).open(&path)?;
            if file.metadata()?.len() > LOG_LIMIT {
                file.set_len(0)?;
            }
            Ok(file)
        };
        open().with_context(|| format!("cannot open {}", path.display()))
    }

    /// Waits until a process from [`Self::spawn`] answers.
    ///
    /// # Errors
    /// When it ends first, with the last line of its log, or does not answer within `limit`.
    pub async fn wait_ready(&self, child: &mut Child, limit: Duration) -> Result<()> {
        let job = &self.job;
        let end = Instant::now() + limit;
        loop {
            if let Some(status) = child.try_wait().with_context(|| format!("cannot look after the {job}"))? {
                let said = std::fs::read_to_string(self.log_path()).unwrap_or_default();
                let last = said.lines().next_back().unwrap_or("it logged nothing");
                bail!("the {job} ended with {status}: {last}");
            }
            if self.ask() == Answer::Alive {
                return Ok(());
            }
            if Instant::now() >= end {
                bail!("the {job} did not answer within {limit:?}");
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Asks a device for its configuration (`get=1`), and waits for the beginning of the answer: at most a second. A
    /// connection alone proves nothing, as the kernel accepts it for a process that is stopped. Of a process without a
    /// socket counts what it wrote into its lock file; one that does another job than this is as bad as one that hangs.
    #[must_use]
    pub fn ask(&self) -> Answer {
        if let Some(socket) = self.job.socket() {
            return ask(&socket, ANSWER_LIMIT);
        }
        match self.locked() {
            Ok(Some(said)) => match said.lines().nth(1) {
                Some(line) if line == self.job.ready_line() => Answer::Alive,
                Some(_) => Answer::Hangs,
                None => Answer::Absent,
            },
            Ok(None) | Err(_) => Answer::Absent,
        }
    }

    /// True if the process runs, whether it answers or not.
    ///
    /// # Errors
    /// When its lock file cannot be read.
    pub fn runs(&self) -> Result<bool> {
        Ok(self.holder()?.is_some())
    }

    /// Ends the process, wherever it came from, and waits until its device, if it has one, is gone with it. False if there
    /// was none.
    ///
    /// # Errors
    /// When it does not end.
    pub fn stop(&self) -> Result<bool> {
        self.end(&[Signal::SIGTERM, Signal::SIGKILL])
    }

    /// As [`Self::stop`], for a process that hangs and could not act upon a request to end.
    ///
    /// # Errors
    /// When it does not end.
    pub fn kill(&self) -> Result<bool> {
        self.end(&[Signal::SIGKILL])
    }

    fn end(&self, signals: &[Signal]) -> Result<bool> {
        let mut ran = false;
        for signal in signals {
            let Some(holder) = self.holder()? else { return Ok(ran) };
            ran = true;
            // A process that ended in between is what is wanted.
            let _ = nix::sys::signal::kill(holder, *signal);
            let end = Instant::now() + STOP_PATIENCE;
            while Instant::now() < end {
                // A process that ends gives up the lock a moment before its last descriptor of the device.
                if self.holder()?.is_none() && self.job.is_there() != Some(true) {
                    return Ok(true);
                }
                std::thread::sleep(POLL);
            }
        }
        if self.holder()?.is_none() {
            return Ok(ran);
        }
        bail!("the {} does not end", self.job)
    }

    /// The process that holds the lock.
    fn holder(&self) -> Result<Option<Pid>> {
        let Some(said) = self.locked()? else { return Ok(None) };
        let pid = said.lines().next().and_then(|line| line.trim().parse().ok());
        Ok(pid.filter(|pid| *pid > 1 && self.is_done_by(*pid)).map(Pid::from_raw))
    }

    /// What stands in the lock file; none if nobody holds the lock.
    fn locked(&self) -> Result<Option<String>> {
        let path = self.lock_path();
        let mut file = match File::open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            file => file.with_context(|| format!("cannot open {}", path.display()))?,
        };
        // A process that starts in this very moment waits for us: see `Ownership::take`.
        match file.try_lock_shared() {
            Ok(()) => Ok(None),
            Err(TryLockError::WouldBlock) => {
                let mut text = String::new();
                file.read_to_string(&mut text).with_context(|| format!("cannot read {}", path.display()))?;
                Ok(Some(text))
            }
            Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
        }
    }

    /// A process that has just taken the lock has not written its id yet: what stands there may be the id of a process long
    /// gone, which somebody else has by now.
    fn is_done_by(&self, pid: i32) -> bool {
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        command.split(|byte| *byte == 0).any(|word| word == self.job.subcommand().as_bytes())
    }
}

fn ask(path: &Path, limit: Duration) -> Answer {
    let connected = || -> nix::Result<UnixStream> {
        let address = UnixAddr::new(path)?;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let asker = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        connect(asker.as_raw_fd(), &address)?;
        Ok(UnixStream::from(asker))
    };
    let mut stream = match connected() {
        Ok(stream) => stream,
        // The queue of connections is full, and nobody takes one.
        Err(Errno::EAGAIN) => return Answer::Hangs,
        Err(_) => return Answer::Absent,
    };
    let mut question = || -> std::io::Result<usize> {
        stream.set_nonblocking(false)?;
        stream.set_write_timeout(Some(limit))?;
        stream.set_read_timeout(Some(limit))?;
        stream.write_all(b"get=1\n\n")?;
        // The answer begins with the private key. Who closes before its end is nothing unusual for the process.
        let mut beginning = Zeroizing::new([0; 16]);
        stream.read(&mut *beginning)
    };
    match question() {
        Ok(1..) => Answer::Alive,
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {
            Answer::Hangs
        }
        // It ended while it was asked.
        Ok(0) | Err(_) => Answer::Absent,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    const SHORT: Duration = Duration::from_millis(50);

    #[test]
    fn a_connection_that_nobody_answers_is_a_process_that_hangs() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("husk-wg0.sock");
        assert_eq!(ask(&path, SHORT), Answer::Absent);
        let listener = UnixListener::bind(&path).unwrap();
        assert_eq!(ask(&path, SHORT), Answer::Hangs);
        drop(listener);
        assert_eq!(ask(&path, SHORT), Answer::Absent, "the socket file of a dead process");
    }

    #[test]
    fn an_answer_of_any_length_is_life() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("husk-wg0.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let mut asked = [0; 7];
            let (mut stream, _) = listener.accept().unwrap();
            stream.read_exact(&mut asked).unwrap();
            stream.write_all(b"errno=0\n\n").unwrap();
            asked
        });
        assert_eq!(ask(&path, Duration::from_secs(10)), Answer::Alive);
        assert_eq!(&server.join().unwrap(), b"get=1\n\n");
    }

    #[test]
    fn a_lock_held_by_something_else_names_no_process() {
        let directory = tempfile::tempdir().unwrap();
        let job = Job::WireguardUserspace { interface: "husk-wg0".parse().unwrap() };
        let process = Process::new(&job, directory.path());
        assert!(!process.stop().unwrap());
        private_directory(process.directory()).unwrap();
        let file = File::create(process.lock_path()).unwrap();
        file.try_lock().unwrap();
        // The id of a process that is no device's must never get a signal.
        (&file).write_all(std::process::id().to_string().as_bytes()).unwrap();
        assert_eq!(process.holder().unwrap(), None);
    }

    #[test]
    fn a_process_without_a_socket_is_alive_when_it_says_that_it_does_this_job() {
        let directory = tempfile::tempdir().unwrap();
        let at = |port| Job::UdpEncapsulation { port, family: husk_overlay::prefix::Family::Ipv4 };
        let process = Process::new(&at(4500), directory.path());
        assert_eq!(process.ask(), Answer::Absent);
        let mut ownership = crate::companion::Ownership::take(&process).unwrap();
        assert_eq!(process.ask(), Answer::Absent, "it is starting");
        ownership.ready().unwrap();
        assert_eq!(process.ask(), Answer::Alive);
        assert_eq!(Process::new(&at(4501), directory.path()).ask(), Answer::Hangs, "at another port");
        drop(ownership);
        assert_eq!(process.ask(), Answer::Absent);
    }
}
