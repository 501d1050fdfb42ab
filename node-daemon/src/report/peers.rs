//! `huskctl peers` and `huskctl diff`

use std::collections::{BTreeMap, BTreeSet};

use husk_overlay::keys::PublicKey;
use husk_overlay::name::NodeName;
use husk_overlay::prefix::{Family, Prefix};
use husk_overlay::probe::Report;
use husk_overlay::record::DualStack;
use serde::{Deserialize, Serialize};

/// How a peer is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum PeerState {
    /// For WireGuard a handshake, for IPsec a packet received within the last three minutes (WireGuard gives a session up
    /// after 180 s: `REJECT_AFTER_TIME`).
    Connected,
    /// Configured; there was no traffic yet, or none for long.
    Idle,
    /// Nothing can be sent to it yet: the keys that both sides need are not published or not installed.
    Waiting,
    /// Configured, in a mode without handshakes.
    Configured,
    /// Not configured: see the reason.
    Refused,
}

/// A row of `huskctl peers`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PeerReport {
    /// Node name.
    pub node: NodeName,
    /// State.
    pub state: PeerState,
    /// Why it is refused.
    pub reason: Option<String>,
    /// Underlay address and port packets go to.
    pub endpoint: Option<String>,
    /// Public key, in modes that have one.
    pub public_key: Option<PublicKey>,
    /// Seconds since the last handshake.
    pub handshake_age: Option<u64>,
    /// For IPsec: seconds since the last packet was received from it; at most as long as this daemon runs.
    pub received_age: Option<u64>,
    /// Bytes received from it through the tunnel, under the keys there are now.
    pub received: Option<u64>,
    /// Bytes sent to it through the tunnel, likewise.
    pub sent: Option<u64>,
    /// MTU in bytes of the routes to it.
    pub mtu: Option<u32>,
    /// What probing found of the paths to it, by family of the packets inside the tunnel.
    #[serde(default)]
    pub paths: BTreeMap<Family, Report>,
    /// Its own addresses inside the overlay.
    #[serde(default)]
    pub router: DualStack,
    /// Blocks routed to it.
    pub blocks: BTreeSet<Prefix>,
}

/// A line of `huskctl diff`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DiffReport {
    /// What the next pass would change, in the order it would.
    pub changes: Vec<String>,
}
