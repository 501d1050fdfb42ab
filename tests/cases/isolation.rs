//! Who may not: strangers that speak VXLAN, pods that speak with another's voice, packets that come beside the tunnel.
//!
//! Every packet that has to be dropped is also sent where nothing stops it, by the same code, and arrives: from a known node,
//! or after the guard was taken away by hand. What never arrives for another reason would prove nothing.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result};
use etherparse::PacketBuilder;
use husk_overlay::name::NodeName;
use husk_overlay::plan::vxlan_mac;
use husk_tests::netns::Netns;
use husk_tests::probe::{Echo, Reach, payload};
use husk_tests::{Capture, Cluster, Family, Host, Kind, MODES, Mode, Packet, Pod, Signal, eventually};
use serde_json::json;

/// How long an answer that will not come is waited for.
const BRIEFLY: Duration = Duration::from_millis(150);

/// How long what will come may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(5);

/// The port and network identifier of the default configuration, as `huskd example-config` prints them.
const VXLAN: (u16, u32) = (4789, 4242);

/// The chains that drop; the names are those of `nft list table inet husk`.
const PREROUTING_GUARD: &str = "prerouting-guard";

/// Packets that a guard of this host has dropped.
fn dropped(host: &Host, counter: &str) -> Result<u64> {
    let status = host.huskctl_json(["status"])?;
    status["counters"][counter]["packets"].as_u64().with_context(|| format!("no counter {counter}: {status:#}"))
}

/// Waits until the counter stands this much higher, and no more: the packets are dropped where it is said.
fn assert_dropped(host: &Host, counter: &str, before: u64, packets: u64) -> Result<()> {
    eventually(&format!("{packets} more packets in {counter}"), PATIENCE, || {
        Ok(dropped(host, counter)? >= before + packets)
    })?;
    assert_eq!(dropped(host, counter)?, before + packets, "{counter}");
    Ok(())
}

/// Ends the daemon, so that it cannot put it back, and takes a chain's rules away.
fn take_away(host: &Host, chain: &str) -> Result<()> {
    host.stop_daemon(Signal::SIGKILL)?;
    host.program("nft").args(["flush", "chain", "inet", "husk", chain]).check()?;
    Ok(())
}

/// Gives loopback an address that is somebody else's.
fn steal(netns: &Netns, address: IpAddr) -> Result<()> {
    let (length, option) = if address.is_ipv4() { (32, "") } else { (128, "nodad") };
    netns.ip_batch(&format!("addr add {address}/{length} dev lo {option}"))
}

/// True for a packet that a probe made.
fn is_probe(packet: &Packet) -> bool {
    packet.contains(payload::MARKER)
}

/// What a namespace's interface receives of probes while `send` runs.
fn received(pod: &Netns, interface: &str, send: impl FnOnce() -> Result<()>) -> Result<usize> {
    let ear = Capture::on(pod, interface)?;
    send()?;
    Ok(ear.stop()?.count(|packet| is_probe(packet) && !packet.outgoing))
}

fn mac_of(netns: &Netns, interface: &str) -> Result<[u8; 6]> {
    let links = netns.ip_json(["link", "show", "dev", interface])?;
    let text = links[0]["address"].as_str().context("a device without an address")?.to_owned();
    let bytes: Vec<u8> = text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<_, _>>()?;
    bytes.try_into().ok().with_context(|| format!("{text} is no Ethernet address"))
}

/// A VXLAN payload (RFC 7348) with a datagram for a pod in it, which pretends to come from another node's pod.
fn vxlan_packet(from: &Pod, to: (&Pod, u16), macs: ([u8; 6], [u8; 6]), family: Family) -> Result<Vec<u8>> {
    let (to, port) = to;
    let frame = PacketBuilder::ethernet2(macs.0, macs.1);
    let datagram = match (from.address(family)?, to.address(family)?) {
        (IpAddr::V4(from), IpAddr::V4(to)) => frame.ipv4(from.octets(), to.octets(), 64),
        (IpAddr::V6(from), IpAddr::V6(to)) => frame.ipv6(from.octets(), to.octets(), 64),
        _ => unreachable!("two addresses of one family"),
    }
    .udp(4000, port);
    let vni = VXLAN.1.to_be_bytes();
    let mut packet = vec![0x08, 0, 0, 0, vni[1], vni[2], vni[3], 0];
    datagram.write(&mut packet, payload::MARKER)?;
    Ok(packet)
}

