//! Nodes that come, go, move, change their keys or lie about them, and manifests that are wrong: the mesh follows, and
//! between the others not a packet is lost.

#[path = "membership/mesh.rs"]
mod mesh;

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_overlay::manifest::{self};
use husk_overlay::name::NodeName;
use husk_overlay::record::NodeRecord;
use husk_tests::process::binary;
use husk_tests::steady::{Steady, Tunnel, issues};
use husk_tests::{Cluster, Family, Host, Mode, Prefix, Signal, eventually};

use mesh::{Mesh, all_reached, is_untouched, join, key_of, nothing_reported, peer_names, put, put_record, reported};

/// How soon the others follow a change of the cluster's manifests. A pass follows a change within milliseconds; the rest is
/// for a WireGuard handshake and for a machine that does other things too.
const SOON: Duration = Duration::from_secs(4);

/// How soon something is noticed that announces itself to nobody: the daemon looks every five seconds.
const NEXT_TICK: Duration = Duration::from_secs(8);

#[test]
fn a_node_joins_and_leaves_and_the_others_do_not_notice() -> Result<()> {
    for mode in [Mode::Wireguard, Mode::Vxlan] {
        let mut cluster = Cluster::builder().mode(mode).hosts(2).start()?;
        let (a, b) = (cluster.host(1).add_pod("a")?, cluster.host(2).add_pod("b")?);
        all_reached(&a, &b, "before")?;
        let steady = Steady::between(&a, &b)?;
        let before = Tunnel::of(cluster.host(1))?;
        ensure!(mode != Mode::Wireguard || before.handshakes.values().all(|time| *time > 0), "{before:?}");

        let number = cluster.add_host()?;
        let (one, third) = (cluster.host(1), cluster.host(number));
        join(third)?;
        let c = third.add_pod("c")?;
        all_reached(&a, &c, "after it joined")?;
        all_reached(&c, &b, "after it joined")?;
        if mode == Mode::Wireguard {
            let joined = Tunnel::of(one)?;
            assert_eq!((joined.index, joined.handshakes.len()), (before.index, 2));
            assert!(before.handshakes.iter().all(|(key, time)| joined.handshakes.get(key) == Some(time)), "{joined:?}");
        }

        assert!(c.del()?.success());
        third.stop_daemon(Signal::SIGTERM)?;
        third.program(binary("huskd")?).args(["cleanup"]).check()?;
        for host in [one, cluster.host(2)] {
            eventually("the others to forget it", SOON, || Ok(!peer_names(host)?.contains(&"host3".to_owned())))?;
            assert!(
                !host
                    .ip(["route", "show", "table", "all", "proto", "72"])?
                    .contains(&c.address(Family::Ipv4)?.to_string())
            );
        }
        assert_eq!(Tunnel::of(one)?, before, "host1 has the device and the sessions it had before");
        nothing_reported(&[one, cluster.host(2)])?;
        steady.finish().with_context(|| format!("in mode {mode}"))?;
    }
    Ok(())
}

#[test]
fn a_node_returns_with_another_address() -> Result<()> {
    let mesh = Mesh::start()?;
    let (one, third) = (mesh.host(1), mesh.host(3));
    let second = key_of(&mesh.record(2)?);
    let steady = Steady::between(&mesh.a, &mesh.b)?;
    let before = Tunnel::of(one)?;
    let moved = |byte: u8| -> Result<()> {
        let address = third.address(Family::Ipv4)?;
        assert_eq!(address.to_string(), format!("192.0.2.{byte}"));
        eventually("the record to follow", SOON, || Ok(mesh.record(3)?.addresses.iter().any(|it| it == address)))?;
        mesh.third_is_reached("at its new address")?;
        let endpoints = one.program("wg").args(["show", "husk-wg0", "endpoints"]).check()?;
        ensure!(endpoints.contains(&format!("{address}:51820")), "{endpoints}");
        is_untouched(&before, &Tunnel::of(one)?, &second)
    };
    // Under a running daemon.
    mesh.cluster.readdress(3, 33)?;
    moved(33)?;
    // While it is down.
    third.stop_daemon(Signal::SIGTERM)?;
    mesh.cluster.readdress(3, 34)?;
    third.start_daemon()?;
    third.wait_ready()?;
    moved(34)?;
    steady.finish()?;
    nothing_reported(&[one, mesh.host(2), third])
}

