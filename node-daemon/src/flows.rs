//! Flows: the packets that policy denied, as the kernel tells of them, with the pods and the policy behind them.
//!
//! A thread of its own listens, names and keeps; the loop has no part in it, and nobody who asks for flows waits for the loop.
//! The kernel's rule bounds how many packets it tells of; its counters count all.

mod record;
mod ring;

use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use husk_dataplane::nflog::Log;
use husk_overlay::marks;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

pub use self::record::{Flow, FlowEnd, FlowVerdict, Icmp};
use self::ring::Ring;
use crate::engine::State;

/// How long the thread waits for a packet before it looks at what else is to be done.
const PATIENCE: Duration = Duration::from_millis(250);

/// How long to wait before the log is opened again. Another program may hold the group, or the module may be missing.
const RETRY: Duration = Duration::from_secs(10);

/// Flows in one answer.
const MOST: usize = 1000;

/// Flows as the daemon tells them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FlowsReport {
    /// Flows, the oldest first; a bounded number.
    pub flows: Vec<Flow>,
    /// Sequence number of the newest flow that is kept; 0 before the first. Numbers begin at 1 with every daemon.
    pub newest: u64,
    /// Records that the kernel had no room for, or that were not understood, since the daemon started.
    pub lost: u64,
    /// Why nothing is recorded, where that is so.
    pub unavailable: Option<String>,
}

/// The flows that are kept. Clones are of the same.
#[derive(Debug, Clone, Default)]
pub struct Flows(Arc<Mutex<Ring>>);

impl Flows {
    /// Starts to record, in the calling thread's network namespace, on a thread that ends with the process.
    ///
    /// # Errors
    /// When no thread can be had.
    pub fn record(&self, states: watch::Receiver<State>) -> std::io::Result<()> {
        let flows = self.clone();
        thread::Builder::new().name("husk-flows".into()).spawn(move || {
            loop {
                let Err(error) = flows.listen(&states);
                let reason = error.to_string();
                let known = flows.with(|ring| ring.unavailable.replace(reason.clone()).as_ref() == Some(&reason));
                if !known {
                    tracing::warn!(reason, "denied flows are not recorded, only counted");
                }
                thread::sleep(RETRY);
            }
        })?;
        Ok(())
    }

    /// Flows after a sequence number, or the newest.
    #[must_use]
    pub fn report(&self, after: Option<u64>) -> FlowsReport {
        self.with(|ring| FlowsReport {
            flows: ring.after(after, MOST),
            newest: ring.newest(),
            lost: ring.lost,
            unavailable: ring.unavailable.clone(),
        })
    }

    /// Keeps a flow that nobody denied.
    #[cfg(test)]
    pub(crate) fn keep(&self, flow: Flow) {
        self.with(|ring| ring.keep(flow));
    }

    fn with<T>(&self, body: impl FnOnce(&mut Ring) -> T) -> T {
        body(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn listen(&self, states: &watch::Receiver<State>) -> Result<std::convert::Infallible, husk_dataplane::Error> {
        let mut log = Log::open(marks::NFLOG_GROUP)?;
        let before = self.with(|ring| {
            ring.unavailable = None;
            ring.lost
        });
        loop {
            let heard = log.next(PATIENCE)?;
            let flow = heard.and_then(|logged| {
                // Taken out at once: whoever holds it holds up the loop.
                let cluster = Arc::clone(&states.borrow().cluster);
                Flow::of(&logged, &cluster, jiff::Timestamp::now())
            });
            let lost = before + log.lost();
            self.with(|ring| {
                let now = Instant::now();
                ring.lost = lost;
                ring.keep_settled(now);
                if let Some(flow) = flow {
                    ring.take(flow, now);
                }
            });
        }
    }
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
    fn what_the_kernel_denies_is_recorded_with_its_policy() {
        let world = || {
            run("ip", &["link", "set", "lo", "up"]);
            run("ip", &["address", "add", "10.0.0.1/32", "dev", "lo"]);
            let state = State { cluster: Arc::new(cluster(true)), ..State::default() };
            let (_sender, states) = watch::channel(state);
            let flows = Flows::default();
            flows.record(states).unwrap();
            let rule = r#"udp dport 5432 log prefix "husk-denied-ingress" group 72 drop"#;
            run("nft", &["add table inet t; add chain inet t c { type filter hook input priority 0; }"]);
            // Only the first rule's packet counts: the other's prefix is none of ours.
            run("nft", &[&format!("add rule inet t c {rule}")]);
            run("nft", &[r#"add rule inet t c udp dport 5433 log prefix "theirs" group 72 drop"#]);
            let socket = UdpSocket::bind("127.0.0.2:4000").unwrap();
            let begun = Instant::now();
            let mut sent = 0;
            loop {
                let report = flows.report(None);
                if let Some(flow) = report.flows.first() {
                    assert_eq!((report.unavailable.as_ref(), report.lost), (None, 0));
                    assert_eq!(flow.reason, "default deny by: shop/db");
                    assert_eq!((flow.source.port, flow.destination.port), (Some(4000), Some(5432)));
                    assert_eq!((flow.protocol.as_str(), flow.sequence), ("UDP", 1));
                    assert!((2..=sent).contains(&flow.count), "{} of {sent}", flow.count);
                    assert!(flows.report(Some(report.newest)).flows.is_empty());
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
