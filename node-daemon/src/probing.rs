//! Probing as it is done: a thread that sends what [`Prober`] says, tells it what came back, and answers the probes of others.
//!
//! The loop hands over what there is to be probed after each pass, and takes what was found for a fact of the next one. It is
//! woken only when that has changed. Nothing here is kept: a daemon that starts knows no limits, and finds them again within
//! seconds.
//!
//! Sockets are bound to the own addresses that targets name. An address that is not there yet, or a port that an earlier daemon
//! still has, is tried again every second.

mod responder;
mod sockets;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::thread;
use std::time::{Duration, SystemTime};

use husk_dataplane::probe::Sent;
use husk_ipam::lease::since_boot;
use husk_overlay::marks;
use husk_overlay::name::NodeName;
use husk_overlay::prefix::Family;
use husk_overlay::probe::wire::{self, Kind};
use husk_overlay::probe::{Path, Prober, Report, Shot, Target};

use self::responder::Responder;
use self::sockets::Sockets;
use crate::nudge::Nudged;
use crate::worker::{self, Shared, Worker};

/// Least time between two times that the loop is told of other limits: where the node's own uplink swallows, one path after the
/// other is found to.
const TELL_INTERVAL: Duration = Duration::from_secs(1);

/// Pause before an own address that could not be bound is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Most packets that are taken from a socket before the others, and what is to be sent, have their turn.
const AT_ONCE: usize = 256;

/// Bytes of the largest UDP payload.
const LARGEST: usize = 1 << 16;

/// The thread, as the others see it. It ends with the last of these.
#[derive(Debug, Clone)]
pub struct Probing(Worker<Paths>);

/// What the thread shares with the loop.
#[derive(Debug)]
struct Paths {
    prober: Prober,
    targets: BTreeMap<Path, Target>,
    /// The sockets may have to be others.
    moved: bool,
    /// Messages that came in so far, whatever they are.
    received: u64,
}

impl Probing {
    /// Starts the thread, in the network namespace of the caller. `changed` is called when [`Self::limits`] has changed.
    ///
    /// # Errors
    /// When there is no thread, no socket or no randomness to be had.
    pub fn start(changed: impl Fn() + Send + 'static) -> io::Result<Self> {
        let prober = Prober::new(worker::seed()?);
        let paths = Paths { prober, targets: BTreeMap::new(), moved: false, received: 0 };
        let worker = Worker::start("husk-probe", paths, |shared, nudged, _| {
            let (sockets, responder, announced) = (Sockets::default(), Responder::default(), Announced::default());
            let thread = Thread { shared, nudged, sockets, responder, announced };
            move || thread.run(&changed)
        })?;
        Ok(Self(worker))
    }

    /// What there is to be probed from now on, and who is answered.
    pub fn set_targets(&self, targets: &BTreeMap<Path, Target>) {
        let mut shared = self.0.lock();
        if shared.targets == *targets {
            return;
        }
        shared.prober.set_targets(targets, since_boot());
        shared.targets.clone_from(targets);
        shared.moved = true;
        drop(shared);
        self.0.wake();
    }

    /// Verifies the paths to a peer at once, and looks for what passes anew. When that began, as time since boot.
    #[must_use]
    pub fn demand(&self, peer: &NodeName) -> Duration {
        let now = since_boot();
        self.0.lock().prober.demand(peer, now);
        self.0.wake();
        now
    }

    /// Peers to which less passes than is promised, with the bytes of the largest packet that passes.
    #[must_use]
    pub fn limits(&self) -> BTreeMap<NodeName, u32> {
        if self.is_over() {
            // Nobody would ever find that a path is whole again.
            return BTreeMap::new();
        }
        self.0.lock().prober.limits()
    }

    /// The thread has ended, which only a panic brings about; the log tells of it.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.0.is_over()
    }

    /// No path is known to be answered.
    #[must_use]
    pub fn is_silent(&self) -> bool {
        self.0.lock().prober.is_silent()
    }

    /// Messages that came in so far, whatever they are.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.0.lock().received
    }

    /// The paths to a peer.
    #[must_use]
    pub fn reports_of(&self, peer: &NodeName) -> BTreeMap<Path, Report> {
        let shared = self.0.lock();
        let paths = Family::ALL.into_iter().map(|family| Path { peer: peer.clone(), family });
        paths.filter_map(|path| shared.prober.report(&path).map(|report| (path, report))).collect()
    }

    /// All paths.
    #[must_use]
    pub fn reports(&self) -> BTreeMap<Path, Report> {
        self.0.lock().prober.reports()
    }
}

/// The wall clock; a host that believes to be before 1970 says 1970.
fn since_1970() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

struct Thread {
    shared: Shared<Paths>,
    nudged: Nudged,
    sockets: Sockets,
    responder: Responder,
    announced: Announced,
}

/// What the loop knows of limits.
#[derive(Debug, Default)]
struct Announced {
    /// Revision of the limits that it was told of last.
    revision: u64,
    /// When that was, as time since boot.
    at: Option<Duration>,
}

impl Announced {
    /// What is to be done of limits that have this revision by now: tell at once, or tell later, as time since boot, or nothing.
    fn due(&mut self, revision: u64, now: Duration) -> Due {
        if revision == self.revision {
            return Due::Nothing;
        }
        match self.at.map(|at| at + TELL_INTERVAL).filter(|earliest| now < *earliest) {
            Some(earliest) => Due::Later(earliest),
            None => {
                *self = Self { revision, at: Some(now) };
                Due::Now
            }
        }
    }
}

