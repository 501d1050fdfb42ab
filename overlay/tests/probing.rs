//! Path probing against models of paths, over many simulated hours.

#[path = "probing/world.rs"]
mod world;

use std::time::Duration;

use husk_overlay::prefix::Family;
use husk_overlay::probe::Standing;
use husk_overlay::probe::wire::SMALL;
use proptest::prelude::*;

use world::{FLOOR, Model, SECOND, World};

const HOUR: Duration = Duration::from_secs(3600);

/// Within which a path that swallows packets is found, to the byte.
const FOUND: Duration = Duration::from_secs(30);

/// Within which a path that has recovered is seen to have, if no packet is lost.
const RECOVERED: Duration = Duration::from_secs(20);

/// A world in which every path was verified.
fn verified(peers: usize, families: &[Family], promised: u32, seed: u64) -> World {
    let mut world = World::new(peers, families, promised, seed);
    let took = world.run_until(FOUND, |world| world.all_stand(Standing::Verified));
    assert!(took.is_some(), "not verified: {:?}", world.prober.reports());
    world
}

/// A promise and what of it passes.
fn hole() -> impl Strategy<Value = (u32, u32)> {
    let promised = prop_oneof![Just(1281_u32), 1282_u32..1500, Just(1440), 1500_u32..9001, Just(65475)];
    promised.prop_flat_map(|promised| (Just(promised), prop_oneof![Just(FLOOR), Just(promised - 1), FLOOR..promised]))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_black_hole_is_found_to_the_byte_within_30_seconds_and_its_end_within_20(
        (promised, passes) in hole(),
        families in prop_oneof![Just(&Family::ALL[..1]), Just(&Family::ALL[1..]), Just(&Family::ALL[..])],
        delay in 0_u64..300,
        begin in 0_u64..20_000,
        seed: u64,
    ) {
        let mut world = verified(3, families, promised, seed);
        world.run(Duration::from_millis(begin));
        world.peer(1, Model { delay: Duration::from_millis(delay), ..Model::passing(passes) });
        world.run(FOUND);
        prop_assert_eq!(world.limit(1), Some(passes), "{:?}", world.prober.reports());
        prop_assert_eq!((world.limit(0), world.limit(2)), (None, None));
        for family in families {
            let report = world.report(1, *family);
            prop_assert_eq!((report.standing, report.passes), (Standing::Limited { passes }, Some(passes)));
        }
        world.run(Duration::from_millis(begin));
        prop_assert_eq!(world.limit(1), Some(passes));
        world.peer(1, Model::good());
        world.run(RECOVERED);
        prop_assert_eq!(world.limit(1), None);
        prop_assert!(world.all_stand(Standing::Verified));
    }

    #[test]
    fn it_is_found_just_as_fast_where_packets_are_lost(
        (promised, passes) in hole(),
        lost in prop_oneof![Just((50_u64, 0_u64)), Just((0, 50)), Just((25, 25))],
        begin in 0_u64..20_000,
        seed: u64,
    ) {
        let mut world = verified(1, &[Family::Ipv4], promised, seed);
        world.run(Duration::from_millis(begin));
        world.peer(0, Model::passing(passes).losing(lost.0, lost.1));
        world.run(FOUND);
        prop_assert_eq!(world.limit(0), Some(passes), "{:?}", world.prober.reports());
        // A lost probe may cost another try.
        world.peer(0, Model::good().losing(lost.0, lost.1));
        prop_assert!(world.run_until(RECOVERED * 3, |world| world.limit(0).is_none()).is_some());
    }

    #[test]
    fn a_path_that_gets_worse_or_somewhat_better_is_followed_to_the_byte(
        first in 1290_u32..8900,
        second in 1290_u32..8900,
        seed: u64,
    ) {
        let mut world = verified(1, &[Family::Ipv4], 8941, seed);
        world.peer(0, Model::passing(first));
        world.run(FOUND);
        prop_assert_eq!(world.limit(0), Some(first));
        world.peer(0, Model::passing(second));
        world.run(FOUND + RECOVERED);
        prop_assert_eq!(world.limit(0), Some(second));
    }

    #[test]
    fn a_path_that_changes_while_it_is_measured_is_understood_in_the_end(
        changes in proptest::collection::vec((FLOOR - 10..1460, 0_u64..5000), 1..12),
        seed: u64,
    ) {
        let mut world = verified(1, &[Family::Ipv4, Family::Ipv6], 1440, seed);
        for (passes, milliseconds) in &changes {
            world.peer(0, Model::passing(*passes));
            world.run(Duration::from_millis(*milliseconds));
        }
        world.run(FOUND * 2);
        let passes = changes.last().map_or(1440, |(passes, _)| *passes);
        prop_assert_eq!(world.limit(0), (passes < 1440).then_some(passes.max(FLOOR)));
    }

    #[test]
    fn what_was_never_sent_or_comes_twice_or_late_does_no_harm(
        forged in proptest::collection::vec(any::<u64>(), 0..50),
        copies in 1_usize..4,
        seed: u64,
    ) {
        let mut world = verified(2, &Family::ALL, 1440, seed);
        world.peer(0, Model { copies, delay: Duration::from_millis(600), ..Model::passing(1399) });
        for id in forged {
            world.prober.answered(id, world.now);
            world.run(SECOND);
        }
        world.run(FOUND);
        prop_assert_eq!(world.limit(0), Some(1399));
        // Whoever answers after more than a second might as well be silent; what is known of the path stays.
        world.peer(0, Model { delay: Duration::from_millis(1500), copies: 1, ..Model::good() });
        world.run(FOUND * 4);
        prop_assert_eq!(world.limit(0), Some(1399));
        prop_assert_eq!(world.report(0, Family::Ipv4).standing, Standing::Unreachable);
        prop_assert_eq!(world.limit(1), None);
    }
}

