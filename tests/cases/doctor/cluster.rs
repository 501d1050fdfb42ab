//! Checks that take more than one host, or a daemon: each is broken for real, found, mended as the doctor says, and well again.

use std::fs;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow, ensure};
use husk_dataplane::probe::ProbeSocket;
use husk_overlay::mac::MacAddress;
use husk_overlay::manifest::{self, Manifest};
use husk_overlay::marks::PROBE_PORT;
use husk_overlay::name::NodeName;
use husk_overlay::offload::FOUND_WITHIN;
use husk_overlay::probe::wire::{self, Kind};
use husk_overlay::record::NodeRecord;
use husk_tests::cluster::Fault;
use husk_tests::firewall::{self, At};
use husk_tests::process::binary;
use husk_tests::{Cluster, Family, Host, Mode, Netns, Prefix, Signal, eventually, rotation};
use serde_json::{Value, json};

use super::{Bed, Breakage, Ground, SHOWS};

/// Two hosts in mode `vxlan`, and what is wrong between them.
pub(crate) const TWO_HOSTS: Ground = Ground {
    bed: || Ok(Bed::new(Cluster::builder().mode(Mode::Vxlan).hosts(2).start()?)),
    breakages: &[&[
        Breakage { check: "issues", finds: &["BadManifest"], run: issues },
        Breakage { check: "duplicates", finds: &["DuplicateAddress", "DuplicateBlock"], run: duplicates },
        Breakage { check: "address-overlap", finds: &["leads to eth0", "table 52"], run: overlap },
        Breakage {
            check: "leases",
            finds: &["is not as it was wired", "no network any more", "outlived its pod", "has no lease"],
            run: leases,
        },
        Breakage { check: "versions", finds: &["No such file", "0.0.1"], run: versions },
        Breakage { check: "mtu", finds: &["1400"], run: mtu },
        Breakage { check: "paths", finds: &["underlay: {mtu: 1401}"], run: paths },
        Breakage {
            check: "peers",
            finds: &["UDP port 4789 is blocked", "is down or unplugged", "the daemon of host2 does not answer"],
            run: peers,
        },
        Breakage { check: "node-file", finds: &["11111111-2222-3333-4444-555555555555"], run: node_file },
        Breakage { check: "clocks", finds: &["ms ahead"], run: clocks },
    ]],
};

/// Two hosts in mode `wireguard`: keys. A key lives no longer than a dozen seconds once there is another.
pub(crate) const KEYS: Ground = Ground {
    bed: || {
        let keys = Cluster::builder().hosts(2).set("keys.rotation", 0).set("keys.grace", 1);
        Ok(Bed::new(keys.set("keys.hardLifetime", 12).start()?))
    },
    breakages: &[&[
        Breakage { check: "duplicates", finds: &["DuplicateKey"], run: duplicate_key },
        Breakage { check: "keys", finds: &["should have been replaced", "the rotation does not end"], run: keys },
    ]],
};

/// A cluster with room for two nodes.
pub(crate) const POOL: Ground = Ground {
    bed: || {
        let small: Prefix = "10.42.0.0/27".parse()?;
        let builder = Cluster::builder().mode(Mode::Vxlan).hosts(1).cluster_cidrs([small]);
        Ok(Bed::new(builder.set("blockLengths.ipv4", 28).start()?))
    },
    breakages: &[&[Breakage { check: "address-pools", finds: &["2 of 2 blocks"], run: full_pool }]],
};

/// A host that is to use IPsec. Neither ESP nor a daemon is needed: the kernel counts what a policy blocks.
pub(crate) const IPSEC: Ground = Ground {
    bed: || Ok(Bed::new(Cluster::builder().mode(Mode::Ipsec).hosts(1).build()?)),
    breakages: &[&[Breakage { check: "xfrm-errors", finds: &["XfrmOutPolBlock"], run: refused_packets }]],
};

/// Hosts whose cards may break.
pub(crate) const OFFLOAD: Ground = Ground {
    bed: || Ok(Bed::new(Cluster::builder().mode(Mode::Vxlan).set("log.level", "debug").start()?)),
    breakages: &[&[Breakage { check: "offload", finds: &["BrokenOffload"], run: broken_offload }]],
};