/// When to tell the loop of other limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Due {
    Nothing,
    Now,
    Later(Duration),
}

impl Thread {
    fn run(mut self, changed: &impl Fn()) {
        let mut buffer = vec![0; LARGEST];
        loop {
            self.follow_targets();
            let next = self.send();
            let revision = self.shared.lock().prober.revision();
            let later = match self.announced.due(revision, since_boot()) {
                Due::Now => {
                    changed();
                    None
                }
                Due::Later(at) => Some(at),
                Due::Nothing => None,
            };
            let due = [next, self.sockets.next_try(), later].into_iter().flatten().min();
            if let Err(error) = self.nudged.wait(self.sockets.all().map(|socket| socket.as_fd()), due) {
                // A wait that fails at once would make a busy loop.
                tracing::debug!(%error, "waiting for the answers to probes");
                thread::sleep(RETRY);
            }
            if !self.nudged.drain() {
                return;
            }
            self.receive(&mut buffer);
        }
    }

    /// Brings sockets and guest list to what there is to be probed.
    fn follow_targets(&mut self) {
        let mut shared = self.shared.lock();
        if std::mem::take(&mut shared.moved) {
            let own: BTreeSet<IpAddr> = shared.targets.values().map(|target| target.own).collect();
            self.responder.answer_only(shared.targets.values().map(|target| target.address).collect());
            self.sockets.want(own);
        }
        drop(shared);
        self.sockets.bind_missing(since_boot());
    }

    /// Sends what is due; when more will be.
    fn send(&self) -> Option<Duration> {
        let now = since_boot();
        let (shots, next) = {
            let mut shared = self.shared.lock();
            (shared.prober.due(now), shared.prober.next())
        };
        let refused: Vec<u64> = shots.iter().filter(|shot| !self.fire(shot)).map(|shot| shot.id).collect();
        if refused.is_empty() {
            return next;
        }
        let mut shared = self.shared.lock();
        for id in refused {
            shared.prober.refused(id, now);
        }
        shared.prober.next()
    }

    /// Sends a probe. False if it never left this host for a reason that has nothing to do with the path; one for which there
    /// is no way has not passed.
    fn fire(&self, shot: &Shot) -> bool {
        let Some(socket) = self.sockets.at(shot.own) else { return false };
        let payload = wire::probe(shot.path.family, shot.size, shot.id);
        match socket.send(shot.target, &payload) {
            Sent::Sent => true,
            Sent::NoWay(errno) => {
                tracing::debug!(peer = %shot.path.peer, to = %shot.target, %errno, "there is no way for a probe");
                true
            }
            Sent::TooBig | Sent::Busy => false,
        }
    }

    /// Takes what came: answers for the prober, probes of others to be answered.
    fn receive(&mut self, buffer: &mut [u8]) {
        let mut answered = Vec::new();
        let mut broken = Vec::new();
        let mut count = 0;
        for socket in self.sockets.all() {
            for _ in 0..AT_ONCE {
                let received = match socket.receive(buffer) {
                    Ok(Some(received)) => received,
                    Ok(None) => break,
                    Err(error) => {
                        tracing::warn!(%error, "the socket of probes is made anew");
                        broken.push(socket.own().ip());
                        break;
                    }
                };
                count += 1;
                // Both ends have the same port: nobody but a node's own daemon is meant.
                if received.from.port() != marks::PROBE_PORT || !self.responder.knows(received.from.ip()) {
                    continue;
                }
                let family = Family::of(received.from.ip());
                let Some(message) = wire::read(family, &buffer[..received.length]) else { continue };
                match message.kind {
                    Kind::Answer { time } => answered.push((message.id, time)),
                    Kind::Probe { reads_time } if self.responder.may_answer(received.from.ip(), since_boot()) => {
                        let answer = wire::answer(reads_time, message.size, message.id, since_1970());
                        let _ = socket.send(received.from, &answer);
                    }
                    Kind::Probe { .. } => {}
                }
            }
        }
        for own in broken {
            self.sockets.give_up(own);
        }
        if count > 0 {
            let (now, wall) = (since_boot(), since_1970());
            let mut shared = self.shared.lock();
            shared.received += count;
            for (id, time) in answered {
                if let Some(theirs) = time {
                    shared.prober.told_time(id, theirs, wall, now);
                }
                shared.prober.answered(id, now);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_that_change_all_the_time_are_told_once_a_second() {
        let at = |milliseconds| Duration::from_millis(100_000 + milliseconds);
        let mut announced = Announced::default();
        assert_eq!(announced.due(0, at(0)), Due::Nothing);
        assert_eq!(announced.due(1, at(0)), Due::Now, "the first at once");
        assert_eq!(announced.due(1, at(10)), Due::Nothing);
        let times = (0..5000_u64)
            .step_by(30)
            .zip(2_u64..)
            .filter(|(time, revision)| announced.due(*revision, at(*time)) == Due::Now);
        assert_eq!(times.count(), 4);
        assert_eq!(announced.due(1000, at(5000)), Due::Later(at(5080)), "none is forgotten");
        assert_eq!(announced.due(1000, at(5080)), Due::Now);
        assert_eq!(announced.due(1000, at(5081)), Due::Nothing);
    }
}
