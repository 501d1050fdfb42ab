//! A program that makes much and must leave nothing: one process does the work, the other waits for it, passes signals on, and
//! removes what is left when the first has ended in whatever way. So a panic, Ctrl-C or a kill leaves nothing behind.

use std::process::{Child, Command, ExitStatus};

use anyhow::{Context, Result};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use crate::scope;

/// The signals by which people and machines end a program.
const ENDING: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];

/// What became of the work.
#[derive(Debug)]
pub struct Supervised {
    /// Id of the process that did it.
    pub worker: u32,
    /// How the process that did it ended.
    pub status: ExitStatus,
    /// True if a signal demanded its end.
    pub interrupted: bool,
    /// What it left and did not mean to keep; removed by now.
    pub swept: Vec<String>,
}

/// Runs this program once more, with the same arguments and `argument`, and looks after that process.
///
/// # Errors
/// When it cannot be started, or what it left cannot be removed.
pub fn supervise(argument: &str) -> Result<Supervised> {
    let mut awaited: SigSet = ENDING.into_iter().collect();
    awaited.add(Signal::SIGCHLD);
    awaited.thread_block().context("blocking signals")?;
    // What detached itself, as the userspace WireGuard device does, becomes this process's child when its parent ends. In a
    // container without an init nobody else would wait for it.
    prctl::set_child_subreaper(true).context("becoming the parent of orphans")?;
    let own = std::env::current_exe().context("finding the path of this program")?;
    let mut worker = Command::new(own)
        .args(std::env::args_os().skip(1))
        .arg(argument)
        .spawn()
        .context("starting the process that does the work")?;
    let (status, interrupted) = wait(&mut worker, &awaited)?;
    let swept = scope::sweep().context("removing what was left")?;
    while matches!(waitpid(None, Some(WaitPidFlag::WNOHANG)), Ok(ended) if ended.pid().is_some()) {}
    Ok(Supervised { worker: worker.id(), status, interrupted, swept })
}

/// To be called by the process that does the work: an ending signal simply ends it. The other blocked them for itself, and a
/// child inherits that.
///
/// # Errors
/// When the kernel refuses.
pub fn unblock_signals() -> Result<()> {
    SigSet::all().thread_unblock().context("unblocking signals")
}

/// Waits for the worker's end; true if a signal demanded it.
fn wait(worker: &mut Child, awaited: &SigSet) -> Result<(ExitStatus, bool)> {
    let mut interrupted = false;
    loop {
        if let Some(status) = worker.try_wait()? {
            return Ok((status, interrupted));
        }
        let signal = awaited.wait().context("waiting for a signal")?;
        if ENDING.contains(&signal) {
            interrupted = true;
            // Ctrl-C went to both. Not yet waited for, the worker still owns its process id.
            let _ = kill(Pid::from_raw(i32::try_from(worker.id())?), Signal::SIGTERM);
        }
    }
}
