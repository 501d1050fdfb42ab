//! The modes that need more of the kernel than every one has, over every underlay family: who reaches whom with which packet
//! sizes, and what the underlay saw. What any kernel can do, `connectivity` asks of this one too.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::kernel::{self, Part};
use husk_tests::pod::Served;
use husk_tests::probe::{Echo, Reach, tcp};
use husk_tests::{Cluster, ClusterBuilder, Family, Host, Kind, Leak, Mode, eventually, xfrm};
use serde_json::json;

/// Bytes of one verified transfer: some full segments each way.
const TRANSFER: u64 = 20_000;

/// How long what a daemon does by itself may take.
const SOON: Duration = Duration::from_secs(5);

/// MTU of the underlay.
const UNDERLAY: usize = 1500;

#[test]
fn wireguard_of_the_kernel_over_ipv4() -> Result<()> {
    every_pair(wireguard(Family::Ipv4).hosts(3), 1440, Kind::Wireguard).map(drop)
}

#[test]
fn wireguard_of_the_kernel_over_ipv6() -> Result<()> {
    every_pair(wireguard(Family::Ipv6), 1420, Kind::Wireguard).map(drop)
}

fn wireguard(family: Family) -> ClusterBuilder {
    Cluster::builder().mode(Mode::Wireguard).underlay(family).set("wireguard.device", "kernel")
}

#[test]
fn ipsec_over_ipv4() -> Result<()> {
    every_pair_and(esp(Mode::Ipsec, Family::Ipv4).hosts(3), 1446, Kind::Esp, |cluster, pods| {
        explained(cluster, pods, Family::Ipv4)
    })
    .map(drop)
}

#[test]
fn ipsec_over_ipv6() -> Result<()> {
    every_pair(esp(Mode::Ipsec, Family::Ipv6), 1426, Kind::Esp).map(drop)
}

#[test]
fn vxlan_in_ipsec_over_ipv4() -> Result<()> {
    every_pair(esp(Mode::VxlanIpsec, Family::Ipv4), 1416, Kind::Esp).map(drop)
}

#[test]
fn vxlan_in_ipsec_over_ipv6() -> Result<()> {
    every_pair_and(esp(Mode::VxlanIpsec, Family::Ipv6).hosts(3), 1396, Kind::Esp, |cluster, pods| {
        explained(cluster, pods, Family::Ipv6)
    })
    .map(drop)
}

#[test]
fn ipsec_in_udp_over_ipv4() -> Result<()> {
    every_pair(esp(Mode::Ipsec, Family::Ipv4).set("ipsec.udpEncapsulation", 4500), 1438, Kind::EspInUdp).map(drop)
}

#[test]
fn ipsec_in_udp_over_ipv6() -> Result<()> {
    every_pair(esp(Mode::Ipsec, Family::Ipv6).set("ipsec.udpEncapsulation", 4500), 1418, Kind::EspInUdp).map(drop)
}

#[test]
fn ipsec_with_aes_256_and_a_secret_of_the_cluster() -> Result<()> {
    let builder = esp(Mode::Ipsec, Family::Ipv4).set("ipsec.cipher", "aes-gcm-256");
    let cluster = every_pair(builder.set("ipsec.presharedKeyFile", SECRET), 1446, Kind::Esp)?;
    let states = xfrm::states(cluster.host(1).netns())?;
    // 32 bytes of key and 4 of salt.
    ensure!(states.iter().all(|state| state.key.as_ref().is_some_and(|key| key.len() == 72)), "{} keys", states.len());
    Ok(())
}

/// Where the hosts have the cluster's secret, if they are to have one.
const SECRET: &str = "/etc/husk/secret";

fn esp(mode: Mode, family: Family) -> ClusterBuilder {
    Cluster::builder().mode(mode).underlay(family)
}

