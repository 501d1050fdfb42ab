//! `huskctl capture --verify-encrypted`: sends what nobody else knows through the tunnel, and looks for it on the wire.
//!
//! The datagrams go from the own router address to the other node's, at the port where its daemon answers probes: it takes no
//! notice of what is no probe (`husk_overlay::probe::wire`); in every family that the tunnel carries. They are many times the
//! marker, so that one cut in two shows it still, and each has a size by which it is recognised where it is encrypted: what others
//! send to the node meanwhile proves nothing. What is seen is everything between this host and the other node or its pods on the
//! interface that leads there, in whichever form.

mod sizes;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::Context as _;
use husk_dataplane::capture::{Filter, WHOLE};
use husk_overlay::marks::PROBE_PORT;
use husk_overlay::mode::Mode;
use husk_overlay::name::NodeName;
use husk_overlay::prefix::Family;
use husk_overlay::probe::wire;
use schemars::JsonSchema;
use serde::Serialize;

use self::sizes::{Recognition, Size};
use super::decode::Decoder;
use super::session::{End, Limits, Session};
use crate::huskctl::Show;
use crate::report::{CaptureReport, VerifyPath};

/// Datagrams that are sent.
const DATAGRAMS: u32 = 10;

/// Pause between two: the first may have to wait for a handshake.
const PAUSE: Duration = Duration::from_millis(100);

/// How long sending takes.
const WHILE_SENDING: Duration = PAUSE.saturating_mul(DATAGRAMS);

/// How long it is looked on after the last one: longer than a handshake that has to be tried again (`REKEY_TIMEOUT`, five
/// seconds; WireGuard paper, section 6.1).
const AFTER: Duration = Duration::from_secs(6);

/// How long it is looked for the sizes of what others send to the node, before anything is sent.
const BEFORE: Duration = Duration::from_secs(1);

/// How often it is looked whether all came by.
const ROUND: Duration = Duration::from_millis(300);

/// Bytes of a marker.
const MARKER: usize = 16;

/// What the wire showed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(in crate::huskctl) struct Verified {
    /// To whom.
    node: NodeName,
    /// Encapsulation.
    mode: Mode,
    /// Where it was looked.
    interface: String,
    /// Datagrams with the marker that were sent through the tunnel.
    sent: u64,
    /// Packets to the node that were seen, by what they are.
    packets: BTreeMap<String, u64>,
    /// The datagrams that were recognised among the encrypted packets, by their sizes and order.
    recognised: u64,
    /// Packets that held the marker.
    with_marker: u64,
    /// Packets that were lost before they could be looked at.
    lost: u64,
    /// What follows.
    verdict: Finding,
}

/// What follows from what was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) enum Finding {
    /// All datagrams were seen encrypted, and the marker never.
    Encrypted,
    /// The marker was seen.
    Plaintext,
    /// Datagrams were not seen at all, or packets were lost: nothing is proven.
    Unproven,
}

impl Verified {
    fn judge(&mut self) {
        self.verdict = if self.with_marker > 0 {
            Finding::Plaintext
        } else if self.recognised == u64::from(DATAGRAMS) && self.sent == self.recognised && self.lost == 0 {
            Finding::Encrypted
        } else {
            Finding::Unproven
        };
    }
}

pub(super) fn run(report: &CaptureReport, show: &Show) -> anyhow::Result<(String, bool)> {
    let path = report.verify.as_ref().with_context(|| {
        format!(
            "{} is no other node that packets are sent to: name one with --verify-encrypted (huskctl peers lists them)",
            report.target
        )
    })?;
    let mut marker = [0; MARKER];
    getrandom::fill(&mut marker).map_err(|error| anyhow::anyhow!("there is no randomness: {error}"))?;
    let verified = look(report, path, &marker)?;
    Ok((show.text(&verified, in_words)?, verified.verdict != Finding::Encrypted))
}

fn look(report: &CaptureReport, path: &VerifyPath, marker: &[u8]) -> anyhow::Result<Verified> {
    let mut session = Session::open(std::slice::from_ref(&path.tap), &Filter::default(), WHOLE)?;
    let decoder = Decoder { side: "outer", ports: &report.ports, names: &report.names };
    let mut taken = BTreeSet::new();
    let end = session.run(&Limits { count: None, time: Some(BEFORE) }, |seen| {
        let sent = seen.filter(|it| it.captured.outgoing);
        taken.extend(sent.and_then(|it| sizes::of_packet(it.captured.link, it.bytes)));
        Ok(true)
    })?;
    anyhow::ensure!(end != End::Interrupted, INTERRUPTED);
    let sizes = sizes::choose(DATAGRAMS as usize, (&path.stack, Family::of(path.underlay)), path.mtu, &taken)?;
    let sending = send(path, marker, &sizes)?;
    let mut recognition = Recognition::of(sizes);
    let mut verified = Verified {
        node: path.node.clone(),
        mode: report.mode,
        interface: path.tap.interface.to_string(),
        sent: 0,
        packets: BTreeMap::new(),
        recognised: 0,
        with_marker: 0,
        lost: 0,
        verdict: Finding::Unproven,
    };
    let mut waited = Duration::ZERO;
    // The last ones may still wait for a handshake when all have been sent.
    while waited < WHILE_SENDING + AFTER {
        let end = session.run(&Limits { count: None, time: Some(ROUND) }, |seen| {
            let Some(it) = seen.filter(|it| it.captured.outgoing) else { return Ok(true) };
            let content = decoder.content(it.captured.link, it.bytes, false);
            if let Some(size) = sizes::of_packet(it.captured.link, it.bytes).filter(|_| content.is_encrypted()) {
                recognition.saw(size);
            }
            verified.with_marker += u64::from(it.bytes.windows(marker.len()).any(|bytes| bytes == marker));
            *verified.packets.entry(content.protocol).or_default() += 1;
            Ok(true)
        })?;
        anyhow::ensure!(end != End::Interrupted, INTERRUPTED);
        waited += ROUND;
        let came = recognition.seen().max(verified.with_marker);
        if end != End::Time || came >= u64::from(DATAGRAMS) {
            break;
        }
    }
    verified.sent = sending.join().map_err(|_| anyhow::anyhow!("the datagrams could not be sent"))??;
    verified.recognised = recognition.seen();
    verified.lost = session.statistics()?.lost;
    verified.judge();
    Ok(verified)
}

