//! Flows: the packets that policy denied, and the connections that begin and end, as the kernel tells of them, with the pods and
//! the policy behind them.
//!
//! Threads of their own listen, name and keep; the loop has no part in it, and nobody who asks for flows waits for the loop.
//! The kernel's rule bounds how many denied packets it tells of; its counters count all. For connections it is listened to only
//! while somebody wants to know: see `connections`.

mod connections;
mod record;
mod ring;

use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use husk_dataplane::connections::{Listener, News, Tracked, list};
use husk_dataplane::nflog::Log;
use husk_overlay::marks;
use husk_overlay::prefix::Prefix;
use husk_overlay::record::DualStack;
use husk_policy::cluster::Cluster;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use self::connections::{Interest, Known, REMEMBERED, ends};
pub(crate) use self::record::protocol;
pub use self::record::{Flow, FlowCount, FlowEnd, FlowVerdict, Icmp};
use self::ring::Ring;
use crate::engine::State;
use crate::line_log::Logs;

/// How long a thread waits for news before it looks at what else is to be done.
const PATIENCE: Duration = Duration::from_millis(250);

/// Least time between two readings of the kernel's whole table of connections.
const CATCH_UP: Duration = Duration::from_secs(10);

/// How long to wait before the kernel is listened to again. Another program may hold the group, or the module may be missing.
const RETRY: Duration = Duration::from_secs(10);

/// Flows in one answer.
const MOST: usize = 1000;

/// A kind of flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum FlowKind {
    /// What was denied.
    Denied,
    /// A connection that began or ended.
    Connection,
}

impl FlowKind {
    /// All of them, in the order of [`Totals`].
    pub const ALL: [Self; 2] = [Self::Denied, Self::Connection];

    /// In a word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Denied => "denied",
            Self::Connection => "connection",
        }
    }
}

/// How many flows of each kind there were since the daemon started, in the order of [`FlowKind::ALL`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Recorded.
    pub recorded: [u64; 2],
    /// Not recorded, because the kernel had no room to tell of them or they were not understood.
    pub lost: [u64; 2],
}

/// What kinds of flows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kinds {
    /// What was denied.
    pub denied: bool,
    /// Connections that began or ended.
    pub connections: bool,
}

impl Kinds {
    /// All of them.
    pub const ALL: Self = Self { denied: true, connections: true };
}

/// Flows as the daemon tells them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FlowsReport {
    /// Flows, the oldest first; a bounded number.
    pub flows: Vec<Flow>,
    /// Sequence number of the newest flow that is kept; 0 before the first. Numbers begin at 1 with every daemon.
    pub newest: u64,
    /// There are more of these after the last one.
    pub more: bool,
    /// Records that the kernel had no room for, or that were not understood, since the daemon started.
    pub lost: u64,
    /// Connections that begin and end are recorded now.
    pub listening: bool,
    /// Why nothing is recorded, where that is so.
    pub unavailable: Option<String>,
}

/// The flows that are kept. Clones are of the same.
#[derive(Debug, Clone, Default)]
pub struct Flows {
    ring: Arc<Mutex<Ring>>,
    interest: Arc<Interest>,
}

/// Places in the ring's arrays, as in [`FlowKind::ALL`].
const DENIED: usize = 0;
const CONNECTIONS: usize = 1;

impl Flows {
    /// Has flows logged from now on.
    pub fn log_to(&self, logs: Logs) {
        if logs.wants_connections() {
            self.interest.last();
        }
        self.with(|ring| ring.logs = logs);
    }

    /// Starts to record what is denied, in the calling thread's network namespace, on a thread that ends with the process.
    ///
    /// # Errors
    /// When no thread can be had.
    pub fn record_denied(&self, states: watch::Receiver<State>) -> std::io::Result<()> {
        let flows = self.clone();
        thread::Builder::new().name("husk-flows".into()).spawn(move || {
            loop {
                let Err(error) = flows.listen_to_denied(&states);
                flows.has_failed(DENIED, &error, "denied flows are not recorded, only counted");
                thread::sleep(RETRY);
            }
        })?;
        Ok(())
    }

    /// Records connections that begin and end while somebody wants to know, in the calling thread's network namespace, on a
    /// thread that ends with the process.
    ///
    /// # Errors
    /// When no thread can be had.
    pub fn record_connections(&self, states: watch::Receiver<State>) -> std::io::Result<()> {
        let flows = self.clone();
        thread::Builder::new().name("husk-connections".into()).spawn(move || {
            loop {
                flows.interest.wait();
                let listened = flows.listen_to_connections(&states);
                flows.with(|ring| ring.listening = false);
                if let Err(error) = listened {
                    flows.has_failed(CONNECTIONS, &error, "connections that begin and end are not recorded");
                    thread::sleep(RETRY);
                }
            }
        })?;
        Ok(())
    }

