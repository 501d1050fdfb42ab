//! The self-test of the VXLAN device's offload as it is done: a thread that makes the transfers that [`Tester`] wants, and takes
//! those of other nodes.
//!
//! The loop hands over who can be reached after each pass, takes what is to be done with the device for a fact of the next
//! one, and is woken when that has changed. Whether the device is as the test needs it is read from the device itself. What was
//! found is kept in the run directory, so that a daemon that starts anew does not begin with stalls.
//!
//! A transfer is that many bytes over TCP, in writes as large as the largest packets that a device takes at once, and one byte back
//! for all of them. It is taken from known nodes only, a few at a time, and for a limited time.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use husk_dataplane::offload::Offloads;
use husk_ipam::lease::since_boot;
use husk_overlay::marks;
use husk_overlay::name::{InterfaceName, NodeName};
use husk_overlay::offload::{BYTES, Candidate, LIMIT, Offload, Outcome, Tester, Transfer};
use nix::sys::socket::{setsockopt, sockopt};
use serde::{Deserialize, Serialize};

use crate::files;
use crate::nudge::{Nudged, WeakNudge};
use crate::worker::{self, Shared, Worker};

/// File in the run directory that keeps what was found.
const FILE: &str = "offload.json";

/// Pause before an own address that could not be listened at is tried again, and after a failed wait.
const RETRY: Duration = Duration::from_secs(1);

/// Transfers of others that are taken at once.
const GUESTS: usize = 8;

/// How long one of them may take: longer than its sender waits.
const GUEST_LIMIT: Duration = LIMIT.saturating_mul(2);

/// Bytes of a write: the largest packet that a device cuts by itself (`GSO_LEGACY_MAX_SIZE`, include/linux/netdevice.h).
const CHUNK: usize = 64 << 10;

/// The answer to a transfer that arrived.
const RECEIVED: u8 = b'!';

/// The thread, as the others see it. It ends with the last of these.
#[derive(Debug, Clone)]
pub struct OffloadTesting(Worker<Test>);

/// What the thread shares with the loop and with the threads of transfers.
#[derive(Debug)]
struct Test {
    tester: Tester,
    candidates: BTreeMap<NodeName, Candidate>,
    /// What became of the transfer under way.
    outcome: Option<Outcome>,
    /// Transfers of others that are being taken.
    guests: usize,
}

/// What is kept, and of which boot it is.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    boot: String,
    offload: Offload,
}

impl OffloadTesting {
    /// Starts the thread, in the network namespace of the caller. `changed` is called when [`Self::offload`] has changed.
    ///
    /// # Errors
    /// When there is no thread, no socket or no randomness to be had.
    pub fn start(run_directory: &Path, boot: &str, changed: impl Fn() + Send + 'static) -> io::Result<Self> {
        let (file, boot) = (run_directory.join(FILE), boot.to_owned());
        let tester = Tester::new(load(&file, &boot), worker::seed()?);
        let test = Test { tester, candidates: BTreeMap::new(), outcome: None, guests: 0 };
        let worker = Worker::start("husk-offload", test, |shared, nudged, nudge| {
            let thread = Thread {
                shared,
                nudged,
                // Not the handle itself, which would keep the thread from ending.
                waker: nudge.downgrade(),
                file,
                boot,
                offloads: None,
                listeners: BTreeMap::new(),
                tried: None,
                known: None,
            };
            move || thread.run(&changed)
        })?;
        Ok(Self(worker))
    }

    /// Who can be reached through the VXLAN device now. To be called after each pass: the device may be as wanted by then.
    pub fn set_candidates(&self, candidates: BTreeMap<NodeName, Candidate>) {
        let mut shared = self.0.lock();
        if candidates.is_empty() && shared.candidates.is_empty() {
            return;
        }
        if candidates != shared.candidates {
            shared.tester.set_candidates(candidates.clone(), since_boot());
            shared.candidates = candidates;
        }
        drop(shared);
        self.0.wake();
    }

    /// The thread has ended, which only a panic brings about; the log tells of it.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.0.is_over()
    }

    /// What is to be done with the device, and why.
    #[must_use]
    pub fn offload(&self) -> Offload {
        self.0.lock().tester.offload().clone()
    }
}

