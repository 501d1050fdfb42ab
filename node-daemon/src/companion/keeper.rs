//! The daemon's part: a companion runs, and answers, or is started anew.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::job::Job;
use super::process::{Answer, Process};
use crate::tunnels;

/// The program that runs: the file it came from may have been replaced or removed, by an upgrade for example.
pub(crate) const OWN_PROGRAM: &str = "/proc/self/exe";

/// How long a process may take from its start to its first answer.
pub(crate) const START_PATIENCE: Duration = Duration::from_secs(5);

/// How long an answer counts. A process that ends gives up its lock, or takes its device with it, which is looked for every
/// time.
const FRESH: Duration = Duration::from_secs(1);

/// Questions in a row that stay without an answer before the process is ended: it may only be short of processor time.
const QUESTIONS: u32 = 3;

/// Pause between questions to a process that runs and does not listen, as one does that is just starting.
const STARTING: Duration = Duration::from_millis(200);

/// How companions are started.
#[derive(Debug, Clone)]
pub struct Companions {
    /// Where their locks and logs are.
    pub run_directory: PathBuf,
    /// What reaps them.
    pub runtime: tokio::runtime::Handle,
    /// Socket of the process that starts them, where they have to outlive the daemon's container; none: they are children.
    pub tunnels: Option<PathBuf>,
}

/// Keeps the companions of a daemon.
pub struct Keeper {
    companions: Companions,
    /// When a companion last answered.
    answered: BTreeMap<Job, Instant>,
}

impl Keeper {
    /// Starts companions in this way, when they are needed.
    #[must_use]
    pub fn new(companions: Companions) -> Self {
        Self { companions, answered: BTreeMap::new() }
    }

    /// Makes sure that the process runs and answers. One that hangs is killed, and started like one that is missing. Takes
    /// some milliseconds when all is well, seconds otherwise.
    ///
    /// # Errors
    /// When the process does not start, or cannot be ended.
    pub fn ensure(&mut self, job: &Job) -> Result<()> {
        let process = Process::new(job, &self.companions.run_directory);
        let fresh = self.answered.get(job).is_some_and(|at| at.elapsed() < FRESH);
        if fresh && job.is_there().map_or_else(|| process.runs(), Ok)? {
            return Ok(());
        }
        self.answered.remove(job);
        match ask_repeatedly(&process)? {
            Answer::Alive => {}
            Answer::Absent => self.start(&process, job)?,
            Answer::Hangs => {
                tracing::error!("the {job} does not do its job; it is killed and started anew");
                if !process.kill()? {
                    let place = job.socket().map_or_else(|| job.subject(), |socket| socket.display().to_string());
                    bail!("a process that Husk did not start serves {place} and does not answer; end it");
                }
                self.start(&process, job)?;
            }
        }
        self.answered.insert(job.clone(), Instant::now());
        Ok(())
    }

    /// Ends the process; false if there was none.
    ///
    /// # Errors
    /// When it does not end.
    pub fn stop(&mut self, job: &Job) -> Result<bool> {
        self.answered.remove(job);
        Process::new(job, &self.companions.run_directory).stop()
    }

    fn start(&self, process: &Process, job: &Job) -> Result<()> {
        if let Some(socket) = &self.companions.tunnels {
            tunnels::ask_to_start(socket, job)?;
            tracing::info!("had the {job} started");
            return Ok(());
        }
        let runtime = &self.companions.runtime;
        let _runtime = runtime.enter();
        let mut child = process.spawn(Path::new(OWN_PROGRAM))?;
        let pid = child.id();
        runtime.block_on(process.wait_ready(&mut child, START_PATIENCE))?;
        tracing::info!(pid, "started the {job}");
        Ok(())
    }
}

/// A process that runs and does not even listen is starting, or its socket was removed, so that nobody can reach it.
fn ask_repeatedly(process: &Process) -> Result<Answer> {
    for _ in 0..QUESTIONS {
        match process.ask() {
            Answer::Alive => return Ok(Answer::Alive),
            Answer::Absent if !process.runs()? => return Ok(Answer::Absent),
            Answer::Absent => std::thread::sleep(STARTING),
            Answer::Hangs => {}
        }
    }
    Ok(Answer::Hangs)
}
