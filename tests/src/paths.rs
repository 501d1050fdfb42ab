//! Paths between hosts as their daemons, their kernels and their pods see them.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use etherparse::{LaxSlicedPacket, TcpOptionElement, TransportSlice};
use husk_overlay::mode::Mode;
use husk_overlay::prefix::Family;
use serde_json::Value;

use crate::capture::Capture;
use crate::host::Host;
use crate::netns::Netns;
use crate::packet::Packet;
use crate::pod::{Pod, Served};
use crate::probe::{Echo, Reach, path_mtu, payload, tcp};
use crate::{eventually, patience};

/// Bytes of the largest packet of a pod that fits an underlay of so many, by the table in README and not by Husk's own calculus:
/// WireGuard and VXLAN take what they take, ESP pads to four bytes with its trailer of two.
///
/// # Panics
/// When the underlay has not even room for headers.
#[must_use]
pub fn inner_mtu(mode: Mode, underlay: Family, mtu: usize) -> usize {
    let ip = if underlay == Family::Ipv4 { 20 } else { 40 };
    let vxlan = 8 + 8 + 14;
    // SPI and sequence number, nonce, integrity check value.
    let esp = |mtu: usize| (mtu - ip - 8 - 8 - 16) / 4 * 4 - 2;
    match mode {
        Mode::Direct => mtu,
        Mode::Vxlan => mtu - ip - vxlan,
        Mode::Wireguard => mtu - ip - 8 - 32,
        Mode::Ipsec => esp(mtu),
        Mode::VxlanIpsec => esp(mtu) - vxlan,
    }
}

/// The least MTU of an underlay that leaves pods what IPv6 needs (RFC 8200, section 5).
#[must_use]
pub fn least_underlay_mtu(mode: Mode, underlay: Family) -> usize {
    (1280..).find(|mtu| inner_mtu(mode, underlay, *mtu) >= 1280).unwrap_or(usize::MAX)
}

/// What probing says of the paths to a host, by family.
///
/// # Errors
/// When the daemon does not answer or does not know the host.
pub fn probed(host: &Host, peer: &str) -> Result<Value> {
    let peers = host.huskctl_json(["peers"])?;
    let row = peers.as_array().into_iter().flatten().find(|row| row["node"] == peer);
    Ok(row.with_context(|| format!("{} does not know {peer}: {peers}", host.name()))?["paths"].clone())
}

/// Waits until probing has found that what is promised passes to a host, in both families.
///
/// # Errors
/// When it has not in time.
pub fn await_verified(host: &Host, peer: &str, limit: Duration) -> Result<()> {
    let mut last = Value::Null;
    let awaited = eventually("paths to be verified", limit, || {
        last = probed(host, peer)?;
        Ok(["ipv4", "ipv6"].iter().all(|family| last[family]["standing"]["state"] == "verified"))
    });
    awaited.with_context(|| format!("{} to {peer}: {last}", host.name()))
}

/// A host's issues about paths.
///
/// # Errors
/// When the daemon does not answer.
pub fn issues(host: &Host) -> Result<Vec<Value>> {
    host.issues("PathMtu")
}

/// The host's routes to a pod have this MTU, in both families.
///
/// # Errors
/// When the kernel does not tell.
pub fn routes_have(host: &Host, to: &Pod, mtu: usize) -> Result<bool> {
    for family in Family::ALL {
        if path_mtu(host.netns(), to.address(family)?)? != mtu {
            return Ok(false);
        }
    }
    Ok(true)
}

/// A packet of exactly this size passes, and the sender's own kernel knows that none of one byte more does.
///
/// # Errors
/// When nothing can be sent.
pub fn is_exact(from: &Netns, to: IpAddr, mtu: usize) -> Result<bool> {
    let ask = |size| Echo::to(to).packet_size(size).limit(patience(Duration::from_millis(300))).run(from);
    Ok(ask(mtu)?.arrived() && ask(mtu + 1)? == Reach::TooBig { path_mtu: mtu, local: true })
}

/// Asks until the path is exact, with packets of the size that passed before, since only what is too large is told so.
///
/// # Errors
/// When it is not in time.
pub fn await_exact(from: &Netns, to: IpAddr, before: usize, mtu: usize, limit: Duration) -> Result<()> {
    eventually(&format!("{} to learn that {mtu} bytes pass to {to}", from.name()), limit, || {
        Echo::to(to).packet_size(before).limit(Duration::from_millis(50)).run(from)?;
        is_exact(from, to, mtu)
    })
}

/// The largest segment that a SYN offers.
fn offered(packet: &Packet) -> Option<u16> {
    let sliced = LaxSlicedPacket::from_ethernet(&packet.bytes).ok()?;
    let Some(TransportSlice::Tcp(tcp)) = sliced.transport else { return None };
    let sizes = tcp.options_iterator().filter_map(|option| match option {
        Ok(TcpOptionElement::MaximumSegmentSize(size)) => Some(size),
        _ => None,
    });
    sizes.last().filter(|_| tcp.syn())
}

/// The largest segments that a pod's SYN and the answer to it offered, as they arrived at the other: on their way, hosts may have
/// lowered them.
///
/// # Errors
/// When the pods do not reach each other, or a packet was not seen.
pub fn segments_offered(from: &Pod, to: &Served, family: Family) -> Result<[u16; 2]> {
    let far = Capture::on(to.pod.netns(), "eth0")?;
    let near = Capture::on(from.netns(), "eth0")?;
    tcp::transfer(from.netns(), to.server.at(to.pod.address(family)?), 20_000)?;
    let arrived = |trace: &[Packet]| trace.iter().filter(|packet| !packet.outgoing).find_map(offered);
    let syn = arrived(far.stop()?.packets()).context("no SYN arrived")?;
    let answer = arrived(near.stop()?.packets()).context("no SYN came back")?;
    Ok([syn, answer])
}

/// Sends so many bytes over a connection to an echo server, and waits until all have come back; how long that took.
///
/// # Errors
/// When they have not within two minutes, or are others.
pub fn send_and_wait(mut stream: &TcpStream, bytes: usize) -> Result<Duration> {
    let limit = Some(patience(Duration::from_secs(120)));
    stream.set_read_timeout(limit)?;
    stream.set_write_timeout(limit)?;
    let started = Instant::now();
    stream.write_all(&payload::of_length(bytes)).context("sending")?;
    let mut back = vec![0; bytes];
    stream.read_exact(&mut back).context("waiting for what was sent to come back")?;
    payload::verify(0, &back)?;
    Ok(started.elapsed())
}
