//! Checks that take more than one host, or a daemon: each is broken for real, found, mended as the doctor says, and well again.

use std::fs;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow, ensure};
use husk_dataplane::probe::ProbeSocket;
use husk_overlay::manifest::{self, Manifest};
use husk_overlay::marks::PROBE_PORT;
use husk_overlay::name::NodeName;
use husk_overlay::offload::FOUND_WITHIN;
use husk_overlay::probe::wire::{self, Kind};
use husk_overlay::record::NodeRecord;
use husk_tests::cluster::Fault;
use husk_tests::process::binary;
use husk_tests::rotation::request;
use husk_tests::{Cluster, Family, Host, Mode, Netns, Prefix, Signal, eventually};
use nix::mount::{MntFlags, umount2};
use serde_json::{Value, json};

/// What is broken here.
pub(crate) const BREAKS: &[&str] = &[
    "versions",
    "node-file",
    "peers",
    "paths",
    "mtu",
    "clocks",
    "offload",
    "keys",
    "xfrm-errors",
    "duplicates",
    "address-overlap",
    "address-pools",
    "leases",
    "issues",
];

/// How long it may take until what was broken or mended shows.
const SHOWS: Duration = Duration::from_secs(30);

/// What a check of a host says now.
fn look(host: &Host, id: &str) -> Result<Value> {
    Ok(host.huskctl_json(["doctor", "--only", id])?["checks"][0].clone())
}

fn await_well(host: &Host, id: &str) -> Result<()> {
    let mut last = Value::Null;
    let awaited = eventually(&format!("the check {id} to be well"), SHOWS, || {
        last = look(host, id)?;
        Ok(last["outcome"] == "well")
    });
    awaited.with_context(|| format!("{}: {last:#}", host.name()))
}

/// Waits for a finding whose cause, evidence and fix have all of these parts.
fn await_found(host: &Host, id: &str, parts: &[&str]) -> Result<Value> {
    let mut last = Value::Null;
    let mut found = Value::Null;
    let awaited = eventually(&format!("the check {id} to find it"), SHOWS, || {
        last = look(host, id)?;
        let findings = last["findings"].as_array().cloned().unwrap_or_default();
        let has_all = |finding: &Value| {
            let text =
                [finding["cause"].to_string(), finding["evidence"].to_string(), finding["fix"].to_string()].concat();
            parts.iter().all(|part| text.contains(part))
        };
        found = findings.into_iter().find(has_all).unwrap_or_default();
        Ok(!found.is_null())
    });
    awaited.with_context(|| format!("{}: no finding with {parts:?}: {last:#}", host.name()))?;
    // As people see it, with its exit status.
    let told = host.huskctl(["doctor", "--only", id])?;
    ensure!(told.status.code() == Some(1), "{told:?}");
    eprintln!("{}", told.stdout);
    Ok(found)
}

/// Does on a host what a fix says, in a shell as a person would.
fn apply(host: &Host, finding: &Value) -> Result<()> {
    let commands = finding["fix"]["commands"].as_array().context("a fix has commands")?;
    ensure!(!commands.is_empty(), "no command in {finding:#}");
    for command in commands {
        let command = command.as_str().context("a command is text")?;
        host.program("/bin/sh").args(["-ec", command]).check().with_context(|| command.to_owned())?;
    }
    Ok(())
}

/// Has a host probe its peer now, and waits until it is known what passes.
fn probe(host: &Host, peer: &str) -> Result<()> {
    let program = host.program(binary("huskctl")?).limit(Duration::from_secs(70));
    program.args(["mtu", "probe", peer]).run().map(drop)
}

#[test]
fn what_is_broken_between_two_hosts_is_found_and_mended() -> Result<()> {
    let cluster = Cluster::builder().mode(Mode::Vxlan).hosts(2).start()?;
    let one = cluster.host(1);
    probe(one, "host2")?;
    for id in BREAKS.iter().filter(|id| !["keys", "xfrm-errors"].contains(id)) {
        await_well(one, id)?;
    }
    for id in ["keys", "xfrm-errors"] {
        ensure!(look(one, id)?["outcome"] == "doesNotApply", "{id}: {}", look(one, id)?);
    }
    issues(&cluster)?;
    duplicates(&cluster)?;
    overlap(one)?;
    leases(one)?;
    versions(one)?;
    mtu(one)?;
    paths(&cluster)?;
    blocked_port(&cluster)?;
    cable(&cluster)?;
    silent_daemon(&cluster)
}