#[test]
fn random_loss_is_never_taken_for_a_black_hole() {
    for (index, lost) in [(50, 50), (100, 100), (100, 0), (0, 100), (190, 0)].into_iter().enumerate() {
        let mut world = World::new(16, &Family::ALL, 1440, 7 + index as u64);
        world.all(Model::good().losing(lost.0, lost.1));
        let wrong = world.run_until(HOUR * 24, |world| !world.prober.limits().is_empty());
        assert_eq!(wrong, None, "{lost:?}: {:?}", world.prober.reports());
        let expected = 1000 - (1000 - lost.0) * (1000 - lost.1) / 1000;
        let measured = world.report(0, Family::Ipv4).loss_per_mille.unwrap();
        eprintln!("{lost:?} of 1000 lost: {expected} expected, {measured} measured, {} probes", world.sent);
        assert!(u64::from(measured).abs_diff(expected) < 110, "{lost:?}: {measured}");
    }
}

#[test]
fn links_that_come_and_go_are_never_taken_for_a_black_hole() {
    let mut world = World::new(8, &Family::ALL, 1440, 3);
    for _ in 0..4000 {
        let (up, down) = (world.random() % 8000, world.random() % 3000);
        world.all(Model::good().losing(20, 20));
        world.run(Duration::from_millis(up));
        world.all(Model::dead());
        world.run(Duration::from_millis(down));
        assert!(world.prober.limits().is_empty(), "{:?}", world.prober.reports());
    }
    world.all(Model::good());
    world.run(FOUND);
    assert!(world.all_stand(Standing::Verified));
}

#[test]
fn what_is_found_of_a_tunnel_in_one_family_holds_for_the_other() {
    for tunnelled in [true, false] {
        let mut world = verified(1, &Family::ALL, 1440, 41);
        world.targets.values_mut().for_each(|target| target.tunnelled = tunnelled);
        world.prober.set_targets(&world.targets, world.now);
        assert!(world.run_until(FOUND, |world| world.all_stand(Standing::Verified)).is_some());
        world.peer(0, Model::passing(1400));
        let limited = |world: &World| Family::ALL.map(|family| world.report_limit(0, family));
        world.run_until(FOUND, |world| limited(world).contains(&Some(1400)));
        assert_eq!(limited(&world) == [Some(1400); 2], tunnelled, "{:?}", world.prober.reports());
        assert!(world.run_until(FOUND, |world| limited(world) == [Some(1400); 2]).is_some());
    }
}

#[test]
fn each_family_has_a_floor_of_its_own() {
    let mut world = World::new(1, &Family::ALL, 1440, 43);
    world.targets.get_mut(&world::path(0, Family::Ipv4)).unwrap().floor = 576;
    world.prober.set_targets(&world.targets, world.now);
    assert!(world.run_until(FOUND, |world| world.all_stand(Standing::Verified)).is_some());
    world.peer(0, Model::passing(1250));
    world.run(FOUND);
    let limits = Family::ALL.map(|family| world.prober.limits()[&world::peer(0)][&family].bytes);
    assert_eq!(limits, [1250, 1280]);
    // With IPv6 out of use IPv4 goes on alone, and finds that the path is whole again.
    world.targets.remove(&world::path(0, Family::Ipv6));
    world.prober.set_targets(&world.targets, world.now);
    world.run(HOUR);
    assert_eq!(world.limit(0), Some(1250));
    world.peer(0, Model::good());
    world.run(RECOVERED);
    assert_eq!(world.limit(0), None);
}

