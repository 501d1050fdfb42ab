//! Probing: whether packets of the size that the plan promises pass the path to a peer, and if not, which do.
//!
//! A router that swallows packets too big for it, without a word, makes a *black hole*: small packets pass, so that
//! connections are made, and then stall for good. Nobody but the end of the path can tell. A node therefore sends
//! full-sized packets to every peer through the tunnel, and the peer answers each with a small one ([`wire`]), so that only
//! the way there is judged: the peer judges the other one.
//!
//! [`Prober`] decides what to send and what an answer, or none, means. It has no socket and no clock: `now` is time since
//! boot, handed in.

mod chance;
mod clock;
mod pace;
mod phase;
mod prober;
mod search;
mod sessions;
mod statistics;
mod suspicion;
mod track;
pub mod wire;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use clock::ClockSkew;
pub use prober::Prober;

use crate::name::NodeName;
use crate::prefix::Family;

/// Most probes a node sends within any second. The peers together send it as many, on the average over the cluster, and both
/// sorts are answered: 160 packets per second. What handshakes cost comes off these ([`Target::handshakes`]).
pub const PROBES_PER_SECOND: u32 = 40;

/// What is probed on its own.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Path {
    /// To whom.
    pub peer: NodeName,
    /// Family of the packets inside the tunnel.
    pub family: Family,
}

/// What to probe, and what is known of it without probing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Target {
    /// Where the peer answers.
    pub address: IpAddr,
    /// Own address to send from.
    pub own: IpAddr,
    /// Bytes of the largest packet that the plan says passes, its IP header included.
    pub promised: u32,
    /// Bytes below which no limit is looked for: hosts rely on this much (1280 for IPv6, 576 for IPv4).
    pub floor: u32,
    /// All families of the peer go the same way, since one tunnel carries them: what is found of one holds for the others.
    pub tunnelled: bool,
    /// A probe may cost a handshake with the peer before it (WireGuard).
    pub handshakes: bool,
}

/// Less than what is promised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Limit {
    /// Bytes of the largest packet to send.
    pub bytes: u32,
    /// Larger ones were seen to vanish. Else more is promised than was so far, and is yet to be verified.
    pub found: bool,
}

/// Limits of the paths to peers, by family of the probes.
pub type Limits = BTreeMap<NodeName, BTreeMap<Family, Limit>>;

/// A probe to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shot {
    /// Path it is for.
    pub path: Path,
    /// Own address to send from.
    pub own: IpAddr,
    /// Where to.
    pub target: SocketAddr,
    /// Bytes of the whole packet, IP header included.
    pub size: u32,
    /// What the answer is known by.
    pub id: u64,
}

/// What is known of a path.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", tag = "state")]
pub enum Standing {
    /// Nothing yet.
    #[default]
    Unknown,
    /// What is promised passes.
    Verified,
    /// What is promised does not pass; what does is being looked for.
    Searching {
        /// Bytes of the largest packet that was answered; 0 if none of the floor's size or larger was.
        passes: u32,
        /// Bytes of the smallest packet that is known not to pass, or one more than promised.
        fails: u32,
    },
    /// Less passes than is promised.
    Limited {
        /// Bytes of the largest packet that passes; less than the floor ([`Target::floor`]) if not even that does.
        passes: u32,
    },
    /// Small packets are not answered either, which says nothing about sizes.
    Unreachable,
}

/// What is to be told about a path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// What is known of it.
    pub standing: Standing,
    /// Bytes of the largest packet that the plan says passes.
    pub promised: u32,
    /// Bytes of the largest packet known to pass; none while nothing is known.
    pub passes: Option<u32>,
    /// Round-trip time, smoothed (RFC 6298, section 2).
    pub rtt: Option<Duration>,
    /// Of a thousand exchanges with sizes that pass, how many failed lately.
    pub loss_per_mille: Option<u16>,
    /// How the peer's wall clock differs from the own one, by its last answer; none while it has told no time.
    #[serde(default)]
    pub clock_skew: Option<ClockSkew>,
    /// Probes sent so far.
    pub sent: u64,
    /// Probes answered so far.
    pub answered: u64,
    /// Since when it has stood like this, as time since boot.
    pub since: Duration,
    /// When it was last concluded what passes, or that nothing does, as time since boot; none before the first time. What was
    /// asked for with [`Prober::demand`] is done when this is later.
    pub concluded: Option<Duration>,
}

#[cfg(test)]
mod tests;