fn issues(cluster: &Cluster) -> Result<()> {
    let file = cluster.manifests().join("broken.yaml");
    fs::write(&file, "apiVersion: husk.dev/v1alpha1\nkind: AddressBlock\nmetadata: {name: x}\nspec: 7\n")?;
    await_found(cluster.host(1), "issues", &["broken.yaml", "BadManifest"])?;
    fs::remove_file(&file)?;
    await_well(cluster.host(1), "issues")
}

/// Somebody copied a node's record: two claim one address.
fn duplicates(cluster: &Cluster) -> Result<()> {
    let one = cluster.host(1);
    let victim = cluster.record(2)?;
    // Who was there first keeps the address.
    let created = victim.created + Duration::from_secs(3600);
    let forged = NodeRecord { name: NodeName::new("a-ghost")?, created, ..victim };
    fs::write(cluster.manifests().join("nodes/a-ghost.yaml"), Manifest::Node(forged).to_yaml())?;
    let address = cluster.host(2).address(Family::Ipv4)?.to_string();
    let found = await_found(one, "duplicates", &["a-ghost", &address, "host2", "DuplicateAddress"])?;
    apply(one, &found)?;
    await_well(one, "duplicates")
}

/// A VPN with addresses of pods, in the main table and in one that is asked before.
fn overlap(host: &Host) -> Result<()> {
    host.ip(["route", "add", "10.42.128.0/20", "via", "192.0.2.254"])?;
    let found = await_found(host, "address-overlap", &["10.42.128.0/20", "eth0", "10.42.0.0/16"])?;
    apply(host, &found)?;
    await_well(host, "address-overlap")?;
    host.ip(["-6", "route", "add", "fd42:0:0:ffff::/64", "dev", "eth0", "table", "52"])?;
    await_well(host, "address-overlap").context("nobody asks the table")?;
    host.ip(["-6", "rule", "add", "pref", "5270", "lookup", "52"])?;
    let found = await_found(host, "address-overlap", &["fd42:0:0:ffff::/64", "5270", "eth0", "table 52"])?;
    apply(host, &found)?;
    await_well(host, "address-overlap")
}

fn leases(host: &Host) -> Result<()> {
    let pod = host.add_pod("a")?;
    let address = pod.address(Family::Ipv4)?.to_string();
    await_well(host, "leases")?;
    let ipam = host.huskctl_json(["ipam", "show"])?;
    let interface = ipam["leases"][0]["hostInterface"].as_str().context("a lease has an interface")?.to_owned();
    host.ip(["link", "del", &interface])?;
    await_found(host, "leases", &["has no network any more", &interface, &address])?;
    // A runtime that crashed: the namespace goes, and nobody says DEL.
    let path = pod.netns().path();
    host.run(|| umount2(&path, MntFlags::MNT_DETACH))??;
    let found = await_found(host, "leases", &["outlived its pod", &address])?;
    ensure!(found["fix"]["byHand"].is_null(), "{found:#}");
    let fixed = host.huskctl_json(["doctor", "--only", "leases", "--fix", "--yes"])?;
    ensure!(fixed["repairs"][0]["result"] == "gone", "{fixed:#}");
    await_well(host, "leases")?;
    eventually("the daemon to know", SHOWS, || Ok(host.huskctl_json(["ipam", "show"])?["leases"] == json!([])))?;
    // And an interface that nobody has a lease for.
    host.ip(["link", "add", "husk0123456789a", "type", "veth", "peer", "name", "other0"])?;
    let found = await_found(host, "leases", &["husk0123456789a", "has no lease"])?;
    apply(host, &found)?;
    await_well(host, "leases")
}

