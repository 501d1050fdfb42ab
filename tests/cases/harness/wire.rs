//! What a capture and a watch tell of the wire.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use husk_tests::probe::{Echo, Stream, payload};
use husk_tests::process::Program;
use husk_tests::{Cluster, Family, Kind, Leak, Packet, eventually};

use crate::underlay;

#[test]
fn a_capture_sees_markers_kinds_and_fragments() -> Result<()> {
    let cluster = underlay().build()?;
    let (one, two) = (cluster.host(1), cluster.host(2));
    for family in Family::ALL {
        let to = two.address(family)?;
        let (wire, end) = (cluster.capture()?, two.capture()?);
        assert!(Echo::to(to).run(one.netns())?.arrived());
        let (wire, end) = (wire.stop()?, end.stop()?);
        for trace in [&wire, &end] {
            // Request and reply.
            assert_eq!(trace.containing(payload::MARKER), 2);
            assert_eq!(trace.count(|packet| packet.kind == Kind::Icmp), 2);
            assert_eq!(
                trace.count(|packet| packet.is_between(one.address(family).unwrap(), to)),
                trace.count(|packet| {
                    packet.kind == Kind::Icmp
                        || (packet.kind == Kind::NeighbourDiscovery
                            && packet.is_between(one.address(family).unwrap(), to))
                })
            );
            assert_eq!((trace.fragments(), trace.containing(b"absent")), (0, 0));
        }
        let resolution = if family == Family::Ipv4 { Kind::Arp } else { Kind::NeighbourDiscovery };
        assert!(wire.kinds().contains_key(&resolution), "{:?}", wire.kinds());
        assert_eq!(end.count(|packet| packet.kind == Kind::Icmp && packet.outgoing), 1);

        let wire = cluster.capture()?;
        assert!(Echo::to(to).packet_size(4000).may_fragment().run(one.netns())?.arrived());
        assert_eq!(wire.stop()?.fragments(), 6, "three fragments each way over {family}");
    }
    Ok(())
}

#[test]
fn a_leak_through_the_default_route_is_seen() -> Result<()> {
    let cluster = Cluster::builder().build()?;
    let wire = cluster.capture()?;
    let reach = Echo::to("10.42.7.7".parse()?).limit(Duration::from_millis(200)).run(cluster.host(1).netns())?;
    assert!(!reach.arrived());
    wire.wait_for("the leak", Duration::from_secs(1), |packet| packet.contains(payload::MARKER))?;
    let trace = wire.stop()?;
    assert!(trace.readable(cluster.cluster_cidrs()) > 0);
    let file = cluster.scope().directory().join("leak.pcap");
    trace.write_pcap(&file)?;
    let shown = Program::new("tcpdump").args(["-n", "-r"]).args([&file]).check()?;
    assert!(shown.contains("192.0.2.1 > 10.42.7.7: ICMP echo request"), "{shown}");
    Ok(())
}

/// Asserts that a watch found something, and removes the capture that it left for people.
fn found(leak: Leak, cluster: &Cluster) -> Result<()> {
    let said = leak.finish(cluster).expect_err("a packet told of pods").to_string();
    let (_, capture) =
        said.rsplit_once("told of pods").and_then(|(_, rest)| rest.rsplit_once(' ')).context("a capture")?;
    fs::remove_file(capture).with_context(|| format!("removing the capture of {said:?}"))
}

#[test]
fn a_watch_finds_what_tells_of_pods_and_only_that() -> Result<()> {
    let cluster = Cluster::builder().build()?;
    let leak = Leak::watch(&cluster)?;
    let between_hosts = Stream::udp(cluster.host(1).netns(), cluster.host(2).netns(), "192.0.2.2".parse()?, 100)?;
    found(leak, &cluster)?;
    drop(between_hosts);

    let leak = Leak::watch(&cluster)?;
    // Without the marker it is the address that tells.
    let to_a_pod = cluster.host(1).program("ping").args(["-c1", "-W1", "10.42.7.7"]).run()?;
    assert!(!to_a_pod.status.success());
    found(leak, &cluster)?;

    let leak = Leak::watch(&cluster)?;
    cluster.host(1).program("ping").args(["-c1", "-W1", "192.0.2.2"]).check()?;
    let seen = leak.finish(&cluster)?;
    assert_eq!(seen.strange.iter().map(|packet| packet.kind).collect::<Vec<_>>(), [Kind::Icmp; 2], "{:?}", seen.kinds);
    assert!(seen.nothing_strange().is_err());
    assert!(seen.with_tunnelled(1).is_err());

    let leak = Leak::watch(&cluster)?;
    cluster.set_cable(1, false)?;
    assert!(leak.finish(&cluster).is_err(), "nothing that was seen proves nothing");
    Ok(())
}

#[test]
fn a_captured_frame_arrives_again() -> Result<()> {
    let cluster = Cluster::builder().build()?;
    let (one, two) = (cluster.host(1), cluster.host(2));
    let wire = cluster.capture()?;
    let stream = Stream::udp(one.netns(), two.netns(), two.address(Family::Ipv4)?, 50)?;
    let is_datagram = |packet: &Packet| packet.kind == Kind::Udp;
    wire.wait_for("a datagram", Duration::from_secs(2), is_datagram)?;
    let seen = wire.so_far()?;
    let frame = seen.packets().iter().find(|packet| is_datagram(packet)).context("a datagram")?;
    for _ in 0..3 {
        cluster.deliver(2, &frame.bytes)?;
    }
    eventually("the duplicates", Duration::from_secs(2), || Ok(stream.so_far().duplicated == 3))?;
    let report = stream.stop()?;
    assert!(report.lossless(), "{report}");
    assert!(cluster.deliver(2, &[0; 3]).is_err(), "a frame without a whole header");
    Ok(())
}

#[test]
fn esp_is_recognised_with_its_spi() -> Result<()> {
    let cluster = underlay().build()?;
    let wire = cluster.capture()?;
    let mac = |text: &str| text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<Vec<_>, _>>();
    let links = cluster.host(2).netns().ip_json(["link", "show", "eth0"])?;
    let to = mac(links[0]["address"].as_str().context("a MAC address")?)?;
    let header = [&to[..], &[2, 0, 0, 0, 0, 1], &[8, 0]].concat();
    let esp = [0, 0, 0x0a, 0xbc, 0, 0, 0, 7, 1, 2, 3, 4, 5, 6, 7, 8];
    let ip = |protocol: u8, length: u8| {
        [&[0x45, 0, 0, 20 + length, 0, 0, 0, 0, 64, protocol, 0, 0][..], &[192, 0, 2, 1], &[192, 0, 2, 2]].concat()
    };
    let udp = [0x11, 0x94, 0x11, 0x94, 0, 8 + 16, 0, 0];
    let plain = [&header[..], &ip(50, 16), &esp].concat();
    let in_udp = [&header[..], &ip(17, 24), &udp, &esp].concat();
    let ike = [&header[..], &ip(17, 24), &udp, &[0; 16]].concat();
    for frame in [&plain, &in_udp, &ike] {
        cluster.inject(1, frame)?;
    }
    wire.wait_for("the last of them", Duration::from_secs(2), |packet| packet.kind == Kind::Udp)?;
    let trace = wire.stop()?;
    let seen: Vec<_> = trace
        .packets()
        .iter()
        .filter(|packet| matches!(packet.kind, Kind::Esp | Kind::EspInUdp))
        .map(|packet| (packet.kind, packet.spi()))
        .collect();
    assert_eq!(seen, [(Kind::Esp, Some(0xabc)), (Kind::EspInUdp, Some(0xabc))]);
    Ok(())
}