/// What an earlier daemon found since the host was booted. Damage means that it has to be found again.
fn load(file: &Path, boot: &str) -> Offload {
    let text = files::read_text(file, 1 << 16).ok().flatten().unwrap_or_default();
    let kept = serde_json::from_str::<Kept>(&text).ok().filter(|kept| kept.boot == boot);
    kept.map(|kept| kept.offload).unwrap_or_default()
}

struct Thread {
    shared: Shared<Test>,
    nudged: Nudged,
    /// For the threads of transfers, which end in their own time.
    waker: WeakNudge,
    file: PathBuf,
    boot: String,
    offloads: Option<Offloads>,
    listeners: BTreeMap<IpAddr, TcpListener>,
    /// When addresses without a listener were tried last, as time since boot.
    tried: Option<Duration>,
    /// As the loop was told last.
    known: Option<Offload>,
}

impl Thread {
    fn run(mut self, changed: &impl Fn()) {
        loop {
            let missing = self.listen();
            let next = self.advance();
            if self.note() {
                changed();
            }
            let retry = missing.then(|| self.tried.unwrap_or_default() + RETRY);
            let listeners = self.listeners.values().map(|listener| listener.as_fd());
            if let Err(error) = self.nudged.wait(listeners, [next, retry].into_iter().flatten().min()) {
                tracing::debug!(%error, "waiting for transfers");
                thread::sleep(RETRY);
            }
            if !self.nudged.drain() {
                return;
            }
            self.accept();
        }
    }

    /// Listens at the own addresses. True if there is one at which that is still to be tried.
    fn listen(&mut self) -> bool {
        let own: BTreeSet<IpAddr> = self.shared.lock().candidates.values().map(|candidate| candidate.own).collect();
        self.listeners.retain(|address, _| own.contains(address));
        let now = since_boot();
        let missing: Vec<IpAddr> = own.into_iter().filter(|address| !self.listeners.contains_key(address)).collect();
        if missing.is_empty() || self.tried.is_some_and(|tried| now < tried + RETRY) {
            return !missing.is_empty();
        }
        self.tried = Some(now);
        for address in missing {
            let bound = TcpListener::bind((address, marks::PROBE_PORT));
            match bound.and_then(|listener| listener.set_nonblocking(true).map(|()| listener)) {
                Ok(listener) => {
                    self.listeners.insert(address, listener);
                }
                Err(error) => tracing::debug!(%address, %error, "no transfers are taken at this address yet"),
            }
        }
        true
    }

    /// Carries the test on; when there will be something to do by itself.
    fn advance(&mut self) -> Option<Duration> {
        let watches = self.shared.lock().tester.watches_device();
        let device = if watches { self.device() } else { None };
        let now = since_boot();
        let mut shared = self.shared.lock();
        shared.tester.set_device(device);
        if let Some(outcome) = shared.outcome.take() {
            tracing::debug!(?outcome, offload = ?device, "a transfer through the VXLAN device ended");
            shared.tester.finished(outcome, now);
        }
        if let Some(transfer) = shared.tester.due(now) {
            drop(shared);
            self.begin(transfer);
            shared = self.shared.lock();
        }
        shared.tester.next(now)
    }

    fn device(&mut self) -> Option<bool> {
        let interface = InterfaceName::new(marks::VXLAN_INTERFACE).expect("a constant of eight letters");
        let offloads = match &mut self.offloads {
            Some(offloads) => Ok(offloads),
            none => Offloads::open().map(|opened| none.insert(opened)),
        };
        offloads.and_then(|offloads| offloads.read(&interface)).unwrap_or_else(|error| {
            tracing::debug!(%error, "the offload of the VXLAN device is not tested");
            None
        })
    }

    /// Makes a transfer on a thread of its own: it may stand still.
    fn begin(&self, transfer: Transfer) {
        let (shared, waker) = (self.shared.clone(), self.waker.clone());
        let work = move || {
            let outcome = make(&transfer);
            shared.lock().outcome = Some(outcome);
            waker.wake();
        };
        if let Err(error) = thread::Builder::new().name("husk-transfer".into()).spawn(work) {
            tracing::debug!(%error, "no transfer could be made");
            self.shared.lock().tester.finished(Outcome::Declined, since_boot());
        }
    }

