//! Paths as a prober meets them: with a delay, with losses, and with a size above which packets vanish.

#![allow(clippy::unwrap_used, clippy::panic, reason = "functions that tests share are test code too")]

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use husk_overlay::name::NodeName;
use husk_overlay::prefix::Family;
use husk_overlay::probe::{Limit, Limits, PROBES_PER_SECOND, Path, Prober, Report, Shot, Standing, Target};

pub(crate) const SECOND: Duration = Duration::from_secs(1);
pub(crate) const FLOOR: u32 = 1280;

/// What a path does to packets.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Model {
    /// Largest packet that passes, in bytes.
    pub(crate) passes: u32,
    /// Of a thousand packets, how many are lost on the way there, and on the way back.
    pub(crate) lost: (u64, u64),
    /// Round-trip time.
    pub(crate) delay: Duration,
    /// An answer comes this many times.
    pub(crate) copies: usize,
}

impl Model {
    pub(crate) fn good() -> Self {
        Self { passes: u32::MAX, lost: (0, 0), delay: Duration::from_millis(2), copies: 1 }
    }

    pub(crate) fn passing(passes: u32) -> Self {
        Self { passes, ..Self::good() }
    }

    pub(crate) fn losing(self, there: u64, back: u64) -> Self {
        Self { lost: (there, back), ..self }
    }

    pub(crate) fn dead() -> Self {
        Self::passing(0)
    }
}

/// A prober, its paths and a clock.
pub(crate) struct World {
    pub(crate) prober: Prober,
    pub(crate) targets: BTreeMap<Path, Target>,
    models: BTreeMap<Path, Model>,
    pub(crate) now: Duration,
    /// Answers on their way; the second part keeps those of one moment apart.
    answers: BTreeMap<(Duration, usize), u64>,
    /// When probes were sent within the last second.
    recent: VecDeque<Duration>,
    pub(crate) sent: usize,
    pub(crate) sent_to: BTreeMap<Path, usize>,
    chance: u64,
    /// The own kernel refuses probes larger than this.
    pub(crate) device: u32,
    /// When sessions with peers were made, where that takes handshakes.
    sessions: BTreeMap<NodeName, Duration>,
    /// Packets within the last second: when, and how many at once.
    packets: VecDeque<(Duration, usize)>,
    /// The most of them.
    pub(crate) most_packets: usize,
}

/// Age of a session from which on who sends makes another (`REKEY_AFTER_TIME`, WireGuard's paper, section 6.1).
const SESSION: Duration = Duration::from_secs(120);

pub(crate) fn peer(index: usize) -> NodeName {
    NodeName::new(&format!("host{index}")).unwrap()
}

pub(crate) fn path(index: usize, family: Family) -> Path {
    Path { peer: peer(index), family }
}

impl World {
    /// With so many peers in these families, to all of which this much is promised.
    pub(crate) fn new(peers: usize, families: &[Family], promised: u32, seed: u64) -> Self {
        let target = |family: Family| {
            let (address, own) = match family {
                Family::Ipv4 => ("10.42.0.64", "10.42.0.0"),
                Family::Ipv6 => ("fd42::40", "fd42::"),
            };
            Target {
                address: address.parse().unwrap(),
                own: own.parse().unwrap(),
                promised,
                floor: FLOOR,
                tunnelled: true,
                handshakes: false,
            }
        };
        let paths = (0..peers).flat_map(|index| families.iter().map(move |family| path(index, *family)));
        let targets: BTreeMap<Path, Target> = paths.map(|path| (path.clone(), target(path.family))).collect();
        let mut world = Self {
            prober: Prober::new(Limits::new(), seed),
            models: targets.keys().map(|path| (path.clone(), Model::good())).collect(),
            targets,
            now: Duration::from_secs(1000),
            answers: BTreeMap::new(),
            recent: VecDeque::new(),
            sent: 0,
            sent_to: BTreeMap::new(),
            chance: seed ^ 0x5555,
            device: u32::MAX,
            sessions: BTreeMap::new(),
            packets: VecDeque::new(),
            most_packets: 0,
        };
        world.prober.set_targets(&world.targets, world.now);
        world
    }

    /// There is a path more.
    pub(crate) fn add(&mut self, index: usize, family: Family) {
        self.models.insert(path(index, family), Model::good());
    }

    /// From now on a probe takes a handshake where there is no session.
    pub(crate) fn take_handshakes(&mut self) {
        self.targets.values_mut().for_each(|target| target.handshakes = true);
        self.prober.set_targets(&self.targets, self.now);
    }

    /// Counts what is on the wire for a probe: itself and its answer; initiation, response, and the keepalive that ends it all.
    fn count_packets(&mut self, path: &Path) {
        let young = self.sessions.get(&path.peer).is_some_and(|made| self.now < *made + SESSION);
        let handshake = self.targets[path].handshakes && !young;
        if handshake {
            self.sessions.insert(path.peer.clone(), self.now);
        }
        self.packets.retain(|(at, _)| *at + SECOND > self.now);
        self.packets.push_back((self.now, if handshake { 5 } else { 2 }));
        self.most_packets = self.most_packets.max(self.packets.iter().map(|(_, packets)| packets).sum());
    }

