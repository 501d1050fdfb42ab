//! A packet in one line.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use etherparse::{IpNumber, LaxNetSlice, LaxSlicedPacket, TcpSlice, TransportSlice};
use husk_dataplane::capture::{Captured, Link};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::Serialize;

use crate::flows::protocol;
use crate::report::TunnelPorts;

/// Bytes of a VXLAN header (RFC 7348, section 5).
const VXLAN_HEADER: usize = 8;

/// What has to be known to make sense of packets.
pub(super) struct Decoder<'a> {
    /// `inner` or `outer`.
    pub(super) side: &'static str,
    pub(super) ports: &'a TunnelPorts,
    pub(super) names: &'a BTreeMap<IpAddr, String>,
}

/// A packet as far as it could be read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(in crate::huskctl) struct Packet {
    /// When the interface saw it (RFC 3339).
    #[schemars(with = "String")]
    pub(super) time: Timestamp,
    /// Name of the interface.
    pub(super) interface: String,
    /// `inner`: as pods see it; `outer`: as the network between the nodes does.
    pub(super) side: &'static str,
    /// The interface sent it.
    pub(super) outgoing: bool,
    /// Bytes of it, link header included.
    pub(super) length: usize,
    #[serde(flatten)]
    pub(super) content: Content,
}

/// What a packet holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Content {
    /// For example `TCP`, `WireGuard data`, `VXLAN 4242`.
    pub(super) protocol: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) source: Option<End>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) destination: Option<End>,
    /// What else its headers say.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) details: String,
    /// What is in a tunnel's packet, where that can be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) inside: Option<Box<Content>>,
}

/// One end of a packet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct End {
    pub(super) address: IpAddr,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) port: Option<u16>,
    /// Pod or node that has the address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) name: Option<String>,
}

impl Decoder<'_> {
    pub(super) fn decode(&self, interface: &str, captured: &Captured, bytes: &[u8]) -> Packet {
        let nanoseconds = i128::try_from(captured.at.as_nanos()).unwrap_or_default();
        Packet {
            time: Timestamp::from_nanosecond(nanoseconds).unwrap_or_default(),
            interface: interface.to_owned(),
            side: self.side,
            outgoing: captured.outgoing,
            length: captured.length,
            content: self.content(captured.link, bytes, true),
        }
    }

    /// What a packet holds; also what is in a tunnel's packet, if that is wanted. A tunnel in a tunnel is not looked into: Husk
    /// makes none, and a pod could nest as many as it likes.
    pub(super) fn content(&self, link: Link, bytes: &[u8], inside: bool) -> Content {
        let sliced = match link {
            Link::Ethernet => LaxSlicedPacket::from_ethernet(bytes).ok(),
            Link::None => LaxSlicedPacket::from_ip(bytes).ok(),
        };
        let Some(LaxSlicedPacket { net: Some(net), transport, .. }) = sliced else {
            return Content::unread("other than IP");
        };
        let (addresses, number, payload) = match &net {
            LaxNetSlice::Arp(arp) => {
                let end = |bytes: &[u8]| <[u8; 4]>::try_from(bytes).ok().map(|it| self.end(IpAddr::from(it), None));
                return Content {
                    source: end(arp.sender_protocol_addr()),
                    destination: end(arp.target_protocol_addr()),
                    ..Content::unread("ARP")
                };
            }
            LaxNetSlice::Ipv4(ip) => {
                let header = ip.header();
                let addresses = [IpAddr::from(header.source_addr()), header.destination_addr().into()];
                (addresses, ip.payload().ip_number, ip.payload().payload)
            }
            LaxNetSlice::Ipv6(ip) => {
                let header = ip.header();
                let addresses = [IpAddr::from(header.source_addr()), header.destination_addr().into()];
                (addresses, ip.payload().ip_number, ip.payload().payload)
            }
        };
        let between = |ports: Option<(u16, u16)>| {
            let [source, destination] = addresses;
            let (from, to) = ports.unzip();
            (Some(self.end(source, from)), Some(self.end(destination, to)))
        };
        let (ports, mut content) = match &transport {
            Some(TransportSlice::Tcp(tcp)) => (
                Some((tcp.source_port(), tcp.destination_port())),
                Content { details: flags(tcp), ..Content::unread("TCP") },
            ),
            Some(TransportSlice::Udp(udp)) => {
                let ports = (udp.source_port(), udp.destination_port());
                (Some(ports), self.udp(ports, udp.payload(), inside))
            }
            Some(TransportSlice::Icmpv4(icmp)) => (None, icmp_content("ICMP", icmp.slice())),
            Some(TransportSlice::Icmpv6(icmp)) => (None, icmp_content("ICMPv6", icmp.slice())),
            _ if number == IpNumber::ENCAPSULATING_SECURITY_PAYLOAD => (None, esp("ESP", payload)),
            // Fragments but the first, and what is cut off, have the name of their protocol alone.
            _ => (None, Content::unread(&named(number.0))),
        };
        (content.source, content.destination) = between(ports);
        content
    }

    fn end(&self, address: IpAddr, port: Option<u16>) -> End {
        End { address, port, name: self.names.get(&address).cloned() }
    }

    fn udp(&self, (source, destination): (u16, u16), payload: &[u8], inside: bool) -> Content {
        let uses = |port: u16| source == port || destination == port;
        if self.ports.wireguard.iter().any(|port| uses(*port)) {
            return wireguard(payload);
        }
        if self.ports.vxlan == Some(destination)
            && let Some((header, inner)) = payload.split_at_checked(VXLAN_HEADER)
        {
            let vni = u32::from_be_bytes([0, header[4], header[5], header[6]]);
            let inside = inside.then(|| Box::new(self.content(Link::Ethernet, inner, false)));
            return Content { inside, ..Content::unread(&format!("VXLAN {vni}")) };
        }
        if self.ports.esp.is_some_and(uses) && !payload.starts_with(&[0; 4]) && payload.len() > 8 {
            return esp("ESP in UDP", payload);
        }
        Content::unread("UDP")
    }
}

