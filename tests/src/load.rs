//! Traffic between pods in every direction, all the time, every packet of it accounted for: numbered UDP datagrams one way,
//! over both families, and a TCP connection for every two pods on which bytes go back and forth.

use std::fmt;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use husk_overlay::prefix::Family;

use crate::netns::Netns;
use crate::pod::Pod;
use crate::probe::{Echo, EchoServer, Report, Stream, tcp};

/// How much each direction carries: what a machine can do besides everything else, and frequent enough that no gap that
/// matters passes between two datagrams.
#[derive(Debug, Clone, Copy)]
pub struct Rate {
    /// UDP datagrams per second, at the machine's [`pace`](crate::pace).
    pub datagrams: u32,
    /// Bytes per second of TCP, there and back.
    pub bytes: u32,
}

impl Default for Rate {
    fn default() -> Self {
        Self { datagrams: 200, bytes: 50_000 }
    }
}

/// From one pod to another.
#[derive(Debug)]
struct Lane {
    name: String,
    datagrams: Stream,
}

#[derive(Debug)]
struct Connection {
    name: String,
    flow: tcp::Flow,
}

/// Running traffic. Dropping it ends it, whatever became of it.
#[derive(Debug)]
pub struct Load {
    lanes: Vec<Lane>,
    connections: Vec<Connection>,
    control: Connection,
    _servers: Vec<EchoServer>,
}

/// What became of the traffic.
#[derive(Debug)]
pub struct Account {
    /// By name, `a → b, IPv4`.
    pub datagrams: Vec<(String, Report)>,
    /// By name, `a ⇄ b`.
    pub connections: Vec<(String, tcp::Transfer)>,
    /// A connection of the first pod to itself: what stalled it was the machine, not the network.
    pub control: tcp::Transfer,
}

impl Load {
    /// Starts traffic from every pod to every other.
    ///
    /// # Errors
    /// When a pod has no way to another, or a connection cannot be made.
    pub fn among(pods: &[&Pod], rate: Rate) -> Result<Self> {
        let servers = pods.iter().map(|pod| EchoServer::start(pod.netns())).collect::<Result<Vec<_>>>()?;
        let (mut lanes, mut connections) = (Vec::new(), Vec::new());
        for (number, from) in pods.iter().enumerate() {
            for (other, to) in pods.iter().enumerate().filter(|(other, _)| *other != number) {
                for family in Family::ALL {
                    let name = format!("{} → {}, {family}", from.name(), to.name());
                    let datagrams = Stream::udp(from.netns(), to.netns(), to.address(family)?, rate.datagrams)?;
                    lanes.push(Lane { name, datagrams });
                }
                if other > number {
                    // Every second pair over the other family.
                    let family = Family::ALL[(number + other) % Family::ALL.len()];
                    let name = format!("{} ⇄ {}, {family}", from.name(), to.name());
                    let flow = tcp::Flow::start(from.netns(), servers[other].at(to.address(family)?), rate.bytes)?;
                    connections.push(Connection { name, flow });
                }
            }
        }
        let (first, server) = (pods.first().context("no pods")?, servers.first().context("no pods")?);
        let flow = tcp::Flow::start(first.netns(), server.at(first.address(Family::Ipv4)?), rate.bytes)?;
        let control = Connection { name: "control".to_owned(), flow };
        Ok(Self { lanes, connections, control, _servers: servers })
    }

    /// Datagrams that were sent so far.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.lanes.iter().map(|lane| lane.datagrams.so_far().sent).sum()
    }

    /// Ends the traffic and tells what became of it.
    ///
    /// # Errors
    /// When a connection broke or brought a wrong byte.
    pub fn stop(self) -> Result<Account> {
        let stopped = |lane: Lane| Ok((lane.name, lane.datagrams.stop()?));
        let datagrams = self.lanes.into_iter().map(stopped).collect::<Result<_>>()?;
        let ended = |connection: Connection| {
            let transfer = connection.flow.stop().with_context(|| format!("the connection {}", connection.name))?;
            Ok((connection.name, transfer))
        };
        let (_, control) = ended(self.control)?;
        Ok(Account { datagrams, connections: self.connections.into_iter().map(ended).collect::<Result<_>>()?, control })
    }
}

impl Account {
    /// Makes sure that every datagram arrived once.
    ///
    /// # Errors
    /// When one did not, or arrived twice; the error names every direction that was disturbed.
    pub fn exact(&self) -> Result<()> {
        let disturbed = |report: &Report| !report.lossless() || report.duplicated > 0;
        let lines: Vec<_> = self
            .datagrams
            .iter()
            .filter(|(_, report)| disturbed(report))
            .map(|(name, report)| format!("{name}: {report}"))
            .collect();
        ensure!(lines.is_empty(), "the traffic was disturbed:\n{}\nof all: {self}", lines.join("\n"));
        Ok(())
    }

    /// The longest time in which nothing came over a connection.
    #[must_use]
    pub fn longest_stall(&self) -> Duration {
        self.connections.iter().map(|(_, transfer)| transfer.largest_stall).max().unwrap_or_default()
    }
}

/// Sends single packets with the payload's marker to these addresses all the time while `work` goes on; whether anybody
/// answers does not matter.
///
/// # Errors
/// Those of `work`, and when the harness fails.
pub fn while_knocking<T>(from: &[&Netns], to: &[IpAddr], work: impl FnOnce() -> Result<T>) -> Result<T> {
    /// Fewer prove nothing; where all is slow, they go on after the end of the work.
    const LEAST: u32 = 50;
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let knocking = scope.spawn(|| -> Result<()> {
            let mut knocks = 0;
            while knocks < LEAST || !done.load(Ordering::Relaxed) {
                for (netns, to) in from.iter().flat_map(|netns| to.iter().map(move |to| (netns, to))) {
                    Echo::to(*to).limit(Duration::from_millis(2)).run(netns)?;
                    knocks += 1;
                }
            }
            Ok(())
        });
        let result = work();
        done.store(true, Ordering::Relaxed);
        knocking.join().map_err(|_| anyhow!("the knocking thread panicked"))??;
        result
    })
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sum = |count: fn(&Report) -> u64| self.datagrams.iter().map(|(_, report)| count(report)).sum::<u64>();
        let gap = self.datagrams.iter().map(|(_, report)| report.largest_gap).max().unwrap_or_default();
        write!(
            f,
            "{} datagrams in {} directions, {} lost, {} refused, {} duplicated, {} reordered, longest gap {gap:?}; \
             {} connections, longest stall {:?}, of the control {:?}",
            sum(|report| report.sent),
            self.datagrams.len(),
            sum(|report| report.lost),
            sum(|report| report.refused),
            sum(|report| report.duplicated),
            sum(|report| report.reordered),
            self.connections.len(),
            self.longest_stall(),
            self.control.largest_stall
        )
    }
}
