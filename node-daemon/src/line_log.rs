//! Logs in JSON lines, for whoever collects them: which flows there were, and what people and the daemon decided.
//!
//! Each log has a thread that writes, and a queue of bounded length before it: a disk that is slow, full or gone holds up
//! nobody. Lines that find no room in the queue, or none on the disk, are counted; when lines can be written again, one says
//! how many are missing, and until then there is an issue. How a file is rotated without losing a line: `file`.

mod entry;
mod file;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use husk_overlay::config::{DecisionLogs, LogLimits};
use husk_overlay::issue::{Issue, IssueKind, Severity};
use husk_overlay::name::NodeName;
use jiff::Timestamp;

pub use self::entry::{Client, Entry, Event, LogLine};
use self::file::LineFile;
use crate::flows::{Flow, FlowKind};

/// Lines that may wait to be written: about 4 MiB.
const QUEUE: usize = 8192;

/// Pause between two attempts to write of what is missing, while nothing new is told.
const RETRY: Duration = Duration::from_secs(2);

/// How long the end of the daemon waits for the last lines.
const LAST_LINES: Duration = Duration::from_secs(1);

/// The logs there are. Clones are of the same.
#[derive(Debug, Clone, Default)]
pub struct Logs {
    flows: Option<Arc<LineLog>>,
    audit: Option<Arc<LineLog>>,
    connections: bool,
}

impl Logs {
    /// Starts the logs that the configuration asks for.
    ///
    /// # Errors
    /// When no thread can be had.
    pub fn start(config: &DecisionLogs, node: &NodeName) -> io::Result<Self> {
        let start = |path: &Option<PathBuf>| {
            path.as_ref().map(|path| LineLog::start(path, config.limits, node).map(Arc::new)).transpose()
        };
        let (flows, audit) = (start(&config.flows)?, start(&config.audit)?);
        Ok(Self { connections: flows.is_some() && config.connections, flows, audit })
    }

    /// Flows are logged, and connections among them.
    #[must_use]
    pub fn wants_connections(&self) -> bool {
        self.connections
    }

    /// Decisions are logged.
    #[must_use]
    pub fn wants_decisions(&self) -> bool {
        self.audit.is_some()
    }

    /// Logs a flow.
    pub fn flow(&self, flow: &Flow) {
        if let Some(log) = &self.flows {
            log.tell(Timestamp::now(), Entry::Flow { event: flow.verdict, flow: Box::new(flow.clone()) });
        }
    }

    /// Logs that flows are missing at this place, because nobody could record them.
    pub fn flows_lost(&self, flows: FlowKind, count: u64) {
        if let Some(log) = &self.flows {
            log.tell(Timestamp::now(), Entry::Audit(Event::FlowsLost { flows, count }));
        }
    }

    /// Logs a decision; the event is made only if somebody wants it.
    pub fn decision(&self, event: impl FnOnce() -> Event) {
        if let Some(log) = &self.audit {
            log.tell(Timestamp::now(), Entry::Audit(event()));
        }
    }

    /// What is wrong with the logs.
    #[must_use]
    pub fn issues(&self) -> Vec<Issue> {
        [&self.flows, &self.audit].into_iter().flatten().filter_map(|log| log.issue()).collect()
    }

    /// Waits until all that was told is written, but not for long.
    pub fn flush(&self) {
        for log in [&self.flows, &self.audit].into_iter().flatten() {
            log.flush(LAST_LINES);
        }
    }
}

/// One log.
struct LineLog {
    path: PathBuf,
    node: NodeName,
    queue: SyncSender<Job>,
    shared: Arc<Shared>,
}

impl fmt::Debug for LineLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LineLog").field("path", &self.path).finish_non_exhaustive()
    }
}

enum Job {
    Line(String),
    Flush(SyncSender<()>),
}

#[derive(Default)]
struct Shared {
    /// Lines that found no room, and that the log has not told of yet.
    missing: AtomicU64,
    /// Why the last line could not be written.
    failure: Mutex<Option<String>>,
}

