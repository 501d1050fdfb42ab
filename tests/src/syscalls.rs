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

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::io::{IoSlice, IoSliceMut, Read as _, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, ExitStatus};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::libc;
use nix::sys::ptrace::{self, Event, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;

use crate::process::Output;

/// Shell program that waits, stopped, until it is traced, and then becomes the program that its first argument names.
pub(crate) const STOPPED: &str = r#"kill -STOP $$; exec "$0" "$@""#;

/// `PTRACE_SYSCALL_INFO_ENTRY` (include/uapi/linux/ptrace.h).
const ENTRY: u8 = 1;

/// `struct nlmsghdr` (netlink(7)): its length and that of the alignment of messages in bytes, and where in it the type is.
const HEADER_LENGTH: usize = 16;
const ALIGNMENT: usize = 4;
const TYPE_OFFSET: usize = 4;

/// A type beyond all that rtnetlink knows (`RTM_MAX`, include/uapi/linux/rtnetlink.h).
const UNKNOWN_TYPE: [u8; 2] = [0xff, 0x3f];

/// Longest path that is read from a program's memory for people, in bytes.
const PATH_LENGTH: usize = 256;

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

/// Number and arguments of the call that a stopped thread is in (proc_pid_syscall(5)).
fn call_of(thread: Pid) -> Result<(i64, Vec<u64>)> {
    let path = format!("/proc/{thread}/syscall");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let mut fields = text.split_ascii_whitespace();
    let number = fields.next().and_then(|number| number.parse().ok());
    let number = number.with_context(|| format!("{path} says {text:?}"))?;
    let hexadecimal = |field: &str| u64::from_str_radix(field.trim_start_matches("0x"), 16).ok();
    Ok((number, fields.map_while(hexadecimal).take(6).collect()))
}

/// Gives one of the netlink requests that a thread is about to send (sendto(2)) an unknown type; false if there is none of this
/// index, or what it sends is no netlink.
fn spoil_request(thread: Pid, arguments: &[u64], index: usize) -> Result<bool> {
    let [_, base, length, ..] = arguments else { return Ok(false) };
    let (base, length) = (usize::try_from(*base)?, usize::try_from(*length)?);
    let mut datagram = vec![0; length];
    let read = process_vm_readv(thread, &mut [IoSliceMut::new(&mut datagram)], &[RemoteIoVec { base, len: length }]);
    ensure!(read.context("reading what the traced program sends")? == length, "what the traced program sends is cut");
    let Some(at) = requests(&datagram).and_then(|found| found.get(index).copied()) else { return Ok(false) };
    let (base, len) = (base + at + TYPE_OFFSET, UNKNOWN_TYPE.len());
    let written = process_vm_writev(thread, &[IoSlice::new(&UNKNOWN_TYPE)], &[RemoteIoVec { base, len }]);
    ensure!(written.context("changing what the traced program sends")? == len, "a request could not be changed");
    Ok(true)
}

/// Offsets of the messages of a netlink datagram; none if it is no netlink, whose lengths add up (netlink(7)).
fn requests(datagram: &[u8]) -> Option<Vec<usize>> {
    let (mut found, mut at) = (Vec::new(), 0);
    while at < datagram.len() {
        let length = datagram.get(at..at + size_of::<u32>())?.try_into().ok().map(u32::from_ne_bytes)?;
        let length = usize::try_from(length).ok().filter(|length| *length >= HEADER_LENGTH)?;
        found.push(at);
        at += length.next_multiple_of(ALIGNMENT);
    }
    (at == datagram.len()).then_some(found)
}

/// What a call is about, as far as its arguments tell; empty otherwise.
fn object(thread: Pid, number: i64, arguments: &[u64]) -> String {
    let argument = |index: usize| arguments.get(index).copied().unwrap_or_default();
    match subject(number) {
        Subject::Path(index) => path_at(thread, argument(index)),
        Subject::Descriptor => fs::read_link(format!("/proc/{thread}/fd/{}", argument(0)))
            .map(|target| target.to_string_lossy().into_owned())
            .unwrap_or_default(),
        Subject::Nothing => String::new(),
    }
}

fn path_at(thread: Pid, address: u64) -> String {
    let mut bytes = vec![0; PATH_LENGTH];
    let Ok(base) = usize::try_from(address) else { return String::new() };
    // A path near the end of its page is cut there.
    let remote = [RemoteIoVec { base, len: (PATH_LENGTH).min(4096 - base % 4096) }];
    let read = process_vm_readv(thread, &mut [IoSliceMut::new(&mut bytes)], &remote).unwrap_or_default();
    let end = bytes[..read].iter().position(|byte| *byte == 0).unwrap_or(read);
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// Where a call's arguments say what it is about.
enum Subject {
    /// The path that this argument points to.
    Path(usize),
    /// The file of the first argument.
    Descriptor,
    Nothing,
}

/// The registers that a call goes through.
#[cfg(target_arch = "x86_64")]
mod registers {
    use anyhow::{Context, Result};
    use nix::errno::Errno;
    use nix::sys::ptrace::{getregs, setregs};
    use nix::unistd::Pid;

    /// Lets a thread that is at a call's entry make none: there is no call -1.
    pub(super) fn skip_call(thread: Pid) -> Result<()> {
        let mut registers = getregs(thread).context("reading registers")?;
        registers.orig_rax = u64::MAX;
        setregs(thread, registers).context("writing registers")
    }

    /// True if the kernel begins the call anew at whose exit a thread is: `ERESTARTSYS`, `ERESTARTNOINTR`, `ERESTARTNOHAND` or
    /// `ERESTART_RESTARTBLOCK` (include/linux/errno.h), which no program ever sees.
    pub(super) fn begins_anew(thread: Pid) -> Result<bool> {
        match getregs(thread) {
            Ok(registers) => Ok(matches!(registers.rax.cast_signed(), -514..=-512 | -516)),
            // Killed meanwhile.
            Err(Errno::ESRCH) => Ok(false),
            Err(errno) => Err(errno).context("reading registers"),
        }
    }

    /// Lets a thread that is at a call's exit see an error.
    pub(super) fn set_error(thread: Pid, errno: Errno) -> Result<()> {
        let mut registers = getregs(thread).context("reading registers")?;
        registers.rax = i64::from(-(errno as i32)).cast_unsigned();
        setregs(thread, registers).context("writing registers")
    }
}

/// The registers that a call goes through.
#[cfg(not(target_arch = "x86_64"))]
mod registers {
    use anyhow::{Result, bail};
    use nix::errno::Errno;
    use nix::unistd::Pid;

    /// Unknown here: what the kernel begins anew counts again.
    pub(super) fn begins_anew(_: Pid) -> Result<bool> {
        Ok(false)
    }

    pub(super) fn skip_call(_: Pid) -> Result<()> {
        bail!("system calls can be made to fail on x86_64 only")
    }

    pub(super) fn set_error(_: Pid, _: Errno) -> Result<()> {
        bail!("system calls can be made to fail on x86_64 only")
    }
}

/// Names of system calls, and what they are about.
macro_rules! calls {
    ($($(#[$condition:meta])* $call:ident $name:ident $subject:expr;)*) => {
        fn name(number: i64) -> Option<&'static str> {
            match number {
                $($(#[$condition])* libc::$call => Some(stringify!($name)),)*
                _ => None,
            }
        }

        fn subject(number: i64) -> Subject {
            match number {
                $($(#[$condition])* libc::$call => $subject,)*
                _ => Subject::Nothing,
            }
        }
    };
}

calls! {
    SYS_openat openat Subject::Path(1);
    SYS_statx statx Subject::Path(1);
    SYS_newfstatat newfstatat Subject::Path(1);
    SYS_readlinkat readlinkat Subject::Path(1);
    SYS_mkdirat mkdirat Subject::Path(1);
    SYS_unlinkat unlinkat Subject::Path(1);
    SYS_renameat renameat Subject::Path(1);
    SYS_renameat2 renameat2 Subject::Path(1);
    #[cfg(target_arch = "x86_64")] SYS_open open Subject::Path(0);
    #[cfg(target_arch = "x86_64")] SYS_stat stat Subject::Path(0);
    #[cfg(target_arch = "x86_64")] SYS_readlink readlink Subject::Path(0);
    #[cfg(target_arch = "x86_64")] SYS_mkdir mkdir Subject::Path(0);
    #[cfg(target_arch = "x86_64")] SYS_unlink unlink Subject::Path(0);
    #[cfg(target_arch = "x86_64")] SYS_rename rename Subject::Path(0);
    #[cfg(target_arch = "x86_64")] SYS_link link Subject::Path(0);
    SYS_linkat linkat Subject::Path(1);
    SYS_fsync fsync Subject::Descriptor;
    SYS_ftruncate ftruncate Subject::Descriptor;
    SYS_close close Subject::Descriptor;
    SYS_fcntl fcntl Subject::Descriptor;
    SYS_flock flock Subject::Descriptor;
    SYS_utimensat utimensat Subject::Descriptor;
    SYS_fstat fstat Subject::Descriptor;
    SYS_fstatfs fstatfs Subject::Descriptor;
    SYS_getdents64 getdents64 Subject::Descriptor;
    SYS_ioctl ioctl Subject::Descriptor;
    SYS_lseek lseek Subject::Descriptor;
    SYS_read read Subject::Descriptor;
    SYS_write write Subject::Descriptor;
    SYS_writev writev Subject::Descriptor;
    SYS_setns setns Subject::Descriptor;
    SYS_socket socket Subject::Nothing;
    SYS_bind bind Subject::Descriptor;
    SYS_connect connect Subject::Descriptor;
    SYS_getsockname getsockname Subject::Descriptor;
    SYS_setsockopt setsockopt Subject::Descriptor;
    SYS_getsockopt getsockopt Subject::Descriptor;
    SYS_sendto sendto Subject::Descriptor;
    SYS_sendmsg sendmsg Subject::Descriptor;
    SYS_recvfrom recvfrom Subject::Descriptor;
    SYS_recvmsg recvmsg Subject::Descriptor;
    SYS_clone3 clone3 Subject::Nothing;
    SYS_clone clone Subject::Nothing;
    SYS_mmap mmap Subject::Nothing;
    SYS_munmap munmap Subject::Nothing;
    SYS_mremap mremap Subject::Nothing;
    SYS_mprotect mprotect Subject::Nothing;
    SYS_madvise madvise Subject::Nothing;
    SYS_brk brk Subject::Nothing;
    SYS_futex futex Subject::Nothing;
    SYS_clock_nanosleep clock_nanosleep Subject::Nothing;
    SYS_clock_gettime clock_gettime Subject::Nothing;
    SYS_getrandom getrandom Subject::Nothing;
    SYS_ppoll ppoll Subject::Nothing;
    #[cfg(target_arch = "x86_64")] SYS_poll poll Subject::Nothing;
    #[cfg(target_arch = "x86_64")] SYS_arch_prctl arch_prctl Subject::Nothing;
    SYS_prctl prctl Subject::Nothing;
    SYS_prlimit64 prlimit64 Subject::Nothing;
    SYS_rseq rseq Subject::Nothing;
    SYS_rt_sigaction rt_sigaction Subject::Nothing;
    SYS_rt_sigprocmask rt_sigprocmask Subject::Nothing;
    SYS_sigaltstack sigaltstack Subject::Nothing;
    SYS_sched_getaffinity sched_getaffinity Subject::Nothing;
    SYS_set_robust_list set_robust_list Subject::Nothing;
    SYS_set_tid_address set_tid_address Subject::Nothing;
    SYS_gettid gettid Subject::Nothing;
    SYS_exit exit Subject::Nothing;
    SYS_exit_group exit_group Subject::Nothing;
}
