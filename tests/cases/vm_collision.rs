//! Two associations towards a host get one SPI, made likely by using few bits of it: the host finds another key, and nobody
//! notices.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::kernel::{self, Part};
use husk_tests::load::Rate;
use husk_tests::rotation::rotate;
use husk_tests::{Cluster, Leak, Load, Mode, xfrm};

/// So many that every seventh change of a key makes two associations collide, and hardly ever a second time before the first
/// collision is over: two hosts with a collision each, with each other, wait for the hard lifetime.
const BITS: u8 = 6;

/// Rounds of three changes that may pass until there was a collision: chances are one in ten thousand that there is none.
const MOST: usize = 20;

/// How long a rotation may take.
const LIMIT: Duration = Duration::from_secs(10);

/// What the daemon logs of it.
const SAID: &str = "two associations have one SPI";

#[test]
fn colliding_spis_are_made_anew_unnoticed() -> Result<()> {
    kernel::require(&[Part::Esp])?;
    let builder = Cluster::builder().mode(Mode::Ipsec).hosts(3).set("ipsec.spiBits", BITS);
    let cluster = builder.set("keys.grace", 1).set("keys.hardLifetime", 1800).build()?;
    let leak = Leak::watch(&cluster)?;
    cluster.start()?;
    let pods = cluster.add_pods("p")?;
    for (from, to) in [(0, 1), (1, 2), (2, 0)] {
        pods[from].await_answer_of(&pods[to], LIMIT)?;
    }
    let load = Load::among(&pods.iter().collect::<Vec<_>>(), Rate::default())?;
    let collisions = || cluster.hosts().iter().map(|host| host.daemon_log().matches(SAID).count()).sum::<usize>();
    let at_first = collisions();
    let mut rounds = 0;
    while collisions() == at_first {
        ensure!(rounds < MOST, "no collision in {MOST} rotations of each host: nothing was tested");
        for host in [1, 2, 3] {
            rotate(&cluster, &[host], LIMIT)?;
        }
        rounds += 1;
    }
    let account = load.stop()?;
    eprintln!("{} collisions in {rounds} rounds: {account}", collisions());
    account.exact()?;
    for (number, host) in cluster.hosts().iter().enumerate() {
        let own = host.address(husk_tests::Family::Ipv4)?;
        let states = xfrm::states(host.netns())?;
        let small = states.iter().all(|state| (256..256 + (1 << BITS)).contains(&state.spi));
        let inbound = states.iter().filter(|state| state.destination == own).count();
        ensure!(small && inbound >= 2, "host{}: {states:?}", number + 1);
    }
    leak.finish(&cluster)?.with_tunnelled(100).map(drop).context("the wire")
}
