//! Offload of the VXLAN device: tested, and done without only where it is broken.
//!
//! A VXLAN device hands packets on without their inner checksums, and many segments as one large packet: the device below is
//! to fill in and to cut. Some drivers and some kernels get that wrong inside a tunnel, and what they send is discarded at the
//! other end. Small packets may pass all the same, while TCP stands still for a minute at a time. With the offload of the
//! VXLAN device off, which is nobody else's device, the kernel computes and cuts before the packets are wrapped.
//!
//! Nobody can be asked whether it works, so it is tried: a transfer to a peer, through the tunnel. One that stands still is
//! repeated, then tried without offload, and once more with it. Only if it stands still each time with offload, and passes at
//! once without, is the offload to blame. If it fails without as well, the path is broken and the offload is left as it was.
//! A peer whose path changes in the middle proves nothing.
//!
//! Two peers per interface of the underlay are tried, whatever the size of the cluster, one at a time: the driver is the
//! same for all of them. The finding counts for a day; it is kept as long as the host runs. The first time it counts for ten
//! minutes: a link that fails and recovers in just the rhythm of the test looks the same, once.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::facts::Facts;
use crate::marks;
use crate::name::{InterfaceName, NodeName};
use crate::plan::Plan;

/// Bytes of a transfer: a few bursts of the largest packets that a device takes at once (64 KiB), so that one that comes through
/// by chance, after TCP has gone over to single segments, does not count as success in time.
pub const BYTES: usize = 256 << 10;

/// How long a transfer may take. Over a link of 1 Mbit/s it takes two seconds.
pub const LIMIT: Duration = Duration::from_secs(5);

/// How long it takes until a broken offload is off, from when the first peer can be reached: three transfers that stand still,
/// one that passes, and what the loop takes to carry out a change.
pub const FOUND_WITHIN: Duration = Duration::from_secs(30);

/// Peers that are tried per interface of the underlay.
const SAMPLES: usize = 2;

/// From when a peer can be reached, as far as this node knows, to its test: it may have heard of this node a little later.
const SETTLING: Duration = Duration::from_secs(1);

/// Least time between two tests.
const PAUSE: Duration = Duration::from_secs(1);

/// Until a peer that declined is tried again; twice as long each time.
const RETRY: Duration = Duration::from_secs(10);

/// Longest such time, and the time after which a peer to which the path is broken is tried again, and what was found for the
/// first time.
const LATER: Duration = Duration::from_secs(600);

/// How long what was found counts.
const RETEST: Duration = Duration::from_secs(86400);

/// How long a test waits for the device to be set as it needs it.
const SET_WITHIN: Duration = Duration::from_secs(30);

/// What is to be done with the device's offload.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Setting {
    /// It is left as it is.
    #[default]
    Untouched,
    /// It has to be off.
    Off,
    /// It has to be on: it was turned off here.
    On,
}

/// A broken offload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// Peer that it was tried with.
    pub peer: NodeName,
    /// Interface of the underlay that leads to it.
    pub interface: InterfaceName,
    /// When, as time since boot.
    pub at: Duration,
    /// It was found again later.
    #[serde(default)]
    pub confirmed: bool,
}

impl Finding {
    /// Until when it counts, as time since boot.
    fn until(&self) -> Duration {
        self.at + if self.confirmed { RETEST } else { LATER }
    }
}

/// What is known of the offload: a fact for the plan, and kept across restarts of the daemon.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Offload {
    /// What is to be done.
    pub setting: Setting,
    /// Why, if it is off for good and not for a test.
    pub finding: Option<Finding>,
}

impl Offload {
    /// As it is between tests.
    fn settle(&mut self) {
        self.setting = match (&self.finding, self.setting) {
            (Some(_), _) => Setting::Off,
            (None, Setting::Untouched) => Setting::Untouched,
            (None, Setting::Off | Setting::On) => Setting::On,
        };
    }
}

/// A peer that a transfer can be made to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Own address inside the overlay.
    pub own: IpAddr,
    /// Its address inside the overlay.
    pub address: IpAddr,
    /// Interface of the underlay that leads to it.
    pub interface: InterfaceName,
    /// MTU in bytes of the routes to it.
    pub mtu: Option<u32>,
}

/// Peers that this node sends to through its VXLAN device.
#[must_use]
pub fn candidates(plan: &Plan, facts: &Facts) -> BTreeMap<NodeName, Candidate> {
    if !plan.desired.links.keys().any(|interface| interface.as_str() == marks::VXLAN_INTERFACE) {
        return BTreeMap::new();
    }
    let peers = plan.peers.iter().filter(|(_, peer)| peer.refused.is_none());
    let candidate = |(name, peer): (&NodeName, &crate::plan::PeerPlan)| {
        let target = peer.probe.values().next()?;
        let interface = facts.routes.get(&peer.address?)?.interface.clone();
        Some((name.clone(), Candidate { own: target.own, address: target.address, interface, mtu: peer.mtu }))
    };
    peers.filter_map(candidate).collect()
}