    /// Changes what all paths to all peers do.
    pub(crate) fn all(&mut self, model: Model) {
        self.models.values_mut().for_each(|it| *it = model);
    }

    /// Changes what all paths to a peer do.
    pub(crate) fn peer(&mut self, index: usize, model: Model) {
        let peer = peer(index);
        self.models.iter_mut().filter(|(path, _)| path.peer == peer).for_each(|(_, it)| *it = model);
    }

    /// The plan promises something else.
    pub(crate) fn promise(&mut self, promised: u32) {
        self.targets.values_mut().for_each(|target| target.promised = promised);
        let foreseen = self.prober.limits_under(&self.targets);
        self.prober.set_targets(&self.targets, self.now);
        assert_eq!(self.prober.limits(), foreseen);
    }

    /// Lets this much time pass.
    pub(crate) fn run(&mut self, time: Duration) {
        self.run_until(time, |_| false);
    }

    /// The same, or less if this holds before; how much, or none if it never held.
    pub(crate) fn run_until(&mut self, time: Duration, holds: impl Fn(&Self) -> bool) -> Option<Duration> {
        let begin = self.now;
        loop {
            if holds(self) {
                return Some(self.now - begin);
            }
            let answer = self.answers.first_key_value().map(|((at, _), _)| *at);
            let next = self.prober.next().into_iter().chain(answer).min().filter(|at| *at <= begin + time);
            let Some(next) = next else {
                self.now = begin + time;
                return None;
            };
            self.now = self.now.max(next);
            self.step();
        }
    }

    fn step(&mut self) {
        while let Some(answer) = self.answers.first_entry().filter(|answer| answer.key().0 <= self.now) {
            let id = answer.remove();
            self.prober.answered(id, self.now);
        }
        for shot in self.prober.due(self.now) {
            self.send(shot);
        }
        for (peer, limits) in self.prober.limits() {
            for (family, Limit { bytes, .. }) in limits {
                let path = Path { peer: peer.clone(), family };
                let target = &self.targets[&path];
                assert!((target.floor..target.promised).contains(&bytes), "{path:?}: {bytes}");
            }
        }
    }

    fn send(&mut self, shot: Shot) {
        self.sent += 1;
        *self.sent_to.entry(shot.path.clone()).or_default() += 1;
        self.recent.retain(|at| *at + SECOND > self.now);
        self.recent.push_back(self.now);
        assert!(self.recent.len() <= PROBES_PER_SECOND as usize, "{} probes within a second", self.recent.len());
        assert!(shot.size <= self.targets[&shot.path].promised, "{shot:?}");
        self.count_packets(&shot.path);
        if shot.size > self.device {
            self.prober.refused(shot.id, self.now);
            return;
        }
        let model = self.models[&shot.path];
        let arrives = shot.size <= model.passes && !self.loses(model.lost.0) && !self.loses(model.lost.1);
        for copy in 0..if arrives { model.copies } else { 0 } {
            let at = self.now + model.delay * u32::try_from(copy + 1).unwrap();
            self.answers.insert((at, self.sent * 8 + copy), shot.id);
        }
    }

    fn loses(&mut self, per_mille: u64) -> bool {
        self.random() % 1000 < per_mille
    }

    /// An xorshift of its own: nothing the prober does is hidden in it.
    pub(crate) fn random(&mut self) -> u64 {
        self.chance = self.chance.max(1);
        self.chance ^= self.chance << 13;
        self.chance ^= self.chance >> 7;
        self.chance ^= self.chance << 17;
        self.chance >> 11
    }

    pub(crate) fn report(&self, index: usize, family: Family) -> Report {
        self.prober.report(&path(index, family)).unwrap()
    }

    /// What passes in every family, if that is less than promised.
    pub(crate) fn limit(&self, index: usize) -> Option<u32> {
        self.prober.limits().get(&peer(index))?.values().map(|limit| limit.bytes).min()
    }

    /// Another daemon goes on with what this one knew.
    pub(crate) fn restart(&mut self) {
        let known = self.prober.limits();
        self.prober = Prober::new(known, self.random());
        self.answers.clear();
        self.prober.set_targets(&self.targets, self.now);
    }

    /// What was found in one family.
    pub(crate) fn report_limit(&self, index: usize, family: Family) -> Option<u32> {
        match self.prober.report(&path(index, family))?.standing {
            Standing::Limited { passes } => Some(passes),
            _ => None,
        }
    }

    pub(crate) fn all_stand(&self, standing: Standing) -> bool {
        self.prober.reports().values().all(|report| report.standing == standing)
    }
}