const INTERRUPTED: &str = "interrupted: nothing is proven";

type Sending = std::thread::JoinHandle<anyhow::Result<u64>>;

/// Sends the datagrams, one of each size, to all addresses in turn; how many could be sent.
fn send(path: &VerifyPath, marker: &[u8], sizes: &[Size]) -> anyhow::Result<Sending> {
    let open = |(inside, own): (&IpAddr, &IpAddr)| {
        let socket = UdpSocket::bind((*own, 0));
        let socket = socket.with_context(|| format!("cannot send from {own}, the own address inside the tunnel"))?;
        Ok((socket, SocketAddr::new(*inside, PROBE_PORT)))
    };
    let ways: Vec<(UdpSocket, SocketAddr)> = path.inside.iter().map(open).collect::<anyhow::Result<_>>()?;
    let (marker, sizes) = (marker.to_vec(), sizes.to_vec());
    let send = move || {
        let mut refused = None;
        let mut sent = 0;
        for (size, (socket, to)) in sizes.iter().zip(ways.iter().cycle()) {
            let payload: Vec<u8> =
                marker.iter().copied().cycle().take(payload_of(size.inside, Family::of(to.ip()))).collect();
            match socket.send_to(&payload, to) {
                Ok(_) => sent += 1,
                Err(error) => refused = Some((*to, error)),
            }
            std::thread::sleep(PAUSE);
        }
        match refused {
            Some((to, error)) if sent == 0 => {
                Err(error).with_context(|| format!("nothing can be sent to {to}; try huskctl trace"))
            }
            _ => Ok(sent),
        }
    };
    Ok(std::thread::Builder::new().name("marker".into()).spawn(send)?)
}

/// Bytes in a UDP datagram of a packet of so many bytes.
fn payload_of(packet: u32, family: Family) -> usize {
    packet.saturating_sub(wire::headers(family)) as usize
}

fn in_words(verified: &Verified) -> String {
    let Verified { node, mode, interface, sent, packets, recognised, with_marker, lost, verdict } = verified;
    let all: u64 = packets.values().sum();
    let kinds: Vec<String> = packets.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
    let kinds = if kinds.is_empty() { String::new() } else { format!(": {}", kinds.join(", ")) };
    let mut text = format!(
        "{sent} datagrams with a random marker, each of another size, were sent through the tunnel to {node} (mode {mode})\n{all} \
         packets to {node} were seen on {interface}{kinds}\n{recognised} of the datagrams are among the encrypted ones, by size and \
         order\n{with_marker} packets held the marker\n"
    );
    if *lost > 0 {
        text += &format!("{lost} packets were lost before they could be looked at\n");
    }
    text += "\n";
    text += &match verdict {
        Finding::Encrypted => format!("ENCRYPTED: what is sent to {node} cannot be read on the wire.\n"),
        Finding::Plaintext => {
            let remedy = if mode.encrypted() {
                "this is a bug, or somebody changed this host: see huskctl diff and huskctl status, and report it"
            } else {
                "mode wireguard, ipsec or vxlan-ipsec encrypts (huskctl status names the mode)"
            };
            format!("PLAINTEXT: anybody on the way can read what is sent to {node}.\n  -> {remedy}\n")
        }
        Finding::Unproven => format!(
            "NOTHING PROVEN: not all of the datagrams were seen, neither readable nor encrypted.\n  -> is there a session with \
             {node}? See huskctl peers, and huskctl trace host {node} --port {PROBE_PORT} --protocol udp --probe\n"
        ),
    };
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verified(sent: u64, with_marker: u64, lost: u64, recognised: u64) -> Verified {
        let mut verified = Verified {
            node: NodeName::new("host2").unwrap(),
            mode: Mode::Wireguard,
            interface: "eth0".into(),
            sent,
            packets: [("WireGuard data".to_owned(), 99)].into(),
            recognised,
            with_marker,
            lost,
            verdict: Finding::Unproven,
        };
        verified.judge();
        verified
    }

    #[test]
    fn only_all_datagrams_without_the_marker_prove_anything() {
        assert_eq!(verified(10, 0, 0, 10).verdict, Finding::Encrypted);
        assert_eq!(verified(10, 1, 0, 10).verdict, Finding::Plaintext);
        for unproven in [verified(10, 0, 0, 0), verified(10, 0, 0, 9), verified(10, 0, 1, 10), verified(9, 0, 0, 9)] {
            assert_eq!(unproven.verdict, Finding::Unproven);
            assert!(in_words(&unproven).contains("huskctl trace host host2"));
        }
        let text = in_words(&verified(10, 0, 0, 10));
        assert!(text.contains("99 packets to host2 were seen on eth0: 99 WireGuard data"), "{text}");
        assert!(text.contains("10 of the datagrams") && text.contains("ENCRYPTED"), "{text}");
    }

    #[test]
    fn a_datagram_fills_the_packet() {
        assert_eq!((payload_of(576, Family::Ipv4), payload_of(576, Family::Ipv6)), (548, 528));
    }
}
