//! What is seen on the wire: a packet socket in a namespace, read by a thread until it is stopped.
//!
//! The socket hears every interface of its namespace and the thread keeps what was asked for. Packets that the kernel
//! had to drop because the thread was too slow are counted, and a capture that lost one is an error: "nothing in
//! plaintext" is proven only by a complete trace.

use std::fs::File;
use std::io::{self, BufWriter, IoSliceMut, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use husk_overlay::prefix::Prefix;
use nix::errno::Errno;
use nix::libc;
use nix::net::if_::if_nametoindex;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, recvmsg, setsockopt,
    socket, sockopt,
};

use crate::eventually;
use crate::host::lock;
use crate::netns::Netns;
use crate::packet::{Kind, Packet, parse};

/// Bytes the kernel may queue for the thread.
const QUEUE: usize = 64 << 20;

/// Bytes of packets a capture keeps in memory; measure throughput without one.
const CAPACITY: usize = 512 << 20;

/// Which packets of a namespace to keep.
#[derive(Debug, Clone)]
enum Watch {
    /// Sent and received on this interface.
    Interface(usize),
    /// Received on any interface but these.
    ArrivalsExcept(Vec<usize>),
}

impl Watch {
    fn wants(&self, from: &LinkAddr) -> bool {
        match self {
            Self::Interface(index) => from.ifindex() == *index,
            Self::ArrivalsExcept(indexes) => {
                from.pkttype() != libc::PACKET_OUTGOING && !indexes.contains(&from.ifindex())
            }
        }
    }
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    recorded: Mutex<Recorded>,
}

#[derive(Debug, Default)]
struct Recorded {
    packets: Vec<Packet>,
    bytes: usize,
    /// Dropped by the kernel, as the socket counts them.
    dropped: u32,
    /// Seen after the memory was used up.
    beyond_capacity: usize,
}

/// A running capture; dropping it discards what it saw.
#[derive(Debug)]
pub struct Capture {
    what: String,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<()>>>,
    sentinel: UdpSocket,
}

impl Capture {
    /// Captures what `interface` sends and receives; it hears from the moment this returns.
    ///
    /// # Errors
    /// When there is no such interface.
    pub fn on(netns: &Netns, interface: &str) -> Result<Self> {
        Self::start(netns, interface, || Ok(Watch::Interface(index(interface)?)))
    }

    /// Captures what arrives at any interface of the namespace except loopback and `except`.
    ///
    /// # Errors
    /// When an interface of `except` does not exist.
    pub fn arrivals(netns: &Netns, except: &[&str]) -> Result<Self> {
        Self::start(netns, "every port", || {
            let indexes: Result<_> = except.iter().copied().chain(["lo"]).map(index).collect();
            Ok(Watch::ArrivalsExcept(indexes?))
        })
    }

    fn start(netns: &Netns, what: &str, watch: impl FnOnce() -> Result<Watch> + Send) -> Result<Self> {
        let what = format!("{what} in {}", netns.name());
        let opened = netns.run(|| -> Result<_> {
            let watch = watch()?;
            let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)
                .context("opening a packet socket")?;
            setsockopt(&socket, sockopt::RcvBufForce, &QUEUE).context("enlarging the queue")?;
            setsockopt(&socket, sockopt::RxqOvfl, &1).context("asking for the number of dropped packets")?;
            let sentinel = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).context("binding the sentinel")?;
            sentinel.connect(sentinel.local_addr()?).context("connecting the sentinel")?;
            Ok((watch, socket, sentinel))
        });
        let (watch, socket, sentinel) = opened?.with_context(|| format!("capturing on {what}"))?;
        let shared = Arc::new(Shared::default());
        let thread = std::thread::Builder::new().name("capture".to_owned()).spawn({
            let shared = Arc::clone(&shared);
            move || record(&socket, &watch, &shared)
        })?;
        Ok(Self { what, shared, thread: Some(thread), sentinel })
    }

    /// What was seen so far; the capture goes on.
    ///
    /// # Errors
    /// When packets were lost.
    pub fn so_far(&self) -> Result<Trace> {
        let packets = lock(&self.shared.recorded).packets.clone();
        self.trace(packets)
    }

    /// Waits until a packet was seen that `question` affirms.
    ///
    /// # Errors
    /// When none was seen within `limit`.
    pub fn wait_for(&self, what: &str, limit: Duration, question: impl Fn(&Packet) -> bool) -> Result<()> {
        let what = format!("{what} on {}", self.what);
        eventually(&what, limit, || Ok(lock(&self.shared.recorded).packets.iter().any(&question)))
    }

    /// Stops the capture, after all that passed before this call.
    ///
    /// # Errors
    /// When packets were lost.
    pub fn stop(mut self) -> Result<Trace> {
        self.finish()?;
        let packets = std::mem::take(&mut lock(&self.shared.recorded).packets);
        self.trace(packets)
    }

    fn trace(&self, packets: Vec<Packet>) -> Result<Trace> {
        let recorded = lock(&self.shared.recorded);
        if recorded.dropped > 0 || recorded.beyond_capacity > 0 {
            let lost = u64::from(recorded.dropped) + recorded.beyond_capacity as u64;
            bail!("the capture on {} kept {} packets and lost {lost}: it proves nothing", self.what, packets.len());
        }
        Ok(Trace { packets })
    }

    fn finish(&mut self) -> Result<()> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        // The number of drops comes with the next packet: make sure that there is one.
        let _ = self.sentinel.send(b"end of capture");
        self.shared.stop.store(true, Ordering::Release);
        match thread.join() {
            Ok(ended) => ended.with_context(|| format!("capturing on {}", self.what)),
            Err(_) => bail!("the capture on {} panicked", self.what),
        }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        let _ = self.finish();
    }
}

