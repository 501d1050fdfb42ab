//! What somebody on the underlay can send without having a key: packets that were sent before, or sent elsewhere, or by
//! somebody else. None arrives at a pod, and what the kernel can count, it counts.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::kernel::{self, Part};
use husk_tests::probe::{Echo, Stream};
use husk_tests::rotation::rotate;
use husk_tests::{Capture, Cluster, Family, Host, Kind, Mode, Packet, Pod, Trace, eventually, xfrm};

/// How long what a daemon or the kernel does by itself may take.
const SOON: Duration = Duration::from_secs(6);

/// Packets that are sent again.
const PACKETS: usize = 20;

/// Datagrams per second of the stream that they are taken from, at the machine's pace.
const RATE: u32 = 500;

/// Lengths of the header of Ethernet, and offsets within that of IPv4.
const ETHERNET: usize = 14;
const SOURCE: std::ops::Range<usize> = ETHERNET + 12..ETHERNET + 16;
const DESTINATION: std::ops::Range<usize> = ETHERNET + 16..ETHERNET + 20;

/// Sequence number of a forged packet: far ahead of all that were sent, so that it is not taken for an old one.
const AHEAD: [u8; 4] = [0x10, 0, 0, 0];

struct Stage {
    cluster: Cluster,
    wire: Capture,
    pods: Vec<Pod>,
}

impl Stage {
    fn set(mode: Mode) -> Result<Self> {
        kernel::require(&[Part::Esp, Part::Wireguard])?;
        let builder = Cluster::builder().mode(mode).hosts(3).set("keys.grace", 1).set("keys.hardLifetime", 5);
        let cluster = builder.start()?;
        let wire = cluster.capture()?;
        let pods = cluster.hosts().iter().map(|host| host.add_pod("p")).collect::<Result<Vec<_>>>()?;
        for (from, to) in [(0, 1), (2, 0), (2, 1)] {
            pods[from].await_answer_of(&pods[to], SOON)?;
        }
        Ok(Self { cluster, wire, pods })
    }

    fn host(&self, number: usize) -> &Host {
        self.cluster.host(number)
    }

    fn address(&self, number: usize) -> Result<IpAddr> {
        self.host(number).address(Family::Ipv4)
    }

    fn stream(&self, from: usize, to: usize) -> Result<Stream> {
        let (from, to) = (&self.pods[from - 1], &self.pods[to - 1]);
        Stream::udp(from.netns(), to.netns(), to.address(Family::Ipv4)?, RATE)
    }

    /// The last packets with data from one host to another.
    fn sent(&self, from: usize, to: usize, count: usize) -> Result<Vec<Packet>> {
        let addresses = Some((self.address(from)?, self.address(to)?));
        let mut found = Vec::new();
        eventually("packets to be sent", SOON, || {
            let seen: Trace = self.wire.so_far()?;
            found = seen.packets().iter().filter(|it| it.addresses == addresses && is_data(it)).cloned().collect();
            Ok(found.len() >= count)
        })?;
        Ok(found.split_off(found.len() - count))
    }

    /// Delivers frames to a host, and waits until its kernel has counted all of them as `counter`.
    fn counted(&self, to: usize, frames: &[Vec<u8>], counter: &str) -> Result<()> {
        let netns = self.host(to).netns();
        let before = xfrm::counter(netns, counter)?;
        for frame in frames {
            self.cluster.deliver(to, frame)?;
        }
        let expected = before + frames.len() as u64;
        eventually(counter, SOON, || Ok(xfrm::counter(netns, counter)? >= expected))
            .with_context(|| format!("host{to} has {:?}, {counter} was {before}", xfrm::counters(netns)))
    }
}

fn is_data(packet: &Packet) -> bool {
    // Type 4 of WireGuard is data.
    let wireguard = || packet.bytes.get(ETHERNET + 20 + 8) == Some(&4);
    packet.kind == Kind::Esp || (packet.kind == Kind::Wireguard && wireguard())
}

fn frames(packets: &[Packet]) -> Vec<Vec<u8>> {
    packets.iter().map(|packet| packet.bytes.clone()).collect()
}

/// As if it had been sent the other way. The checksum of the IPv4 header stays right.
fn reversed(frame: &[u8]) -> Vec<u8> {
    let mut reversed = frame.to_owned();
    reversed[..6].copy_from_slice(&frame[6..12]);
    reversed[6..12].copy_from_slice(&frame[..6]);
    reversed[SOURCE].copy_from_slice(&frame[DESTINATION]);
    reversed[DESTINATION].copy_from_slice(&frame[SOURCE]);
    reversed
}