/// Sends VXLAN payloads from a host, with one of its addresses.
fn send_vxlan(host: &Host, from: IpAddr, to: IpAddr, packets: &[Vec<u8>]) -> Result<()> {
    let socket = host.netns().run(|| UdpSocket::bind(SocketAddr::new(from, 0)))?.context("binding on a host")?;
    for packet in packets {
        socket.send_to(packet, (to, VXLAN.0)).with_context(|| format!("sending from {from} to {to}"))?;
    }
    Ok(())
}

#[test]
fn vxlan_from_an_address_that_is_no_node_is_dropped() -> Result<()> {
    for underlay in Family::ALL {
        let mut cluster = Cluster::builder().mode(Mode::Vxlan).underlay(underlay).start()?;
        let stranger = cluster.add_host()?;
        let (one, two, stranger) = (cluster.host(1), cluster.host(2), cluster.host(stranger));
        let (a, b) = (one.add_pod("a")?, two.add_pod("b")?);
        let name = NodeName::new(two.name())?;
        let macs = (vxlan_mac(&name).0, mac_of(one.netns(), "husk-vx")?);
        let inbox = a.netns().run(|| UdpSocket::bind("[::]:0"))?.context("receiving in a pod")?;
        inbox.set_read_timeout(Some(BRIEFLY))?;
        let port = inbox.local_addr()?.port();
        let packets = Family::ALL
            .map(|family| vxlan_packet(&b, (&a, port), macs, family))
            .into_iter()
            .collect::<Result<Vec<_>>>()?;
        let arrivals = || {
            let mut buffer = [0; 100];
            let one = || inbox.recv(&mut buffer).is_ok_and(|length| &buffer[..length] == payload::MARKER);
            std::iter::repeat_with(one).take_while(|arrived| *arrived).count()
        };
        let (to, own) = (one.address(underlay)?, stranger.address(underlay)?);

        let before = dropped(one, "unknown_vtep")?;
        send_vxlan(stranger, own, to, &packets)?;
        assert_eq!(arrivals(), 0, "over {underlay}: a stranger's packets arrived");
        assert_dropped(one, "unknown_vtep", before, packets.len() as u64)?;

        // The same bytes, from the same wire, under a known node's address.
        let known = two.address(underlay)?;
        steal(stranger.netns(), known)?;
        send_vxlan(stranger, known, to, &packets)?;
        assert_eq!(arrivals(), packets.len(), "over {underlay}: the packets are no good, the case proves nothing");
        assert_dropped(one, "unknown_vtep", before, packets.len() as u64)?;

        // And from the stranger again, with nobody at the gate.
        take_away(one, "input-vtep")?;
        send_vxlan(stranger, own, to, &packets)?;
        assert_eq!(arrivals(), packets.len(), "over {underlay}: something else than the gate stopped the stranger");
    }
    Ok(())
}

#[test]
fn a_pod_cannot_speak_vxlan_for_its_node() -> Result<()> {
    for underlay in Family::ALL {
        let cluster = Cluster::builder().mode(Mode::Vxlan).underlay(underlay).start()?;
        let (one, two) = (cluster.host(1), cluster.host(2));
        let (thief, b) = (one.add_pod("thief")?, two.add_pod("b")?);
        let macs = (vxlan_mac(&NodeName::new(one.name())?).0, mac_of(two.netns(), "husk-vx")?);
        let inbox = b.netns().run(|| UdpSocket::bind("[::]:0"))?.context("receiving in a pod")?;
        inbox.set_read_timeout(Some(BRIEFLY))?;
        // Pretends to be from a pod that the thief is not.
        let packet = vxlan_packet(&thief, (&b, inbox.local_addr()?.port()), macs, Family::Ipv4)?;
        let to = SocketAddr::new(two.address(underlay)?, VXLAN.0);
        let speak = || -> Result<bool> {
            let socket = thief.netns().run(|| UdpSocket::bind("[::]:0"))?.context("sending in a pod")?;
            socket.send_to(&packet, to)?;
            Ok(inbox.recv(&mut [0; 100]).is_ok())
        };
        let before = dropped(one, "pod_to_vtep")?;
        assert!(!speak()?, "over {underlay}: masqueraded as its node, a pod put a packet into another's overlay");
        assert_dropped(one, "pod_to_vtep", before, 1)?;
        take_away(one, PREROUTING_GUARD)?;
        assert!(speak()?, "over {underlay}: something else than the guard stopped the pod, the case proves nothing");
    }
    Ok(())
}

