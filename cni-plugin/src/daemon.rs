//! Talking to the daemon, for a bounded time.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use husk_overlay::ipc::{Attaching, Request, Response, read_message, write_message};
use husk_overlay::issue::Issue;
use husk_overlay::name::InterfaceName;
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use serde_json::Value;

use crate::deadline::Deadline;
use crate::error::{Code, Failure};

/// How long the daemon may take to admit a pod, allocate a block or say that it is ready, if the deadline allows.
const ANSWER: Duration = Duration::from_secs(10);

/// How long a DEL may take to wake the daemon up.
const NOTICE: Duration = Duration::from_millis(50);

/// How long the daemon may take to delete an interface. It takes some milliseconds; a DEL that has waited in vain does it.
const HAND_OVER: Duration = Duration::from_millis(250);

/// Pause between two attempts to connect to a daemon whose queue of connections is full.
const PAUSE: Duration = Duration::from_millis(1);

/// A connection to the daemon, good for one question.
#[derive(Debug)]
pub(crate) struct Daemon {
    stream: Bounded,
    deadline: Deadline,
}

impl Daemon {
    /// Connects; whatever is asked then has to be answered by the deadline.
    pub(crate) fn connect(path: &Path, deadline: Deadline) -> Result<Self, Failure> {
        let stream = connect_within(path, deadline.allow(ANSWER)).map_err(|error| {
            let reason = match error.kind() {
                ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
                    "huskd is not running; start it, or look at why it ended".to_owned()
                }
                _ => error.to_string(),
            };
            Failure::new(Code::TryAgainLater, format!("cannot reach the daemon at {}: {reason}", path.display()))
        })?;
        Ok(Self { stream, deadline })
    }

    /// Asks, and waits for a positive answer.
    pub(crate) fn ask(self, request: &Request) -> Result<(), Failure> {
        match accepted(self.answer_to(request)?)? {
            None => Ok(()),
            Some(_) => Err(other_release()),
        }
    }

    /// Asks, and waits for the answer, whatever it is.
    pub(crate) fn answer_to(mut self, request: &Request) -> Result<Response, Failure> {
        let time = self.deadline.allow(ANSWER);
        self.stream.deadline = Instant::now() + time;
        let answer = write_message(&mut self.stream, request).and_then(|()| read_message(&mut self.stream));
        answer.map_err(|error| {
            let reason = match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                    format!("it did not answer within {:.1} s; look at its log", time.as_secs_f32())
                }
                ErrorKind::UnexpectedEof | ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => {
                    format!("it closed the connection ({error}); look at its log")
                }
                _ => error.to_string(),
            };
            Failure::new(Code::TryAgainLater, format!("no answer from huskd: {reason}"))
        })
    }
}

/// What a positive answer reports, if anything; a negative one as failure.
pub(crate) fn accepted(response: Response) -> Result<Option<Value>, Failure> {
    match response {
        Response::Done => Ok(None),
        Response::Report { report } => Ok(Some(report)),
        Response::NotReady { reason, issues } => {
            Err(Failure::new(Code::TryAgainLater, format!("huskd is not ready: {reason}"))
                .with_details(issues.iter().map(Issue::to_string)))
        }
        Response::Refused { reason } => Err(Failure::new(Code::Refused, format!("huskd refuses: {reason}"))),
    }
}

