//! A program under ptrace(2): which system calls it makes, and what becomes of it when one of them is its last or fails.
//!
//! A program acts on the world outside through system calls alone, and all its threads together make them in one order here,
//! as a thread that enters a namespace is waited for by the one that began it. So the states in which a SIGKILL can leave the
//! world are those between two calls, and killing at the *entry* of each call meets them all: the kernel looks for a fatal
//! signal after it has reported the entry to the tracer and before it begins the call (`ptrace_report_syscall_entry`,
//! include/linux/ptrace.h), so that this call has no effect and all calls before it have. What a single call does, a datagram of
//! several netlink requests for example, is not interrupted by a signal.
//!
//! A call is named by its number and by how many calls of this number the program, all threads counted together, has made: a
//! [`Point`]. That a call more or less is made for memory or for another look at the clock so moves no other point.
//! strace counts per thread instead, and would meet the second call of a thread never if another thread made two before.
//! A call that the kernel itself begins anew counts once: a kernel parameter whose lock is taken is written thousands of times
//! (`restart_syscall` in include/linux/sched/signal.h), though the program wrote it once.

mod registers;
mod table;
mod tracee;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{Read as _, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, ExitStatus};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::sys::ptrace::{self, Event, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;

use self::table::name;
use self::tracee::{call_of, object, spoil_request};
use crate::process::Output;

/// Shell program that waits, stopped, until it is traced, and then becomes the program that its first argument names.
pub(crate) const STOPPED: &str = r#"kill -STOP $$; exec "$0" "$@""#;

/// `PTRACE_SYSCALL_INFO_ENTRY` (include/uapi/linux/ptrace.h).
const ENTRY: u8 = 1;

/// A system call of a run, as its number and how many of this number have been made with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Point {
    /// Number of the system call.
    pub number: i64,
    /// 1 for the first call of this number.
    pub occurrence: u32,
}

impl Point {
    /// Name of the system call; `syscall N` if it is none that the programs here are known to make.
    #[must_use]
    pub fn name(self) -> String {
        name(self.number).map_or_else(|| format!("syscall {}", self.number), str::to_owned)
    }
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} #{}", self.name(), self.occurrence)
    }
}

/// What happens at a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interference {
    /// SIGKILL before the call.
    Kill(Point),
    /// The call is not made and fails. On x86_64 only.
    Fail(Point, Errno),
    /// Of the netlink requests that the call sends, the one of this index, from 0, gets a type that the kernel does not know:
    /// it refuses the request, with `EOPNOTSUPP`, and serves the others.
    Refuse(Point, usize),
}

impl Interference {
    /// Where it happens.
    #[must_use]
    pub fn point(self) -> Point {
        match self {
            Self::Kill(point) | Self::Fail(point, _) | Self::Refuse(point, _) => point,
        }
    }
}

impl fmt::Display for Interference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill(point) => write!(f, "killed at {point}"),
            Self::Fail(point, errno) => write!(f, "{errno:?} from {point}"),
            Self::Refuse(point, index) => write!(f, "request {index} of {point} refused"),
        }
    }
}

/// A system call that was made, or was about to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// Which.
    pub point: Point,
    /// The path or the file it is about, if any, for people.
    pub object: String,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.point)?;
        if self.object.is_empty() { Ok(()) } else { write!(f, " ({})", self.object) }
    }
}

/// A run that has ended.
#[derive(Debug, Clone)]
pub struct Traced {
    /// What the program said, and how it ended.
    pub output: Output,
    /// The calls it made, in order, from its first one on.
    pub calls: Vec<Call>,
    /// The call that was interfered with; none if the program ended without making it.
    pub hit: Option<Call>,
}

/// Traces a program that was started by [`STOPPED`] with its three streams piped, to its end. Tracer is the calling thread.
pub(crate) fn trace(
    mut child: Child,
    input: &[u8],
    interference: Option<Interference>,
    limit: Duration,
) -> Result<Traced> {
    let pid = Pid::from_raw(child.id().try_into().context("a process id beyond i32")?);
    let (done, watched) = mpsc::channel::<()>();
    let watchdog = thread::spawn(move || {
        let late = watched.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout);
        // The tracer waits for the program alone; without it there is nothing to wait for.
        late && kill(pid, Signal::SIGKILL).is_ok()
    });
    let traced = feed(&mut child, pid, input).and_then(|()| Tracer::new(pid, interference).run());
    if traced.is_err() {
        let _ = kill(pid, Signal::SIGKILL);
        let _ = waitpid(pid, Some(WaitPidFlag::__WALL));
    }
    let _ = done.send(());
    let late = watchdog.join().unwrap_or(false);
    let (status, tracer) = traced?;
    ensure!(!late, "the program did not end within {limit:?}; its last calls: {}", tracer.tail());
    let (mut stdout, mut stderr) = (String::new(), String::new());
    if let Some(mut pipe) = child.stdout.take() {
        pipe.read_to_string(&mut stdout).context("reading standard output")?;
    }
    if let Some(mut pipe) = child.stderr.take() {
        pipe.read_to_string(&mut stderr).context("reading standard error")?;
    }
    Ok(Traced { output: Output { status, stdout, stderr }, calls: tracer.calls, hit: tracer.hit })
}

