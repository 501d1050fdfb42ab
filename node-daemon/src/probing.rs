//! Probing as it is done: a thread that sends what [`Prober`] says, tells it what came back, and answers the probes of others.
//!
//! The loop hands over what there is to be probed after each pass, and takes what was found for a fact of the next one. It is
//! woken only when that has changed. Limits are kept in the run directory: a daemon that starts anew keeps to them until it has
//! tried whether they still hold, instead of opening a black hole once more.
//!
//! Sockets are bound to the own addresses that targets name. An address that is not there yet, or a port that an earlier daemon
//! still has, is tried again every second.

mod responder;
mod sockets;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::path::{self, PathBuf};
use std::thread;
use std::time::{Duration, SystemTime};

use husk_dataplane::probe::Sent;
use husk_ipam::lease::since_boot;
use husk_overlay::marks;
use husk_overlay::name::NodeName;
use husk_overlay::prefix::Family;
use husk_overlay::probe::wire::{self, Kind};
use husk_overlay::probe::{Limits, Path, Prober, Report, Shot, Target};
use serde::{Deserialize, Serialize};

use self::responder::Responder;
use self::sockets::Sockets;
use crate::files;
use crate::nudge::Nudged;
use crate::worker::{self, Shared, Worker};

/// File in the run directory that keeps the limits.
const FILE: &str = "limits.json";

/// Bytes of the largest such file that is read: both families of 5,000 peers take 600 KiB.
const FILE_LIMIT: u64 = 4 << 20;

/// Least time between two times that the loop is told of other limits, in the long run: where the node's own uplink swallows,
/// one path after the other is found to.
const TELL_INTERVAL: Duration = Duration::from_secs(1);

/// How often it may be told at once after a quiet time: what the paths to a few peers pass is verified at about the same time.
const TELL_BURST: u32 = 3;

/// From a change to when the loop is told, so that both families of a peer are told of at once.
const TELL_AFTER: Duration = Duration::from_millis(20);

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

/// What is kept, and of which boot it is.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    boot: String,
    limits: Limits,
}