#[test]
fn another_daemon_keeps_to_what_was_known_until_it_knows_better() {
    let mut world = verified(3, &Family::ALL, 1440, 47);
    world.peer(1, Model::passing(1400));
    world.run(FOUND);
    let known = world.prober.limits();
    world.restart();
    assert_eq!(world.prober.limits(), known);
    assert_eq!(world.run_until(HOUR, |world| world.limit(1) != Some(1400)), None);
    world.peer(1, Model::good());
    world.restart();
    assert_eq!(world.prober.limits(), known);
    assert!(world.run_until(SECOND * 4, |world| world.limit(1).is_none()).is_some(), "it is tried as soon as may be");
    // Among thousands, too.
    let mut world = verified(1, &Family::ALL, 1440, 53);
    world.peer(0, Model::passing(1400));
    world.run(FOUND);
    for index in 1..5000 {
        for family in Family::ALL {
            let target = world.targets[&world::path(0, family)].clone();
            world.targets.insert(world::path(index, family), target);
            world.add(index, family);
        }
    }
    world.peer(0, Model::good());
    world.restart();
    assert_eq!(world.limit(0), Some(1400));
    assert!(world.run_until(SECOND * 10, |world| world.limit(0).is_none()).is_some());
}

#[test]
fn what_is_promised_later_is_used_when_it_is_verified() {
    for passes in [8941, 4000, 1440] {
        let mut world = verified(3, &Family::ALL, 1440, 59);
        world.all(Model::passing(passes));
        world.promise(8941);
        for index in 0..3 {
            assert_eq!(world.limit(index), Some(1440), "what was verified");
            assert!(!world.prober.limits()[&world::peer(index)][&Family::Ipv4].found, "nothing is known to vanish");
        }
        // Nothing above it is used before it was seen to pass.
        let found = world.run_until(FOUND * 2, |world| (0..3).all(|index| world.limit(index) != Some(1440)));
        if passes == 8941 {
            assert!(found.is_some_and(|took| took < SECOND), "{found:?}");
        }
        world.run(FOUND);
        for index in 0..3 {
            assert_eq!(world.limit(index), Some(passes).filter(|passes| *passes < 8941));
        }
        if passes < 8941 {
            assert!(world.all_stand(Standing::Limited { passes }), "{:?}", world.prober.reports());
        }
    }
    // Who never answered is taken at its word, as before anything is known.
    let mut world = World::new(1, &Family::ALL, 1440, 61);
    world.all(Model::dead());
    world.run(FOUND);
    world.promise(8941);
    assert_eq!(world.limit(0), None);
    // The own device may follow a moment later.
    let mut world = verified(1, &Family::ALL, 1440, 67);
    world.device = 1440;
    world.promise(8941);
    world.run(SECOND / 2);
    world.device = u32::MAX;
    assert!(world.run_until(SECOND * 2, |world| world.limit(0).is_none()).is_some());
}

#[test]
fn answers_from_an_earlier_address_prove_nothing() {
    let mut world = World::new(1, &[Family::Ipv4], 1440, 71);
    // The first check is on its way when the peer gets another address, to which nothing passes.
    world.peer(0, Model { delay: Duration::from_millis(900), ..Model::good() });
    assert!(world.run_until(FOUND, |world| world.sent == 1).is_some());
    world.targets.values_mut().for_each(|target| target.address = "10.42.0.128".parse().unwrap());
    world.prober.set_targets(&world.targets, world.now);
    world.peer(0, Model::dead());
    // It is asked again before the old answer comes.
    world.prober.demand(&world::peer(0), world.now);
    let wrong = world.run_until(FOUND, |world| world.report(0, Family::Ipv4).standing == Standing::Verified);
    assert_eq!(wrong, None);
    // The same where it was away for a moment.
    world.peer(0, Model { delay: Duration::from_millis(900), ..Model::good() });
    world.prober.demand(&world::peer(0), world.now);
    world.run(SECOND / 10);
    world.peer(0, Model::dead());
    world.prober.set_targets(&std::collections::BTreeMap::new(), world.now);
    world.prober.set_targets(&world.targets, world.now);
    world.prober.demand(&world::peer(0), world.now);
    let wrong = world.run_until(FOUND, |world| world.report(0, Family::Ipv4).standing == Standing::Verified);
    assert_eq!(wrong, None);
}

