//! Rotation of IPsec keys, simulated: two to four nodes with modelled kernels and a modelled cluster source, everything that
//! can happen in any order, and the real plan. Between connected nodes no packet is ever lost, and no key is ever used twice.

#![allow(clippy::unwrap_used, clippy::panic, reason = "functions that tests share are test code too")]

mod node;
mod world;

use husk_overlay::config::Config;
use husk_overlay::mode::Mode;
use proptest::prelude::*;

use world::{Event, World};

/// Seconds; far beyond what a run takes.
const HARD_LIFETIME: u32 = 100_000;

/// Enough for a few rotations of all nodes, one after another, in rounds of half a second.
const ROUNDS: usize = 200;

fn config(mode: Mode, spi_bits: u8) -> Config {
    let mut config = Config::new(vec!["10.42.0.0/16".parse().unwrap()]);
    config.underlay.family = node::family();
    config.mode = mode;
    config.ipsec.spi_bits = spi_bits;
    config.rotation.interval = None;
    config.rotation.grace = 2;
    config.rotation.hard_lifetime = HARD_LIFETIME;
    config
}

fn undisturbed() -> impl Strategy<Value = Event> {
    let node = || 0_usize..4;
    prop_oneof![
        24 => node().prop_map(Event::Step),
        12 => node().prop_map(Event::Pass),
        20 => (node(), node()).prop_map(|(to, of)| Event::Deliver(to, of)),
        24 => (node(), node(), 0..world::LONGEST_DELAY).prop_map(|(from, to, delay)| Event::Send(from, to, delay)),
        12 => (0_u64..1000).prop_map(Event::Wait),
        2 => Just(Event::Wait(3000)),
        3 => node().prop_map(Event::Request),
        1 => node().prop_map(Event::Kill),
        3 => node().prop_map(Event::Start),
        1 => node().prop_map(Event::Refuse),
    ]
}

fn disturbed() -> impl Strategy<Value = Event> {
    let node = || 0_usize..4;
    prop_oneof![
        60 => undisturbed(),
        1 => node().prop_map(Event::Flush),
        1 => (node(), 0_usize..40).prop_map(|(node, which)| Event::Remove(node, which)),
        1 => node().prop_map(Event::Reboot),
        1 => node().prop_map(Event::Move),
    ]
}

fn modes() -> impl Strategy<Value = Mode> {
    prop_oneof![3 => Just(Mode::Ipsec), 1 => Just(Mode::VxlanIpsec)]
}

/// Lets everything come to rest. Where SPIs collide, two nodes can get to wait for each other: each would have to receive
/// from the other's new epoch under its own old one, and both lack the SPI for it. Then the hard lifetime has to end it.
/// With all 32 bits that takes two collisions of one pair within one rotation.
fn rest(world: &mut World, by_itself: bool) {
    for _ in 0..5 {
        if world.settle(ROUNDS) {
            world.check_rest();
            world.forgive();
            return;
        }
        assert!(!by_itself, "the rotation does not come to its end: {:#?}", stuck(world));
        world.disturb_all();
        world.wait(u64::from(HARD_LIFETIME) * 1000);
    }
    panic!("not even the hard lifetime ends the rotation: {:#?}", stuck(world));
}

fn stuck(world: &World) -> Vec<String> {
    world.nodes.iter().map(node::Node::describe).collect()
}

/// Cases per property; more with `PROPTEST_CASES`.
fn cases(usual: u32) -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(usual);
    ProptestConfig { max_shrink_iters: 4000, ..ProptestConfig::with_cases(cases) }
}

proptest! {
    #![proptest_config(cases(1000))]

    /// From the first packet that arrives, all do, whatever the daemons are doing.
    #[test]
    fn between_connected_nodes_no_packet_is_lost(
        count in 2_usize..=4,
        mode in modes(),
        settled in any::<bool>(),
        events in proptest::collection::vec(undisturbed(), 0..250),
    ) {
        let mut world = World::new(config(mode, 32), count);
        if settled {
            rest(&mut world, true);
        }
        events.iter().for_each(|event| world.apply(event));
        rest(&mut world, true);
    }

    /// The same with so few SPIs that associations collide all the time.
    #[test]
    fn no_packet_is_lost_though_spis_collide(
        count in 2_usize..=4,
        bits in 7_u8..=9,
        settled in any::<bool>(),
        events in proptest::collection::vec(undisturbed(), 0..250),
    ) {
        let mut world = World::new(config(Mode::Ipsec, bits), count);
        if settled {
            rest(&mut world, false);
        }
        events.iter().for_each(|event| world.apply(event));
        rest(&mut world, false);
    }

    /// After flushes, reboots and new addresses no key is used again and everything is connected again; the connections of
    /// those it did not happen to lose nothing meanwhile.
    #[test]
    fn what_was_disturbed_recovers_and_no_key_is_used_twice(
        count in 2_usize..=4,
        mode in modes(),
        bits in prop_oneof![Just(32_u8), Just(8)],
        events in proptest::collection::vec(disturbed(), 0..200),
        after in proptest::collection::vec(undisturbed(), 0..60),
    ) {
        let mut world = World::new(config(mode, bits), count);
        events.iter().for_each(|event| world.apply(event));
        rest(&mut world, false);
        after.iter().for_each(|event| world.apply(event));
        rest(&mut world, false);
    }
}

/// Two nodes at rest in epoch 1; the first has published epoch 2, and the other has seen it and will send under it.
fn just_rotated() -> World {
    let mut world = World::new(config(Mode::Ipsec, 32), 2);
    rest(&mut world, true);
    // The daemons take notice of the last packets, and then of there being none.
    for _ in 0..2 {
        (0..2).for_each(|node| world.apply(&Event::Pass(node)));
        world.apply(&Event::Wait(10_000));
    }
    world.apply(&Event::Request(0));
    (0..4).for_each(|_| world.apply(&Event::Pass(0)));
    assert_eq!(world.nodes[0].epochs().len(), 2);
    world
}

/// The record on its way from one node to the other, and what the other makes of it.
fn tell(world: &mut World, from: usize, to: usize) {
    (0..8).for_each(|_| world.apply(&Event::Deliver(to, from)));
    (0..4).for_each(|_| world.apply(&Event::Pass(to)));
}

/// The old epoch was long unused, and the last packet under it is overtaken by the first under the new one.
#[test]
fn a_packet_that_is_overtaken_is_still_received() {
    let mut world = just_rotated();
    world.apply(&Event::Send(1, 0, world::LONGEST_DELAY - 1));
    tell(&mut world, 0, 1);
    world.apply(&Event::Send(1, 0, 0));
    world.apply(&Event::Wait(1));
    (0..6).for_each(|_| world.apply(&Event::Pass(0)));
    rest(&mut world, true);
}

/// A daemon that hangs between reading and setting policies goes on sending under the old epoch.
#[test]
fn a_packet_that_a_late_policy_sent_under_the_old_epoch_is_still_received() {
    let mut world = just_rotated();
    tell(&mut world, 0, 1);
    world.apply(&Event::Send(1, 0, 0));
    world.apply(&Event::Wait(1));
    world.apply(&Event::Pass(0));
    (0..2).for_each(|_| world.apply(&Event::Step(0)));
    world.apply(&Event::Wait(10_000));
    world.apply(&Event::Send(0, 1, world::LONGEST_DELAY - 1));
    (0..6).for_each(|_| world.apply(&Event::Pass(0)));
    tell(&mut world, 0, 1);
    rest(&mut world, true);
}