fn connect_within(path: &Path, time: Duration) -> io::Result<Bounded> {
    let deadline = Instant::now() + time;
    let address = UnixAddr::new(path)?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let descriptor: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    loop {
        match connect(descriptor.as_raw_fd(), &address) {
            Ok(()) => break,
            // A full queue: unlike for TCP, nothing will tell when there is room.
            Err(Errno::EAGAIN | Errno::EINTR) if Instant::now() < deadline => std::thread::sleep(PAUSE),
            Err(Errno::EAGAIN | Errno::EINTR) => {
                let message = format!("huskd did not accept a connection within {} ms", time.as_millis());
                return Err(io::Error::new(ErrorKind::TimedOut, message));
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    let stream = UnixStream::from(descriptor);
    stream.set_nonblocking(false)?;
    Ok(Bounded { stream, deadline })
}

fn other_release() -> Failure {
    Failure::new(
        Code::TryAgainLater,
        "huskd answered a question that was not asked; huskd and the plugin are of different releases: install the plugin \
         of huskd's release (husk-cni install)",
    )
}

/// Why no pod can be added, in the words of whoever knows best: a daemon that runs tells what it waits for; without one there
/// is nothing but `otherwise`. No failure if the daemon has just become ready.
pub(crate) fn reason(path: &Path, deadline: Deadline, otherwise: Failure) -> Result<(), Failure> {
    match Daemon::connect(path, deadline) {
        Ok(daemon) => daemon.ask(&Request::Ready),
        Err(_) => Err(otherwise),
    }
}

/// Wakes the daemon up, if it is there. It looks at the leases on its own as well, so that nobody waits for an answer.
pub(crate) fn notify_released(path: &Path) {
    if let Ok(mut stream) = connect_within(path, NOTICE) {
        // A daemon that does not listen misses nothing but the wake-up.
        let _ = write_message(&mut stream, &Request::Released);
    }
}

/// Tells the daemon how an ADD or DEL went, if it is there; after a DEL this wakes it up, too.
pub(crate) fn notify_end(path: &Path, command: Attaching, took: Duration, error: Option<Code>) {
    if let Ok(mut stream) = connect_within(path, NOTICE) {
        let microseconds = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let request = Request::Ended { command, microseconds, error: error.map(|code| code as u32) };
        // What is not counted is missing from the metrics, and nowhere else.
        let _ = write_message(&mut stream, &request);
    }
}

/// Lets the daemon delete the host interface of an attachment, if it is there: it answers as soon as nobody can find the interface,
/// and waits for the kernel to forget it, which a program that ends cannot do after its answer. What becomes of it is for the
/// caller to find out.
pub(crate) fn vacate(path: &Path, interface: InterfaceName, index: u32) {
    if let Ok(mut stream) = connect_within(path, NOTICE) {
        stream.deadline = Instant::now() + HAND_OVER;
        let request = Request::Detach { interface, index };
        let _ = write_message(&mut stream, &request).and_then(|()| read_message::<Response>(&mut stream));
    }
}

/// A stream that is good until a deadline, however many pieces a message comes in.
#[derive(Debug)]
struct Bounded {
    stream: UnixStream,
    deadline: Instant,
}

impl Bounded {
    fn remaining(&self) -> io::Result<Option<Duration>> {
        match self.deadline.checked_duration_since(Instant::now()) {
            None | Some(Duration::ZERO) => Err(ErrorKind::TimedOut.into()),
            remaining => Ok(remaining),
        }
    }
}

impl Read for Bounded {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.remaining()?)?;
        self.stream.read(buffer)
    }
}

impl Write for Bounded {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.remaining()?)?;
        self.stream.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_missing_daemon_is_said_to_be_missing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("daemon.sock");
        let check = || {
            let failure = Daemon::connect(&path, Deadline::after(ANSWER)).unwrap_err();
            assert_eq!(failure.code, Code::TryAgainLater);
            assert!(failure.message.contains("huskd is not running"), "{failure}");
        };
        check();
        drop(UnixListener::bind(&path).unwrap());
        check();
    }

    #[test]
    fn a_daemon_that_accepts_nobody_does_not_hold_up_a_del() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("daemon.sock");
        let address = UnixAddr::new(&path).unwrap();
        let listener = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        nix::sys::socket::bind(listener.as_raw_fd(), &address).unwrap();
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
        let started = Instant::now();
        let mut connections = Vec::new();
        let refused = loop {
            match connect_within(&path, NOTICE) {
                Ok(connection) => connections.push(connection),
                Err(error) => break error,
            }
            assert!(connections.len() < 100, "the queue never fills");
        };
        assert_eq!(refused.kind(), ErrorKind::TimedOut);
        assert!(started.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn garbage_from_a_daemon_is_a_failure() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("daemon.sock");
        let listener = UnixListener::bind(&path).unwrap();
        for (answer, expected) in [
            (&b"\0\0\0\x02{}"[..], "not understood"),
            (b"\xff\xff\xff\xff", "announces"),
            (b"\0\0\0\x09{}", "closed the connection"),
            (b"", "closed the connection"),
        ] {
            let failure = std::thread::scope(|scope| {
                scope.spawn(|| {
                    let (mut stream, _) = listener.accept().unwrap();
                    let _: Request = read_message(&mut stream).unwrap();
                    stream.write_all(answer).unwrap();
                });
                Daemon::connect(&path, Deadline::after(ANSWER)).unwrap().ask(&Request::Ready).unwrap_err()
            });
            assert_eq!(failure.code, Code::TryAgainLater);
            assert!(failure.message.contains(expected), "{failure}");
        }
    }
}
