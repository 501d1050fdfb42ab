//! A program that runs as long as the cluster does: started with a log of its own, ended by a signal, started again.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::host::lock;
use crate::netns;
use crate::patience;
use crate::process;

/// How long a program may take to end after a signal.
const TIME_LIMIT: Duration = Duration::from_secs(20);

/// Lines of a log in an error.
const LAST_LINES: usize = 12;

/// Where programs run.
#[derive(Debug)]
pub(super) struct Namespaces<'a> {
    pub(super) net: &'a File,
    pub(super) mounts: Option<&'a File>,
    pub(super) pids: Option<&'a File>,
}

/// The program, whether it runs or not.
#[derive(Debug)]
pub(super) struct Service {
    name: String,
    log: PathBuf,
    child: Mutex<Option<Child>>,
}

impl Service {
    /// A service that does not run yet; its log is in `directory`.
    pub(super) fn new(name: &str, directory: &Path) -> Self {
        Self { name: name.to_owned(), log: directory.join(format!("{name}.log")), child: Mutex::new(None) }
    }

    /// Starts it; its log is continued.
    pub(super) fn start<S: AsRef<OsStr>>(
        &self,
        place: &Namespaces<'_>,
        program: impl AsRef<OsStr>,
        arguments: impl IntoIterator<Item = S>,
    ) -> Result<()> {
        let mut child = lock(&self.child);
        ensure!(child.is_none(), "{} runs already", self.name);
        let log = OpenOptions::new().create(true).append(true).open(&self.log);
        let log = log.with_context(|| format!("opening {}", self.log.display()))?;
        let mut command = Command::new(program);
        // No proxy of the caller's may stand between the parts of a cluster, and no setting of etcd's or kubectl's come from
        // outside. A group of its own spares it the signals that a terminal sends to whoever called.
        command.args(arguments).env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        let started = netns::enter(place.net, place.mounts, || -> Result<Child> {
            if let Some(pids) = place.pids {
                // This concerns children only; the thread stays where it is.
                setns(pids, CloneFlags::CLONE_NEWPID).context("choosing the process namespace of a child")?;
            }
            Ok(command.spawn()?)
        })?;
        *child = Some(started.with_context(|| format!("starting {}", command.get_program().to_string_lossy()))?);
        Ok(())
    }

    /// Sends it a signal and waits for its end.
    pub(super) fn stop(&self, signal: Signal) -> Result<()> {
        let mut child = lock(&self.child).take().with_context(|| format!("{} does not run", self.name))?;
        // Not yet waited for, it owns its process id, be it dead.
        let _ = kill(Pid::from_raw(child.id().try_into()?), signal);
        let ended = process::wait(&mut child, patience(TIME_LIMIT))?;
        ended.with_context(|| format!("{} ignored {signal} for {TIME_LIMIT:?} and was killed", self.name)).map(drop)
    }

    /// An error, with the end of the log, when it does not run.
    pub(super) fn ensure_runs(&self) -> Result<()> {
        match lock(&self.child).as_mut().with_context(|| format!("{} was not started", self.name))?.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} ended by itself ({status}); {}", self.name, self.last_words()),
        }
    }

    /// True from start to stop.
    pub(super) fn was_started(&self) -> bool {
        lock(&self.child).is_some()
    }

    /// Where its log is.
    pub(super) fn log(&self) -> &Path {
        &self.log
    }

    /// The end of its log, for an error.
    pub(super) fn last_words(&self) -> String {
        let bytes = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().collect();
        format!("{} ends:\n{}", self.log.display(), lines[lines.len().saturating_sub(LAST_LINES)..].join("\n"))
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if let Some(mut child) = lock(&self.child).take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