#[test]
fn a_node_changes_its_key_and_the_mesh_heals() -> Result<()> {
    let mesh = Mesh::start()?;
    let (one, third) = (mesh.host(1), mesh.host(3));
    let second = key_of(&mesh.record(2)?);
    let steady = Steady::between(&mesh.a, &mesh.b)?;
    let before = Tunnel::of(one)?;
    let key_file = third.file("/run/husk/keys/wireguard-0.key");
    let changed = |old: &str| -> Result<()> {
        mesh.third_is_reached("with its new key")?;
        let now = key_of(&mesh.record(3)?);
        let tunnel = Tunnel::of(one)?;
        ensure!(now != old && tunnel.handshakes.contains_key(&now), "{now} for {old}: {tunnel:?}");
        ensure!(!tunnel.handshakes.contains_key(old), "host1 still takes the old key: {tunnel:?}");
        is_untouched(&before, &tunnel, &second)
    };
    // As after a reboot: neither daemon nor device nor key are there.
    let old = key_of(&mesh.record(3)?);
    third.stop_daemon(Signal::SIGKILL)?;
    match third.wireguard_process() {
        Some(process) => process.signal(Signal::SIGKILL)?,
        None => third.ip(["link", "del", "husk-wg0"]).map(drop)?,
    }
    fs::remove_file(&key_file)?;
    third.start_daemon()?;
    third.wait_ready()?;
    changed(&old)?;
    // Under a running daemon, which reads its key in every pass and gets a new one.
    let old = key_of(&mesh.record(3)?);
    fs::remove_file(&key_file)?;
    eventually("another key", NEXT_TICK, || Ok(key_of(&mesh.record(3)?) != old))?;
    changed(&old)?;
    steady.finish()?;
    nothing_reported(&[one, mesh.host(2), third])
}

#[test]
fn a_thief_of_blocks_keys_and_addresses_harms_only_itself() -> Result<()> {
    let mesh = Mesh::start()?;
    let (one, two, third) = (mesh.host(1), mesh.host(2), mesh.host(3));
    let steady = Steady::between(&mesh.a, &mesh.b)?;
    let before = Tunnel::of(one)?;
    let (victim, honest) = (mesh.record(2)?, mesh.record(3)?);
    let second = key_of(&victim);

    // A daemon that runs corrects what others write about its node.
    let file = mesh.cluster.record_path(3);
    put_record(&file, &NodeRecord { wireguard: victim.wireguard.clone(), ..honest.clone() })?;
    eventually("the daemon to correct its record", SOON, || Ok(mesh.record(3)? == honest))?;
    mesh.third_is_reached("after the correction")?;

    // From here on nobody corrects it.
    third.stop_daemon(Signal::SIGTERM)?;
    let block = *victim.blocks.first().context("host2 has no block")?;
    let mut blocks = honest.blocks.clone();
    blocks.insert(block);
    put_record(&file, &NodeRecord { blocks, ..honest.clone() })?;
    reported(&[one, two], "DuplicateBlock", "host3", &format!("{block}, which is allocated to host2"))?;
    mesh.third_is_reached("over the blocks that are its own")?;

    put_record(&file, &NodeRecord { wireguard: victim.wireguard.clone(), ..honest.clone() })?;
    reported(&[one, two], "DuplicateKey", "host3", "belongs to host2")?;
    mesh.third_is_not_reached()?;

    put_record(&file, &NodeRecord { addresses: victim.addresses, ..honest.clone() })?;
    reported(&[one, two], "DuplicateAddress", "host3", "belongs to host2")?;
    mesh.third_is_not_reached()?;

    let foreign: Prefix = "10.99.0.0/26".parse()?;
    put_record(&file, &NodeRecord { blocks: [foreign].into(), ..honest.clone() })?;
    reported(&[one, two], "ForeignBlock", "host3", "outside the cluster CIDRs")?;
    assert_eq!(one.ip(["route", "show", "10.99.0.0/26"])?, "");

    // A node that never was, by somebody's hand.
    let forged = NodeRecord { name: NodeName::new("a-ghost")?, ..victim.clone() };
    let ghost = mesh.cluster.manifests().join("nodes/a-ghost.yaml");
    put_record(&ghost, &NodeRecord { created: honest.created, ..forged.clone() })?;
    reported(&[one, two], "DuplicateAddress", "a-ghost", "belongs to host2")?;
    // The victim's own lock on its block, claimed in another file by a node whose name comes first.
    let stolen = manifest::block(block, &forged.name).to_yaml();
    put(&mesh.cluster.manifests().join("stolen.yaml"), &stolen)?;
    reported(&[one, two], "BadManifest", "stolen.yaml", "for a-ghost")?;
    // The victim's record, in another file and of an earlier time.
    let forged = NodeRecord { created: "2001-01-01T00:00:00Z".parse()?, wireguard: honest.wireguard.clone(), ..victim };
    put_record(&mesh.cluster.manifests().join("stolen.yaml"), &forged)?;
    reported(&[one, two], "BadManifest", "stolen.yaml", "OverlayNode host2")?;
    all_reached(&mesh.a, &mesh.b, "whatever is claimed")?;
    assert!(one.cni_status()?.success() && two.cni_status()?.success());

    fs::remove_file(ghost)?;
    fs::remove_file(mesh.cluster.manifests().join("stolen.yaml"))?;
    third.start_daemon()?;
    third.wait_ready()?;
    mesh.third_is_reached("after its daemon came back")?;
    nothing_reported(&[one, two, third])?;
    is_untouched(&before, &Tunnel::of(one)?, &second)?;
    steady.finish()
}