/// Starts the hosts with a pod each and asks every pod for every other; the wire is watched all the time.
fn every_pair(builder: ClusterBuilder, pod_mtu: usize, kind: Kind) -> Result<Cluster> {
    every_pair_and(builder, pod_mtu, kind, |_, _| Ok(()))
}

/// What `huskctl` tells of ESP: a trace names the association and both epochs, and a marker that goes through the tunnel is not
/// seen on the wire.
fn explained(cluster: &Cluster, pods: &[Served], underlay: Family) -> Result<()> {
    let one = cluster.host(1);
    for family in Family::ALL {
        let [from, to] = [0, 1].map(|number| pods[number].pod.address(family).map(|it| it.to_string()));
        let report = one.huskctl_json(["trace", &from?, &to?, "--port", "80"])?;
        let hop = |name: &str| {
            let hops = report["hops"].as_array().into_iter().flatten();
            hops.into_iter().find(|hop| hop["name"] == name).cloned().unwrap_or_default()
        };
        ensure!(report["broken"].is_null() && hop("tunnel")["standing"] == "passes", "{report:#}");
        let told = hop("tunnel")["evidence"].to_string();
        let address = cluster.host(2).address(underlay)?;
        for words in [&format!("ESP to {address}, SPI 0x"), "own epoch 1, the peer's 1", "associations", "policies"] {
            ensure!(told.contains(words), "{words}: {told}");
        }
    }
    let verified = one.huskctl(["capture", "host2", "--verify-encrypted"])?;
    ensure!(verified.status.code() == Some(0) && verified.stdout.contains("ENCRYPTED"), "{verified:?}");
    ensure!(verified.stdout.contains("ESP") && verified.stdout.contains("0 packets held the marker"), "{verified:?}");
    Ok(())
}

/// The same, and something more that is looked at meanwhile.
fn every_pair_and(
    builder: ClusterBuilder,
    pod_mtu: usize,
    kind: Kind,
    look: impl Fn(&Cluster, &[Served]) -> Result<()>,
) -> Result<Cluster> {
    kernel::require(&[Part::Esp, Part::Wireguard])?;
    let cluster = builder.build()?;
    let leak = Leak::watch(&cluster)?;
    for host in cluster.hosts() {
        host.write_secret(SECRET, "of the cluster, and of this test\n")?;
    }
    cluster.start()?;
    let pods = cluster.hosts().iter().map(|host| Served::start(host, "p")).collect::<Result<Vec<_>>>()?;
    for (from, to) in pairs(&pods) {
        assert_eq!(from.pod.mtu()?, pod_mtu);
        reaches(from, to, pod_mtu)?;
    }
    // What a pod lets the kernel fragment is fragmented inside the tunnel, never around it.
    let far = pods[1].pod.address(Family::Ipv4)?;
    let reach = Echo::to(far).packet_size(4000).may_fragment().run(pods[0].pod.netns())?;
    assert!(matches!(reach, Reach::Answered { packet_size: 4000, .. }), "{reach:?}");
    look(&cluster, &pods)?;

    settled(&cluster)?;
    let seen = leak.finish(&cluster)?.with_tunnelled(100)?;
    assert_eq!((seen.largest, seen.fragments), (UNDERLAY, 0), "{:?}", seen.kinds);
    seen.nothing_strange()?;
    for other in [Kind::Wireguard, Kind::Esp, Kind::EspInUdp] {
        assert_eq!(seen.kinds.contains_key(&other), other == kind, "{:?}", seen.kinds);
    }
    Ok(cluster)
}

fn pairs(pods: &[Served]) -> impl Iterator<Item = (&Served, &Served)> {
    let pairs = pods.iter().flat_map(|from| pods.iter().map(move |to| (from, to)));
    pairs.filter(|(from, to)| !std::ptr::eq(*from, *to))
}