impl LineLog {
    fn start(path: &Path, limits: LogLimits, node: &NodeName) -> io::Result<Self> {
        let (queue, jobs) = sync_channel(QUEUE);
        let shared = Arc::<Shared>::default();
        let writer = Writer { file: LineFile::new(path, limits), node: node.clone(), shared: Arc::clone(&shared) };
        thread::Builder::new().name("husk-line-log".into()).spawn(move || writer.write_all(&jobs))?;
        Ok(Self { path: path.to_owned(), node: node.clone(), queue, shared })
    }

    fn tell(&self, time: Timestamp, entry: Entry) {
        let told = line(time, &self.node, entry).is_some_and(|line| match self.queue.try_send(Job::Line(line)) {
            Ok(()) => true,
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => false,
        });
        if !told {
            self.shared.missing.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn flush(&self, limit: Duration) {
        let (done, flushed) = sync_channel(1);
        // A queue that is full will not be written in time anyway.
        if self.queue.try_send(Job::Flush(done)).is_ok() {
            let _ = flushed.recv_timeout(limit);
        }
    }

    fn issue(&self) -> Option<Issue> {
        let reason = self.shared.failure().clone()?;
        Some(Issue {
            severity: Severity::Warning,
            kind: IssueKind::LogUnwritable,
            subject: self.path.display().to_string(),
            message: format!("lines of this log are lost: {reason}"),
            remedy: "make room on its file system and the file writable; the log goes on by itself".into(),
        })
    }
}

impl Shared {
    fn failure(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes what waits, on a thread of its own.
struct Writer {
    file: LineFile,
    node: NodeName,
    shared: Arc<Shared>,
}

impl Writer {
    fn write_all(mut self, jobs: &Receiver<Job>) {
        loop {
            // Who waits for the next line to find out whether there is room again would leave the issue standing until then.
            let job = if self.shared.failure().is_some() {
                jobs.recv_timeout(RETRY)
            } else {
                jobs.recv().map_err(Into::into)
            };
            let job = match job {
                Ok(job) => job,
                Err(RecvTimeoutError::Timeout) => {
                    self.tell_of_missing();
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => return,
            };
            match job {
                Job::Line(line) => {
                    self.tell_of_missing();
                    if !self.write(&line) {
                        self.shared.missing.fetch_add(1, Ordering::Relaxed);
                    }
                }
                Job::Flush(done) => {
                    self.tell_of_missing();
                    let _ = done.try_send(());
                }
            }
        }
    }

    /// Says how many lines are missing here.
    fn tell_of_missing(&mut self) {
        let missing = self.shared.missing.swap(0, Ordering::Relaxed);
        if missing == 0 {
            return;
        }
        let entry = Entry::Audit(Event::LinesLost { count: missing });
        let told = line(Timestamp::now(), &self.node, entry).is_some_and(|line| self.write(&line));
        if !told {
            self.shared.missing.fetch_add(missing, Ordering::Relaxed);
        }
    }

    fn write(&mut self, line: &str) -> bool {
        let failure = self.file.write(line.as_bytes()).err().map(|error| error.to_string());
        let written = failure.is_none();
        let before = std::mem::replace(&mut *self.shared.failure(), failure.clone());
        match (&before, &failure) {
            (None, Some(reason)) => tracing::warn!(reason, "lines of a log are lost"),
            (Some(_), None) => tracing::info!("a log can be written again"),
            _ => {}
        }
        written
    }
}

/// A line with its end.
fn line(time: Timestamp, node: &NodeName, entry: Entry) -> Option<String> {
    // Nothing in an entry has a form that JSON lacks.
    let mut line = serde_json::to_string(&LogLine { time, node: node.clone(), entry }).ok()?;
    line.push('\n');
    Some(line)
}

#[cfg(test)]
mod tests;