#[test]
fn what_is_broken_between_two_hosts_is_found_and_mended() -> Result<()> {
    TWO_HOSTS.run().map(drop)
}

#[test]
fn keys_that_are_copied_too_old_or_never_gone_are_found() -> Result<()> {
    KEYS.run().map(drop)
}

#[test]
fn a_full_pool_is_found_and_a_larger_one_mends_it() -> Result<()> {
    POOL.run().map(drop)
}

#[test]
fn packets_that_ipsec_refuses_are_found() -> Result<()> {
    IPSEC.run().map(drop)
}

#[test]
fn an_offload_that_is_broken_is_found_and_well_with_another_card() -> Result<()> {
    OFFLOAD.run().map(drop)
}

/// Has a host probe its peer now, and waits until it is known what passes.
fn probe(host: &Host, peer: &str) -> Result<()> {
    let program = host.program(binary("huskctl")?).limit(Duration::from_secs(70));
    program.args(["mtu", "probe", peer]).run().map(drop)
}

fn issues(bed: &mut Bed) -> Result<()> {
    for mode_has_none in ["keys", "xfrm-errors"] {
        ensure!(bed.look(mode_has_none)?["outcome"] == "doesNotApply", "{mode_has_none}");
    }
    bed.await_well("issues")?;
    let file = bed.cluster.manifests().join("broken.yaml");
    fs::write(&file, "apiVersion: husk.dev/v1alpha1\nkind: AddressBlock\nmetadata: {name: x}\nspec: 7\n")?;
    bed.await_found("issues", &["broken.yaml"])?;
    fs::remove_file(&file)?;
    bed.await_well("issues")
}

/// Somebody copied a node's record, and changed a part of it. Who was there first keeps what both claim.
fn ghost(bed: &Bed, change: impl FnOnce(&mut NodeRecord) -> Result<()>) -> Result<PathBuf> {
    let victim = bed.cluster.record(2)?;
    let created = victim.created + Duration::from_secs(3600);
    let mut forged = NodeRecord { name: NodeName::new("a-ghost")?, created, ..victim };
    change(&mut forged)?;
    let file = bed.cluster.manifests().join("nodes/a-ghost.yaml");
    fs::write(&file, Manifest::Node(forged).to_yaml())?;
    Ok(file)
}

/// An address that nobody has.
const FREE: [u8; 4] = [192, 0, 2, 77];

fn duplicates(bed: &mut Bed) -> Result<()> {
    bed.await_well("duplicates")?;
    ghost(bed, |_| Ok(()))?;
    let address = bed.cluster.host(2).address(Family::Ipv4)?.to_string();
    let found = bed.await_found("duplicates", &["DuplicateAddress", "a-ghost", &address, "host2"])?;
    bed.obey(&found)?;
    bed.await_well("duplicates")?;
    // The CIDRs of another node's pods, claimed under an address of its own.
    let block = bed.cluster.record(2)?.blocks.first().context("host2 has a block")?.to_string();
    let file = ghost(bed, |forged| {
        forged.addresses = [IpAddr::from(FREE)].into_iter().collect();
        forged.vxlan_mac = Some(MacAddress::derived(&["a-ghost"]));
        Ok(())
    })?;
    bed.await_found("duplicates", &["DuplicateBlock", "a-ghost", &block, "allocated to host2"])?;
    fs::remove_file(file)?;
    bed.await_well("duplicates")
}

fn duplicate_key(bed: &mut Bed) -> Result<()> {
    bed.await_well("duplicates")?;
    ghost(bed, |forged| {
        forged.addresses = [IpAddr::from(FREE)].into_iter().collect();
        forged.blocks.clear();
        Ok(())
    })?;
    let key = bed.cluster.record(2)?.wireguard.first().context("host2 has a key")?.public_key.to_string();
    let found = bed.await_found("duplicates", &["DuplicateKey", "a-ghost", &key, "belongs to host2"])?;
    bed.obey(&found)?;
    bed.await_well("duplicates")
}

