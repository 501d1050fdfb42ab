//! A numbered stream of packets in the background, for what must not lose a single one.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use husk_overlay::prefix::Family;
use nix::errno::Errno;

use super::datagram::UDP_HEADER;
use super::socket::{Probe, Protocol, enlarge_queue, header};
use super::{echo, payload};
use crate::host::lock;
use crate::netns::Netns;
use crate::{pace, patience};

/// Length of the payload unless told otherwise: the marker, the number, and some bytes to make it a usual ping.
const PAYLOAD: usize = 64;

/// How long packets may still be under way after the last was sent, before [`patience`].
const DRAIN: Duration = Duration::from_secs(1);

/// How long the first packet of a stream travels alone, before [`patience`].
const FIRST: Duration = Duration::from_millis(100);

/// How often a thread looks whether it should stop.
const PATIENCE: Duration = Duration::from_millis(20);

/// What became of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    /// Packets that the kernel took.
    pub sent: u64,
    /// Packets that arrived (of a ping stream: answers), each counted once.
    pub received: u64,
    /// Packets that never arrived.
    pub lost: u64,
    /// The number of the first of them, counted from 0, once the stream has stopped: it tells whether it was lost at the
    /// beginning, at the end, or in between.
    pub first_lost: Option<u64>,
    /// Arrivals of a packet that had arrived before.
    pub duplicated: u64,
    /// Arrivals after a packet with a higher number.
    pub reordered: u64,
    /// Packets that the kernel refused to send.
    pub refused: u64,
    /// Why it refused the last of them: its own reason, or the one that an ICMP error brought for an earlier packet.
    pub refusal: Option<Errno>,
    /// The longest time between two arrivals.
    pub largest_gap: Duration,
}

impl Report {
    /// True if something was sent and everything arrived.
    #[must_use]
    pub fn lossless(&self) -> bool {
        self.sent > 0 && self.lost == 0 && self.refused == 0
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { sent, received, lost, first_lost, duplicated, reordered, refused, refusal, largest_gap } = self;
        write!(f, "{sent} sent, {received} received, {lost} lost, {refused} refused, {duplicated} duplicated, ")?;
        write!(f, "{reordered} reordered, longest gap {largest_gap:?}")?;
        if let Some(first) = first_lost {
            write!(f, ", first lost number {first}")?;
        }
        refusal.map_or(Ok(()), |refusal| write!(f, ", last refused for {refusal}"))
    }
}

#[derive(Debug, Default)]
struct Shared {
    stop_sending: AtomicBool,
    stop_receiving: AtomicBool,
    sent: AtomicU64,
    refused: AtomicU64,
    refusal: AtomicI32,
    arrivals: Mutex<Arrivals>,
}

