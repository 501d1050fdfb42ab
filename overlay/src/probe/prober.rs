//! The prober: which path may send when, and whose an answer is.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use super::chance::Chance;
use super::pace::Pace;
use super::phase::{Due, Fired, Shared};
use super::sessions::{self, Sessions};
use super::track::Track;
use super::{ClockSkew, Limit, Limits, PROBES_PER_SECOND, Path, Report, Shot, Standing, Target, wire};
use crate::marks;
use crate::name::NodeName;
use crate::prefix::Family;

/// How long an answer is waited for.
const TIMEOUT: Duration = Duration::from_secs(1);

/// Longest time between two checks of a path, unless there are many.
const INTERVAL: Duration = Duration::from_secs(10);

/// Packets per second that the checks of all paths take, of twice [`PROBES_PER_SECOND`]. The others are for doubts and searches.
const ROUTINE: u32 = PROBES_PER_SECOND * 2 * 4 / 5;

/// Probes to settle doubts for each one that is a matter of course, where both sorts are due.
const URGENT_TURNS: u8 = 3;

/// Time before the first check of a new path: nodes learn of each other at about the same time, and one that does not know the other
/// yet takes its probes for those of a stranger. In mode wireguard the session is also made by then, and not by both at once.
const COURTESY: Duration = Duration::from_secs(2);

/// From when on a path that is not answered counts as silent, after it was first found so: a daemon that is replaced by another
/// version is away for some seconds, in which traffic goes on.
const SILENT: Duration = Duration::from_secs(10);

/// Time over which first checks are spread, at least.
const SPREAD: Duration = Duration::from_secs(1);

/// Decides what to send, and what answers mean.
///
/// With up to 288 paths each is checked every 8 to 10 seconds, with more as often as the budget allows: the 10,000 paths of a
/// node among 5,000 with both families every 350 seconds at most, or 870 where checks so rare cost a handshake each. Both families of a peer share one tunnel and are checked
/// at random times, and what is found in one holds for the other, or without a tunnel is looked for in it at once.
#[derive(Debug)]
pub struct Prober {
    tracks: BTreeMap<Path, Track>,
    /// When which path wants to send as a matter of course.
    routine: BTreeSet<(Duration, Path)>,
    /// The same of doubts and searches, in the order in which they began.
    urgent: BTreeMap<(Duration, Path), Duration>,
    /// How many urgent ones came before their turn.
    urgent_turns: u8,
    flying: BTreeMap<u64, (Path, Fired)>,
    /// The same in the order in which they were sent; those that were answered are here until their turn comes.
    order: VecDeque<(Duration, u64)>,
    /// Those of an earlier daemon included, whose paths are not there yet.
    limits: BTreeMap<Path, Limit>,
    shared: Shared,
    pace: Pace,
    sessions: Sessions,
    /// How often limits have changed.
    revision: u64,
}

impl Prober {
    /// Knows no path yet, and of some what an earlier daemon knew. `seed` is random: ids of probes, and when what is sent, come
    /// from it.
    #[must_use]
    pub fn new(known: Limits, seed: u64) -> Self {
        let path = |peer: &NodeName, family| Path { peer: peer.clone(), family };
        let of_peer = |(peer, limits): (NodeName, BTreeMap<Family, Limit>)| {
            limits.into_iter().map(|(family, limit)| (path(&peer, family), limit)).collect::<Vec<_>>()
        };
        Self {
            tracks: BTreeMap::new(),
            routine: BTreeSet::new(),
            urgent: BTreeMap::new(),
            urgent_turns: 0,
            flying: BTreeMap::new(),
            order: VecDeque::new(),
            limits: known.into_iter().flat_map(of_peer).collect(),
            shared: Shared { chance: Chance::new(seed), interval: INTERVAL, guess: None, alarm: false, limited: None },
            pace: Pace::default(),
            sessions: Sessions::default(),
            revision: 0,
        }
    }

    /// What there is to be probed from now on.
    pub fn set_targets(&mut self, targets: &BTreeMap<Path, Target>, now: Duration) {
        let gone: Vec<Path> = self.tracks.keys().filter(|path| !targets.contains_key(path)).cloned().collect();
        for path in gone {
            self.unschedule(&path);
            self.tracks.remove(&path);
            self.note_limit(&path, None);
            self.flying.retain(|_, (of, _)| *of != path);
        }
        let costly = || targets.iter().filter(|(_, target)| target.handshakes).map(|(path, _)| &path.peer);
        let peers: BTreeSet<&NodeName> = costly().collect();
        self.sessions.retain(|peer| peers.contains(peer));
        // They come after nine tenths of it on the average.
        let all = sessions::interval(targets.len(), peers.len(), ROUTINE) * 10 / 9;
        self.shared.interval = INTERVAL.max(all);
        for (path, target) in targets {
            let target = Target { promised: target.promised.min(wire::LARGEST), ..target.clone() };
            let first = now + self.shared.chance.up_to(all.max(SPREAD));
            if !self.tracks.contains_key(path) {
                let known = self.limits.get(path).copied();
                let track = Track::new(target, known, now, [now + COURTESY, first + COURTESY]);
                self.note_limit(path, track.limit());
                self.tracks.insert(path.clone(), track);
                self.schedule(path);
            } else if self.tracks.get(path).is_some_and(|track| *track.target() != target) {
                self.act(path, now, |track, _| track.retarget(target, now, first));
            }
        }
    }