fn index(interface: &str) -> Result<usize> {
    let index = if_nametoindex(interface).with_context(|| format!("looking for interface {interface}"))?;
    Ok(usize::try_from(index)?)
}

fn record(socket: &OwnedFd, watch: &Watch, shared: &Shared) -> Result<()> {
    // Longer than any packet, those that a network card would have segmented included.
    let mut buffer = vec![0; 256 << 10];
    let mut control = nix::cmsg_space!(u32);
    loop {
        let stopping = shared.stop.load(Ordering::Acquire);
        let mut waiting = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        if poll(&mut waiting, PollTimeout::from(if stopping { 0_u8 } else { 20 })).unwrap_or(0) == 0 {
            if stopping {
                return Ok(());
            }
            continue;
        }
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let flags = MsgFlags::MSG_DONTWAIT;
        let message = match recvmsg::<LinkAddr>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags) {
            Ok(message) => message,
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ENETDOWN) => continue,
            Err(error) => return Err(error).context("reading a packet socket"),
        };
        let dropped = message.cmsgs()?.find_map(|it| match it {
            ControlMessageOwned::RxqOvfl(total) => Some(total),
            _ => None,
        });
        let (length, from) = (message.bytes, message.address);
        let mut recorded = lock(&shared.recorded);
        recorded.dropped = dropped.unwrap_or(recorded.dropped);
        let Some(from) = from.filter(|from| watch.wants(from)) else { continue };
        if recorded.bytes + length > CAPACITY {
            recorded.beyond_capacity += 1;
            continue;
        }
        recorded.bytes += length;
        let at = SystemTime::now();
        recorded.packets.push(parse(at, from.hatype(), from.pkttype() == libc::PACKET_OUTGOING, &buffer[..length]));
    }
}

/// A complete record of what passed.
#[derive(Debug, Clone)]
pub struct Trace {
    packets: Vec<Packet>,
}

impl Trace {
    /// The packets in order.
    #[must_use]
    pub fn packets(&self) -> &[Packet] {
        &self.packets
    }

    /// How many packets `question` affirms.
    #[must_use]
    pub fn count(&self, question: impl Fn(&Packet) -> bool) -> usize {
        self.packets.iter().filter(|packet| question(packet)).count()
    }

    /// How many packets are fragments of an IP packet.
    #[must_use]
    pub fn fragments(&self) -> usize {
        self.count(|packet| packet.fragment)
    }

    /// How many packets hold these bytes anywhere, encapsulated or not.
    #[must_use]
    pub fn containing(&self, bytes: &[u8]) -> usize {
        self.count(|packet| packet.contains(bytes))
    }

    /// How many packets have a source or destination in one of these prefixes, in the outermost IP header or in that
    /// of a VXLAN payload: pod traffic that anybody can read.
    #[must_use]
    pub fn readable(&self, prefixes: &[Prefix]) -> usize {
        self.count(|packet| packet.readable().any(|address| prefixes.iter().any(|prefix| prefix.contains(address))))
    }

    /// Number of packets of each kind.
    #[must_use]
    pub fn kinds(&self) -> std::collections::BTreeMap<Kind, usize> {
        let mut kinds = std::collections::BTreeMap::new();
        for packet in &self.packets {
            *kinds.entry(packet.kind).or_default() += 1;
        }
        kinds
    }

    /// The greatest length of an IP packet, header included.
    #[must_use]
    pub fn largest(&self) -> usize {
        self.packets.iter().map(|packet| packet.ip_length).max().unwrap_or(0)
    }

    /// Writes the Ethernet packets as a pcap file.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_pcap(&self, path: &Path) -> Result<()> {
        self.pcap(path).with_context(|| format!("writing {}", path.display()))
    }

    /// The classic format, <https://www.ietf.org/archive/id/draft-ietf-opsawg-pcap-04.html>: version 2.4, Ethernet.
    fn pcap(&self, path: &Path) -> io::Result<()> {
        let number = |value: u128| u32::try_from(value).unwrap_or(u32::MAX).to_le_bytes();
        let mut file = BufWriter::new(File::create(path)?);
        file.write_all(&0xa1b2_c3d4_u32.to_le_bytes())?;
        file.write_all(&[2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0])?;
        file.write_all(&(256_u32 << 10).to_le_bytes())?;
        file.write_all(&1_u32.to_le_bytes())?;
        for packet in self.packets.iter().filter(|packet| packet.ethernet) {
            let at = packet.at.duration_since(UNIX_EPOCH).unwrap_or_default();
            let length = number(packet.bytes.len() as u128);
            for field in [number(at.as_secs().into()), number(at.subsec_micros().into()), length, length] {
                file.write_all(&field)?;
            }
            file.write_all(&packet.bytes)?;
        }
        file.flush()
    }
}