impl Content {
    fn unread(protocol: &str) -> Self {
        Self { protocol: protocol.to_owned(), source: None, destination: None, details: String::new(), inside: None }
    }

    /// It is a packet of a tunnel that encrypts.
    pub(super) fn is_encrypted(&self) -> bool {
        self.protocol.starts_with("WireGuard") || self.protocol.starts_with("ESP")
    }
}

/// WireGuard messages (WireGuard paper, section 5.4): a type of one byte, three that are zero.
fn wireguard(payload: &[u8]) -> Content {
    let number = |at: usize| payload.get(at..)?.first_chunk().map(|it| u32::from_le_bytes(*it));
    let counter = || payload.get(8..)?.first_chunk().map(|it| u64::from_le_bytes(*it));
    let (kind, details) = match payload {
        [1, 0, 0, 0, ..] => ("handshake initiation", number(4).map(|it| format!("from session {it:#010x}"))),
        [2, 0, 0, 0, ..] => ("handshake response", number(8).map(|it| format!("for session {it:#010x}"))),
        [3, 0, 0, 0, ..] => ("cookie reply", number(4).map(|it| format!("for session {it:#010x}"))),
        [4, 0, 0, 0, ..] => {
            // A header of 16 bytes and a tag of 16 around nothing.
            let kind = if payload.len() == 32 { "keepalive" } else { "data" };
            (
                kind,
                number(4)
                    .zip(counter())
                    .map(|(session, counter)| format!("for session {session:#010x}, counter {counter}")),
            )
        }
        _ => return Content::unread("UDP at the port of WireGuard, but none of its messages"),
    };
    Content { details: details.unwrap_or_default(), ..Content::unread(&format!("WireGuard {kind}")) }
}

/// ESP (RFC 4303, section 2).
/// A protocol that is not looked into.
fn named(number: u8) -> String {
    let name = protocol(number);
    if name.parse::<u8>().is_ok() { format!("IP protocol {name}") } else { name }
}

fn esp(protocol: &str, payload: &[u8]) -> Content {
    let number = |at: usize| payload.get(at..)?.first_chunk().map(|it| u32::from_be_bytes(*it));
    let details = number(0).zip(number(4)).map(|(spi, sequence)| format!("SPI {spi:#010x}, sequence {sequence}"));
    Content { details: details.unwrap_or_default(), ..Content::unread(protocol) }
}

fn icmp_content(protocol: &str, slice: &[u8]) -> Content {
    let details = match slice {
        [kind, code, ..] => {
            let name = match (protocol, kind) {
                ("ICMP", 0) | ("ICMPv6", 129) => ", echo reply",
                ("ICMP", 8) | ("ICMPv6", 128) => ", echo request",
                ("ICMP", 3) | ("ICMPv6", 1) => ", unreachable",
                ("ICMPv6", 2) => ", packet too big",
                ("ICMPv6", 133..=137) => ", neighbour discovery",
                _ => "",
            };
            format!("type {kind} code {code}{name}")
        }
        _ => String::new(),
    };
    Content { details, ..Content::unread(protocol) }
}

fn flags(tcp: &TcpSlice<'_>) -> String {
    let all = [(tcp.syn(), "SYN"), (tcp.ack(), "ACK"), (tcp.fin(), "FIN"), (tcp.rst(), "RST"), (tcp.psh(), "PSH")];
    let set: Vec<&str> = all.iter().filter(|(set, _)| *set).map(|(_, name)| *name).collect();
    set.join(" ")
}

impl fmt::Display for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The day is known to who looks on.
        let time = self.time.strftime("%H:%M:%S%.6f");
        let direction = if self.outgoing { "->" } else { "<-" };
        write!(f, "{time} {} {direction} {:<12} {}, {} bytes", self.side, self.interface, self.content, self.length)
    }
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.protocol)?;
        if let (Some(source), Some(destination)) = (&self.source, &self.destination) {
            write!(f, " {source} > {destination}")?;
        }
        if !self.details.is_empty() {
            write!(f, ", {}", self.details)?;
        }
        match &self.inside {
            Some(inside) => write!(f, " [{inside}]"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.address, self.port) {
            (IpAddr::V6(address), Some(port)) => write!(f, "[{address}]:{port}")?,
            (address, Some(port)) => write!(f, "{address}:{port}")?,
            (address, None) => write!(f, "{address}")?,
        }
        match &self.name {
            Some(name) => write!(f, " ({name})"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