/// A transfer to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transfer {
    /// To whom.
    pub peer: NodeName,
    /// From this own address.
    pub own: IpAddr,
    /// To this address.
    pub address: IpAddr,
}

/// What became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All arrived in time.
    Passed,
    /// It did not.
    Stalled,
    /// The peer, or the own kernel, would not have it: nothing follows.
    Declined,
}

/// Decides what to try, and what follows.
#[derive(Debug)]
pub struct Tester {
    offload: Offload,
    candidates: BTreeMap<NodeName, Candidate>,
    /// When each of them may be tried.
    waiting: BTreeMap<NodeName, Wait>,
    /// When a transfer to a peer last passed.
    sound: BTreeMap<NodeName, Duration>,
    /// Whether the device has offload, if that is known.
    device: Option<bool>,
    test: Option<Test>,
    not_before: Duration,
    random: u64,
}

#[derive(Debug, Clone, Copy)]
struct Wait {
    until: Duration,
    declined: u32,
}

#[derive(Debug)]
struct Test {
    peer: NodeName,
    candidate: Candidate,
    step: Step,
    /// When the step began.
    since: Duration,
    running: bool,
}

/// How far a test is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    First,
    Again,
    WithoutOffload,
    Confirmation,
}

impl Tester {
    /// One that goes on with what an earlier daemon found on the running system. The seed decides which peers are tried.
    #[must_use]
    pub fn new(mut offload: Offload, seed: u64) -> Self {
        offload.settle();
        Self {
            offload,
            candidates: BTreeMap::new(),
            waiting: BTreeMap::new(),
            sound: BTreeMap::new(),
            device: None,
            test: None,
            not_before: Duration::ZERO,
            random: seed,
        }
    }

    /// What is known.
    #[must_use]
    pub fn offload(&self) -> &Offload {
        &self.offload
    }

    /// True if the plan wants anything of the device, or a test could begin: then what it has should be told.
    #[must_use]
    pub fn watches_device(&self) -> bool {
        !self.candidates.is_empty()
    }

    /// Who can be reached now.
    pub fn set_candidates(&mut self, candidates: BTreeMap<NodeName, Candidate>, now: Duration) {
        // What was found of a peer was found with the card that led to it.
        let same_card = |peer: &NodeName| {
            let interface = |of: &BTreeMap<NodeName, Candidate>| of.get(peer).map(|it| it.interface.clone());
            candidates.contains_key(peer) && interface(&self.candidates) == interface(&candidates)
        };
        self.waiting.retain(|peer, _| same_card(peer));
        self.sound.retain(|peer, _| same_card(peer));
        for peer in candidates.keys() {
            self.waiting.entry(peer.clone()).or_insert(Wait { until: now + SETTLING, declined: 0 });
        }
        self.candidates = candidates;
        if self.test.as_ref().is_some_and(|test| !test.running && !self.is_as_before(test)) {
            self.give_up(now);
        }
    }

    /// Whether the device leaves checksums and segments to the device below; none when that cannot be told.
    pub fn set_device(&mut self, offload: Option<bool>) {
        self.device = offload;
    }

    /// The transfer to be made now; the next one only when [`Tester::finished`] was told of it.
    pub fn due(&mut self, now: Duration) -> Option<Transfer> {
        if let Some(test) = &self.test
            && !test.running
            && now >= test.since + SET_WITHIN
        {
            self.give_up(now);
        }
        if self.test.is_none() {
            if self.offload.finding.is_none() && self.offload.setting == Setting::On && self.device == Some(true) {
                self.offload.setting = Setting::Untouched;
            }
            self.begin(now);
        }
        let test = self.test.as_mut().filter(|test| !test.running)?;
        if self.device != Some(test.step != Step::WithoutOffload) {
            return None;
        }
        test.running = true;
        let Candidate { own, address, .. } = test.candidate;
        Some(Transfer { peer: test.peer.clone(), own, address })
    }

    /// When to ask again what is due, if nothing happens before.
    #[must_use]
    pub fn next(&self, now: Duration) -> Option<Duration> {
        match &self.test {
            Some(test) if test.running => None,
            Some(test) => Some(test.since + SET_WITHIN),
            None if self.offload.finding.is_none() && self.device != Some(true) => None,
            None => self.wanted(now).map(|(at, _)| at).min().map(|at| at.max(self.not_before)),
        }
    }