#[test]
fn a_path_that_passes_less_than_the_floor_is_limited_to_the_floor() {
    let mut world = verified(1, &Family::ALL, 1440, 5);
    world.peer(0, Model::passing(FLOOR - 1));
    world.run(FOUND);
    assert_eq!(world.limit(0), Some(FLOOR));
    assert_eq!(world.report(0, Family::Ipv6).standing, Standing::Limited { passes: SMALL });
    world.run(HOUR);
    assert_eq!(world.limit(0), Some(FLOOR));
    world.peer(0, Model::passing(FLOOR));
    world.run(FOUND + RECOVERED);
    assert_eq!(world.report(0, Family::Ipv6).standing, Standing::Limited { passes: FLOOR });
    world.peer(0, Model::good());
    world.run(RECOVERED);
    assert_eq!(world.limit(0), None);
}

#[test]
fn a_peer_out_of_reach_keeps_its_limit_or_none() {
    let mut world = verified(2, &Family::ALL, 1440, 11);
    world.peer(0, Model::passing(1300));
    world.run(FOUND);
    world.all(Model::dead());
    world.run(FOUND);
    assert!(world.all_stand(Standing::Unreachable));
    assert_eq!((world.limit(0), world.limit(1)), (Some(1300), None));
    assert_eq!(world.report(1, Family::Ipv4).loss_per_mille.map(|loss| loss > 300), Some(true));
    let since = world.report(1, Family::Ipv4).since;
    let sent = world.sent;
    world.run(HOUR);
    assert_eq!(world.report(1, Family::Ipv4).since, since, "nothing has changed");
    assert!(world.sent - sent < 4 * 3600, "{} probes to the dead", world.sent - sent);
    world.all(Model::good());
    world.run(RECOVERED);
    assert!(world.all_stand(Standing::Verified));
    assert_eq!(world.report(1, Family::Ipv4).loss_per_mille.unwrap_or(0), 0, "an outage is over, not a loss");
}

#[test]
fn a_path_that_dies_behind_its_limit_stays_unreachable_however_often_somebody_asks() {
    let mut world = verified(1, &Family::ALL, 1440, 17);
    world.peer(0, Model::passing(1300));
    world.run(FOUND);
    assert!(world.all_stand(Standing::Limited { passes: 1300 }));
    world.all(Model::dead());
    let fell = world.run_until(FOUND, |world| world.all_stand(Standing::Unreachable));
    assert!(fell.is_some(), "{:?}", world.prober.reports());
    for _ in 0..20 {
        let begun = world.now;
        world.prober.demand(&world::peer(0), world.now);
        let wrong = world.run_until(SECOND * 3, |world| !world.all_stand(Standing::Unreachable));
        assert_eq!(wrong, None, "nothing was answered: {:?}", world.prober.reports());
        let concluded = |family| world.report(0, family).concluded.is_some_and(|concluded| concluded > begun);
        assert!(Family::ALL.into_iter().all(concluded), "who asked is told so");
    }
    // Who asks when it is back behind the same path, or behind a better one, is told that as well.
    world.all(Model::passing(1300));
    world.prober.demand(&world::peer(0), world.now);
    assert!(world.run_until(SECOND * 3, |world| world.all_stand(Standing::Limited { passes: 1300 })).is_some());
    world.all(Model::dead());
    assert!(world.run_until(FOUND, |world| world.all_stand(Standing::Unreachable)).is_some());
    world.all(Model::good());
    world.prober.demand(&world::peer(0), world.now);
    assert!(world.run_until(SECOND * 2, |world| world.all_stand(Standing::Verified)).is_some());
    // One that died just now is still searched when somebody asks, but not for long.
    world.peer(0, Model::passing(1300));
    world.run(FOUND);
    world.all(Model::dead());
    world.prober.demand(&world::peer(0), world.now);
    assert!(world.run_until(SECOND * 10, |world| world.all_stand(Standing::Unreachable)).is_some());
}

