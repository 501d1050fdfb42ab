//! One host is rebooted while the others talk: they notice nothing of it among themselves, its own traffic returns by itself, and
//! no key of before is ever used again.
//!
//! It shares the others' kernel, which forgets of it what was in its namespaces; `vm_reboot` reboots a whole kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_overlay::keys::PublicKey;
use husk_tests::kernel::{self, Part};
use husk_tests::load::{Rate, while_knocking};
use husk_tests::rotation::{newest, published, rotate};
use husk_tests::{Cluster, ClusterBuilder, Leak, Load, Mode, xfrm};

/// How soon traffic has to pass.
const SOON: Duration = Duration::from_secs(10);

/// The host that is rebooted.
const REBOOTED: usize = 2;

#[test]
fn a_host_that_reboots_is_missed_by_nobody_with_wireguard() -> Result<()> {
    kernel::require(&[Part::Wireguard])?;
    tell(Cluster::builder().set("wireguard.device", "kernel"))
}

#[test]
fn a_host_that_reboots_is_missed_by_nobody_with_ipsec() -> Result<()> {
    kernel::require(&[Part::Esp])?;
    tell(Cluster::builder().mode(Mode::Ipsec))
}

#[test]
fn a_host_that_reboots_is_missed_by_nobody_with_vxlan_in_ipsec() -> Result<()> {
    kernel::require(&[Part::Esp])?;
    tell(Cluster::builder().mode(Mode::VxlanIpsec))
}

/// Keys of associations with the rebooted host, in the kernels of all.
fn associations(cluster: &Cluster, rebooted: IpAddr) -> Result<BTreeSet<String>> {
    let mut keys = BTreeSet::new();
    for host in cluster.hosts() {
        let states = xfrm::states(host.netns())?.into_iter();
        let with_it = states.filter(|state| state.source == rebooted || state.destination == rebooted);
        keys.extend(with_it.filter_map(|state| state.key));
    }
    Ok(keys)
}

fn tell(builder: ClusterBuilder) -> Result<()> {
    let mut cluster = builder.hosts(3).set("keys.grace", 1).set("keys.hardLifetime", 600).build()?;
    let esp = cluster.mode().uses_esp();
    let leak = Leak::watch(&cluster)?;
    cluster.start()?;
    let [a, b, c] = ["a", "b", "c"];
    let [a, b, c] = [cluster.host(1).add_pod(a)?, cluster.host(REBOOTED).add_pod(b)?, cluster.host(3).add_pod(c)?];
    for (from, to) in [(&a, &b), (&b, &c), (&c, &a)] {
        from.await_answer_of(to, SOON)?;
    }
    // So that its number is not where it began.
    rotate(&cluster, &[REBOOTED], SOON)?;
    let address = cluster.host(REBOOTED).address(husk_tests::Family::Ipv4)?;
    let before: BTreeMap<u64, PublicKey> = published(&cluster, REBOOTED)?;
    let keys = associations(&cluster, address)?;
    ensure!(keys.len() >= 4 || !esp, "{} associations with the host", keys.len());

    let to = b.addresses();
    let load = Load::among(&[&a, &c], Rate::default())?;
    let again = while_knocking(&[a.netns(), c.netns()], &to, || {
        drop(b);
        cluster.reboot(REBOOTED)?;
        let host = cluster.host(REBOOTED);
        ensure!(xfrm::states(host.netns())?.is_empty(), "the kernel remembers associations of {}", host.name());
        host.start()?;
        host.wait_ready()?;
        cluster.wait_meshed()?;
        let again = host.add_pod("b")?;
        for (from, to) in [(&again, &a), (&again, &c), (&a, &again), (&c, &again)] {
            from.await_answer_of(to, SOON).context("traffic returns by itself")?;
        }
        Ok(again)
    })?;
    let account = load.stop()?;
    account.exact().context("between the others")?;
    eprintln!("{}: {account}", cluster.mode());

    let after = published(&cluster, REBOOTED)?;
    let known: BTreeSet<_> = before.values().collect();
    ensure!(after.values().all(|key| !known.contains(key)), "{after:?} has a key of {before:?}");
    // A generation of WireGuard is everybody's: who comes back takes part in the one there is.
    let (first, last) = (after.keys().next(), before.keys().next_back());
    ensure!(if esp { first > last } else { first >= last }, "it counts from {first:?} again, and was at {last:?}");
    ensure!(newest(&cluster, 1)? <= newest(&cluster, REBOOTED)? || esp, "it has fallen behind");
    if esp {
        let new = associations(&cluster, address)?;
        ensure!(new.len() >= 4 && new.is_disjoint(&keys), "of {} associations some are keyed as before", new.len());
    }
    drop(again);
    leak.finish(&cluster)?.with_tunnelled(100).map(drop)
}