impl Shared {
    /// Waits until the first packet has arrived, or a while if it does not. A flow's first packet enters it into connection
    /// tracking at the end of its way through a host; one that overtakes it on another processor until then is dropped, as
    /// the entry is there already (net/netfilter/nf_conntrack_core.c, `nf_ct_resolve_clash`; of ICMP none is resolved).
    fn await_first(&self) {
        let deadline = Instant::now() + patience(FIRST);
        while lock(&self.arrivals).last.is_none()
            && !self.stop_sending.load(Ordering::Relaxed)
            && Instant::now() < deadline
        {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

#[derive(Debug, Default)]
struct Arrivals {
    seen: HashSet<u64>,
    highest: u64,
    duplicated: u64,
    reordered: u64,
    last: Option<Instant>,
    largest_gap: Duration,
}

impl Arrivals {
    fn record(&mut self, number: u64, at: Instant) {
        if !self.seen.insert(number) {
            self.duplicated += 1;
            return;
        }
        self.reordered += u64::from(number < self.highest);
        self.highest = self.highest.max(number);
        self.largest_gap = self.last.map_or(self.largest_gap, |last| self.largest_gap.max(at - last));
        self.last = Some(at);
    }
}

/// A running stream.
#[derive(Debug)]
pub struct Stream {
    shared: Arc<Shared>,
    sender: Option<JoinHandle<()>>,
    receiver: Option<JoinHandle<()>>,
}

impl Stream {
    /// Pings `to` this often per second, at the machine's [`pace`]; arrivals are the replies.
    ///
    /// # Errors
    /// When there is no way to `to`.
    pub fn ping(netns: &Netns, to: IpAddr, per_second: u32) -> Result<Self> {
        let (family, id) = (Family::of(to), echo::next_id());
        let probe = Arc::new(open(netns, Protocol::Icmp, to)?);
        let sending = Arc::clone(&probe);
        Ok(Self::start(
            per_second,
            PAYLOAD,
            move |number, body| {
                let sequence = u16::try_from(number & 0xffff).unwrap_or(0);
                sending.send(&echo::request(family, id, sequence, body))
            },
            move |buffer| {
                let length = probe.receive(buffer, Instant::now() + PATIENCE).ok().flatten()?;
                echo::reply(family, id, &buffer[..length]).and_then(|(_, body)| number(body))
            },
        ))
    }

    /// Sends UDP datagrams this often per second, at the machine's [`pace`], to a receiver at `to`, an address of the
    /// namespace `receiver`.
    ///
    /// # Errors
    /// When there is no way to `to`, or it is no address of the receiver's.
    pub fn udp(sender: &Netns, receiver: &Netns, to: IpAddr, per_second: u32) -> Result<Self> {
        Self::udp_of_size(sender, receiver, to, per_second, header(Family::of(to)) + UDP_HEADER + PAYLOAD)
    }

    /// The same in IP packets of so many bytes, which must not be fragmented: one that is larger than what the sender's kernel
    /// has for the path counts as refused.
    ///
    /// # Errors
    /// As [`Stream::udp`], and when the size leaves no room for a number.
    pub fn udp_of_size(
        sender: &Netns,
        receiver: &Netns,
        to: IpAddr,
        per_second: u32,
        packet_size: usize,
    ) -> Result<Self> {
        let payload =
            packet_size.checked_sub(header(Family::of(to)) + UDP_HEADER).filter(|payload| *payload >= PAYLOAD);
        let payload = payload.with_context(|| format!("{packet_size} bytes are too few for a numbered datagram"))?;
        let (socket, probe) = Self::datagrams(sender, receiver, to)?;
        Ok(Self::start(
            per_second,
            payload,
            move |_, body| probe.send(body),
            move |buffer| socket.recv(buffer).ok().and_then(|length| number(&buffer[..length])),
        ))
    }

    fn datagrams(sender: &Netns, receiver: &Netns, to: IpAddr) -> Result<(UdpSocket, Probe)> {
        let socket = receiver.run(|| UdpSocket::bind(SocketAddr::new(to, 0)))?;
        let socket = socket.with_context(|| format!("receiving at {to} in {}", receiver.name()))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        enlarge_queue(&socket)?;
        let probe = open(sender, Protocol::Udp(socket.local_addr()?.port()), to)?;
        Ok((socket, probe))
    }

    fn start(
        per_second: u32,
        payload: usize,
        mut send: impl FnMut(u64, &[u8]) -> nix::Result<()> + Send + 'static,
        mut receive: impl FnMut(&mut [u8]) -> Option<u64> + Send + 'static,
    ) -> Self {
        let shared = Arc::new(Shared::default());
        let receiver = thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                let mut buffer = vec![0; 1 << 16];
                while !shared.stop_receiving.load(Ordering::Relaxed) {
                    if let Some(number) = receive(&mut buffer) {
                        lock(&shared.arrivals).record(number, Instant::now());
                    }
                }
            }
        });
        let sender = thread::spawn({
            let shared = Arc::clone(&shared);
            let interval = Duration::from_secs(1) / pace(per_second);
            move || {
                let mut due = Instant::now();
                let mut number = 0;
                while !shared.stop_sending.load(Ordering::Relaxed) {
                    let mut body = payload::of_length(payload);
                    body[payload::MARKER.len()..][..8].copy_from_slice(&u64::to_be_bytes(number));
                    let counter = match send(number, &body) {
                        Ok(()) => &shared.sent,
                        Err(refusal) => {
                            shared.refusal.store(refusal as i32, Ordering::Relaxed);
                            &shared.refused
                        }
                    };
                    counter.fetch_add(1, Ordering::Relaxed);
                    if number == 0 {
                        shared.await_first();
                        due = Instant::now();
                    }
                    number += 1;
                    due += interval;
                    thread::sleep(due.saturating_duration_since(Instant::now()));
                }
            }
        });
        Self { shared, sender: Some(sender), receiver: Some(receiver) }
    }

    /// What became of the stream so far; packets under way count as lost.
    #[must_use]
    pub fn so_far(&self) -> Report {
        let arrivals = lock(&self.shared.arrivals);
        let (sent, received) = (self.shared.sent.load(Ordering::Relaxed), arrivals.seen.len() as u64);
        // An answer may come before the sender has counted its question.
        let lost = sent.saturating_sub(received);
        Report {
            sent,
            received,
            lost,
            first_lost: None,
            duplicated: arrivals.duplicated,
            reordered: arrivals.reordered,
            refused: self.shared.refused.load(Ordering::Relaxed),
            refusal: Some(self.shared.refusal.load(Ordering::Relaxed)).filter(|it| *it != 0).map(Errno::from_raw),
            largest_gap: arrivals.largest_gap,
        }
    }

    /// Stops sending, waits for what is under way, and reports.
    ///
    /// # Errors
    /// When a thread of the stream panicked.
    pub fn stop(mut self) -> Result<Report> {
        self.finish()?;
        let report = self.so_far();
        let arrivals = lock(&self.shared.arrivals);
        let first_lost = (0..report.sent).find(|number| !arrivals.seen.contains(number));
        Ok(Report { first_lost, ..report })
    }

    fn finish(&mut self) -> Result<()> {
        self.shared.stop_sending.store(true, Ordering::Relaxed);
        join(self.sender.take())?;
        let deadline = Instant::now() + patience(DRAIN);
        while self.receiver.is_some() && self.so_far().lost > 0 && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(2));
        }
        self.shared.stop_receiving.store(true, Ordering::Relaxed);
        join(self.receiver.take())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let _ = self.finish();
    }
}

fn open(netns: &Netns, protocol: Protocol, to: IpAddr) -> Result<Probe> {
    let opened = Probe::open(netns, protocol, to, None, true)?;
    opened.map_err(|errno| anyhow!("{} has no way to {to}: {errno}", netns.name()))
}

fn number(body: &[u8]) -> Option<u64> {
    let bytes = body.get(payload::MARKER.len()..)?.first_chunk()?;
    body.starts_with(payload::MARKER).then(|| u64::from_be_bytes(*bytes))
}

fn join(thread: Option<JoinHandle<()>>) -> Result<()> {
    thread.map_or(Ok(()), |thread| thread.join().map_err(|_| anyhow!("a thread of the stream panicked")))
}