#[test]
fn who_is_away_for_a_moment_is_not_silent_and_who_stays_away_is_until_it_answers() {
    let mut world = verified(2, &Family::ALL, 1440, 19);
    let silent = |world: &World| world.prober.silent(world.now);
    world.peer(0, Model::dead());
    let fell = world.run_until(FOUND, |world| world.report(0, Family::Ipv4).standing == Standing::Unreachable);
    assert!(fell.is_some() && silent(&world).is_empty());
    assert!(world.run_until(FOUND, |world| silent(world).len() == 2).is_some());
    assert!(silent(&world).iter().all(|path| path.peer == world::peer(0)));
    world.peer(0, Model::good());
    assert!(world.run_until(RECOVERED, |world| silent(world).is_empty()).is_some());
    world.peer(0, Model::dead());
    world.run(FOUND * 2);
    assert_eq!(silent(&world).len(), 2);
    world.targets.retain(|path, _| path.peer != world::peer(0));
    world.prober.set_targets(&world.targets, world.now);
    assert!(silent(&world).is_empty(), "it has left");
}

#[test]
fn a_new_promise_is_verified_anew_and_limits_above_it_go() {
    let mut world = verified(1, &[Family::Ipv4], 8941, 13);
    world.peer(0, Model::passing(1440));
    world.run(FOUND);
    assert_eq!(world.limit(0), Some(1440));
    world.promise(1440);
    assert_eq!((world.limit(0), world.report(0, Family::Ipv4).standing), (None, Standing::Unknown));
    world.run(SECOND * 2);
    assert!(world.all_stand(Standing::Verified));
    world.promise(8941);
    world.run(FOUND);
    assert_eq!(
        (world.limit(0), world.report(0, Family::Ipv4).standing),
        (Some(1440), Standing::Limited { passes: 1440 })
    );
    world.promise(4000);
    assert_eq!(world.limit(0), Some(1440), "what passes is still known");
    world.run(FOUND);
    assert_eq!(world.limit(0), Some(1440));
    world.peer(0, Model::good());
    world.promise(9001);
    world.run(SECOND * 3);
    assert!(world.all_stand(Standing::Verified) && world.limit(0).is_none());
    world.targets.clear();
    world.prober.set_targets(&world.targets, world.now);
    world.run(HOUR);
    assert!(world.prober.reports().is_empty() && world.prober.limits().is_empty());
}

#[test]
fn what_somebody_asks_for_is_begun_at_once() {
    let mut world = verified(40, &Family::ALL, 1440, 17);
    world.peer(0, Model::passing(1350));
    world.run(FOUND);
    assert_eq!(world.limit(0), Some(1350));
    world.peer(0, Model::passing(1390));
    let ask = |world: &mut World, index, patience| {
        let asked = world.now;
        world.prober.demand(&world::peer(index), world.now);
        let concluded = |family: &Family, world: &World| world.report(index, *family).concluded > Some(asked);
        world.run_until(patience, |world| Family::ALL.iter().all(|family| concluded(family, world)))
    };
    assert!(ask(&mut world, 0, SECOND * 12).is_some());
    assert_eq!(world.limit(0), Some(1390));
    assert!(ask(&mut world, 1, SECOND).is_some());
    world.peer(2, Model::dead());
    assert!(ask(&mut world, 2, SECOND * 6).is_some());
    assert_eq!(world.report(2, Family::Ipv4).standing, Standing::Unreachable);
}

#[test]
fn what_the_own_kernel_refuses_says_nothing_of_the_path() {
    let mut world = verified(2, &Family::ALL, 1440, 19);
    world.device = 1400;
    let sent = world.sent;
    world.run(HOUR);
    assert!(world.prober.limits().is_empty() && world.all_stand(Standing::Verified));
    assert!(world.sent - sent < 4 * 3600 / 7, "{} tries", world.sent - sent);
    world.device = u32::MAX;
    world.peer(0, Model::passing(1350));
    world.run(FOUND);
    assert_eq!(world.limit(0), Some(1350));
}

#[test]
fn in_a_large_cluster_nobody_is_forgotten_and_the_budget_is_kept() {
    let mut world = World::new(5000, &Family::ALL, 8941, 23);
    world.run(Duration::from_secs(400));
    assert!(world.all_stand(Standing::Verified));
    let before = world.sent_to.clone();
    let sent = world.sent;
    world.run(Duration::from_secs(400));
    eprintln!("{} probes per second for 10,000 paths", (world.sent - sent) / 400);
    assert!(world.sent_to.iter().all(|(path, sent)| *sent > before[path]), "somebody was left out");
    // One peer of them is lost in both families as soon as it is in one.
    world.peer(77, Model::passing(1400));
    let found = world.run_until(Duration::from_secs(400), |world| world.limit(77).is_some());
    eprintln!("one black hole among 10,000 paths is found after {found:?}");
    assert!(found.is_some());
    // A thousand are out of reach: the others are still probed.
    (1000..2000).for_each(|index| world.peer(index, Model::dead()));
    world.run(Duration::from_secs(800));
    let before = world.sent_to.clone();
    world.run(Duration::from_secs(800));
    let forgotten = world.sent_to.iter().filter(|(path, sent)| **sent == before[path]).count();
    assert_eq!(forgotten, 0);
    world.peer(3000, Model::passing(2000));
    assert!(world.run_until(Duration::from_secs(1200), |world| world.limit(3000) == Some(2000)).is_some());
}

