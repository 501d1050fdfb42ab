//! A network card that is broken as some are: what it was to complete inside a tunnel leaves it incomplete, or not at all.
//!
//! ```text
//!  host1 eth0 ── host1 [card: two packet sockets] card0 ── card1 ┤ switch (bridge)
//! ```
//!
//! A veth pair passes on what a card is to do, the checksum still to be filled in and the segments still to be cut, and a packet
//! socket tells of it in a header (`struct virtio_net_hdr`, include/uapi/linux/virtio_net.h). What the host receives passes as it
//! is. What it sends passes too, and is completed by the kernel, unless it is encapsulated and the card's fault concerns it.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, bind, recvfrom, send, setsockopt, socket,
    sockopt,
};

use super::Cluster;
use crate::host::UNDERLAY_INTERFACE;
use crate::netns::Netns;

#[derive(Clone, Copy, Debug)]
struct VirtioHeader;
nix::setsockopt_impl!(VirtioHeader, libc::SOL_PACKET, PACKET_VNET_HDR, i32, sockopt::SetStruct<'_, i32>);

/// include/uapi/linux/if_packet.h.
const PACKET_VNET_HDR: i32 = 15;

/// Bytes of the header before each frame, and where in it is what.
const HEADER: usize = 10;
const FLAGS: usize = 0;
const SEGMENTATION: usize = 1;
const CHECKSUM_START: usize = 6;

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`.
const NEEDS_CHECKSUM: u8 = 1;

/// Ethernet and IPv6 header in bytes: what begins behind them is inside a tunnel.
const OUTER: u16 = 14 + 40;

/// Bytes the kernel may queue for a direction.
const QUEUE: usize = 16 << 20;

/// What the card gets wrong of encapsulated packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It does not fill in their inner checksums.
    Checksums,
    /// It loses those that it should have cut.
    Segments,
}

/// The card. Whole again when it is dropped.
#[derive(Debug)]
pub struct Card {
    switch: Netns,
    port: String,
    stop: Arc<AtomicBool>,
    directions: Vec<JoinHandle<()>>,
}

impl Cluster {
    /// Breaks the card of a host. Packets of many segments leave the host from now on, as they do with a card that cuts them.
    ///
    /// # Errors
    /// When the kernel refuses a part.
    pub fn break_card(&self, number: usize, fault: Fault) -> Result<Card> {
        let host = self.host(number);
        let port = host.name().to_owned();
        let mtu = self.builder.mtu;
        self.switch.ip_batch(&format!(
            "link add card0 mtu {mtu} type veth peer name card1 mtu {mtu}\n\
             link set card1 master br0\nlink set card0 up\nlink set card1 up\nlink set {port} nomaster\n"
        ))?;
        let mut card =
            Card { switch: self.switch.handle()?, port: port.clone(), stop: Arc::default(), directions: Vec::new() };
        let ends = self.switch.run(|| anyhow::Ok((open(&port)?, open("card0")?, open("card0")?, open(&port)?)))??;
        card.carry(ends.0, ends.1, Some(fault))?;
        card.carry(ends.2, ends.3, None)?;
        if fault == Fault::Segments {
            host.netns().command("ethtool", ["-K", UNDERLAY_INTERFACE, "sg", "on", "tso", "on"])?;
            host.netns().command("ip", ["link", "set", UNDERLAY_INTERFACE, "gso_max_segs", "65535"])?;
        }
        self.wait_for_ports()?;
        Ok(card)
    }
}

impl Card {
    /// Carries frames from where they are heard to where they are sent.
    fn carry(&mut self, from: Port, to: Port, fault: Option<Fault>) -> Result<()> {
        let stop = Arc::clone(&self.stop);
        let work = move || {
            let mut frame = vec![0; HEADER + (1 << 17)];
            while !stop.load(Ordering::Relaxed) {
                let mut waiting = [PollFd::new(from.socket.as_fd(), PollFlags::POLLIN)];
                if poll(&mut waiting, PollTimeout::from(50_u8)).is_ok_and(|ready| ready > 0) {
                    pass(&from, &to, &mut frame, fault);
                }
            }
        };
        self.directions.push(thread::Builder::new().name("card".into()).spawn(work).context("starting a card")?);
        Ok(())
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for direction in self.directions.drain(..) {
            let _ = direction.join();
        }
        let _ = self.switch.ip_batch(&format!("link del card0\nlink set {} master br0\n", self.port));
    }
}

/// A packet socket at one interface.
struct Port {
    socket: OwnedFd,
    link: LinkAddr,
}

fn open(interface: &str) -> Result<Port> {
    let all = SockProtocol::EthAll;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket: OwnedFd =
        socket(AddressFamily::Packet, SockType::Raw, flags, all).context("opening a packet socket")?;
    setsockopt(&socket, VirtioHeader, &1).context("asking what a card would be asked")?;
    setsockopt(&socket, sockopt::RcvBufForce, &QUEUE).context("enlarging the queue")?;
    let link = getifaddrs()?
        .filter(|entry| entry.interface_name == interface)
        .find_map(|entry| entry.address.and_then(|address| address.as_link_addr().copied()))
        .with_context(|| format!("there is no interface {interface}"))?;
    bind(socket.as_raw_fd(), &link).with_context(|| format!("binding to {interface}"))?;
    Ok(Port { socket, link })
}

/// Passes on what waits.
fn pass(from: &Port, to: &Port, frame: &mut [u8], fault: Option<Fault>) {
    loop {
        let (length, heard) = match recvfrom::<LinkAddr>(from.socket.as_raw_fd(), frame) {
            Ok(received) => received,
            // What cannot even be described is lost.
            Err(Errno::EINVAL) => continue,
            Err(_) => return,
        };
        let here = heard.is_some_and(|it| it.pkttype() != libc::PACKET_OUTGOING && it.ifindex() == from.link.ifindex());
        if !here || length < HEADER {
            continue;
        }
        let start = u16::from_ne_bytes([frame[CHECKSUM_START], frame[CHECKSUM_START + 1]]);
        let encapsulated = frame[FLAGS] & NEEDS_CHECKSUM != 0 && start > OUTER;
        match fault {
            Some(Fault::Checksums) if encapsulated => frame[FLAGS] = 0,
            Some(Fault::Segments) if frame[SEGMENTATION] != 0 => continue,
            _ => {}
        }
        let _ = send(to.socket.as_raw_fd(), &frame[..length], MsgFlags::empty());
    }
}