    /// What to send now. Answers that have arrived are to be told of before, or they count as missing.
    pub fn due(&mut self, now: Duration) -> Vec<Shot> {
        while let Some((sent, id)) = self.order.front().copied() {
            if now < sent + TIMEOUT && self.flying.contains_key(&id) {
                break;
            }
            self.order.pop_front();
            if let Some((path, fired)) = self.flying.remove(&id) {
                self.act(&path, now, |track, shared| track.outcome(fired, false, now, shared));
            }
        }
        self.pace.earn(now);
        let mut shots = Vec::new();
        while self.pace.affords() {
            let Some(path) = self.choose(now) else { break };
            let Some(fired) = self.act(&path, now, |track, shared| track.fire(now, shared)).flatten() else {
                continue;
            };
            let Some(target) = self.tracks.get(&path).map(Track::target) else { continue };
            let id = self.shared.chance.number();
            let to = SocketAddr::new(target.address, marks::PROBE_PORT);
            shots.push(Shot { path: path.clone(), own: target.own, target: to, size: fired.size, id });
            let (handshakes, peer) = (target.handshakes, path.peer.clone());
            self.flying.insert(id, (path, fired));
            self.order.push_back((now, id));
            self.pace.spend(handshakes && self.sessions.send(&peer, now));
        }
        shots
    }

    /// When to call [`Prober::due`] again, as time since boot; none while there is nothing to probe.
    #[must_use]
    pub fn next(&self) -> Option<Duration> {
        let affordable = self.pace.next();
        let routine = self.routine.first().map(|(at, _)| *at);
        let wanted = self.urgent.values().copied().chain(routine).min();
        let missing = self.order.front().map(|(sent, _)| *sent + TIMEOUT);
        wanted.map(|at| at.max(affordable)).into_iter().chain(missing).min()
    }

    /// A probe was answered. Answers to what was never sent, or is answered or given up already, change nothing.
    pub fn answered(&mut self, id: u64, now: Duration) {
        if let Some((path, fired)) = self.flying.remove(&id) {
            self.act(&path, now, |track, shared| track.outcome(fired, true, now, shared));
        }
    }

    /// The answer to a probe tells the peer's wall clock; to be called before [`Prober::answered`]. `ours` is the own one when it
    /// came, both as time since 1970.
    pub fn told_time(&mut self, id: u64, theirs: Duration, ours: Duration, now: Duration) {
        let Some((path, fired)) = self.flying.get(&id) else { return };
        let skew = ClockSkew::new(theirs, ours, now.saturating_sub(fired.sent));
        if let Some(track) = self.tracks.get_mut(path) {
            track.told_time(skew);
        }
    }

    /// This host's own kernel refused to send a probe, which says nothing about the path.
    pub fn refused(&mut self, id: u64, now: Duration) {
        if let Some((path, fired)) = self.flying.remove(&id) {
            self.act(&path, now, |track, shared| track.refused(fired, now, shared));
        }
    }

    /// Somebody wants to know at once: what is promised is verified, and a limit looked for anew.
    pub fn demand(&mut self, peer: &NodeName, now: Duration) {
        for family in Family::ALL {
            self.act(&Path { peer: peer.clone(), family }, now, |track, shared| track.demand(now, shared));
        }
    }

    /// All paths.
    #[must_use]
    pub fn reports(&self) -> BTreeMap<Path, Report> {
        self.tracks.iter().map(|(path, track)| (path.clone(), track.report())).collect()
    }

    /// One path.
    #[must_use]
    pub fn report(&self, path: &Path) -> Option<Report> {
        self.tracks.get(path).map(Track::report)
    }

    /// Paths on which less passes than is promised, or is known to; not below the floor.
    #[must_use]
    pub fn limits(&self) -> Limits {
        nested(self.limits.iter().map(|(path, limit)| (path, *limit)))
    }

