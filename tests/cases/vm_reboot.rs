//! Hosts that are rebooted: another kernel, empty memory, the same disk. Traffic returns by itself, with new keys and new
//! numbers of epochs: what was published once is never used again.
//!
//! It takes two machines, one after the other, with `HUSK_TEST_DISK` naming a directory that both see:
//!
//! ```sh
//! export HUSK_TEST_DISK=/var/tmp/husk-reboot
//! hack/vm --disk "$HUSK_TEST_DISK" -- PROGRAM --exact before_the_reboot
//! hack/vm --disk "$HUSK_TEST_DISK" -- PROGRAM --exact after_the_reboot
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_overlay::keys::PublicKey;
use husk_tests::kernel::{self, Part};
use husk_tests::load::while_knocking;
use husk_tests::pod::await_answers_among;
use husk_tests::rotation::{published, rotate};
use husk_tests::{Cluster, ClusterBuilder, Family, Leak, Mode, Pod, xfrm};
use serde::{Deserialize, Serialize};

/// How soon traffic has to pass.
const SOON: Duration = Duration::from_secs(10);

/// The modes that have keys.
const ENCRYPTED: [Mode; 3] = [Mode::Wireguard, Mode::Ipsec, Mode::VxlanIpsec];

/// What is remembered from before the reboot.
#[derive(Debug, Serialize, Deserialize)]
struct Before {
    /// Of the kernel that ran.
    boot: String,
    /// By mode and host.
    published: BTreeMap<String, BTreeMap<String, BTreeMap<u64, PublicKey>>>,
    /// Keys of associations.
    associations: BTreeSet<String>,
    /// SPIs with the addresses they belong to.
    spis: BTreeSet<String>,
}

fn disk() -> Result<PathBuf> {
    let disk = std::env::var_os("HUSK_TEST_DISK").context(
        "HUSK_TEST_DISK is not set: this case needs two machines with one disk; `hack/test --tier vm` starts them",
    )?;
    Ok(disk.into())
}

fn boot() -> Result<String> {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").context("reading the id of this boot")
}

fn memory(disk: &Path) -> PathBuf {
    disk.join("before.json")
}

fn cluster(mode: Mode, disk: &Path) -> ClusterBuilder {
    let own = disk.join(mode.as_str());
    Cluster::builder().mode(mode).disk(&own).set("keys.grace", 1).set("keys.hardLifetime", 600)
}

fn connected(cluster: &Cluster) -> Result<Vec<Pod>> {
    let pods = cluster.add_pods("p")?;
    await_answers_among(&pods, SOON)?;
    Ok(pods)
}

fn look(cluster: &Cluster, before: &mut Before) -> Result<()> {
    let mode = cluster.mode().to_string();
    for (number, host) in (1..).zip(cluster.hosts()) {
        let known = before.published.entry(mode.clone()).or_default().entry(host.name().to_owned()).or_default();
        known.extend(published(cluster, number)?);
        for state in xfrm::states(host.netns())? {
            before.spis.insert(format!("{mode} {} {:#x}", state.destination, state.spi));
            before.associations.extend(state.key);
        }
    }
    Ok(())
}

#[test]
fn before_the_reboot() -> Result<()> {
    kernel::require(&[Part::Esp, Part::Wireguard])?;
    let disk = disk()?;
    let (boot, nothing) = (boot()?, BTreeMap::new());
    let mut before = Before { boot, published: nothing, associations: BTreeSet::new(), spis: BTreeSet::new() };
    for mode in ENCRYPTED {
        let cluster = cluster(mode, &disk).build()?;
        cluster.start()?;
        let _pods = connected(&cluster)?;
        look(&cluster, &mut before)?;
        // So that numbers are not where they begin.
        rotate(&cluster, &[1], SOON)?;
        look(&cluster, &mut before)?;
        // The machine goes while everything runs: nobody says good-bye. Only this process's own things are taken away.
    }
    fs::write(memory(&disk), serde_json::to_string(&before)?).context("remembering what was there")
}

#[test]
fn after_the_reboot() -> Result<()> {
    let disk = disk()?;
    let text = fs::read_to_string(memory(&disk)).context("reading what was there before the reboot")?;
    let before: Before = serde_json::from_str(&text)?;
    ensure!(before.boot != boot()?, "this machine has not been rebooted");
    for mode in ENCRYPTED {
        let cluster = cluster(mode, &disk).build()?;
        ensure!(cluster.record(1).is_ok() && cluster.record(2).is_ok(), "{mode}: the records have to be on the disk");
        let leak = Leak::watch(&cluster)?;
        // Only the second host has a pod that others know of, by the same address as before or another.
        let to = cluster.record(2)?.blocks.iter().filter_map(|block| block.nth(1)).collect::<Vec<_>>();
        // What a host sends before its daemon's first pass is not Husk's to hold back.
        let one = cluster.host(1);
        one.start()?;
        one.wait_ready()?;
        let pods = while_knocking(&[one.netns()], &to, || {
            cluster.host(2).start()?;
            cluster.wait_ready()?;
            cluster.wait_meshed()?;
            connected(&cluster)
        })
        .with_context(|| format!("{mode}: traffic returns by itself"))?;
        let mut after =
            Before { boot: boot()?, published: BTreeMap::new(), associations: BTreeSet::new(), spis: BTreeSet::new() };
        look(&cluster, &mut after)?;
        let hosts = before.published.get(mode.as_str()).context("a mode that was not there before")?;
        for (name, keys) in &after.published[mode.as_str()] {
            let old = hosts.get(name).context("a host that was not there before")?;
            let (last, first) = (old.keys().next_back(), keys.keys().next());
            // A generation of WireGuard is the cluster's: whoever comes back takes part in the one there is, with another
            // key.
            let on = if mode.uses_esp() { first > last } else { first >= last };
            ensure!(on, "{mode}: {name} counts from {first:?} again, and was at {last:?}");
            let known: BTreeSet<_> = old.values().collect();
            ensure!(keys.values().all(|key| !known.contains(key)), "{mode}: {name} uses a key again");
        }
        let again: Vec<_> = after.associations.intersection(&before.associations).collect();
        ensure!(again.is_empty(), "{mode}: {} associations are keyed as before", again.len());
        if mode.uses_esp() {
            ensure!(!after.associations.is_empty(), "{mode}: no association");
            ensure!(after.spis.is_disjoint(&before.spis), "{mode}: {:?} as before", after.spis);
        }
        for (from, to) in [(0, 1), (1, 0)] {
            ensure!(pods[from].address(Family::Ipv6)? != pods[to].address(Family::Ipv6)?, "{mode}: one address twice");
        }
        leak.finish(&cluster)?.with_tunnelled(4)?;
    }
    fs::remove_file(memory(&disk)).context("forgetting what was there")
}
