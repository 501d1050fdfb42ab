//! The tester against nodes whose offload works, does not, or is not to blame.

use proptest::prelude::*;

use super::*;

const START: Duration = Duration::from_secs(1000);

fn node(text: &str) -> NodeName {
    NodeName::new(text).unwrap()
}

fn eth(number: usize) -> InterfaceName {
    InterfaceName::new(&format!("eth{number}")).unwrap()
}

/// Peers `p<n>`, each reached by interface `eth<n % interfaces>`.
fn peers(count: usize, interfaces: usize) -> BTreeMap<NodeName, Candidate> {
    let candidate = |number: usize| Candidate {
        own: "10.42.0.1".parse().unwrap(),
        address: std::net::Ipv4Addr::from_bits(0x0a2a_0000 + u32::try_from(number).unwrap()).into(),
        interface: eth(number % interfaces),
        mtu: Some(1450),
    };
    (1..=count).map(|number| (node(&format!("p{number}")), candidate(number))).collect()
}

/// A node, and the world around it.
struct World {
    tester: Tester,
    now: Duration,
    /// What the device has; it follows the tester's setting, unless somebody keeps it off.
    device: bool,
    kept_off: bool,
    /// What a transfer comes to, from whether the device has offload.
    becomes: fn(bool) -> Outcome,
    /// Transfers so far: to whom, with offload or without.
    transfers: Vec<(NodeName, bool)>,
}

impl World {
    fn new(candidates: BTreeMap<NodeName, Candidate>, becomes: fn(bool) -> Outcome) -> Self {
        let mut tester = Tester::new(Offload::default(), 7);
        tester.set_candidates(candidates, START);
        Self { tester, now: START, device: true, kept_off: false, becomes, transfers: Vec::new() }
    }

    fn apply(&mut self) {
        match self.tester.offload().setting {
            Setting::Untouched => {}
            Setting::Off => self.device = false,
            Setting::On => self.device = true,
        }
        self.device &= !self.kept_off;
        self.tester.set_device(Some(self.device));
    }

    /// Lives for so long; nothing but the tester's own times drives it.
    fn live(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            self.apply();
            if let Some(transfer) = self.tester.due(self.now) {
                assert_eq!(self.tester.due(self.now), None, "one at a time");
                let outcome = (self.becomes)(self.device);
                self.transfers.push((transfer.peer, self.device));
                self.now += if outcome == Outcome::Stalled { LIMIT } else { Duration::from_millis(10) };
                self.tester.finished(outcome, self.now);
                continue;
            }
            let before = self.device;
            self.apply();
            if self.device != before {
                continue;
            }
            match self.tester.next(self.now) {
                Some(next) if next < end => self.now = next.max(self.now + Duration::from_millis(1)),
                _ => break,
            }
        }
        self.now = self.now.max(end);
    }

    fn with_offload(&self) -> Vec<bool> {
        self.transfers.iter().map(|(_, with)| *with).collect()
    }
}

fn healthy(_: bool) -> Outcome {
    Outcome::Passed
}

fn broken(offload: bool) -> Outcome {
    if offload { Outcome::Stalled } else { Outcome::Passed }
}

fn no_path(_: bool) -> Outcome {
    Outcome::Stalled
}

fn declining(_: bool) -> Outcome {
    Outcome::Declined
}

#[test]
fn a_healthy_node_tries_two_peers_per_interface_a_day_however_many_there_are() {
    let mut world = World::new(peers(5000, 2), healthy);
    world.live(Duration::from_secs(60));
    assert_eq!(world.transfers.len(), 4);
    assert_eq!(*world.tester.offload(), Offload::default());
    let interfaces: Vec<_> = world.transfers.iter().map(|(peer, _)| peers(5000, 2)[peer].interface.clone()).collect();
    assert_eq!(interfaces.iter().filter(|it| **it == eth(0)).count(), 2);
    world.live(RETEST - Duration::from_secs(120));
    assert_eq!(world.transfers.len(), 4);
    world.live(Duration::from_secs(180));
    assert_eq!(world.transfers.len(), 8);
}