/// Waits for the stop and fills the pipe: what a runtime says fits into its buffer.
fn feed(child: &mut Child, pid: Pid, input: &[u8]) -> Result<()> {
    // Left for the tracer to be waited for: only looked at.
    waitid(Id::Pid(pid), WaitPidFlag::WSTOPPED | WaitPidFlag::WNOWAIT | WaitPidFlag::WEXITED)
        .context("waiting for the program to stop")?;
    let mut pipe = child.stdin.take().context("the program has no standard input")?;
    pipe.write_all(input).context("writing the program's standard input")
}

struct Tracer {
    pid: Pid,
    interference: Option<Interference>,
    /// The program runs, no longer the shell.
    begun: bool,
    counts: BTreeMap<i64, u32>,
    calls: Vec<Call>,
    hit: Option<Call>,
    /// The thread whose call is being made to fail.
    failing: Option<(Pid, Errno)>,
    /// Threads whose call the kernel begins anew.
    restarting: BTreeSet<Pid>,
}

impl Tracer {
    fn new(pid: Pid, interference: Option<Interference>) -> Self {
        let (counts, calls) = (BTreeMap::new(), Vec::new());
        let restarting = BTreeSet::new();
        Self { pid, interference, begun: false, counts, calls, hit: None, failing: None, restarting }
    }

    fn run(mut self) -> Result<(ExitStatus, Self)> {
        let options = Options::PTRACE_O_TRACESYSGOOD
            | Options::PTRACE_O_TRACECLONE
            | Options::PTRACE_O_TRACEEXEC
            | Options::PTRACE_O_EXITKILL;
        ptrace::seize(self.pid, options).context("tracing the program (PTRACE_SEIZE)")?;
        kill(self.pid, Signal::SIGCONT).context("continuing the program")?;
        loop {
            // Of this thread only: others of this process trace and start programs too.
            let status = waitpid(None, Some(WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD));
            match status.context("waiting for the traced program")? {
                WaitStatus::Exited(pid, code) if pid == self.pid => return Ok((ExitStatus::from_raw(code << 8), self)),
                WaitStatus::Signaled(pid, signal, _) if pid == self.pid => {
                    return Ok((ExitStatus::from_raw(signal as i32), self));
                }
                // Another thread's end, told apart from the program's.
                WaitStatus::Exited(..) | WaitStatus::Signaled(..) => {}
                WaitStatus::PtraceSyscall(thread) => self.syscall_stop(thread)?,
                WaitStatus::PtraceEvent(thread, _, event) => {
                    self.begun |= event == Event::PTRACE_EVENT_EXEC as i32;
                    self.resume(thread, None)?;
                }
                WaitStatus::Stopped(thread, signal) => self.resume(thread, Some(signal))?,
                other => bail!("unexpected news of the traced program: {other:?}"),
            }
        }
    }

    fn resume(&self, thread: Pid, signal: Option<Signal>) -> Result<()> {
        let resumed = if self.begun { ptrace::syscall(thread, signal) } else { ptrace::cont(thread, signal) };
        match resumed {
            // Killed meanwhile; its end is the next news.
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(errno) => Err(errno).context("resuming the traced program"),
        }
    }

    fn syscall_stop(&mut self, thread: Pid) -> Result<()> {
        match ptrace::syscall_info(thread) {
            Ok(info) if info.op == ENTRY => self.entry(thread),
            Ok(_) => self.exit(thread),
            Err(Errno::ESRCH) => Ok(()),
            Err(errno) => Err(errno).context("asking for the system call (PTRACE_GET_SYSCALL_INFO, Linux 5.3)"),
        }
    }

    fn entry(&mut self, thread: Pid) -> Result<()> {
        if self.restarting.remove(&thread) {
            return self.resume(thread, None);
        }
        let (number, arguments) = call_of(thread)?;
        let occurrence = self.counts.entry(number).or_default();
        *occurrence += 1;
        let point = Point { number, occurrence: *occurrence };
        let call = Call { point, object: object(thread, number, &arguments) };
        self.calls.push(call.clone());
        match self.interference {
            Some(Interference::Kill(here)) if here == point => {
                self.hit = Some(call);
                return kill(self.pid, Signal::SIGKILL).context("killing the traced program");
            }
            Some(Interference::Fail(here, errno)) if here == point => {
                self.hit = Some(call);
                self.failing = Some((thread, errno));
                registers::skip_call(thread)?;
            }
            Some(Interference::Refuse(here, index)) if here == point && spoil_request(thread, &arguments, index)? => {
                self.hit = Some(call);
            }
            _ => {}
        }
        self.resume(thread, None)
    }

    fn exit(&mut self, thread: Pid) -> Result<()> {
        if let Some((_, errno)) = self.failing.take_if(|(failing, _)| *failing == thread) {
            registers::set_error(thread, errno)?;
        } else if registers::begins_anew(thread)? {
            self.restarting.insert(thread);
        }
        self.resume(thread, None)
    }

    /// The last calls, for an error.
    fn tail(&self) -> String {
        let last = &self.calls[self.calls.len().saturating_sub(8)..];
        last.iter().map(Call::to_string).collect::<Vec<_>>().join(", ")
    }
}