    /// What became of the transfer that was due.
    pub fn finished(&mut self, outcome: Outcome, now: Duration) {
        let Some(mut test) = self.test.take() else { return };
        test.running = false;
        let changed = !self.is_as_before(&test);
        let known = self.offload.finding.is_some();
        test.since = now;
        let (step, setting) = match (test.step, outcome) {
            _ if changed => return self.put_off(&test.peer, RETRY, now),
            (_, Outcome::Declined) => return self.declined(&test.peer, now),
            (Step::First | Step::Again | Step::Confirmation, Outcome::Passed) => {
                self.offload.finding = None;
                self.sound.insert(test.peer.clone(), now);
                return self.put_off(&test.peer, PAUSE, now);
            }
            (Step::First, Outcome::Stalled) if !known => (Step::Again, self.offload.setting),
            (Step::First | Step::Again, Outcome::Stalled) => (Step::WithoutOffload, Setting::Off),
            (Step::WithoutOffload, Outcome::Passed) if !known => (Step::Confirmation, Setting::On),
            (Step::WithoutOffload, Outcome::Stalled) => {
                // A finding stays as long as nothing speaks against it, and is not put to the test on a broken path. Nor does the
                // offload go off and on for each of many peers in turn that let nothing through.
                self.not_before = now + LATER;
                return self.put_off(&test.peer, LATER, now);
            }
            (Step::WithoutOffload, Outcome::Passed) | (Step::Confirmation, Outcome::Stalled) => {
                let interface = test.candidate.interface.clone();
                self.offload.finding = Some(Finding { peer: test.peer.clone(), interface, at: now, confirmed: known });
                return self.put_off(&test.peer, PAUSE, now);
            }
        };
        test.step = step;
        self.offload.setting = setting;
        self.test = Some(test);
    }

    fn is_as_before(&self, test: &Test) -> bool {
        self.candidates.get(&test.peer) == Some(&test.candidate)
    }

    /// Ends the test without a result.
    fn give_up(&mut self, now: Duration) {
        if let Some(test) = self.test.take() {
            self.put_off(&test.peer, RETRY, now);
        }
    }

    fn declined(&mut self, peer: &NodeName, now: Duration) {
        let before = self.waiting.get(peer).map_or(0, |wait| wait.declined);
        if self.offload.finding.is_some() {
            // Each attempt turns the offload on for a moment.
            self.not_before = self.not_before.max(now + LATER);
        }
        self.put_off(peer, LATER.min(RETRY * 2_u32.saturating_pow(before)), now);
        if let Some(wait) = self.waiting.get_mut(peer) {
            wait.declined = before.saturating_add(1);
        }
    }

    fn put_off(&mut self, peer: &NodeName, time: Duration, now: Duration) {
        self.offload.settle();
        self.not_before = self.not_before.max(now + PAUSE);
        if let Some(wait) = self.waiting.get_mut(peer) {
            *wait = Wait { until: now + time, declined: 0 };
        }
    }

    /// Begins a test, if one is wanted.
    fn begin(&mut self, now: Duration) {
        // Where somebody else has turned it off, there is nothing to test.
        if now < self.not_before || (self.offload.finding.is_none() && self.device != Some(true)) {
            return;
        }
        let due: Vec<NodeName> = self.wanted(now).filter(|(at, _)| *at <= now).map(|(_, peer)| peer.clone()).collect();
        let tried_before = self.offload.finding.as_ref().map(|finding| &finding.peer);
        let Some(peer) = due.iter().find(|peer| Some(*peer) == tried_before).or_else(|| {
            let count = u64::try_from(due.len()).ok().filter(|count| *count > 0)?;
            self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            due.get(usize::try_from((self.random >> 33) % count).ok()?)
        }) else {
            return;
        };
        let Some(candidate) = self.candidates.get(peer).cloned() else { return };
        if self.offload.finding.is_some() {
            self.offload.setting = Setting::On;
        }
        self.test = Some(Test { peer: peer.clone(), candidate, step: Step::First, since: now, running: false });
    }

    /// Peers that may be tried, and from when on.
    fn wanted(&self, now: Duration) -> impl Iterator<Item = (Duration, &NodeName)> {
        let expiry = |at: Duration| at + RETEST;
        // Per interface: when enough peers will no longer have been tried.
        let mut fresh: BTreeMap<&InterfaceName, Vec<Duration>> = BTreeMap::new();
        for (peer, at) in self.sound.iter().filter(|(_, at)| now < expiry(**at)) {
            if let Some(candidate) = self.candidates.get(peer) {
                fresh.entry(&candidate.interface).or_default().push(expiry(*at));
            }
        }
        let enough = move |interface: &InterfaceName| {
            let known = fresh.get(interface).filter(|known| known.len() >= SAMPLES);
            known.and_then(|known| known.iter().min().copied()).unwrap_or_default()
        };
        let known_until = self.offload.finding.as_ref().map(Finding::until).unwrap_or_default();
        self.candidates.iter().map(move |(peer, candidate)| {
            let waits = self.waiting.get(peer).map_or(now, |wait| wait.until);
            let sound = self.sound.get(peer).map(|at| expiry(*at)).unwrap_or_default();
            (waits.max(sound).max(enough(&candidate.interface)).max(known_until), peer)
        })
    }
}

#[cfg(test)]
mod tests;