/// A VPN with addresses of pods, in the main table and in one that is asked before.
fn overlap(bed: &mut Bed) -> Result<()> {
    bed.await_well("address-overlap")?;
    let host = bed.host();
    host.ip(["route", "add", "10.42.128.0/20", "via", "192.0.2.254"])?;
    let found = bed.await_found("address-overlap", &["10.42.128.0/20", "eth0", "10.42.0.0/16"])?;
    bed.obey(&found)?;
    bed.await_well("address-overlap")?;
    host.ip(["-6", "route", "add", "fd42:0:0:ffff::/64", "dev", "eth0", "table", "52"])?;
    bed.await_well("address-overlap").context("nobody asks the table")?;
    host.ip(["-6", "rule", "add", "pref", "5270", "lookup", "52"])?;
    let found = bed.await_found("address-overlap", &["fd42:0:0:ffff::/64", "5270", "eth0", "table 52"])?;
    bed.obey(&found)?;
    bed.await_well("address-overlap")
}

fn leases(bed: &mut Bed) -> Result<()> {
    let host = bed.host();
    // What somebody does inside of a pod.
    let changed = host.add_pod("changed")?;
    bed.await_well("leases")?;
    changed.netns().command("ip", ["link", "set", "eth0", "down"])?;
    let found = bed.await_found("leases", &["is not as it was wired", "in the pod", "eth0 is down", "ip monitor"])?;
    ensure!(found["severity"] == "error" && found["fix"]["byHand"] == "the pod ends", "{found:#}");
    ensure!(changed.del()?.success());
    bed.await_well("leases")?;
    let (a, b) = (host.add_pod("a")?, host.add_pod("b")?);
    let [address, address_of_b] = [&a, &b].map(|pod| pod.address(Family::Ipv4).map(|address| address.to_string()));
    let (address, address_of_b) = (address?, address_of_b?);
    bed.await_well("leases")?;
    let released = || host.huskctl(["ipam", "release", &address]);
    let refused = released()?;
    ensure!(refused.status.code() == Some(3) && refused.stderr.contains("exists"), "a pod that lives: {refused:?}");
    let (interface, interface_of_b) = (host.interface_of(&address)?, host.interface_of(&address_of_b)?);
    host.ip(["link", "del", &interface])?;
    bed.await_found("leases", &["has no network any more", &interface, &address])?;
    let refused = released()?;
    ensure!(refused.stderr.contains("its network namespace"), "a pod that is cut off: {refused:?}");
    // A runtime that crashed: the namespace goes, and nobody says DEL. A daemon would take the lease back within seconds.
    host.stop_daemon(Signal::SIGTERM)?;
    host.forget_namespace(&a)?;
    let found = bed.await_found("leases", &["outlived its pod", &address, "huskctl ipam release"])?;
    ensure!(found["fix"]["byHand"].is_null(), "{found:#}");
    bed.obey(&found)?;
    bed.await_well("leases")?;
    // The same, mended by the doctor itself.
    host.ip(["link", "del", &interface_of_b])?;
    host.forget_namespace(&b)?;
    bed.await_found("leases", &["outlived its pod", &address_of_b])?;
    bed.fixed("leases")?;
    // And an interface that nobody has a lease for.
    host.ip(["link", "add", "husk0123456789a", "type", "veth", "peer", "name", "other0"])?;
    let found = bed.await_found("leases", &["husk0123456789a", "has no lease"])?;
    bed.obey(&found)?;
    bed.await_well("leases")?;
    host.start_daemon()?;
    host.wait_ready()?;
    bed.cluster.wait_meshed()?;
    eventually("the daemon to know", SHOWS, || Ok(host.huskctl_json(["ipam", "show"])?["leases"] == json!([])))
}