fn versions(host: &Host) -> Result<()> {
    let plugin = host.file("/opt/cni/bin/husk");
    let programs = binary("husk-cni")?;
    let programs = programs.parent().context("a program is in a directory")?.display().to_string();
    let mend = || -> Result<()> {
        let path = format!("{programs}:{}", std::env::var("PATH").unwrap_or_default());
        let command = format!("PATH={path} exec {}/huskctl doctor --only versions --fix --yes", programs);
        let fixed = host.program("/bin/sh").args(["-c", &command]).check()?;
        ensure!(fixed.contains("applied, and gone"), "{fixed}");
        Ok(())
    };
    fs::remove_file(&plugin)?;
    await_found(host, "versions", &["/opt/cni/bin/husk", "No such file", "husk-cni install --bin-dir /opt/cni/bin"])?;
    mend()?;
    await_well(host, "versions")?;
    fs::write(&plugin, "#!/bin/sh\necho 'husk-cni 0.0.1, CNI specification 1.0.0'\n")?;
    await_found(host, "versions", &["0.0.1", "/opt/cni/bin/husk"])?;
    mend()?;
    await_well(host, "versions")
}

fn mtu(host: &Host) -> Result<()> {
    host.set_underlay_mtu(1400)?;
    let found = await_found(host, "mtu", &["1400", "1500", "host2", "eth0"])?;
    apply(host, &found)?;
    await_well(host, "mtu")
}

fn paths(cluster: &Cluster) -> Result<()> {
    let (one, two) = (cluster.host(1), cluster.host(2));
    let from = one.address(Family::Ipv4)?;
    let table = format!(
        "table inet path {{ chain arriving {{ type filter hook prerouting priority -400; iifname eth0 ip saddr {from} ip length > 1401 drop; }}; }}"
    );
    two.netns().command("nft", [table.as_str()])?;
    probe(one, "host2")?;
    await_found(one, "paths", &["1351", "1450", "host2 (IPv4)", "underlay: {mtu: 1401}"])?;
    two.netns().command("nft", ["delete", "table", "inet", "path"])?;
    probe(one, "host2")?;
    // What was lost by chance on a busy machine is told, too, and is not what this is about.
    eventually("the path to be whole", SHOWS, || Ok(!look(one, "paths")?.to_string().contains("vanish")))
}

fn blocked_port(cluster: &Cluster) -> Result<()> {
    let (one, two) = (cluster.host(1), cluster.host(2));
    let table = "table inet guard { chain in { type filter hook input priority 0; udp dport 4789 drop; }; }";
    two.netns().command("nft", [table])?;
    probe(one, "host2")?;
    let address = two.address(Family::Ipv4)?.to_string();
    await_found(one, "peers", &["UDP port 4789 is blocked", "host2", &address, "answers a ping"])?;
    two.netns().command("nft", ["delete", "table", "inet", "guard"])?;
    probe(one, "host2")?;
    await_well(one, "peers")
}

fn cable(cluster: &Cluster) -> Result<()> {
    let one = cluster.host(1);
    cluster.set_cable(2, false)?;
    probe(one, "host2")?;
    await_found(one, "peers", &["host2 is down or unplugged", "does not answer a ping"])?;
    cluster.set_cable(2, true)?;
    probe(one, "host2")?;
    await_well(one, "peers")
}