    /// The same as it will be with these targets: where more is promised than was verified, that counts until the rest is
    /// verified, too. To be asked before a promise is kept.
    #[must_use]
    pub fn limits_under(&self, targets: &BTreeMap<Path, Target>) -> Limits {
        let of_path = |(path, known): (&Path, &Limit)| match (self.tracks.get(path), targets.get(path)) {
            (Some(track), Some(target)) => track.limit_under(target),
            _ => Some(*known),
        };
        let known = self.limits.iter().filter_map(|it| Some((it.0, of_path(it)?)));
        let others = targets.iter().filter(|(path, _)| !self.limits.contains_key(path));
        let new = others.filter_map(|(path, target)| Some((path, self.tracks.get(path)?.limit_under(target)?)));
        nested(known.chain(new))
    }

    /// How often [`Self::limits`] has changed, what [`Self::limits_under`] tells beforehand left out.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Paths on which nothing has been answered for so long that it is no daemon that is just being replaced.
    #[must_use]
    pub fn silent(&self, now: Duration) -> BTreeSet<Path> {
        let silent = |track: &Track| track.silent_since().is_some_and(|since| now >= since + SILENT);
        self.tracks.iter().filter(|(_, track)| silent(track)).map(|(path, _)| path.clone()).collect()
    }

    /// Nobody answers, as far as is known: there are paths, and not one of them is in any other state.
    #[must_use]
    pub fn is_silent(&self) -> bool {
        // As a rule the first one tells.
        !self.tracks.is_empty() && self.tracks.values().all(|track| track.standing() == Standing::Unreachable)
    }

    /// The path that is to send next: doubts and matters of course take turns, so that neither waits for all of the others.
    fn choose(&mut self, now: Duration) -> Option<Path> {
        let routine = self.routine.first().filter(|(at, _)| *at <= now).map(|(_, path)| path.clone());
        let urgent = self.urgent.iter().find(|(_, at)| **at <= now).map(|((_, path), _)| path.clone());
        let urgent_next = urgent.is_some() && (self.urgent_turns < URGENT_TURNS || routine.is_none());
        self.urgent_turns = if urgent_next { (self.urgent_turns + 1).min(URGENT_TURNS) } else { 0 };
        if urgent_next { urgent } else { routine }
    }

    /// Does something with a path, and what follows from that for the other paths to the same peer.
    fn act<T>(&mut self, path: &Path, now: Duration, act: impl FnOnce(&mut Track, &mut Shared) -> T) -> Option<T> {
        let result = self.act_on_path(path, act);
        let (alarm, limited) = (std::mem::take(&mut self.shared.alarm), self.shared.limited.take());
        if alarm || limited.is_some() {
            for family in Family::ALL.into_iter().filter(|family| *family != path.family) {
                self.act_on_path(&Path { peer: path.peer.clone(), family }, |track, shared| {
                    limited.into_iter().for_each(|passes| track.follow(passes, now, shared));
                    if alarm {
                        track.hasten(now);
                    }
                });
            }
            self.shared.limited = None;
        }
        result
    }

    /// Does something with a path, and what follows from that for its limit and for when it wants to send.
    fn act_on_path<T>(&mut self, path: &Path, act: impl FnOnce(&mut Track, &mut Shared) -> T) -> Option<T> {
        self.unschedule(path);
        let track = self.tracks.get_mut(path)?;
        let result = act(track, &mut self.shared);
        let limit = track.limit();
        self.note_limit(path, limit);
        self.schedule(path);
        Some(result)
    }

    fn note_limit(&mut self, path: &Path, limit: Option<Limit>) {
        let before = match limit {
            Some(limit) => self.limits.insert(path.clone(), limit),
            None => self.limits.remove(path),
        };
        let assumed = limit.is_some_and(|limit| !limit.found);
        self.revision += u64::from(before != limit && !assumed);
    }

    fn schedule(&mut self, path: &Path) {
        let Some(track) = self.tracks.get(path) else { return };
        match track.due() {
            Due::Never => {}
            Due::Routine(at) => {
                self.routine.insert((at, path.clone()));
            }
            Due::Urgent(at) => {
                self.urgent.insert((track.began(), path.clone()), at);
            }
        }
    }

    fn unschedule(&mut self, path: &Path) {
        let Some(track) = self.tracks.get(path) else { return };
        match track.due() {
            Due::Never => {}
            Due::Routine(at) => {
                self.routine.remove(&(at, path.clone()));
            }
            Due::Urgent(_) => {
                self.urgent.remove(&(track.began(), path.clone()));
            }
        }
    }
}

fn nested<'a>(limits: impl Iterator<Item = (&'a Path, Limit)>) -> Limits {
    let mut nested = Limits::new();
    for (path, limit) in limits {
        nested.entry(path.peer.clone()).or_default().insert(path.family, limit);
    }
    nested
}