#[test]
fn garbage_in_the_directory_is_reported_and_does_nothing_else() -> Result<()> {
    let cluster = Cluster::builder().hosts(2).start()?;
    let (a, b) = (cluster.host(1).add_pod("a")?, cluster.host(2).add_pod("b")?);
    all_reached(&a, &b, "before")?;
    let steady = Steady::between(&a, &b)?;
    let before = Tunnel::of(cluster.host(1))?;
    let hosts = [cluster.host(1), cluster.host(2)];
    let deep = "[".repeat(20_000);
    let anchors =
        format!("a0: &a0 [x]\n{}", (1..40).map(|n| format!("a{n}: &a{n} [*a{0}, *a{0}]\n", n - 1)).collect::<String>());
    let garbage: [(&str, &[u8]); 8] = [
        ("nodes/empty-fields.yaml", b"apiVersion: husk.dev/v1alpha1\nkind: OverlayNode\nmetadata: {}\nspec: {}\n"),
        ("nodes/binary.yaml", &[0, 0xff, 0xfe, 0x80, b'\n']),
        ("nodes/unknown-kind.yaml", b"apiVersion: husk.dev/v1alpha1\nkind: OverlayDream\nmetadata: {name: x}\n"),
        ("blocks/other-name.yaml", b"apiVersion: husk.dev/v1alpha1\nkind: AddressBlock\nmetadata: {name: x}\nspec: {cidr: 10.42.0.0/26, node: y}\n"),
        ("blocks/half.yaml", b"apiVersion: husk.dev/v1alpha1\nkind: Addr"),
        ("words.yaml", b"these are words, and no manifest\n"),
        ("deep.yaml", deep.as_bytes()),
        ("laughs.yaml", anchors.as_bytes()),
    ];
    for (name, content) in garbage {
        fs::write(cluster.manifests().join(name), content)?;
        reported(&hosts, "BadManifest", name, "")?;
    }
    // What is none of ours is passed over.
    for (name, content) in
        [("notes.txt", "x"), ("foreign.yaml", "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\n")]
    {
        fs::write(cluster.manifests().join(name), content)?;
    }
    all_reached(&a, &b, "amid garbage")?;
    let late = cluster.host(2).add_pod("late")?;
    all_reached(&a, &late, "amid garbage")?;
    for host in hosts {
        let kinds: Vec<_> = issues(host)?.into_iter().filter(|(kind, ..)| kind != "BadManifest").collect();
        assert!(kinds.is_empty(), "{kinds:?}");
        let named =
            issues(host)?.iter().any(|(_, subject, _)| subject.contains("notes") || subject.contains("foreign"));
        assert!(!named && host.cni_status()?.success());
    }
    for (name, _) in garbage {
        fs::remove_file(cluster.manifests().join(name))?;
    }
    nothing_reported(&hosts)?;
    assert_eq!(Tunnel::of(cluster.host(1))?, before);
    steady.finish()
}