    /// Flows after a sequence number, or the newest. Whoever follows says so: for connections the kernel is listened to only
    /// then.
    #[must_use]
    pub fn report(&self, after: Option<u64>, kinds: Kinds, follow: bool) -> FlowsReport {
        if follow && kinds.connections {
            self.interest.ask();
        }
        self.with(|ring| {
            let wanted = [kinds.denied, kinds.connections].into_iter().zip([DENIED, CONNECTIONS]);
            let wanted: Vec<usize> = wanted.filter(|(wanted, _)| *wanted).map(|(_, place)| place).collect();
            let flows = ring.after(after, MOST + 1, kinds);
            let more = after.is_some() && flows.len() > MOST;
            let first = if after.is_some() { 0 } else { flows.len().saturating_sub(MOST) };
            FlowsReport {
                flows: flows.into_iter().skip(first).take(MOST).collect(),
                newest: ring.newest(),
                more,
                lost: wanted.iter().map(|place| ring.lost[*place]).sum(),
                listening: ring.listening,
                unavailable: wanted.iter().find_map(|place| ring.unavailable[*place].clone()),
            }
        })
    }

    /// How many there were.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.with(|ring| Totals { recorded: ring.recorded, lost: ring.lost })
    }

    /// Keeps a flow that nobody denied.
    #[cfg(test)]
    pub(crate) fn keep(&self, flow: Flow) {
        self.with(|ring| ring.keep(flow));
    }

    fn with<T>(&self, body: impl FnOnce(&mut Ring) -> T) -> T {
        body(&mut self.ring.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn has_failed(&self, place: usize, error: &husk_dataplane::Error, what: &str) {
        let reason = format!("{error}; {}", error.remedy());
        let known = self.with(|ring| ring.unavailable[place].replace(reason.clone()).as_ref() == Some(&reason));
        if !known {
            tracing::warn!(reason, "{what}");
        }
    }

    fn listen_to_denied(&self, states: &watch::Receiver<State>) -> Result<Infallible, husk_dataplane::Error> {
        let mut log = Log::open(marks::NFLOG_GROUP)?;
        let before = self.with(|ring| {
            ring.unavailable[DENIED] = None;
            ring.lost[DENIED]
        });
        loop {
            let heard = log.next(PATIENCE)?;
            let flow = heard.and_then(|logged| {
                // Taken out at once: whoever holds it holds up the loop.
                let cluster = Arc::clone(&states.borrow().cluster);
                Flow::of(&logged, &cluster, Timestamp::now())
            });
            let lost = before + log.lost();
            self.with(|ring| {
                let now = Instant::now();
                ring.lost[DENIED] = lost;
                ring.log_lost(now);
                ring.keep_settled(now);
                if let Some(flow) = flow {
                    ring.take(flow, now);
                }
            });
        }
    }

    /// Listens until nobody wants to know any more.
    fn listen_to_connections(&self, states: &watch::Receiver<State>) -> Result<(), husk_dataplane::Error> {
        let mut states = states.clone();
        let mut pods = Pods::of(&states.borrow_and_update());
        let mut listener = Listener::open()?;
        let mut known = Known::default();
        let (mut caught_up, mut missed) = (Instant::now(), 0);
        known.begin(list(REMEMBERED, |it| pods.have(it))?.connections);
        self.with(|ring| {
            ring.unavailable[CONNECTIONS] = None;
            ring.listening = true;
        });
        while self.interest.is_there() {
            let news = listener.next(PATIENCE)?;
            if states.has_changed().unwrap_or(false) {
                pods = Pods::of(&states.borrow_and_update());
            }
            let now = Timestamp::now();
            let mut lost = 0;
            let mut changes = match news {
                None => Vec::new(),
                Some(News::Began(connection) | News::Ended(connection)) if !pods.have(&connection) => Vec::new(),
                Some(News::Began(connection)) => vec![known.began(connection, now)],
                Some(News::Ended(connection)) => vec![known.ended(connection, now)],
                Some(News::Lost(count)) => {
                    missed += count;
                    Vec::new()
                }
            };
            // Who reads the whole table does not hear what is told meanwhile: done at once for each loss, it would be all that
            // is done.
            if missed > 0 && caught_up.elapsed() >= CATCH_UP {
                caught_up = Instant::now();
                let mut room = known.room();
                let found = list(REMEMBERED, |it| pods.have(it) && known.asks_for(it, &mut room))?;
                let found = known.catch_up(&found, now);
                lost = std::mem::take(&mut missed).saturating_sub(found.len() as u64);
                changes.extend(found);
            }
            let told = |change| Flow::of_connection(change, &pods.cluster, |it| pods.are_local(it), now);
            let flows: Vec<Flow> = changes.iter().map(told).collect();
            self.with(|ring| {
                ring.lost[CONNECTIONS] += lost;
                ring.log_lost(Instant::now());
                flows.into_iter().for_each(|flow| ring.keep(flow));
            });
        }
        // Nobody waits for what would be found by now.
        self.with(|ring| {
            ring.lost[CONNECTIONS] += missed;
            ring.log_lost(Instant::now());
        });
        Ok(())
    }
}

/// Whose connections are told. Taken out of the state: whoever holds that holds up the loop.
struct Pods {
    cluster: Arc<Cluster>,
    /// Where addresses of this node's pods lie.
    blocks: Vec<Prefix>,
    /// Addresses in them that are the node's own.
    router: DualStack,
}

impl Pods {
    fn of(state: &State) -> Self {
        let (blocks, router) = match &state.node_file {
            Some(file) => (file.blocks.clone(), file.router),
            None => (Vec::new(), DualStack::default()),
        };
        Self { cluster: Arc::clone(&state.cluster), blocks, router }
    }

    /// True for a connection of a pod, as far as this node knows; probes between nodes are none.
    fn have(&self, connection: &Tracked) -> bool {
        ends(connection).into_iter().any(|end| self.are_local(end) || self.cluster.owner(end).is_some())
    }

    /// True for an address of a pod of this node, also before its object is known.
    fn are_local(&self, address: IpAddr) -> bool {
        self.blocks.iter().any(|block| block.contains(address)) && !self.router.iter().any(|router| router == address)
    }
}

/// A flow, for tests of others.
#[cfg(test)]
pub(crate) fn example() -> Flow {
    record::tests::flow(5432)
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::process::Command;

    use husk_dataplane::netns::Netns;

    use super::record::tests::cluster;
    use super::*;

    fn run(program: &str, arguments: &[&str]) {
        let output = Command::new(program).args(arguments).output().unwrap();
        assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    #[test]
    fn who_follows_connections_that_the_kernel_was_told_to_keep_quiet_about_hears_so() {
        let world = || {
            run("nft", &["add table inet t; add chain inet t c { type filter hook input priority 0; }"]);
            run("nft", &["add rule inet t c ct state invalid counter"]);
            std::fs::write("/proc/sys/net/netfilter/nf_conntrack_events", "0").unwrap();
            let (_sender, states) = watch::channel(State::default());
            let flows = Flows::default();
            flows.record_connections(states).unwrap();
            let begun = Instant::now();
            loop {
                let report = flows.report(None, Kinds::ALL, true);
                if let Some(reason) = report.unavailable {
                    assert!(reason.contains("sysctl -w net.netfilter.nf_conntrack_events=2"), "{reason}");
                    assert!(!report.listening);
                    break;
                }
                assert!(begun.elapsed() < Duration::from_secs(20), "{report:?}");
                thread::sleep(Duration::from_millis(20));
            }
        };
        Netns::new_unnamed().unwrap().run_in(world).unwrap();
    }

    #[test]
    fn what_the_kernel_denies_is_recorded_with_its_policy() {
        let world = || {
            run("ip", &["link", "set", "lo", "up"]);
            run("ip", &["address", "add", "10.0.0.1/32", "dev", "lo"]);
            let state = State { cluster: Arc::new(cluster(true)), ..State::default() };
            let (_sender, states) = watch::channel(state);
            let flows = Flows::default();
            flows.record_denied(states).unwrap();
            let rule = r#"udp dport 5432 log prefix "husk-denied-ingress" group 72 drop"#;
            run("nft", &["add table inet t; add chain inet t c { type filter hook input priority 0; }"]);
            // Only the first rule's packet counts: the other's prefix is none of ours.
            run("nft", &[&format!("add rule inet t c {rule}")]);
            run("nft", &[r#"add rule inet t c udp dport 5433 log prefix "theirs" group 72 drop"#]);
            let socket = UdpSocket::bind("127.0.0.2:4000").unwrap();
            let begun = Instant::now();
            let mut sent = 0;
            loop {
                let report = flows.report(None, Kinds::ALL, false);
                if let Some(flow) = report.flows.first() {
                    assert_eq!((report.unavailable.as_ref(), report.lost), (None, 0));
                    assert_eq!(flow.reason, "default deny by: shop/db");
                    assert_eq!((flow.source.port, flow.destination.port), (Some(4000), Some(5432)));
                    assert_eq!((flow.protocol.as_str(), flow.sequence), ("UDP", 1));
                    assert!((2..=sent).contains(&flow.count), "{} of {sent}", flow.count);
                    assert!(flows.report(Some(report.newest), Kinds::ALL, false).flows.is_empty());
                    break;
                }
                assert!(begun.elapsed() < Duration::from_secs(20), "{report:?}");
                socket.send_to(b"x", "10.0.0.1:5433").unwrap();
                socket.send_to(b"x", "10.0.0.1:5432").unwrap();
                sent += 1;
                thread::sleep(Duration::from_millis(100));
            }
        };
        Netns::new_unnamed().unwrap().run_in(world).unwrap();
    }
}
