//! Three hosts change their keys over and over under traffic in every direction, and nobody notices: not when two do it at
//! once, not when the daemon of one is dead meanwhile, not when one is unplugged, except for that one.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_tests::load::{Account, Rate};
use husk_tests::pod::await_answers_among;
use husk_tests::rotation::{newest, over, published, request, rotate};
use husk_tests::{Cluster, ClusterBuilder, Leak, Load, Pod, Signal, eventually};

/// How long a rotation may take.
const LIMIT: Duration = Duration::from_secs(20);

/// How long the traffic runs without a rotation, to know this machine.
const BASELINE: Duration = Duration::from_secs(6);

/// How much longer than on this machine anyway a TCP connection may stand still.
pub(crate) const MORE_STALL: Duration = Duration::from_millis(200);

/// How long a rotation that cannot come to its end is left alone under traffic.
const STUCK: Duration = Duration::from_secs(3);

/// Seconds an old key stays after it was last used.
const GRACE: u32 = 1;

/// Seconds an old key stays at most: longer than any of this takes, so that none goes while it is needed.
const HARD_LIFETIME: u32 = 1800;

/// How often the hosts rotate.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rounds {
    /// Two hosts at once, then the third.
    pub(crate) in_turns: usize,
    /// All at once.
    pub(crate) at_once: usize,
    /// How much longer than on this machine anyway a TCP connection may stand still.
    pub(crate) more_stall: Duration,
}

/// Tells it for a mode.
pub(crate) fn tell(builder: ClusterBuilder, rounds: Rounds) -> Result<()> {
    let cluster = builder.hosts(3).set("keys.grace", GRACE).set("keys.hardLifetime", HARD_LIFETIME).build()?;
    let leak = Leak::watch(&cluster)?;
    cluster.start()?;
    let pods = cluster.add_pods("p")?;
    let [a, b, c] = [&pods[0], &pods[1], &pods[2]];
    await_answers_among(&pods, LIMIT)?;

    let quiet = load("without a rotation", &[a, b, c], || {
        std::thread::sleep(BASELINE);
        Ok(())
    })?;
    let first = (1..=3).map(|number| newest(&cluster, number)).collect::<Result<Vec<_>>>()?;
    let rotated = load("while all rotate", &[a, b, c], || {
        for round in 0..rounds.in_turns {
            let of = |offset: usize| (round + offset) % 3 + 1;
            rotate(&cluster, &[of(0), of(1)], LIMIT).with_context(|| format!("round {round}, two at once"))?;
            rotate(&cluster, &[of(2)], LIMIT).with_context(|| format!("round {round}, one"))?;
        }
        (0..rounds.at_once).try_for_each(|round| {
            rotate(&cluster, &[1, 2, 3], LIMIT).with_context(|| format!("round {round}, all at once"))
        })
    })?;
    // A generation of WireGuard is everybody's: each host has taken part in both rotations of a turn.
    let of_a_turn = if cluster.record(1)?.esp.is_some() { 1 } else { 2 };
    let expected = of_a_turn * rounds.in_turns + rounds.at_once;
    for (number, first) in (1..=3).zip(first) {
        let rotations = newest(&cluster, number)? - first;
        ensure!(rotations >= expected as u64, "host{number} has rotated {rotations} times instead of {expected}");
    }
    settled(&cluster)?;
    let dead = dead_daemon(&cluster, &[a, b, c])?;
    settled(&cluster)?;
    let unplugged = unplugged(&cluster, &[a, b])?;
    await_answers_among(&pods, LIMIT)?;
    let seen = leak.finish(&cluster)?.with_tunnelled(1000)?;
    ensure!(seen.fragments == 0, "{} fragments", seen.fragments);
    seen.nothing_strange()?;
    for (what, account) in [("while all rotate", rotated), ("with a dead daemon", dead), ("unplugged", unplugged)] {
        // A machine that is busy stalls connections by itself: as much as without a rotation, or at the time.
        let baseline = quiet.longest_stall().max(account.control.largest_stall);
        let stall = account.longest_stall();
        ensure!(
            stall <= baseline + rounds.more_stall,
            "{what}: TCP stood still for {stall:?}, of which the machine explains {baseline:?}"
        );
    }
    Ok(())
}

/// Runs traffic among pods while `work` goes on; every datagram has to arrive once.
fn load(what: &str, pods: &[&Pod], work: impl FnOnce() -> Result<()>) -> Result<Account> {
    let load = Load::among(pods, Rate::default())?;
    let started = Instant::now();
    let worked = work().with_context(|| what.to_owned());
    let elapsed = started.elapsed();
    let account = load.stop().with_context(|| what.to_owned())?;
    eprintln!("{what}, {:.1} s: {account}", elapsed.as_secs_f64());
    worked?;
    account.exact().with_context(|| what.to_owned())?;
    Ok(account)
}

/// The others keep what a host needs whose daemon cannot take notice of anything.
fn dead_daemon(cluster: &Cluster, pods: &[&Pod]) -> Result<Account> {
    load("with the second host's daemon dead", pods, || {
        cluster.host(2).stop_daemon(Signal::SIGKILL)?;
        let before = newest(cluster, 1)?;
        request(cluster.host(1))?;
        stuck(cluster, before)?;
        cluster.host(2).start_daemon()?;
        cluster.host(2).wait_ready()?;
        over(cluster, 1, before, LIMIT)
    })
}

/// Those that are connected do not suffer from one that is not.
fn unplugged(cluster: &Cluster, connected: &[&Pod]) -> Result<Account> {
    load("with the third host unplugged", connected, || {
        cluster.set_cable(3, false)?;
        let before = newest(cluster, 1)?;
        request(cluster.host(1))?;
        stuck(cluster, before)?;
        cluster.set_cable(3, true)?;
        over(cluster, 1, before, LIMIT)
    })
}

/// Waits until no host is in a rotation: one that dies in the middle of one holds up the next until the hard lifetime.
fn settled(cluster: &Cluster) -> Result<()> {
    let one_key = |number| published(cluster, number).map(|keys| keys.len() == 1);
    eventually("every host to have one key", LIMIT, || Ok(one_key(1)? && one_key(2)? && one_key(3)?))
}

/// The first host publishes a new key, and keeps the old one for the host that has not confirmed the new one.
fn stuck(cluster: &Cluster, before: u64) -> Result<()> {
    eventually("the new key to be published", LIMIT, || Ok(newest(cluster, 1)? > before))?;
    std::thread::sleep(STUCK);
    let keys = published(cluster, 1)?;
    ensure!(keys.contains_key(&before), "epoch {before} is gone while a host needs it: {keys:?}");
    Ok(())
}