/// Bytes go there and back; a packet of exactly the MTU passes, and for one byte more the pod's own kernel names the MTU.
fn reaches(from: &Served, to: &Served, mtu: usize) -> Result<()> {
    for family in Family::ALL {
        let at = to.pod.address(family)?;
        tcp::transfer(from.pod.netns(), to.server.at(at), TRANSFER)?;
        let what = format!("{} to {at}", from.pod.netns().name());
        let reach = Echo::to(at).packet_size(mtu).run(from.pod.netns())?;
        assert!(matches!(reach, Reach::Answered { packet_size, .. } if packet_size == mtu), "{what}: {reach:?}");
        let reach = Echo::to(at).packet_size(mtu + 1).run(from.pod.netns())?;
        assert_eq!(reach, Reach::TooBig { path_mtu: mtu, local: true }, "{what}");
    }
    Ok(())
}

/// The daemons have nothing to do and nothing to complain about, and the kernel dropped nothing that was encrypted.
fn settled(cluster: &Cluster) -> Result<()> {
    for host in cluster.hosts() {
        host.ensure_settled()?;
        let dropped = xfrm::counters(host.netns())?;
        // While a mesh comes up, a peer may be a moment ahead; none of it was forged.
        let forged = ["XfrmInStateProtoError", "XfrmInStateSeqError", "XfrmInTmplMismatch", "XfrmOutError"];
        assert!(forged.iter().all(|name| !dropped.contains_key(*name)), "{}: {dropped:?}", host.name());
    }
    Ok(())
}

#[test]
fn devices_of_the_kernel_and_in_userspace_in_one_mesh() -> Result<()> {
    kernel::require(&[Part::Wireguard])?;
    let cluster = Cluster::builder().hosts(3).build()?;
    let leak = Leak::watch(&cluster)?;
    for (host, device) in cluster.hosts().iter().zip(["kernel", "userspace", "kernel"]) {
        host.configure(|config| config["wireguard"]["device"] = json!(device))?;
    }
    cluster.start()?;
    let devices = cluster.hosts().iter().map(|host| Ok(host.huskctl_json(["status"])?["wireguardDevice"].clone()));
    assert_eq!(devices.collect::<Result<Vec<_>>>()?, ["kernel", "userspace", "kernel"]);
    let pods = cluster.hosts().iter().map(|host| Served::start(host, "p")).collect::<Result<Vec<_>>>()?;
    pairs(&pods).try_for_each(|(from, to)| reaches(from, to, 1440))?;
    settled(&cluster)?;
    let seen = leak.finish(&cluster)?.with_tunnelled(100)?;
    assert_eq!((seen.largest, seen.fragments), (UNDERLAY, 0), "{:?}", seen.kinds);
    seen.nothing_strange()?;
    Ok(())
}

#[test]
fn hosts_that_differ_in_cipher_or_encapsulation_refuse_each_other_with_the_reason() -> Result<()> {
    kernel::require(&[Part::Esp])?;
    let cluster = esp(Mode::Ipsec, Family::Ipv4).hosts(3).build()?;
    let leak = Leak::watch(&cluster)?;
    cluster.host(2).configure(|config| config["ipsec"]["cipher"] = json!("aes-gcm-256"))?;
    cluster.host(3).configure(|config| config["ipsec"]["udpEncapsulation"] = json!(4500))?;
    cluster.hosts().iter().try_for_each(Host::start)?;
    cluster.wait_ready()?;
    let mut said = String::new();
    eventually("the first host to tell what does not fit", SOON, || {
        said = cluster.host(1).huskctl(["status"])?.stdout;
        Ok(["host2", "host3", "aes-gcm-128", "aes-gcm-256", "udpEncapsulation"].iter().all(|word| said.contains(word)))
    })
    .with_context(|| said.clone())?;
    let (a, b) = (cluster.host(1).add_pod("a")?, cluster.host(2).add_pod("b")?);
    let reach = Echo::to(b.address(Family::Ipv4)?).limit(Duration::from_millis(300)).run(a.netns())?;
    assert!(!reach.arrived(), "{reach:?}");
    leak.finish(&cluster).map(drop)
}