#[test]
fn handshakes_included_a_node_among_5000_has_fewer_than_200_packets_per_second() {
    let mut world = World::new(5000, &Family::ALL, 8941, 37);
    world.take_handshakes();
    world.run(Duration::from_secs(900));
    assert!(world.all_stand(Standing::Verified));
    let before = world.sent_to.clone();
    world.run(Duration::from_secs(900));
    assert!(world.sent_to.iter().all(|(path, sent)| *sent > before[path]), "somebody was left out");
    // Many are out of reach, and some swallow: doubts and searches come on top.
    (1000..2000).for_each(|index| world.peer(index, Model::dead()));
    (3000..3010).for_each(|index| world.peer(index, Model::passing(1400)));
    world.run(Duration::from_secs(900));
    // What this node begins, and as much that the others begin with it.
    let most = 2 * world.most_packets;
    eprintln!("at most {most} packets in a second for 10,000 paths with handshakes");
    assert!(most < 200, "{most} packets");
}

#[test]
fn when_every_path_is_limited_all_are_found_and_recover() {
    let mut world = verified(100, &Family::ALL, 8941, 29);
    world.all(Model::passing(1440));
    let found = world.run_until(HOUR, |world| world.all_stand(Standing::Limited { passes: 1440 })).unwrap();
    world.all(Model::good());
    let recovered = world.run_until(HOUR, |world| world.all_stand(Standing::Verified)).unwrap();
    eprintln!("200 paths: limited in {found:?}, recovered in {recovered:?}");
    assert!(found < Duration::from_secs(400) && recovered < Duration::from_secs(120));
}

#[test]
fn in_the_largest_cluster_whose_paths_are_looked_at_every_ten_seconds_holes_are_found_in_time() {
    let mut slowest = Duration::ZERO;
    for seed in 0..5 {
        let mut world = verified(144, &Family::ALL, 8941, 100 + seed);
        world.run(Duration::from_millis(seed * 997));
        world.peer(99, Model::passing(1440));
        let found = world.run_until(FOUND, |world| world.limit(99).is_some());
        slowest = slowest.max(found.unwrap_or_else(|| panic!("{:?}", world.report(99, Family::Ipv4))));
        world.run_until(FOUND, |world| world.report_limit(99, Family::Ipv4).is_some());
        assert_eq!(world.limit(99), Some(1440));
    }
    eprintln!("144 peers: one hole is found after {slowest:?} at the most");
    // The node's own uplink has become narrow: each path is judged by itself, in the order in which they were noticed.
    let mut world = verified(144, &Family::ALL, 8941, 83);
    world.all(Model::passing(1440));
    let (mut times, begin) = (Vec::new(), world.now);
    for share in [1, 72, 144] {
        assert!(world.run_until(HOUR, |world| world.prober.limits().len() >= share).is_some());
        times.push((share, world.now - begin));
    }
    eprintln!("144 peers, all of them holes: found {times:?}");
    assert!(times[2].1 < Duration::from_secs(240), "{times:?}");
}

#[test]
fn memory_does_not_grow() {
    let mut world = World::new(10, &Family::ALL, 1440, 31);
    let mut most = Vec::new();
    for round in 0..40 {
        let size = format!("{:?}", world.prober).len();
        most.push(size);
        match round % 4 {
            0 => world.all(Model::good().losing(100, 100)),
            1 => world.all(Model { copies: 3, ..Model::passing(1333) }),
            2 => world.all(Model::dead()),
            _ => world.all(Model { delay: Duration::from_millis(1200), ..Model::good() }),
        }
        world.run(HOUR / 4);
    }
    let early = most[..20].iter().max();
    let late = most[20..].iter().max();
    assert!(late.unwrap() < &(early.unwrap() * 3 / 2), "{most:?}");
}
