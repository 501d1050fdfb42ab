//! `huskctl keys`: public keys, numbers and counters. No secret.

use std::collections::BTreeSet;
use std::net::IpAddr;

use husk_overlay::esp::Aead;
use husk_overlay::keys::PublicKey;
use husk_overlay::mode::Mode;
use husk_overlay::name::NodeName;
use serde::{Deserialize, Serialize};

use crate::keys::Technology;

/// `huskctl keys status`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct KeysReport {
    /// Mode.
    pub mode: Mode,
    /// What the keys are for.
    pub technology: Technology,
    /// Cipher, for ESP.
    pub cipher: Option<Aead>,
    /// Epochs (for WireGuard: generations) whose keys the node holds, oldest first; at most two.
    pub epochs: Vec<EpochReport>,
    /// Exactly one epoch is held and published, and none is about to begin or end: no rotation is under way.
    pub settled: bool,
    /// Somebody asked for new keys, and there are none yet.
    pub requested: bool,
    /// Why a rotation that is due or was asked for has to wait, if it has to.
    pub waiting: Option<String>,
    /// When the newest key will be replaced for its age; none if age does not count.
    pub due: Option<RotationDue>,
    /// Keys in use with every peer.
    pub peers: Vec<PeerKeysReport>,
    /// Associations of ESP in the kernel.
    pub associations: Vec<AssociationReport>,
}

/// When a key will be replaced for its age: every node and key has another random moment between these two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RotationDue {
    /// Seconds from now; 0 if it may be replaced at any time.
    pub earliest: u64,
    /// Seconds from now; 0 if it should have been replaced.
    pub latest: u64,
}

/// An own epoch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EpochReport {
    /// Number; higher is newer.
    pub epoch: u64,
    /// Public key.
    pub public_key: PublicKey,
    /// Seconds since it was made.
    pub age: u64,
    /// The node's record, as others have it, names it.
    pub published: bool,
    /// Peers known to use it, and those that are yet to.
    pub confirmed: BTreeSet<NodeName>,
    /// Peers it waits for.
    pub unconfirmed: BTreeSet<NodeName>,
}

/// The keys in use with a peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PeerKeysReport {
    /// Peer.
    pub node: NodeName,
    /// Epochs it publishes, oldest first.
    pub published: Vec<u64>,
    /// Own epoch that packets to it are sent with; none while nothing can be sent.
    pub sending_own: Option<u64>,
    /// Its epoch that they are sent with.
    pub sending_peer: Option<u64>,
    /// Newest own epoch that it is known to send with.
    pub confirmed: Option<u64>,
    /// Why it is refused, if it is.
    pub refused: Option<String>,
}

/// Which way an association goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Direction {
    /// From the peer.
    In,
    /// To the peer.
    Out,
}

/// An association of ESP in the kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AssociationReport {
    /// Peer; none for an association that nothing wants any more.
    pub peer: Option<NodeName>,
    /// Direction.
    pub direction: Direction,
    /// Security parameters index.
    pub spi: u32,
    /// Underlay address of the sender.
    pub source: IpAddr,
    /// Underlay address of the receiver.
    pub destination: IpAddr,
    /// Own epoch it belongs to.
    pub own_epoch: Option<u64>,
    /// The peer's epoch it belongs to.
    pub peer_epoch: Option<u64>,
    /// Packets so far.
    pub packets: u64,
    /// Bytes so far.
    pub bytes: u64,
    /// Seconds without a packet; at most as long as this daemon runs.
    pub quiet: u64,
}

/// What became of `huskctl keys rotate`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RotationReport {
    /// What the keys are for.
    pub technology: Technology,
    /// The epoch that was begun; none if it has to wait.
    pub begun: Option<u64>,
    /// The rotation is over when an epoch of at least this number is the only one.
    pub target: u64,
    /// Why it has to wait.
    pub waiting: Option<String>,
}