fn versions(bed: &mut Bed) -> Result<()> {
    bed.await_well("versions")?;
    let host = bed.host();
    let plugin = host.file("/opt/cni/bin/husk");
    let programs = binary("husk-cni")?;
    let programs = programs.parent().context("a program is in a directory")?.display().to_string();
    let mend = || -> Result<()> {
        let path = format!("{programs}:{}", std::env::var("PATH").unwrap_or_default());
        let command = format!("PATH={path} exec {programs}/huskctl doctor --only versions --fix --yes");
        let fixed = host.program("/bin/sh").args(["-c", &command]).check()?;
        ensure!(fixed.contains("applied, and gone"), "{fixed}");
        Ok(())
    };
    fs::remove_file(&plugin)?;
    bed.await_found("versions", &["/opt/cni/bin/husk", "No such file", "husk-cni install --bin-dir /opt/cni/bin"])?;
    mend()?;
    bed.await_well("versions")?;
    fs::write(&plugin, "#!/bin/sh\necho 'husk-cni 0.0.1, CNI specification 1.0.0'\n")?;
    bed.await_found("versions", &["0.0.1", "/opt/cni/bin/husk"])?;
    mend()?;
    bed.await_well("versions")
}

fn mtu(bed: &mut Bed) -> Result<()> {
    bed.await_well("mtu")?;
    let host = bed.host();
    host.set_underlay_mtu(1400)?;
    let found = bed.await_found("mtu", &["1400", "1500", "host2", "eth0"])?;
    bed.obey(&found)?;
    bed.await_well("mtu")
}

fn paths(bed: &mut Bed) -> Result<()> {
    let (one, two) = (bed.cluster.host(1), bed.cluster.host(2));
    bed.await_well("paths")?;
    let from = one.address(Family::Ipv4)?;
    let rule = format!("iifname eth0 ip saddr {from} ip length > 1401 drop");
    firewall::raise(two.netns(), At::Path, &[&rule])?;
    probe(one, "host2")?;
    bed.await_found("paths", &["1351", "1450", "host2 (IPv4)", "underlay: {mtu: 1401}"])?;
    firewall::lift(two.netns())?;
    probe(one, "host2")?;
    // What was lost by chance on a busy machine is told, too, and is not what this is about.
    eventually("the path to be whole", SHOWS, || Ok(!bed.look("paths")?.to_string().contains("vanish")))
}

fn peers(bed: &mut Bed) -> Result<()> {
    let (one, two) = (bed.cluster.host(1), bed.cluster.host(2));
    let well = || {
        probe(one, "host2")?;
        bed.await_well("peers")
    };
    well()?;
    firewall::raise(two.netns(), At::Input, &["udp dport 4789 drop"])?;
    probe(one, "host2")?;
    let address = two.address(Family::Ipv4)?.to_string();
    bed.await_found("peers", &["UDP port 4789 is blocked", "host2", &address, "answers a ping"])?;
    // As in the DaemonSet's container: root without CAP_NET_RAW, whom net.ipv4.ping_group_range leaves out, too.
    let huskctl = binary("huskctl")?;
    let bare = one.program("setpriv").args(["--bounding-set", "-net_raw"]).args([&huskctl]);
    let bare = bare.args(["doctor", "--only", "peers"]).run()?;
    firewall::lift(two.netns())?;
    for told in ["UDP port 4789 is blocked", "answers an attempt to connect", "pings may not be sent from here"] {
        ensure!(bare.stdout.contains(told), "{told}: {bare:?}");
    }
    well()?;

    bed.cluster.set_cable(2, false)?;
    // The kernel believes for up to a minute what it has heard of a neighbour (`base_reachable_time_ms`, arp(7)).
    one.ip(["neigh", "flush", "dev", "eth0"])?;
    probe(one, "host2")?;
    bed.await_found("peers", &["host2 is down or unplugged", "does not answer a ping"])?;
    bed.cluster.set_cable(2, true)?;
    well()?;

    without_daemon(bed, || {
        probe(one, "host2")?;
        bed.await_found("peers", &["the daemon of host2 does not answer", "so does its address inside the overlay"])
            .map(drop)
    })?;
    well()?;
    // Whoever was missed for so long that `huskctl status` told of it is not any more.
    one.await_answers()
}

/// Something happens while the second host has no daemon.
fn without_daemon(bed: &Bed, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let two = bed.cluster.host(2);
    two.stop_daemon(Signal::SIGTERM)?;
    let done = work();
    two.start_daemon()?;
    two.wait_ready()?;
    done
}

