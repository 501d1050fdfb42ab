//! What somebody on the underlay can send without having a key: packets that were sent before, or sent elsewhere, or by
//! somebody else. None arrives at a pod, and what the kernel can count, it counts.

use std::collections::HashSet;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_overlay::marks::PROBE_PORT;
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
        // What daemons send each other of their own accord would be counted with what is sent again.
        let quiet = format!(
            "table inet quiet {{ chain output {{ type filter hook output priority 0; udp dport {PROBE_PORT} drop; }}; }}"
        );
        cluster.hosts().iter().try_for_each(|host| host.netns().command("nft", [quiet.as_str()]).map(drop))?;
        let wire = cluster.capture()?;
        let pods = cluster.add_pods("p")?;
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
    let wireguard = || packet.bytes.get(MESSAGE) == Some(&4);
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

/// Where in a frame of WireGuard over IPv4 its message begins, and the fields of one with data: whose session it is for, and
/// its number (WireGuard paper, section 5.4.6).
const MESSAGE: usize = ETHERNET + 20 + 8;
const RECEIVER: std::ops::Range<usize> = MESSAGE + 4..MESSAGE + 8;
const COUNTER: std::ops::Range<usize> = MESSAGE + 8..MESSAGE + 16;

/// Length of a WireGuard message without data, which keeps a session up.
const KEEPALIVE: usize = 32;

impl Stage {
    /// Packets with data from the first host to the second that have not arrived: its cable was pulled meanwhile.
    fn held_back(&self) -> Result<Vec<Packet>> {
        let (from, to) = (&self.pods[0], self.pods[1].address(Family::Ipv4)?);
        let addresses = Some((self.address(1)?, self.address(2)?));
        self.cluster.set_cable(2, false)?;
        let before = self.wire.so_far()?.packets().len();
        let mut held = Vec::new();
        let done = eventually("packets to be held back", SOON, || {
            Echo::to(to).limit(Duration::from_millis(5)).run(from.netns())?;
            let seen = self.wire.so_far()?;
            let with_data =
                |it: &&Packet| it.addresses == addresses && is_data(it) && it.bytes.len() > MESSAGE + KEEPALIVE;
            held = seen.packets()[before..].iter().filter(with_data).cloned().collect();
            Ok(held.len() >= PACKETS)
        });
        self.cluster.set_cable(2, true)?;
        done.map(|()| held)
    }

    /// How many packets from the first pod reach the second one while these frames are delivered to its host, and how many
    /// bytes its device counts as received. Nobody else sends meanwhile.
    fn reached(&self, frames: &[Vec<u8>]) -> Result<(usize, u64)> {
        let (from, to) = (self.pods[0].address(Family::Ipv4)?, self.pods[1].address(Family::Ipv4)?);
        let arrivals = Capture::on(self.pods[1].netns(), "eth0")?;
        let before = self.received()?;
        for frame in frames {
            self.cluster.deliver(2, frame)?;
        }
        // What arrives after them, from the third pod, has overtaken none.
        std::thread::sleep(Duration::from_millis(500));
        let counted = self.received()?.saturating_sub(before);
        let third = self.pods[2].address(Family::Ipv4)?;
        self.pods[2].await_answer_of(&self.pods[1], SOON)?;
        arrivals.wait_for("a packet of the third pod", SOON, |packet| packet.addresses == Some((third, to)))?;
        Ok((arrivals.stop()?.count(|packet| packet.addresses == Some((from, to))), counted))
    }

    /// Bytes that the second host has received, over all devices and peers: the kernel counts those of packets it accepts.
    fn received(&self) -> Result<u64> {
        let text = self.host(2).program("wg").args(["show", "all", "transfer"]).check()?;
        let of = |line: &str| line.split_whitespace().nth(2)?.parse::<u64>().ok();
        text.lines().map(|line| of(line).with_context(|| format!("`wg show all transfer` says {line:?}"))).sum()
    }

    /// Where the second host's device thinks that its peers are.
    fn endpoints(&self) -> Result<String> {
        self.host(2).program("wg").args(["show", "all", "endpoints"]).check()
    }

    /// The keys that the second host's devices receive under.
    fn keys(&self) -> Result<HashSet<String>> {
        let text = self.host(2).program("wg").args(["show", "all", "public-key"]).check()?;
        Ok(text.lines().filter_map(|line| Some(line.split_whitespace().nth(1)?.to_owned())).collect())
    }
}

/// The ciphertext of one session in the name of another, numbered so that it is not taken for an old one.
fn in_the_name_of(other: &Packet, packet: &Packet) -> Result<Vec<u8>> {
    let mut frame = packet.bytes.clone();
    frame[RECEIVER].copy_from_slice(other.bytes.get(RECEIVER).context("a receiver")?);
    frame[COUNTER].copy_from_slice(&(1_u64 << 40).to_le_bytes());
    Ok(frame)
}

#[test]
fn wireguard_packets_sent_again_do_not_arrive() -> Result<()> {
    let stage = Stage::set(Mode::Wireguard)?;
    let (stream, other) = (stage.stream(1, 2)?, stage.stream(3, 2)?);
    let (sent, of_the_third) = (stage.sent(1, 2, PACKETS)?, stage.sent(3, 2, PACKETS)?);
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
    // One packet would count more; what keeps a session up may come at any time.
    let little = frames(&sent).iter().map(|frame| frame.len() as u64).sum::<u64>() / 2;
    let nothing = |what: &str, frames: &[Vec<u8>]| -> Result<()> {
        let (arrived, counted) = stage.reached(frames)?;
        ensure!(arrived == 0 && counted < little, "{what}: {arrived} packets arrived, {counted} bytes were counted");
        Ok(())
    };
    nothing("sent again", &frames(&sent))?;

    // The control: whoever delivers what has not arrived yet is believed, once.
    let (fresh, late) = (stage.held_back()?, stage.held_back()?);
    let (arrived, counted) = stage.reached(&frames(&fresh))?;
    ensure!(arrived == fresh.len() && counted >= little, "of {} fresh packets {arrived} arrived", fresh.len());
    nothing("delivered and sent again", &frames(&fresh))?;

    // Each host's ciphertext in the other's name: the key is another, and nobody is thought to have moved.
    let before = stage.endpoints()?;
    let forged =
        |of: &[Packet], name: &Packet| of.iter().map(|it| in_the_name_of(name, it)).collect::<Result<Vec<_>>>();
    nothing("the third host's key", &forged(&of_the_third, &sent[0])?)?;
    nothing("in the third host's name", &forged(&late, &of_the_third[0])?)?;
    assert_eq!(stage.endpoints()?, before);

    // What has never arrived comes too late once the generation is over, and when its device's turn has come again.
    for generations in ["one generation", "two generations"] {
        let over = stage.keys()?;
        rotate(&stage.cluster, &[1, 2, 3], SOON)?;
        // A key that is not published any more goes once no peer sends to it.
        eventually("the old keys to go", SOON, || Ok(stage.keys()?.is_disjoint(&over)))?;
        stage.pods[0].await_answer_of(&stage.pods[1], SOON)?;
        nothing(&format!("{generations} later"), &frames(&late))?;
    }
    Ok(())
}
