//! `huskctl capture --verify-encrypted`: sends what nobody else knows through the tunnel, and looks for it on the wire.
//!
//! The datagrams go from the own router address to the other node's, at the port where its daemon answers probes: it takes no
//! notice of what is no probe (`husk_overlay::probe::wire`). They are many times the marker, so that one cut in two shows it
//! still. What is seen is everything between this host and the other node or its pods on the interface that leads there, in
//! whichever form.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::Context as _;
use husk_dataplane::capture::{Filter, WHOLE};
use husk_overlay::marks::PROBE_PORT;
use husk_overlay::mode::Mode;
use husk_overlay::name::NodeName;
use schemars::JsonSchema;
use serde::Serialize;

use super::decode::Decoder;
use super::session::{End, Limits, Session};
use crate::huskctl::Show;
use crate::report::{CaptureReport, VerifyPath};

/// Datagrams that are sent.
const DATAGRAMS: u64 = 10;

/// Pause between two: the first may have to wait for a handshake.
const PAUSE: Duration = Duration::from_millis(100);

/// How long it is looked on after the last one: longer than a handshake that has to be tried again (`REKEY_TIMEOUT`, five
/// seconds; WireGuard paper, section 6.1).
const AFTER: Duration = Duration::from_secs(6);

/// How long without a packet is long enough, once as many as were sent have been seen.
const QUIET: Duration = Duration::from_millis(300);

/// Bytes of a marker, and how often a datagram has it.
const MARKER: usize = 16;
const REPEATED: usize = 24;

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
    /// Those that held the marker.
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
    /// As many packets of the tunnel as datagrams, and as large, none with the marker.
    Encrypted,
    /// The marker was seen.
    Plaintext,
    /// Too few packets were seen, or some were lost: nothing is proven.
    Unproven,
}

impl Verified {
    fn judge(&mut self, encrypted: u64) {
        self.verdict = if self.with_marker > 0 {
            Finding::Plaintext
        } else if encrypted >= self.sent && self.sent > 0 && self.lost == 0 {
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
    let sending = send(path, marker)?;
    let decoder = Decoder { side: "outer", ports: &report.ports, names: &report.names };
    let mut verified = Verified {
        node: path.node.clone(),
        mode: report.mode,
        interface: path.tap.interface.to_string(),
        sent: 0,
        packets: BTreeMap::new(),
        with_marker: 0,
        lost: 0,
        verdict: Finding::Unproven,
    };
    let mut encrypted = 0;
    let mut look = |session: &mut Session, time| {
        session.run(&Limits { count: None, time: Some(time) }, |seen| {
            let Some(it) = seen.filter(|it| it.captured.outgoing) else { return Ok(true) };
            let content = decoder.content(it.captured.link, it.bytes, false);
            // A smaller one, as a probe's answer or a keepalive is, cannot be one of those that were sent.
            let is_large = it.captured.length > MARKER * REPEATED;
            encrypted += u64::from(is_large && content.is_encrypted());
            verified.with_marker += u64::from(it.bytes.windows(marker.len()).any(|bytes| bytes == marker));
            *verified.packets.entry(content.protocol).or_default() += 1;
            Ok(true)
        })
    };
    let while_sending = PAUSE * u32::try_from(DATAGRAMS).unwrap_or(u32::MAX);
    let mut end = look(&mut session, while_sending)?;
    let mut waited = Duration::ZERO;
    // The last ones may still wait for a handshake.
    while end == End::Time && waited < AFTER {
        let before = session.taken();
        end = look(&mut session, QUIET)?;
        waited += QUIET;
        if session.taken() == before && before >= DATAGRAMS {
            break;
        }
    }
    anyhow::ensure!(end != End::Interrupted, "interrupted: nothing is proven");
    verified.sent = sending.join().map_err(|_| anyhow::anyhow!("the datagrams could not be sent"))??;
    verified.lost = session.statistics()?.lost;
    verified.judge(encrypted);
    Ok(verified)
}

type Sending = std::thread::JoinHandle<anyhow::Result<u64>>;

/// Sends the datagrams; how many could be.
fn send(path: &VerifyPath, marker: &[u8]) -> anyhow::Result<Sending> {
    let own: IpAddr = path.own;
    let to = SocketAddr::new(path.inside, PROBE_PORT);
    // In mode direct nodes probe each other from their own addresses; pods' packets come from within the cluster.
    let from = if own.is_ipv4() == to.is_ipv4() { SocketAddr::new(own, 0) } else { unspecified(to) };
    let socket =
        UdpSocket::bind(from).with_context(|| format!("cannot send from {own}, the own address inside the tunnel"))?;
    let payload = marker.repeat(REPEATED);
    let send = move || {
        let mut refused = None;
        let mut sent = 0;
        for _ in 0..DATAGRAMS {
            match socket.send_to(&payload, to) {
                Ok(_) => sent += 1,
                Err(error) => refused = Some(error),
            }
            std::thread::sleep(PAUSE);
        }
        match refused {
            Some(error) if sent == 0 => {
                Err(error).with_context(|| format!("nothing can be sent to {to}; try huskctl trace"))
            }
            _ => Ok(sent),
        }
    };
    Ok(std::thread::Builder::new().name("marker".into()).spawn(send)?)
}

fn unspecified(to: SocketAddr) -> SocketAddr {
    if to.is_ipv4() { ([0; 4], 0).into() } else { ([0_u16; 8], 0).into() }
}

fn in_words(verified: &Verified) -> String {
    let Verified { node, mode, interface, sent, packets, with_marker, lost, verdict } = verified;
    let all: u64 = packets.values().sum();
    let kinds: Vec<String> = packets.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
    let kinds = if kinds.is_empty() { String::new() } else { format!(": {}", kinds.join(", ")) };
    let mut text = format!(
        "{sent} datagrams with a random marker were sent through the tunnel to {node} (mode {mode})\n{all} packets to {node} were \
         seen on {interface}{kinds}\n{with_marker} of them held the marker\n"
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
            "NOTHING PROVEN: too few packets of the tunnel were seen to be those that were sent.\n  -> is there a session with \
             {node}? See huskctl peers, and huskctl trace host {node} --port {PROBE_PORT} --protocol udp --probe\n"
        ),
    };
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verified(sent: u64, with_marker: u64, lost: u64, encrypted: u64) -> Verified {
        let mut verified = Verified {
            node: NodeName::new("host2").unwrap(),
            mode: Mode::Wireguard,
            interface: "eth0".into(),
            sent,
            packets: [("WireGuard data".to_owned(), encrypted)].into(),
            with_marker,
            lost,
            verdict: Finding::Unproven,
        };
        verified.judge(encrypted);
        verified
    }

    #[test]
    fn only_enough_packets_without_the_marker_prove_anything() {
        assert_eq!(verified(10, 0, 0, 11).verdict, Finding::Encrypted);
        assert_eq!(verified(10, 1, 0, 11).verdict, Finding::Plaintext);
        for unproven in [verified(10, 0, 0, 0), verified(10, 0, 0, 9), verified(10, 0, 1, 11), verified(0, 0, 0, 5)] {
            assert_eq!(unproven.verdict, Finding::Unproven);
            assert!(in_words(&unproven).contains("huskctl trace host host2"));
        }
        let text = in_words(&verified(10, 0, 0, 11));
        assert!(
            text.contains("11 packets to host2 were seen on eth0: 11 WireGuard data") && text.contains("ENCRYPTED")
        );
    }
}