/// Addresses that a pod has no right to, of each family, and who has it instead.
fn foreign(local: &Pod, remote: &Pod, host: &Host, family: Family) -> Result<Vec<(&'static str, IpAddr)>> {
    let (unassigned, stranger) = match family {
        Family::Ipv4 => ("10.42.255.77", "203.0.113.77"),
        Family::Ipv6 => ("fd42::ffff:77", "2001:db8:77::77"),
    };
    let mut all = vec![
        ("a pod of the same host", local.address(family)?),
        ("a pod of another host", remote.address(family)?),
        ("no pod", unassigned.parse()?),
        ("nobody in the cluster", stranger.parse()?),
    ];
    // Of the other family the underlay has none.
    all.extend(host.address(family).ok().map(|address| ("the host", address)));
    Ok(all)
}

#[test]
fn a_pod_cannot_speak_with_another_address() -> Result<()> {
    for mode in MODES {
        let cluster = Cluster::builder().mode(mode).start()?;
        let (one, two) = (cluster.host(1), cluster.host(2));
        let (thief, local, remote) = (one.add_pod("thief")?, one.add_pod("local")?, two.add_pod("remote")?);
        // Replies would go to the owner: whether a packet came is seen at its destination.
        let speak = |as_whom: IpAddr, to: IpAddr| -> Result<Reach> {
            steal(thief.netns(), as_whom)?;
            let reach = Echo::to(to).from(as_whom).limit(BRIEFLY).run(thief.netns())?;
            thief.netns().command("ip", ["addr", "del", &as_whom.to_string(), "dev", "lo"])?;
            Ok(reach)
        };
        // Not to the owner itself: it would not take a packet from its own address, spoofed or not.
        let victims =
            |address: IpAddr| [&local, &remote].into_iter().filter(move |pod| !pod.addresses().contains(&address));

        let before = dropped(one, "spoofed")?;
        let mut sent = 0;
        for family in Family::ALL {
            for (whose, address) in foreign(&local, &remote, one, family)? {
                for victim in victims(address) {
                    let to = victim.address(family)?;
                    let what = format!("{mode}: as {whose} ({address}) to {to}");
                    let heard = received(victim.netns(), "eth0", || {
                        assert_eq!(speak(address, to)?, Reach::Silent, "{what}");
                        Ok(())
                    })?;
                    assert_eq!(heard, 0, "{what}");
                    sent += 1;
                }
            }
        }
        assert_dropped(one, "spoofed", before, sent)?;
        for family in Family::ALL {
            let reach = Echo::to(remote.address(family)?).run(thief.netns())?;
            assert!(reach.arrived(), "{mode}: a thief may still speak for itself: {reach:?}");
        }
        let outside = cluster.capture()?;
        let beyond = Cluster::outside_address(Family::Ipv4);
        assert_eq!(speak(local.address(Family::Ipv4)?, beyond)?, Reach::Silent);
        assert_eq!(outside.stop()?.containing(payload::MARKER), 0, "{mode}: a spoofed packet left for the outside");
        assert_dropped(one, "spoofed", before, sent + 1)?;

        take_away(one, PREROUTING_GUARD)?;
        // IPv4 has a second guard: the reverse path filter of the pod's interface.
        let ends = one.netns().ip_json(["-4", "route", "show", &thief.address(Family::Ipv4)?.to_string()])?;
        let end = ends[0]["dev"].as_str().context("the thief has no route")?;
        one.netns().sysctl(&format!("net/ipv4/conf/{end}/rp_filter"), "0")?;
        for family in Family::ALL {
            let owner = local.address(family)?;
            let to = remote.address(family)?;
            let heard = received(remote.netns(), "eth0", || speak(owner, to).map(drop))?;
            assert_eq!(heard, 1, "{mode}: something else than the guard stopped {owner} to {to}");
        }
    }
    Ok(())
}

