//! Frames put on the wire as they are: what was captured once, sent again, as whoever listens on the underlay can.

use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use etherparse::{LaxNetSlice, LaxSlicedPacket, TransportSlice, UdpHeader};
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, bind, send, socket};

use crate::netns::Netns;
use crate::packet::offset;

/// Where in a UDP header the checksum is (RFC 768).
const UDP_CHECKSUM: usize = 6;

/// Sends a frame out of an interface of a namespace.
pub(crate) fn send_frame(netns: &Netns, interface: &str, frame: &[u8]) -> Result<()> {
    let what = || format!("sending a frame of {} bytes on {interface} in {}", frame.len(), netns.name());
    let mut whole = frame.to_owned();
    fill_checksum(&mut whole);
    netns.run(|| transmit(interface, &whole))?.with_context(what)
}

/// Fills in the checksum of a UDP datagram. What is captured between namespaces has none: the kernel leaves it to a network
/// card, and here is none.
fn fill_checksum(frame: &mut [u8]) {
    let Some((at, checksum)) = checksum(frame) else { return };
    frame[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
}

/// Where the checksum of a UDP datagram belongs, and what it should be.
fn checksum(frame: &[u8]) -> Option<(usize, u16)> {
    let sliced = LaxSlicedPacket::from_ethernet(frame).ok()?;
    let Some(TransportSlice::Udp(udp)) = sliced.transport else { return None };
    let (header, payload) = (udp.to_header(), udp.payload());
    let sum = match sliced.net? {
        LaxNetSlice::Ipv4(ip) => {
            UdpHeader::calc_checksum_ipv4_raw(&header, ip.header().source(), ip.header().destination(), payload)
        }
        LaxNetSlice::Ipv6(ip) => {
            UdpHeader::calc_checksum_ipv6_raw(&header, ip.header().source(), ip.header().destination(), payload)
        }
        LaxNetSlice::Arp(_) => return None,
    };
    Some((offset(frame, udp.slice())? + UDP_CHECKSUM, sum.ok()?))
}

fn transmit(interface: &str, frame: &[u8]) -> Result<()> {
    // Without a protocol the socket hears nothing.
    let socket: OwnedFd = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
    // The list of addresses has one for every link, with its index, in the form that a packet socket is bound to.
    let link = getifaddrs()?
        .filter(|entry| entry.interface_name == interface)
        .find_map(|entry| entry.address.and_then(|address| address.as_link_addr().copied()));
    bind(socket.as_raw_fd(), &link.context("there is no such interface")?)?;
    let sent = send(socket.as_raw_fd(), frame, MsgFlags::empty())?;
    ensure!(sent == frame.len(), "the kernel took {sent} bytes");
    Ok(())
}