fn node_file(bed: &mut Bed) -> Result<()> {
    bed.on(2, || {
        bed.await_well("node-file")?;
        without_daemon(bed, || {
            let node_file = bed.host().file("/run/husk/node.json");
            let told = fs::read_to_string(&node_file)?;
            let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
            let other = "11111111-2222-3333-4444-555555555555";
            fs::write(&node_file, told.replace(boot.trim(), other))?;
            bed.await_found("node-file", &[other, boot.trim(), "systemctl restart huskd"]).map(drop)
        })?;
        bed.await_well("node-file")
    })
}

/// What stands in for a daemon has another time.
fn clocks(bed: &mut Bed) -> Result<()> {
    let (one, two) = (bed.cluster.host(1), bed.cluster.host(2));
    let routers = [Family::Ipv4, Family::Ipv6].map(|family| two.router(family));
    let routers = routers.into_iter().collect::<Result<Vec<_>>>()?;
    probe(one, "host2")?;
    bed.await_well("clocks")?;
    without_daemon(bed, || {
        let _wrong = WrongClock::start(two.netns(), routers)?;
        probe(one, "host2")?;
        bed.await_found("clocks", &["host2: 7", "ms ahead", "timedatectl set-ntp true"]).map(drop)
    })?;
    probe(one, "host2")?;
    bed.await_well("clocks")
}

/// Answers probes in a daemon's place, with a clock that is two hours ahead.
struct WrongClock {
    stop: Arc<AtomicBool>,
    answers: Vec<JoinHandle<()>>,
}

impl WrongClock {
    fn start(netns: &Netns, addresses: Vec<IpAddr>) -> Result<Self> {
        let mut wrong = Self { stop: Arc::default(), answers: Vec::new() };
        for address in addresses {
            let socket = netns.run(|| ProbeSocket::bind(address, PROBE_PORT))??;
            let stop = Arc::clone(&wrong.stop);
            wrong.answers.push(thread::spawn(move || answer(&socket, &stop)));
        }
        Ok(wrong)
    }
}

impl Drop for WrongClock {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.answers.drain(..).for_each(|answers| drop(answers.join()));
    }
}

fn answer(socket: &ProbeSocket, stop: &AtomicBool) {
    let mut buffer = vec![0; 1 << 16];
    while !stop.load(Ordering::Relaxed) {
        let Ok(Some(received)) = socket.receive(&mut buffer) else {
            thread::sleep(Duration::from_millis(1));
            continue;
        };
        let message = wire::read(Family::of(received.from.ip()), &buffer[..received.length]);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        if let Some(message) = message.filter(|it| it.kind == Kind::Probe { reads_time: true }) {
            let answer = wire::answer(true, message.size, message.id, now + Duration::from_secs(7200));
            let _ = socket.send(received.from, &answer);
        }
    }
}

fn keys(bed: &mut Bed) -> Result<()> {
    let (one, two) = (bed.cluster.host(1), bed.cluster.host(2));
    bed.await_well("keys")?;
    older_key(bed)?;
    let found = bed.await_found("keys", &["should have been replaced", "keys.rotation is 60 s", "keys rotate"])?;
    ensure!(found["fix"]["byHand"].is_null(), "{found:#}");
    bed.fixed("keys")?;
    rotation::over(&bed.cluster, 1, 0, ROTATED)?;
    // A peer that never takes the new key, until the old one has expired.
    two.stop_daemon(Signal::SIGTERM)?;
    rotation::request(one)?;
    let parts =
        ["host2 do not use the key of epoch", "keys.hardLifetime", "systemctl restart huskd", "\"severity\":\"error\""];
    bed.await_found("keys", &parts)?;
    two.start_daemon()?;
    two.wait_ready()?;
    bed.await_well("keys")
}

/// How long a rotation may take.
const ROTATED: Duration = Duration::from_secs(30);