#[test]
fn a_node_cannot_speak_for_the_pods_of_another_in_wireguard_mode() -> Result<()> {
    let cluster = Cluster::builder().hosts(3).start()?;
    let (a, c) = (cluster.host(1).add_pod("a")?, cluster.host(3).add_pod("c")?);
    let liar = cluster.host(2);
    for family in Family::ALL {
        let (to, stolen) = (a.address(family)?, c.address(family)?);
        let speak = |from: IpAddr| Echo::to(to).from(from).limit(BRIEFLY).run(liar.netns());
        steal(liar.netns(), stolen)?;
        let heard = received(a.netns(), "eth0", || speak(stolen).map(drop))?;
        assert_eq!(heard, 0, "host2 sent as {stolen}, which is host3's to give");
        let own =
            liar.huskctl_json(["status"])?["router"][if family == Family::Ipv4 { "ipv4" } else { "ipv6" }].clone();
        let own: IpAddr = own.as_str().context("a node without router address")?.parse()?;
        let heard = received(a.netns(), "eth0", || speak(own).map(drop))?;
        assert_eq!(heard, 1, "host2 cannot even speak for itself");
    }
    Ok(())
}

#[test]
fn packets_beside_the_tunnel_do_not_come_in() -> Result<()> {
    for mode in [Mode::Vxlan, Mode::Wireguard] {
        for underlay in Family::ALL {
            let mut cluster = Cluster::builder().mode(mode).underlay(underlay).dual_stack().start()?;
            let stranger = cluster.add_host()?;
            let (one, stranger) = (cluster.host(1), cluster.host(stranger));
            let (a, b) = (one.add_pod("a")?, cluster.host(2).add_pod("b")?);
            let mut sources = Vec::new();
            for family in Family::ALL {
                let (to, via) = (a.address(family)?, one.address(family)?);
                let length = if family == Family::Ipv4 { 32 } else { 128 };
                let pretended = b.address(family)?;
                stranger.ip(["route", "add", &format!("{to}/{length}"), "via", &via.to_string()])?;
                steal(stranger.netns(), pretended)?;
                // As itself, and as a pod, to a pod; and as a pod to the node.
                sources.extend([(stranger.address(family)?, to), (pretended, to), (pretended, via)]);
            }
            let inject = |from: IpAddr, to: IpAddr| Echo::to(to).from(from).limit(BRIEFLY).run(stranger.netns());
            let before = dropped(one, "plaintext_in")?;
            for (count, (from, to)) in (1..).zip(&sources) {
                let what = format!("{mode} over {underlay}: {from} to {to}");
                let wire = one.capture()?;
                let heard = received(a.netns(), "eth0", || {
                    assert_eq!(inject(*from, *to)?, Reach::Silent, "{what}");
                    Ok(())
                })?;
                assert_eq!(heard, 0, "{what}");
                let trace = wire.stop()?;
                let (came, answered) = (
                    trace.count(|packet| packet.kind == Kind::Icmp && is_probe(packet) && !packet.outgoing),
                    trace.count(|packet| is_probe(packet) && packet.outgoing),
                );
                assert_eq!((came, answered), (1, 0), "{what}");
                assert_dropped(one, "plaintext_in", before, count).context(what)?;
            }
            take_away(one, PREROUTING_GUARD)?;
            for (from, to) in sources.iter().filter(|(_, to)| a.addresses().contains(to)) {
                let heard = received(a.netns(), "eth0", || inject(*from, *to).map(drop))?;
                assert_eq!(heard, 1, "{mode} over {underlay}: something else than the guard stopped {from} to {to}");
            }
        }
    }
    Ok(())
}

#[test]
fn counters_stay_at_zero_while_nobody_does_wrong() -> Result<()> {
    for mode in MODES {
        let cluster = Cluster::builder().mode(mode).start()?;
        let (a, b) = (cluster.host(1).add_pod("a")?, cluster.host(2).add_pod("b")?);
        for family in Family::ALL {
            let reach = Echo::to(b.address(family)?).run(a.netns())?;
            assert!(reach.arrived(), "{mode}, {family}: {reach:?}");
        }
        let status = cluster.host(1).huskctl_json(["status"])?;
        let counters = status["counters"].as_object().context("a status without counters")?;
        assert!(counters.contains_key("spoofed"), "{counters:?}");
        for (name, counter) in counters {
            assert_eq!(counter["packets"], json!(0), "{mode}: {name} of honest pods");
        }
    }
    Ok(())
}