    /// Keeps what is known, if it has changed; then the loop has to hear of it.
    fn note(&mut self) -> bool {
        let offload = self.shared.lock().tester.offload().clone();
        if self.known.as_ref() == Some(&offload) {
            return false;
        }
        let before = self.known.replace(offload.clone()).unwrap_or_default();
        match (&before.finding, &offload.finding) {
            (None, Some(finding)) => tracing::warn!(
                peer = %finding.peer, interface = %finding.interface,
                "the offload of the VXLAN device is broken, and off from now on"
            ),
            (Some(_), None) => tracing::info!("the offload of the VXLAN device works again"),
            _ => {}
        }
        let kept = Kept { boot: self.boot.clone(), offload };
        let text = serde_json::to_vec_pretty(&kept).unwrap_or_default();
        if let Err(error) = files::replace(&self.file, &text, 0o600) {
            tracing::warn!(%error, "what was found of the offload is not kept; a restart finds it again");
        }
        before != kept.offload
    }

    /// Takes transfers of known nodes; others are turned away at once.
    fn accept(&mut self) {
        let mut broken = Vec::new();
        for (address, listener) in &self.listeners {
            for _ in 0..GUESTS {
                match listener.accept() {
                    Ok((stream, from)) => self.welcome(stream, from),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    // One that came and went.
                    Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
                    Err(error) => {
                        tracing::debug!(%error, "the socket of transfers is made anew");
                        broken.push(*address);
                        break;
                    }
                }
            }
        }
        if !broken.is_empty() {
            self.tried = Some(since_boot());
            self.listeners.retain(|address, _| !broken.contains(address));
        }
    }

    fn welcome(&self, stream: TcpStream, from: SocketAddr) {
        let mut shared = self.shared.lock();
        let known = shared.candidates.values().any(|candidate| candidate.address == from.ip());
        if !known || shared.guests >= GUESTS {
            return;
        }
        shared.guests += 1;
        drop(shared);
        let shared = self.shared.clone();
        let work = move || {
            if let Err(error) = take(&stream) {
                tracing::debug!(%from, %error, "a transfer did not arrive");
            }
            shared.lock().guests -= 1;
        };
        if thread::Builder::new().name("husk-guest".into()).spawn(work).is_err() {
            self.shared.lock().guests -= 1;
        }
    }
}

/// Time left until then; an error if there is none.
fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// Makes a transfer.
fn make(transfer: &Transfer) -> Outcome {
    match try_make(transfer) {
        Ok(outcome) => outcome,
        Err(error) if matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock) => Outcome::Stalled,
        Err(error) => {
            tracing::debug!(peer = %transfer.peer, %error, "a transfer was declined");
            Outcome::Declined
        }
    }
}

fn try_make(transfer: &Transfer) -> io::Result<Outcome> {
    let deadline = Instant::now() + LIMIT;
    let mut stream = TcpStream::connect_timeout(&(transfer.address, marks::PROBE_PORT).into(), LIMIT)?;
    // One that stands still is dropped with all that it still holds.
    setsockopt(&stream, sockopt::Linger, &nix::libc::linger { l_onoff: 1, l_linger: 0 })?;
    if stream.local_addr()?.ip() != transfer.own {
        return Ok(Outcome::Declined);
    }
    let chunk = vec![0; CHUNK];
    let mut sent = 0;
    while sent < BYTES {
        stream.set_write_timeout(Some(left(deadline)?))?;
        sent += stream.write(&chunk[..CHUNK.min(BYTES - sent)])?;
    }
    stream.set_read_timeout(Some(left(deadline)?))?;
    let mut answer = [0];
    stream.read_exact(&mut answer)?;
    Ok(if answer == [RECEIVED] { Outcome::Passed } else { Outcome::Declined })
}

/// Takes the transfer of another node.
fn take(mut stream: &TcpStream) -> io::Result<()> {
    let deadline = Instant::now() + GUEST_LIMIT;
    stream.set_nonblocking(false)?;
    let mut buffer = vec![0; CHUNK];
    let mut received = 0;
    while received < BYTES {
        stream.set_read_timeout(Some(left(deadline)?))?;
        match stream.read(&mut buffer)? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            length => received += length,
        }
    }
    stream.set_write_timeout(Some(left(deadline)?))?;
    stream.write_all(&[RECEIVED])
}