#[test]
fn another_card_on_the_way_is_tested_at_once() {
    let mut world = World::new(peers(3, 1), healthy);
    world.live(Duration::from_secs(60));
    assert_eq!(world.transfers.len(), 2);
    // The same peers behind another card, whose offload is broken.
    let mut moved = peers(3, 1);
    moved.values_mut().for_each(|candidate| candidate.interface = eth(1));
    world.becomes = broken;
    world.tester.set_candidates(moved, world.now);
    world.live(FOUND_WITHIN);
    let finding = world.tester.offload().finding.clone().expect("the new card was tested");
    assert_eq!(finding.interface, eth(1));
}

#[test]
fn a_broken_offload_is_found_and_stays_off() {
    let mut world = World::new(peers(3, 1), broken);
    world.live(FOUND_WITHIN);
    assert_eq!(world.with_offload(), [true, true, false, true]);
    let found = world.tester.offload().clone();
    let finding = found.finding.clone().unwrap();
    assert_eq!((found.setting, &finding.interface), (Setting::Off, &eth(0)));
    assert!(world.transfers.iter().all(|(peer, _)| *peer == finding.peer));
    assert!(finding.at - START < FOUND_WITHIN - Duration::from_secs(5));
    // Ten minutes later it is tried once more, and not longer than needed.
    world.live(LATER + Duration::from_secs(60));
    assert_eq!(world.with_offload()[4..], [true, false]);
    let found = world.tester.offload().clone();
    let finding = found.finding.clone().filter(|again| again.confirmed && again.at > finding.at).unwrap();
    world.live(RETEST / 2);
    assert_eq!((world.transfers.len(), world.device), (6, false));
    // A daemon that starts anew begins with what is known.
    let mut next = Tester::new(found.clone(), 8);
    next.set_candidates(peers(3, 1), world.now);
    assert_eq!(*next.offload(), found);
    // A day later it is tried again, with the same peer.
    world.live(RETEST / 2 + Duration::from_secs(60));
    assert_eq!(world.with_offload()[6..], [true, false]);
    let again = world.tester.offload().finding.clone().unwrap();
    assert_eq!((again.peer, world.device), (finding.peer, false));
    assert!(again.at > finding.at);
    // The driver was replaced: that is noticed a day after the last test.
    world.becomes = healthy;
    world.live(RETEST + Duration::from_secs(60));
    assert_eq!((world.tester.offload().clone(), world.device), (Offload::default(), true));
}

#[test]
fn a_broken_path_is_not_held_against_the_offload() {
    let mut world = World::new(peers(1, 1), no_path);
    world.live(FOUND_WITHIN);
    assert_eq!(world.with_offload(), [true, true, false]);
    assert_eq!((world.tester.offload().clone(), world.device), (Offload::default(), true));
    world.live(LATER);
    assert_eq!(world.transfers.len(), 6);
    // Nor is a finding given up for one.
    let mut world = World::new(peers(2, 1), broken);
    world.live(RETEST);
    let found = world.tester.offload().clone();
    world.becomes = no_path;
    world.live(2 * LATER);
    assert_eq!((world.tester.offload().finding.clone(), world.device), (found.finding, false));
}

#[test]
fn a_path_that_recovers_in_the_middle_is_not_held_against_the_offload() {
    let mut world = World::new(peers(1, 1), no_path);
    world.apply();
    world.now += SETTLING;
    for _ in 0..2 {
        world.apply();
        assert!(world.tester.due(world.now).is_some());
        world.tester.finished(Outcome::Stalled, world.now + LIMIT);
    }
    world.becomes = healthy;
    world.live(Duration::from_secs(60));
    assert_eq!(world.with_offload(), [false, true]);
    assert_eq!((world.tester.offload().clone(), world.device), (Offload::default(), true));
}

#[test]
fn a_link_that_fails_in_the_rhythm_of_the_test_costs_the_offload_for_ten_minutes() {
    let mut world = World::new(peers(1, 1), broken);
    world.live(FOUND_WITHIN);
    assert!(world.tester.offload().finding.as_ref().is_some_and(|finding| !finding.confirmed));
    world.becomes = healthy;
    world.live(LATER + FOUND_WITHIN);
    assert_eq!((world.tester.offload().clone(), world.device), (Offload::default(), true));
}