impl Probing {
    /// Starts the thread, in the network namespace of the caller. `changed` is called when [`Self::limits`] has changed.
    ///
    /// # Errors
    /// When there is no thread, no socket or no randomness to be had.
    pub fn start(run_directory: &path::Path, boot: &str, changed: impl Fn() + Send + 'static) -> io::Result<Self> {
        let file = run_directory.join(FILE);
        let limits = load(&file, boot);
        let prober = Prober::new(limits.clone(), worker::seed()?);
        let kept = Kept { boot: boot.to_owned(), limits };
        let paths = Paths { prober, targets: BTreeMap::new(), moved: false, received: 0 };
        let worker = Worker::start("husk-probe", paths, |shared, nudged, _| {
            let (sockets, responder, announced) = (Sockets::default(), Responder::default(), Announced::default());
            let thread = Thread { shared, nudged, sockets, responder, announced, file, kept };
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

    /// The limits as they will be with these targets ([`Prober::limits_under`]).
    #[must_use]
    pub fn limits_under(&self, targets: &BTreeMap<Path, Target>) -> Limits {
        let shared = self.0.lock();
        if shared.targets == *targets { shared.prober.limits() } else { shared.prober.limits_under(targets) }
    }

    /// Verifies the paths to a peer at once, and looks for what passes anew. When that began, as time since boot.
    #[must_use]
    pub fn demand(&self, peer: &NodeName) -> Duration {
        let now = since_boot();
        self.0.lock().prober.demand(peer, now);
        self.0.wake();
        now
    }

    /// Paths on which less passes than is promised. Those that were found last, if the thread has ended: a limit that is none any
    /// more costs less than a black hole.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.0.lock().prober.limits()
    }

    /// Paths on which nothing is answered ([`Prober::silent`]); none if the thread has ended, which asks nobody any more.
    #[must_use]
    pub fn silent(&self) -> BTreeSet<Path> {
        if self.is_over() { BTreeSet::new() } else { self.0.lock().prober.silent(since_boot()) }
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

/// What an earlier daemon knew since the host was booted. Damage means that it has to be found again.
fn load(file: &path::Path, boot: &str) -> Limits {
    let text = files::read_text(file, FILE_LIMIT).ok().flatten().unwrap_or_default();
    let kept = serde_json::from_str::<Kept>(&text).ok().filter(|kept| kept.boot == boot);
    kept.map(|kept| kept.limits).unwrap_or_default()
}

struct Thread {
    shared: Shared<Paths>,
    nudged: Nudged,
    sockets: Sockets,
    responder: Responder,
    announced: Announced,
    file: PathBuf,
    kept: Kept,
}

/// What the loop knows of limits.
#[derive(Debug, Default)]
struct Announced {
    /// Revision of the limits that it was told of last.
    revision: u64,
    /// When they were first seen to be others, as time since boot.
    noticed: Option<Duration>,
    /// When it would be told next if it were told as often as may be, all the time.
    next: Duration,
}

impl Announced {
    /// What is to be done of limits that have this revision by now: tell at once, or tell later, as time since boot, or nothing.
    fn due(&mut self, revision: u64, now: Duration) -> Due {
        if revision == self.revision {
            return Due::Nothing;
        }
        let noticed = *self.noticed.get_or_insert(now);
        let earliest = (noticed + TELL_AFTER).max(self.next.saturating_sub(TELL_INTERVAL * (TELL_BURST - 1)));
        if now < earliest {
            return Due::Later(earliest);
        }
        *self = Self { revision, noticed: None, next: self.next.max(now) + TELL_INTERVAL };
        Due::Now
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
                    self.keep();
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
            drop(shared);
            // The loop has carried out what is assumed from now on.
            self.keep();
        } else {
            drop(shared);
        }
        self.sockets.bind_missing(since_boot());
    }

    /// Keeps the limits, if they have changed.
    fn keep(&mut self) {
        let limits = self.shared.lock().prober.limits();
        if limits == self.kept.limits {
            return;
        }
        self.kept.limits = limits;
        let text = serde_json::to_vec(&self.kept).unwrap_or_default();
        if let Err(error) = files::replace(&self.file, &text, 0o600) {
            tracing::warn!(%error, "what is known of narrow paths is not kept; a restart finds it again");
        }
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
    use husk_overlay::probe::Limit;

    use super::*;

    #[test]
    fn limits_that_change_all_the_time_are_told_once_a_second() {
        let at = |milliseconds| Duration::from_millis(100_000 + milliseconds);
        let mut announced = Announced::default();
        assert_eq!(announced.due(0, at(0)), Due::Nothing);
        assert_eq!(announced.due(1, at(0)), Due::Later(at(20)), "with what follows at once");
        assert_eq!(announced.due(2, at(20)), Due::Now);
        assert_eq!(announced.due(2, at(21)), Due::Nothing);
        let times: Vec<u64> = (100..10_100)
            .step_by(10)
            .zip(3_u64..)
            .filter(|(time, revision)| announced.due(*revision, at(*time)) == Due::Now)
            .map(|(time, _)| time)
            .collect();
        assert!(times[1] < 200, "a few at once: {times:?}");
        assert_eq!(times.len(), 12, "{times:?}");
        let Due::Later(then) = announced.due(5000, at(10_100)) else { panic!("none is forgotten") };
        assert_eq!(announced.due(5000, then), Due::Now);
    }

    #[test]
    fn what_is_known_outlives_the_thread_and_the_daemon_but_not_the_boot() {
        let folder = tempfile::tempdir().unwrap();
        let limit = Limit { bytes: 1372, found: true };
        let limits = Limits::from([(NodeName::new("host1").unwrap(), [(Family::Ipv6, limit)].into())]);
        let kept = Kept { boot: "one".into(), limits: limits.clone() };
        std::fs::write(folder.path().join(FILE), serde_json::to_vec(&kept).unwrap()).unwrap();
        let start = |boot| Probing::start(folder.path(), boot, || ()).unwrap();
        assert_eq!(start("one").limits(), limits, "before anything is probed");
        assert_eq!(start("two").limits(), Limits::new());
        let prober = Prober::new(limits.clone(), 7);
        let paths = Paths { prober, targets: BTreeMap::new(), moved: false, received: 0 };
        let probing = Probing(Worker::start("ended", paths, |_, _, _| || ()).unwrap());
        while !probing.is_over() {
            thread::yield_now();
        }
        assert_eq!(probing.limits(), limits, "who probes has ended, and the paths are what they were");
        std::fs::write(folder.path().join(FILE), "{").unwrap();
        assert_eq!(start("one").limits(), Limits::new());
    }
}
