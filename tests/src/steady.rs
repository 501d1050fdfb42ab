//! What must not notice anything: traffic between two pods, and the tunnel device of a host with its sessions.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_overlay::marks;
use husk_overlay::prefix::Family;
use serde_json::Value;

use crate::host::Host;
use crate::patience;
use crate::pod::Pod;
use crate::probe::{Echo, EchoServer, Stream, tcp};

/// Pings per second, in each direction of the first family.
const PINGS: u32 = 1000;

/// Bytes per second of the TCP stream.
const BYTES: u32 = 1_000_000;

/// The longest that the TCP stream may stand still: far below the first retransmission timeouts of a connection whose
/// packets are lost for good, far above what a busy machine takes to run a thread.
const LONGEST_STALL: Duration = Duration::from_secs(1);

/// Pings over both families and a TCP stream between two pods, of which nothing may be lost.
#[derive(Debug)]
pub struct Steady {
    pings: Vec<Stream>,
    flow: tcp::Flow,
    _server: EchoServer,
}

impl Steady {
    /// Starts the traffic, once the pods reach each other.
    ///
    /// # Errors
    /// When they do not.
    pub fn between(one: &Pod, other: &Pod) -> Result<Self> {
        for family in Family::ALL {
            let reach = Echo::to(other.address(family)?).run(one.netns())?;
            ensure!(reach.arrived(), "{} does not reach {} over {family}: {reach:?}", one.name(), other.name());
        }
        let server = EchoServer::start(other.netns())?;
        let to: SocketAddr = server.at(other.address(Family::Ipv6)?);
        let flow = tcp::Flow::start(one.netns(), to, BYTES)?;
        let pings = vec![
            Stream::ping(one.netns(), other.address(Family::Ipv4)?, PINGS)?,
            Stream::ping(other.netns(), one.address(Family::Ipv6)?, PINGS / 10)?,
        ];
        Ok(Self { pings, flow, _server: server })
    }

    /// Ends the traffic.
    ///
    /// # Errors
    /// When a packet was lost, or the TCP stream broke or stood still.
    pub fn finish(self) -> Result<()> {
        for stream in self.pings {
            let report = stream.stop()?;
            ensure!(report.lossless(), "the steady ping was disturbed: {report}");
        }
        let flow = self.flow.stop().context("the steady TCP stream was disturbed")?;
        ensure!(
            flow.bytes > 0 && flow.largest_stall < patience(LONGEST_STALL),
            "the steady TCP stream was disturbed: {flow:?}"
        );
        Ok(())
    }
}

/// A host's tunnel device, and of WireGuard the time of the last handshake with each peer: a device that was made anew or a
/// peer that was set up again shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tunnel {
    /// Index of the device; no device ever gets the same again.
    pub index: u64,
    /// Public key of the peer and time of its last handshake, in seconds since the Unix epoch.
    pub handshakes: BTreeMap<String, u64>,
}

impl Tunnel {
    /// Looks at the tunnel device of a host.
    ///
    /// # Errors
    /// When it has none.
    pub fn of(host: &Host) -> Result<Self> {
        let links = host.netns().ip_json(["link", "show"])?;
        let named = |link: &&Value| link["ifname"].as_str().is_some_and(marks::is_tunnel_interface);
        let link = links.as_array().into_iter().flatten().find(named);
        let link = link.with_context(|| format!("{} has no tunnel device", host.name()))?;
        let name = link["ifname"].as_str().unwrap_or_default();
        let mut handshakes = BTreeMap::new();
        if marks::WIREGUARD_INTERFACES.contains(&name) {
            let listed = host.program("wg").args(["show", name, "latest-handshakes"]).check()?;
            for line in listed.lines() {
                let (key, time) = line.split_once('\t').context("wg prints a key, a tab and a time")?;
                handshakes.insert(key.to_owned(), time.parse()?);
            }
        }
        Ok(Self { index: link["ifindex"].as_u64().context("a device without an index")?, handshakes })
    }
}

/// What `huskctl status` finds wrong on a host: kind, subject and message of each issue.
///
/// # Errors
/// When the daemon does not answer.
pub fn issues(host: &Host) -> Result<Vec<(String, String, String)>> {
    let status = host.huskctl_json(["status"])?;
    let text = |issue: &Value, key: &str| issue[key].as_str().unwrap_or_default().to_owned();
    let listed = status["issues"].as_array().context("a status without issues")?;
    Ok(listed.iter().map(|issue| (text(issue, "kind"), text(issue, "subject"), text(issue, "message"))).collect())
}