#[test]
fn esp_packets_sent_again_are_counted_and_no_pod_sees_them() -> Result<()> {
    for mode in [Mode::Ipsec, Mode::VxlanIpsec] {
        let stage = Stage::set(mode)?;
        let (stream, other) = (stage.stream(1, 2)?, stage.stream(3, 2)?);
        let sent = stage.sent(1, 2, PACKETS)?;
        stage.counted(2, &frames(&sent), "XfrmInStateSeqError").with_context(|| format!("{mode}: sent again"))?;

        // Where it came from, where nobody has an association with this SPI.
        let reversed: Vec<_> = sent.iter().map(|packet| reversed(&packet.bytes)).collect();
        stage.counted(1, &reversed, "XfrmInNoStates").with_context(|| format!("{mode}: swapped direction"))?;

        // The third host's ciphertext in the first host's name: its key is another.
        let spi = sent[PACKETS - 1].esp_at.and_then(|at| sent[PACKETS - 1].bytes.get(at..at + 4)).context("an SPI")?;
        let forged: Vec<_> = stage.sent(3, 2, PACKETS)?.iter().filter_map(|packet| with_spi(packet, spi)).collect();
        ensure!(forged.len() == PACKETS, "{} packets of the third host", forged.len());
        stage.counted(2, &forged, "XfrmInStateProtoError").with_context(|| format!("{mode}: a wrong key"))?;

        // An epoch that is over.
        rotate(&stage.cluster, &[1, 2], SOON)?;
        eventually("the old association to go", SOON, || {
            Ok(xfrm::states(stage.host(2).netns())?.iter().all(|state| state.spi.to_be_bytes() != spi))
        })?;
        stage.counted(2, &frames(&sent), "XfrmInNoStates").with_context(|| format!("{mode}: a stale epoch"))?;

        for stream in [stream, other] {
            let report = stream.stop()?;
            ensure!(report.lossless() && report.duplicated == 0, "{mode}: {report}");
        }
    }
    Ok(())
}

fn with_spi(packet: &Packet, spi: &[u8]) -> Option<Vec<u8>> {
    let at = packet.esp_at?;
    let mut frame = packet.bytes.clone();
    frame.get_mut(at..at + 4)?.copy_from_slice(spi);
    frame.get_mut(at + 4..at + 8)?.copy_from_slice(&AHEAD);
    Some(frame)
}

#[test]
fn a_peer_cannot_speak_for_another_ones_pods() -> Result<()> {
    let stage = Stage::set(Mode::Ipsec)?;
    // An address of the second host's, on the third; its kernel encrypts it with its own key.
    let stolen = match stage.pods[1].address(Family::Ipv4)? {
        IpAddr::V4(address) => IpAddr::from((u32::from(address) ^ 0x20).to_be_bytes()),
        IpAddr::V6(_) => unreachable!("asked for IPv4"),
    };
    let third = stage.host(3);
    third.ip(["addr", "add", &format!("{stolen}/32"), "dev", "lo"])?;
    let to = stage.pods[0].address(Family::Ipv4)?;
    let arrivals = Capture::on(stage.pods[0].netns(), "eth0")?;
    let rejected = || -> Result<u64> {
        let counters = xfrm::counters(stage.host(1).netns())?;
        Ok(["XfrmInTmplMismatch", "XfrmInNoPols"].iter().filter_map(|name| counters.get(*name)).sum())
    };
    let before = rejected()?;
    for _ in 0..PACKETS {
        Echo::to(to).from(stolen).limit(Duration::from_millis(5)).run(third.netns())?;
    }
    eventually("the packets to be counted", SOON, || Ok(rejected()? >= before + PACKETS as u64))
        .with_context(|| format!("{:?}", xfrm::counters(stage.host(1).netns())))?;
    let arrived = arrivals.stop()?.count(|packet| packet.addresses.is_some_and(|(from, _)| from == stolen));
    assert_eq!(arrived, 0);
    // In its own name the third host gets through.
    stage.pods[2].await_answer_of(&stage.pods[0], SOON)
}

#[test]
fn wireguard_packets_sent_again_do_not_arrive() -> Result<()> {
    let stage = Stage::set(Mode::Wireguard)?;
    let stream = stage.stream(1, 2)?;
    let sent = stage.sent(1, 2, PACKETS)?;
    let other = stage.stream(3, 2)?;
    let reversed: Vec<_> = sent.iter().map(|packet| reversed(&packet.bytes)).collect();
    for frame in frames(&sent) {
        stage.cluster.deliver(2, &frame)?;
    }
    for frame in &reversed {
        stage.cluster.deliver(1, frame)?;
    }
    for stream in [stream, other] {
        let report = stream.stop()?;
        ensure!(report.lossless() && report.duplicated == 0, "{report}");
    }
    // While nothing else goes on: the kernel counts bytes it has received of a peer only if it has accepted the packet.
    let received = || stage.host(2).program("wg").args(["show", "all", "transfer"]).check();
    let before = received()?;
    for frame in frames(&sent) {
        stage.cluster.deliver(2, &frame)?;
    }
    let arrivals = Capture::on(stage.pods[1].netns(), "eth0")?;
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!((received()?, arrivals.stop()?.count(|packet| packet.kind == Kind::Udp)), (before, 0));
    Ok(())
}
