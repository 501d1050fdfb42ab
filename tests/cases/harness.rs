//! The harness without Husk: whatever the other cases measure with is proven here first.

#[path = "harness/wire.rs"]
mod wire;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Result;
use husk_tests::netns::Netns;
use husk_tests::probe::{Datagram, Echo, EchoServer, Reach, Stream, path_mtu, payload, tcp};
use husk_tests::process::Program;
use husk_tests::{Cluster, ClusterBuilder, Family, PodSpec, eventually, pace, patience, scope};
use serde_json::json;

fn underlay() -> ClusterBuilder {
    Cluster::builder().dual_stack()
}

#[test]
fn hosts_reach_each_other_and_the_outside() -> Result<()> {
    let cluster = underlay().hosts(3).build()?;
    for family in Family::ALL {
        for to in [cluster.host(2).address(family)?, Cluster::outside_address(family)] {
            let reach = Echo::to(to).run(cluster.host(1).netns())?;
            assert!(reach.arrived(), "{to}: {reach:?}");
        }
        let nobody = match family {
            Family::Ipv4 => "192.0.2.77".parse()?,
            Family::Ipv6 => "2001:db8::77".parse()?,
        };
        let reach = Echo::to(nobody).limit(Duration::from_millis(200)).run(cluster.host(1).netns())?;
        assert_eq!(reach, Reach::Silent);
    }
    Ok(())
}

#[test]
fn an_underlay_of_one_family_has_no_way_for_the_other() -> Result<()> {
    let cluster = Cluster::builder().underlay(Family::Ipv6).build()?;
    assert!(cluster.host(1).address(Family::Ipv4).is_err());
    let reach = Echo::to("198.51.100.1".parse()?).run(cluster.host(1).netns())?;
    assert_eq!(reach, Reach::Refused(nix::errno::Errno::ENETUNREACH));
    Ok(())
}