#[test]
fn a_path_that_changes_proves_nothing() {
    let mut world = World::new(peers(1, 1), broken);
    world.now += SETTLING;
    world.apply();
    assert!(world.tester.due(world.now).is_some());
    let mut narrower = peers(1, 1);
    narrower.values_mut().for_each(|candidate| candidate.mtu = Some(1350));
    world.tester.set_candidates(narrower, world.now);
    world.tester.finished(Outcome::Stalled, world.now + LIMIT);
    assert_eq!(world.tester.next(world.now + LIMIT), Some(world.now + LIMIT + RETRY), "it begins anew, later");
    // The same in the middle of the part without offload, while the device is being set.
    world.now += LIMIT + RETRY;
    for _ in 0..2 {
        assert!(world.tester.due(world.now).is_some());
        world.tester.finished(Outcome::Stalled, world.now);
    }
    assert_eq!(world.tester.offload().setting, Setting::Off);
    world.tester.set_candidates(peers(1, 1), world.now);
    assert_eq!(world.tester.offload().setting, Setting::On);
    world.apply();
    world.tester.due(world.now);
    assert_eq!(*world.tester.offload(), Offload::default());
}

#[test]
fn peers_that_decline_are_left_alone_more_and_more() {
    let mut world = World::new(peers(1, 1), declining);
    world.live(Duration::from_secs(3600));
    assert!((8..15).contains(&world.transfers.len()), "{}", world.transfers.len());
    assert_eq!(*world.tester.offload(), Offload::default());
}

#[test]
fn offload_that_somebody_else_has_turned_off_is_left_off() {
    let mut world = World::new(peers(3, 1), broken);
    world.kept_off = true;
    world.live(Duration::from_secs(3600));
    assert_eq!((world.transfers.len(), world.tester.offload().clone()), (0, Offload::default()));
}

#[test]
fn a_daemon_that_was_killed_in_a_test_leaves_nothing_off() {
    let killed = Offload { setting: Setting::Off, finding: None };
    assert_eq!(Tester::new(killed, 1).offload().setting, Setting::On);
    let finding = Finding { peer: node("p1"), interface: eth(0), at: START, confirmed: true };
    let in_retest = Offload { setting: Setting::On, finding: Some(finding) };
    assert_eq!(Tester::new(in_retest, 1).offload().setting, Setting::Off);
}

proptest! {
    /// Whatever becomes of transfers, and whoever comes and goes: the device is off for good only with a finding, one
    /// transfer is under way at most, and with nothing left to try the tester has settled.
    #[test]
    fn nothing_is_left_off_without_a_finding(
        events in prop::collection::vec((0_u8..6, 0_u64..2000), 1..200),
        seed in any::<u64>(),
    ) {
        let mut tester = Tester::new(Offload::default(), seed);
        let (mut now, mut device, mut running) = (START, true, false);
        for (event, millis) in events {
            now += Duration::from_millis(millis);
            match event {
                0 => tester.set_candidates(peers(usize::try_from(millis % 4).unwrap(), 2), now),
                1 => {
                    match tester.offload().setting {
                        Setting::Off => device = false,
                        Setting::On => device = true,
                        Setting::Untouched => {}
                    }
                    tester.set_device(Some(device));
                }
                2 => {
                    let due = tester.due(now);
                    prop_assert!(!(running && due.is_some()));
                    running |= due.is_some();
                }
                outcome if running => {
                    tester.finished([Outcome::Passed, Outcome::Stalled, Outcome::Declined][usize::from(outcome - 3)], now);
                    running = false;
                }
                _ => {}
            }
        }
        if running {
            tester.finished(Outcome::Declined, now);
        }
        tester.set_candidates(BTreeMap::new(), now);
        let offload = tester.offload();
        prop_assert_eq!(offload.finding.is_some(), offload.setting == Setting::Off);
    }
}
