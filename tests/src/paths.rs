//! Paths between hosts as their daemons, their kernels and their pods see them.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use husk_overlay::mode::Mode;
use husk_overlay::prefix::Family;
use serde_json::Value;

use crate::host::Host;
use crate::netns::Netns;
use crate::pod::Pod;
use crate::probe::{Echo, Reach, path_mtu, payload};
use crate::{eventually, patience};

/// Bytes of the largest packet of a pod that fits an underlay of 1400 to 1500 bytes, by the table in README: WireGuard and VXLAN
/// take what they take, ESP pads to four bytes with its trailer of two.
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
    let status = host.huskctl_json(["status"])?;
    let issues = status["issues"].as_array().cloned().unwrap_or_default();
    Ok(issues.into_iter().filter(|issue| issue["kind"] == "PathMtu").collect())
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