#[test]
fn a_record_that_flaps_costs_bounded_work() -> Result<()> {
    const TIMES: u32 = 1000;
    let mesh = Mesh::start()?;
    let (one, third) = (mesh.host(1), mesh.host(3));
    let steady = Steady::between(&mesh.a, &mesh.b)?;
    let before = Tunnel::of(one)?;
    let second = key_of(&mesh.record(2)?);
    third.stop_daemon(Signal::SIGTERM)?;
    let honest = mesh.record(3)?;
    let narrow = NodeRecord { underlay_mtu: 1400, ..honest.clone() };
    let gone = NodeRecord { blocks: [].into(), ..honest.clone() };
    let passes =
        |host: &Host| -> Result<u64> { host.huskctl_json(["status"])?["passes"].as_u64().context("no passes") };
    let (cpu, started, count) = (daemon_cpu(one)?, Instant::now(), passes(one)?);
    for round in 0..TIMES {
        let variant = [&narrow, &gone, &honest][usize::try_from(round % 3)?];
        put_record(&mesh.cluster.record_path(3), variant)?;
        // As fast as another daemon could write, not as fast as this machine can.
        std::thread::sleep(Duration::from_millis(2));
    }
    put_record(&mesh.cluster.record_path(3), &honest)?;
    mesh.third_is_reached("after its record flapped")?;
    let (cpu, elapsed, count) = (daemon_cpu(one)? - cpu, started.elapsed(), passes(one)? - count);
    eprintln!("{TIMES} rewrites in {elapsed:?}: {count} passes, {cpu:?} of processor time");
    assert!(count <= u64::from(TIMES) && cpu < elapsed / 2, "{count} passes, {cpu:?} of processor time in {elapsed:?}");
    is_untouched(&before, &Tunnel::of(one)?, &second)?;
    nothing_reported(&[one])?;
    steady.finish()
}

/// Processor time that a host's daemon has used, the userspace WireGuard device's not included (proc_pid_stat(5)).
fn daemon_cpu(host: &Host) -> Result<Duration> {
    let daemon = host.processes().into_iter().find(|process| process.command.contains("huskd run"));
    let pid = daemon.context("no daemon runs")?.pid;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    // Fields 14 and 15 of the file, utime and stime, in hundredths of a second; the first after the name is the third.
    let ticks = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
    Ok(Duration::from_millis(ticks * 10))
}

#[test]
fn the_data_plane_outlives_the_shared_directory() -> Result<()> {
    let mesh = Mesh::start()?;
    let hosts = [mesh.host(1), mesh.host(2), mesh.host(3)];
    let steady = Steady::between(&mesh.a, &mesh.b)?;
    let before = Tunnel::of(mesh.host(1))?;
    let (there, away) = (mesh.cluster.manifests(), mesh.cluster.scope().directory().join("away"));
    fs::rename(&there, &away)?;
    for host in hosts {
        eventually("the host to say so", NEXT_TICK, || {
            Ok(issues(host)?.iter().any(|(kind, ..)| kind == "SourceUnavailable"))
        })?;
    }
    mesh.third_is_reached("without the directory")?;
    // The kernel heals and pods come and go from what was known last.
    let late = mesh.host(1).add_pod("late")?;
    all_reached(&late, &mesh.c, "without the directory")?;
    assert!(late.del()?.success());
    // On the host that carries none of the steady traffic.
    mesh.host(3).ip(["route", "flush", "proto", "72"])?;
    all_reached(&mesh.a, &mesh.c, "after its routes were flushed")?;

    // Neither a restart nor a crash takes an absent directory for an empty one.
    mesh.host(1).restart_daemon(Signal::SIGTERM)?;
    mesh.host(3).restart_daemon(Signal::SIGKILL)?;
    assert!(!there.exists(), "a daemon made the absent directory anew");
    mesh.third_is_reached("after restarts without the directory")?;
    let later = mesh.host(1).add_pod("later")?;
    all_reached(&later, &mesh.c, "after a restart without the directory")?;
    assert!(mesh.host(1).cni_status()?.success());
    assert_eq!(Tunnel::of(mesh.host(1))?, before);
    // An empty mount point in its place is no cluster either.
    fs::create_dir(&there)?;
    mesh.host(3).restart_daemon(Signal::SIGTERM)?;
    assert_eq!(fs::read_dir(&there)?.count(), 0, "a daemon took an empty mount point for a new cluster");
    mesh.third_is_reached("with an empty directory in its place")?;
    fs::remove_dir(&there)?;

    fs::rename(&away, &there)?;
    nothing_reported(&hosts)?;
    let (index, last) = (Tunnel::of(mesh.host(1))?.index, mesh.host(3).add_pod("last")?);
    assert_eq!(index, before.index);
    all_reached(&later, &last, "after the directory came back")?;
    steady.finish()
}
