//! The daemon of a host: start, readiness, log, end.

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::{Host, lock};
use crate::process;
use crate::{eventually, patience};

/// How long a daemon may take until pods can be added, and to end after a signal.
const TIME_LIMIT: Duration = Duration::from_secs(15);

/// How long a peer may take that is missed: until its next probe, and the pass after it.
const ANSWERED: Duration = Duration::from_secs(30);

/// Lines of the daemon's log in an error.
const LAST_LINES: usize = 25;

impl Host {
    /// Installs the plugin and starts the daemon without waiting until it is ready.
    ///
    /// # Errors
    /// When one of the two has not been built, or the daemon runs already.
    pub fn start(&self) -> Result<()> {
        self.install_plugin()?;
        self.start_daemon()
    }

    /// Starts the daemon without waiting until it is ready.
    ///
    /// # Errors
    /// When it has not been built, or runs already.
    pub fn start_daemon(&self) -> Result<()> {
        let mut daemon = lock(&self.daemon);
        if daemon.is_some() {
            bail!("the daemon of {} runs already", self.name());
        }
        let path = self.log_path();
        let log = OpenOptions::new().create(true).append(true).open(&path);
        let log = log.with_context(|| format!("opening {}", path.display()))?;
        let program = self.program(process::binary("huskd")?);
        *daemon = Some(program.args(["run", "--config", "/etc/husk/config.yaml"]).spawn(&log)?);
        Ok(())
    }

    /// Sends the daemon a signal and waits for its end.
    ///
    /// # Errors
    /// When none runs, or it does not end in time (it is killed then).
    pub fn stop_daemon(&self, signal: Signal) -> Result<ExitStatus> {
        let name = self.name();
        let mut child = lock(&self.daemon).take().with_context(|| format!("no daemon runs on {name}"))?;
        let pid = Pid::from_raw(child.id().try_into().context("a process id beyond i32")?);
        kill(pid, signal).with_context(|| format!("sending {signal} to the daemon of {name}"))?;
        let status = process::wait(&mut child, patience(TIME_LIMIT))?;
        status.with_context(|| {
            format!(
                "the daemon of {name} ignored {signal} for {:?}; its log ends:\n{}",
                patience(TIME_LIMIT),
                self.log_end()
            )
        })
    }

    /// Ends the daemon with a signal, starts it again and waits until it is ready.
    ///
    /// # Errors
    /// When one of the three fails.
    pub fn restart_daemon(&self, signal: Signal) -> Result<()> {
        self.stop_daemon(signal)?;
        self.start_daemon()?;
        self.wait_ready()
    }

    /// Waits until pods can be added: `node.json` and conflist are there and the plugin's STATUS is content.
    ///
    /// # Errors
    /// When the daemon ends, or is not ready in time; the error carries the end of its log.
    pub fn wait_ready(&self) -> Result<()> {
        let mut last = "no node.json or no conflist".to_owned();
        let ready = eventually("the daemon to be ready", TIME_LIMIT, || {
            if let Some(status) = self.daemon_status()? {
                bail!("the daemon ended by itself ({status})");
            }
            // As the host sees it: a test may have mounted something there.
            let node_file = self.run(|| Path::new("/run/husk/node.json").exists())?;
            if !node_file || !self.conflist_path().exists() {
                return Ok(false);
            }
            let outcome = self.cni_status()?;
            last = format!("STATUS says {}", outcome.stdout.trim());
            Ok(outcome.success())
        });
        ready.with_context(|| format!("on {} ({last}); its log ends:\n{}", self.name(), self.log_end()))
    }

    /// The daemon has nothing to do and nothing to complain about, and nothing came or went in plaintext or from strangers.
    ///
    /// # Errors
    /// What is not so.
    pub fn ensure_settled(&self) -> Result<()> {
        let name = self.name();
        self.await_answers()?;
        let diff = self.huskctl(["diff"])?;
        ensure!(diff.status.code() == Some(0), "{name}: {}{}", diff.stdout, diff.stderr);
        let status = self.huskctl_json(["status"])?;
        ensure!(status["ready"] == true && status["issues"] == json!([]), "{name}: {status:#}");
        for counter in ["plaintext_in", "plaintext_out", "unknown_vtep"] {
            ensure!(status["counters"][counter]["packets"].as_u64().unwrap_or(0) == 0, "{name}: {status:#}");
        }
        Ok(())
    }

    /// Waits until the daemon misses no peer: one that was away, or busy, is missed until its next probe is answered.
    ///
    /// # Errors
    /// When a peer goes on not to answer.
    pub fn await_answers(&self) -> Result<()> {
        let mut missed = Vec::new();
        let answered = eventually("every peer to answer", ANSWERED, || {
            missed = self.issues("PeerSilent")?;
            Ok(missed.is_empty())
        });
        answered.with_context(|| format!("{}: {missed:?}", self.name()))
    }

    /// What `huskctl status` finds wrong of a kind, `PathMtu` for example.
    ///
    /// # Errors
    /// When the daemon does not answer.
    pub fn issues(&self, kind: &str) -> Result<Vec<Value>> {
        let status = self.huskctl_json(["status"])?;
        let issues = status["issues"].as_array().with_context(|| format!("a status without issues: {status:#}"))?;
        Ok(issues.iter().filter(|issue| issue["kind"] == kind).cloned().collect())
    }

    /// How the daemon ended, if it ended by itself; an error when it was never started.
    ///
    /// # Errors
    /// When none was started.
    pub fn daemon_status(&self) -> Result<Option<ExitStatus>> {
        let mut daemon = lock(&self.daemon);
        let child = daemon.as_mut().with_context(|| format!("no daemon was started on {}", self.name()))?;
        Ok(child.try_wait()?)
    }

    /// Everything the host's daemons have logged so far.
    #[must_use]
    pub fn daemon_log(&self) -> String {
        fs::read(self.log_path()).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Path of the daemon's log.
    #[must_use]
    pub fn log_path(&self) -> PathBuf {
        self.file("huskd.log")
    }

    /// Path, from outside, of the CNI configuration that the daemon writes.
    #[must_use]
    pub fn conflist_path(&self) -> PathBuf {
        self.place.conflist_path()
    }

    pub(super) fn log_end(&self) -> String {
        let log = self.daemon_log();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(LAST_LINES)..].join("\n")
    }
}