/// The daemon of a peer has ended; what stands in for it later has another time.
fn silent_daemon(cluster: &Cluster) -> Result<()> {
    let (one, two) = (cluster.host(1), cluster.host(2));
    let routers = [Family::Ipv4, Family::Ipv6].map(|family| two.router(family));
    two.stop_daemon(Signal::SIGTERM)?;
    probe(one, "host2")?;
    await_found(one, "peers", &["the daemon of host2 does not answer", "so does its address inside the overlay"])?;

    let node_file = two.file("/run/husk/node.json");
    let told = fs::read_to_string(&node_file)?;
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    fs::write(&node_file, told.replace(boot.trim(), "11111111-2222-3333-4444-555555555555"))?;
    await_found(two, "node-file", &["11111111-2222-3333-4444-555555555555", boot.trim(), "systemctl restart huskd"])?;

    await_well(one, "clocks")?;
    let wrong = WrongClock::start(two.netns(), routers.into_iter().collect::<Result<Vec<_>>>()?)?;
    probe(one, "host2")?;
    await_found(one, "clocks", &["host2: 7", "ms ahead", "timedatectl set-ntp true"])?;
    drop(wrong);

    two.start_daemon()?;
    two.wait_ready()?;
    await_well(two, "node-file")?;
    probe(one, "host2")?;
    for id in ["clocks", "peers"] {
        await_well(one, id)?;
    }
    Ok(())
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

#[test]
fn a_rotation_that_does_not_end_is_found() -> Result<()> {
    let cluster = Cluster::builder().hosts(2).set("keys.grace", 1).set("keys.hardLifetime", 1800).start()?;
    let (one, two) = (cluster.host(1), cluster.host(2));
    await_well(one, "keys")?;
    two.stop_daemon(Signal::SIGTERM)?;
    request(one)?;
    await_found(one, "keys", &["host2 do not use the key of epoch", "keys.hardLifetime", "systemctl restart huskd"])?;
    two.start_daemon()?;
    two.wait_ready()?;
    await_well(one, "keys")
}

#[test]
fn a_full_pool_is_found_and_a_larger_one_mends_it() -> Result<()> {
    let cidr = |text: &str| text.parse::<Prefix>();
    let builder = Cluster::builder().mode(Mode::Vxlan).hosts(1).cluster_cidrs([cidr("10.42.0.0/27")?]);
    let cluster = builder.set("blockLengths.ipv4", 28).start()?;
    let host = cluster.host(1);
    await_well(host, "address-pools")?;
    let own = *cluster.record(1)?.blocks.first().context("the host has a block")?;
    let other = [cidr("10.42.0.0/28")?, cidr("10.42.0.16/28")?].into_iter().find(|block| *block != own);
    let taken = manifest::block(other.context("there are two")?, &NodeName::new("host9")?).to_yaml();
    fs::write(cluster.manifests().join("taken.yaml"), taken)?;
    await_found(host, "address-pools", &["default-ipv4", "2 of 2 blocks", "clusterCIDRs: [10.42.0.0/26]"])?;
    host.configure(|config| config["clusterCIDRs"] = json!(["10.42.0.0/26"]))?;
    host.restart_daemon(Signal::SIGTERM)?;
    await_well(host, "address-pools")
}

#[test]
fn packets_that_ipsec_refuses_are_found() -> Result<()> {
    // Neither ESP nor a daemon is needed: the kernel counts what a policy blocks.
    let cluster = Cluster::builder().mode(Mode::Ipsec).hosts(1).build()?;
    let host = cluster.host(1);
    await_well(host, "xfrm-errors")?;
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
    let found = await_found(host, "xfrm-errors", &["XfrmOutPolBlock", "a policy blocks them", "ip xfrm policy"]);
    let removed = host.ip(["xfrm", "policy", "delete"].into_iter().chain(policy));
    let well = await_well(host, "xfrm-errors");
    stop.store(true, Ordering::Relaxed);
    sender.join().map_err(|_| anyhow!("the sender panicked"))?;
    found?;
    removed?;
    well
}

#[test]
fn an_offload_that_is_broken_is_found_and_well_with_another_card() -> Result<()> {
    let mut cluster = Cluster::builder().mode(Mode::Vxlan).set("log.level", "debug").start()?;
    eventually("the offload to be tested", FOUND_WITHIN, || {
        Ok(cluster.host(1).daemon_log().contains("outcome=Passed"))
    })?;
    await_well(cluster.host(1), "offload")?;
    let card = cluster.break_card(1, Fault::Checksums)?;
    cluster.host(1).restart_daemon(Signal::SIGTERM)?;
    await_found(cluster.host(1), "offload", &["husk-vx", "eth0", "host2", "BrokenOffload"])?;
    drop(card);
    // What was found holds for a day, or until the host is booted, as for another card.
    cluster.reboot(1)?;
    cluster.host(1).start()?;
    cluster.host(1).wait_ready()?;
    await_well(cluster.host(1), "offload")
}