#[test]
fn a_packet_of_the_mtu_passes_and_one_byte_more_is_refused() -> Result<()> {
    for mtu in [1500, 1280, 9000] {
        let cluster = underlay().mtu(mtu).build()?;
        let netns = cluster.host(1).netns();
        let server = EchoServer::start(cluster.host(2).netns())?;
        for family in Family::ALL {
            let to = cluster.host(2).address(family)?;
            assert_eq!(path_mtu(netns, to)?, mtu);
            let too_big = Reach::TooBig { path_mtu: mtu, local: true };
            for (size, passes) in [(mtu, true), (mtu + 1, false)] {
                for reach in [
                    Echo::to(to).packet_size(size).run(netns)?,
                    Datagram::to(server.at(to)).packet_size(size).run(netns)?,
                ] {
                    if passes {
                        assert!(
                            matches!(reach, Reach::Answered { packet_size, .. } if packet_size == size),
                            "{reach:?}"
                        );
                    } else {
                        assert_eq!(reach, too_big, "{family} {size}");
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_path_that_narrows_is_reported_by_its_router() -> Result<()> {
    let cluster = underlay().build()?;
    let beyond = Netns::create(&cluster.scope().name("beyond"))?;
    let name = beyond.name();
    cluster.outside().ip_batch(&format!(
        "link add narrow mtu 1300 type veth peer name eth0 mtu 1300 netns {name}\n\
         addr add 203.0.113.1/24 dev narrow\naddr add 2001:db8:1::1/64 dev narrow nodad\nlink set narrow up"
    ))?;
    beyond.ip_batch(
        "addr add 203.0.113.2/24 dev eth0\naddr add 2001:db8:1::2/64 dev eth0 nodad\nlink set eth0 up\n\
         route add default via 203.0.113.1\nroute add default via 2001:db8:1::1",
    )?;
    cluster.outside().sysctl("net/ipv4/ip_forward", "1")?;
    cluster.outside().sysctl("net/ipv6/conf/all/forwarding", "1")?;
    for to in ["203.0.113.2", "2001:db8:1::2"] {
        let echo = |size| Echo::to(to.parse()?).packet_size(size).run(cluster.host(1).netns());
        assert!(echo(1300)?.arrived(), "{to}");
        assert_eq!(echo(1400)?, Reach::TooBig { path_mtu: 1300, local: false }, "{to}");
        assert_eq!(echo(1400)?, Reach::TooBig { path_mtu: 1300, local: true }, "{to}");
    }
    Ok(())
}

#[test]
fn tcp_is_verified_and_the_wire_carries_single_packets() -> Result<()> {
    let cluster = underlay().build()?;
    let (one, two) = (cluster.host(1), cluster.host(2));
    let server = EchoServer::start(two.netns())?;
    for family in Family::ALL {
        let wire = cluster.capture()?;
        let done = tcp::transfer(one.netns(), server.at(two.address(family)?), 3_000_001)?;
        assert_eq!(done.bytes, 3_000_001);
        assert_eq!(done.from.ip(), one.address(family)?);
        assert!(server.peers().contains(&done.from), "{:?}", server.peers());
        let trace = wire.stop()?;
        assert_eq!((trace.largest(), trace.fragments()), (1500, 0), "{family}");
        assert!(trace.containing(payload::MARKER) > 4000);
    }
    let refused = tcp::transfer(one.netns(), (two.address(Family::Ipv4)?, 1).into(), 1).unwrap_err();
    assert!(format!("{refused:#}").contains("refused"), "{refused:#}");
    let rate = tcp::throughput(one.netns(), two.netns(), two.address(Family::Ipv4)?, Duration::from_millis(200))?;
    assert!(rate > 1e7, "{rate}");
    Ok(())
}

#[test]
fn streams_count_every_packet() -> Result<()> {
    let cluster = underlay().build()?;
    let (one, two) = (cluster.host(1), cluster.host(2));
    let server = EchoServer::start(two.netns())?;
    let to = two.address(Family::Ipv6)?;
    let streams = [
        Stream::ping(one.netns(), two.address(Family::Ipv4)?, 1000)?,
        Stream::ping(one.netns(), to, 1000)?,
        Stream::udp(one.netns(), two.netns(), to, 1000)?,
    ];
    let flow = tcp::Flow::start(one.netns(), server.at(to), 4_000_000)?;
    std::thread::sleep(Duration::from_secs(1));
    for stream in streams {
        let report = stream.stop()?;
        assert!(report.lossless() && report.sent > u64::from(pace(500)) && report.duplicated == 0, "{report}");
    }
    assert!(flow.stop()?.bytes > 1_000_000);

    let streams = [Stream::ping(one.netns(), to, 500)?, Stream::udp(one.netns(), two.netns(), to, 500)?];
    let flow = tcp::Flow::start(one.netns(), server.at(to), 1_000_000)?;
    let outage = Duration::from_millis(300);
    for (plugged, pause) in [(false, outage), (true, outage)] {
        std::thread::sleep(Duration::from_millis(100));
        cluster.set_cable(2, plugged)?;
        std::thread::sleep(pause);
    }
    for stream in streams {
        let report = stream.stop()?;
        assert!(!report.lossless() && report.received > 0 && report.largest_gap >= outage, "{report}");
    }
    let flow = flow.stop()?;
    assert!(flow.largest_stall >= outage, "{flow:?}");
    assert!(one.netns().counter("Tcp", "RetransSegs")? > 0);
    Ok(())
}

#[test]
fn hosts_change_address_and_mtu() -> Result<()> {
    let cluster = underlay().build()?;
    cluster.readdress(2, 42)?;
    cluster.set_underlay_mtu(1400)?;
    let reach = Echo::to("192.0.2.42".parse()?).packet_size(1401).run(cluster.host(1).netns())?;
    assert_eq!(reach, Reach::TooBig { path_mtu: 1400, local: true });
    for family in Family::ALL {
        let to = cluster.host(2).address(family)?;
        assert!(Echo::to(to).packet_size(1400).run(cluster.host(1).netns())?.arrived());
        assert!(Echo::to(Cluster::outside_address(family)).run(cluster.host(2).netns())?.arrived());
    }
    Ok(())
}

#[test]
fn every_host_has_its_own_directories() -> Result<()> {
    let cluster = Cluster::builder().build()?;
    let (one, two) = (cluster.host(1), cluster.host(2));
    for directory in ["/run/husk", "/run/wireguard", "/var/run/wireguard", "/var/lib/husk", "/etc/husk", "/etc/cni"] {
        let path = format!("{directory}/probe-of-the-harness");
        one.program("touch").args([&path]).check()?;
        assert!(one.file(&path.replace("/var/run", "/run")).exists(), "{path}");
        assert!(!two.file(&path).exists() && !Path::new(&path).exists(), "{path}");
    }
    let links = one.program("ls").args(["/sys/class/net"]).check()?;
    assert_eq!(links.split_whitespace().collect::<Vec<_>>(), ["eth0", "lo"]);
    let config = fs::read_to_string(one.file("/etc/husk/config.yaml"))?;
    assert!(config.contains("mode: wireguard") && config.contains("name: host1"), "{config}");
    Ok(())
}

#[test]
fn the_plugin_is_called_as_libcni_calls_it() -> Result<()> {
    let cluster = Cluster::builder().build()?;
    let host = cluster.host(1);
    let script = r#"#!/bin/sh
cat > /run/husk/stdin; env > /run/husk/environment
[ "$CNI_COMMAND" = DEL ] && { echo '{"code": 11, "msg": "later"}'; exit 1; }
[ -z "$CNI_NETNS" ] || nsenter --net="$CNI_NETNS" ip link show lo > /run/husk/link || exit 2
echo '{"cniVersion": "1.1.0", "ips": [{"address": "10.42.0.5/32"}, {"address": "fd42::5/128"}]}'
"#;
    let plugin = host.file("/opt/cni/bin/husk");
    fs::write(&plugin, script)?;
    fs::set_permissions(&plugin, fs::Permissions::from_mode(0o755))?;
    let conflist = json!({
        "cniVersion": "1.0.0", "cniVersions": ["0.3.1", "1.0.0", "1.1.0"], "name": "husk",
        "plugins": [{"type": "husk", "own": true}],
    });
    fs::write(host.conflist_path(), conflist.to_string())?;
    let seen = |name: &str| fs::read_to_string(host.file("/run/husk").join(name));

    let pod = host.add_pod("a")?;
    assert_eq!(pod.address(Family::Ipv6)?, "fd42::5".parse::<std::net::IpAddr>()?);
    assert!(seen("link")?.contains("LOOPBACK"));
    let stdin: serde_json::Value = serde_json::from_str(&seen("stdin")?)?;
    assert_eq!(stdin, json!({"cniVersion": "1.1.0", "name": "husk", "type": "husk", "own": true}));
    let environment = seen("environment")?;
    for expected in
        ["CNI_COMMAND=ADD", "CNI_IFNAME=eth0", "CNI_PATH=/opt/cni/bin", "K8S_POD_NAME=a", "CNI_NETNS=/run/netns/"]
    {
        assert!(environment.contains(expected), "{expected} in {environment}");
    }

    let outcome = pod.del()?;
    assert_eq!((outcome.status, outcome.error_code()), (Some(1), Some(11)));
    assert!(seen("stdin")?.contains("prevResult"));
    assert!(host.cni_status()?.success());
    assert!(!seen("environment")?.contains("CNI_CONTAINERID"));
    host.cni_gc(&[pod.spec(), &PodSpec::new("b", "other", Path::new("/run/netns/b"))])?;
    assert!(seen("stdin")?.contains(r#"{"containerID":"other","ifname":"eth0"}"#));
    Ok(())
}

#[test]
fn programs_are_bounded_and_tell_why_they_failed() -> Result<()> {
    let started = Instant::now();
    let slow = Program::new("sh").args(["-c", "echo begun; sleep 60"]).limit(Duration::from_millis(200)).run();
    let error = format!("{:#}", slow.unwrap_err());
    assert!(error.contains("200ms") && error.contains("sleep 60"), "{error}");
    assert!(error.contains("begun") && started.elapsed() < patience(Duration::from_secs(2)), "{error}");
    let error = format!("{:#}", Program::new("sh").args(["-c", "echo cause >&2; exit 3"]).check().unwrap_err());
    assert!(error.contains("cause") && error.contains('3'), "{error}");
    let error = format!("{:#}", husk_tests::process::binary("no-such-program").unwrap_err());
    assert!(error.contains("cargo build --workspace"), "{error}");
    Ok(())
}

#[test]
fn nothing_is_left_behind() -> Result<()> {
    let cluster = Cluster::builder().build()?;
    let (prefix, directory) = (cluster.scope().prefix().to_owned(), cluster.scope().directory().to_owned());
    // A process that detached itself, as the userspace WireGuard device does.
    cluster.host(1).program("setsid").args(["-f", "sleep", "7777"]).check()?;
    let detached = cluster.host(1).processes();
    assert_eq!(detached.len(), 1, "{detached:?}");
    let pod = cluster.host(1).sandbox("outlives")?;
    assert_eq!(scope::namespaces(&prefix).len(), 5);

    let panicking = std::thread::spawn(move || {
        let _cluster = cluster;
        panic!("on purpose");
    });
    assert!(panicking.join().is_err());
    // Its parent may take time to notice; an ended process has no command line.
    let remains = fs::read(Path::new("/proc").join(detached[0].pid.to_string()).join("cmdline")).unwrap_or_default();
    assert!(remains.is_empty(), "{detached:?} still runs");
    // The pod still holds its host's namespace, and nothing else.
    assert_eq!(scope::namespaces(&prefix).len(), 2);
    drop(pod);
    assert_eq!(scope::namespaces(&prefix), Vec::<String>::new());
    assert!(!directory.exists());
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    assert!(!mounts.contains(&prefix), "{mounts}");
    Ok(())
}

#[test]
fn what_a_killed_run_left_is_swept_unless_it_was_kept() -> Result<()> {
    // The run is alive while it makes its things: other test processes sweep too.
    let mut run = Command::new("sleep").arg("60").spawn()?;
    let leave = |counter: u8| -> Result<(String, std::path::PathBuf)> {
        let prefix = format!("huskt-{}-{counter}", run.id());
        let directory = std::env::temp_dir().join(&prefix);
        fs::create_dir(&directory)?;
        let netns = Netns::create(&format!("{prefix}-host1"))?;
        netns.program("setsid").args(["-f", "sleep", "7777"]).check()?;
        std::mem::forget(netns);
        Ok((prefix, directory))
    };
    let ((stale, stale_directory), (kept, kept_directory)) = (leave(0)?, leave(1)?);
    fs::write(kept_directory.join("kept"), "")?;
    assert!(!scope::sweep()?.iter().any(|name| name.starts_with(&stale)));
    run.kill()?;
    run.wait()?;
    scope::sweep()?;
    eventually("the sweep, whosever", Duration::from_secs(5), || {
        Ok(scope::namespaces(&stale).is_empty() && !stale_directory.exists())
    })?;
    assert!(scope::namespaces(&kept).len() == 1 && scope::kept().contains(&kept));
    assert_eq!(scope::sweep_kept(&kept)?.len(), 2);
    assert!(scope::namespaces(&kept).is_empty() && !kept_directory.exists());
    Ok(())
}