/// The key of the first host was made when the host was booted, and its daemon renews none by itself. Somebody wants a new one every
/// minute, and writes that into the configuration; the daemon has not heard of it.
fn older_key(bed: &Bed) -> Result<()> {
    let host = bed.cluster.host(1);
    host.stop_daemon(Signal::SIGTERM)?;
    let folder = host.file("/run/husk/keys");
    let descriptions = fs::read_dir(&folder)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    for path in descriptions.iter().filter(|path| path.extension().is_some_and(|it| it == "json")) {
        let mut description: Value = serde_json::from_str(&fs::read_to_string(path)?)?;
        ensure!(description["createdMilliseconds"].is_u64(), "{}: {description}", path.display());
        description["createdMilliseconds"] = 0.into();
        fs::write(path, description.to_string())?;
    }
    host.start_daemon()?;
    host.wait_ready()?;
    bed.cluster.wait_meshed()?;
    // Six minutes are what the doctor takes for late; a machine that was booted just now has to get there first.
    let old_enough = || Ok(husk_ipam::lease::since_boot() > Duration::from_secs(400));
    eventually("the host to have run for some minutes", Duration::from_secs(400), old_enough)?;
    host.configure(|config| config["keys"]["rotation"] = 60.into())
}

fn full_pool(bed: &mut Bed) -> Result<()> {
    let cidr = |text: &str| text.parse::<Prefix>();
    let host = bed.host();
    bed.await_well("address-pools")?;
    let own = *bed.cluster.record(1)?.blocks.first().context("the host has a block")?;
    let other = [cidr("10.42.0.0/28")?, cidr("10.42.0.16/28")?].into_iter().find(|block| *block != own);
    let taken = manifest::block(other.context("there are two")?, &NodeName::new("host9")?).to_yaml();
    fs::write(bed.cluster.manifests().join("taken.yaml"), taken)?;
    bed.await_found("address-pools", &["default-ipv4", "2 of 2 blocks", "clusterCIDRs: [10.42.0.0/26]"])?;
    host.configure(|config| config["clusterCIDRs"] = json!(["10.42.0.0/26"]))?;
    host.restart_daemon(Signal::SIGTERM)?;
    bed.await_well("address-pools")
}

fn refused_packets(bed: &mut Bed) -> Result<()> {
    let host = bed.host();
    bed.await_well("xfrm-errors")?;
    let policy = ["dir", "out", "src", "0.0.0.0/0", "dst", "203.0.113.0/24"];
    host.ip(["xfrm", "policy", "add"].into_iter().chain(policy).chain(["action", "block"]))?;
    let stop = Arc::<AtomicBool>::default();
    let socket = host.netns().run(|| UdpSocket::bind("0.0.0.0:0"))??;
    let stopped = Arc::clone(&stop);
    let sender = thread::spawn(move || {
        while !stopped.load(Ordering::Relaxed) {
            let _ = socket.send_to(b"?", SocketAddr::from(([203, 0, 113, 1], 9)));
            thread::sleep(Duration::from_millis(20));
        }
    });
    let found = bed.await_found("xfrm-errors", &["XfrmOutPolBlock", "a policy blocks them", "ip xfrm policy"]);
    let removed = host.ip(["xfrm", "policy", "delete"].into_iter().chain(policy));
    let well = bed.await_well("xfrm-errors");
    stop.store(true, Ordering::Relaxed);
    sender.join().map_err(|_| anyhow!("the sender panicked"))?;
    found?;
    removed?;
    well
}

fn broken_offload(bed: &mut Bed) -> Result<()> {
    eventually("the offload to be tested", FOUND_WITHIN, || Ok(bed.host().daemon_log().contains("outcome=Passed")))?;
    bed.await_well("offload")?;
    let card = bed.cluster.break_card(1, Fault::Checksums)?;
    bed.host().restart_daemon(Signal::SIGTERM)?;
    bed.await_found("offload", &["husk-vx", "eth0", "host2", "BrokenOffload"])?;
    drop(card);
    // What was found holds for a day, or until the host is booted, as for another card.
    bed.cluster.reboot(1)?;
    bed.host().start()?;
    bed.host().wait_ready()?;
    bed.await_well("offload")
}
