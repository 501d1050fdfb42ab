//! `huskctl mtu`: where the bytes of a full-sized packet go, and where their number comes from.

use std::collections::BTreeMap;
use std::net::IpAddr;

use husk_overlay::issue::Severity;
use husk_overlay::mode::Mode;
use husk_overlay::mtu::Ledger;
use husk_overlay::name::{InterfaceName, NodeName};
use husk_overlay::prefix::Family;
use serde::{Deserialize, Serialize};

/// Who limits the underlay's packets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", tag = "origin")]
pub enum MtuOrigin {
    /// MTU of the interface that carries the own underlay address.
    Interface {
        /// Its name.
        interface: InterfaceName,
    },
    /// MTU of another interface, by which the own host's route to the peer leaves.
    Route {
        /// Its name.
        interface: InterfaceName,
    },
    /// The `mtu` attribute of the own host's route to the peer.
    RouteAttribute {
        /// Interface that the route leaves by.
        interface: InterfaceName,
    },
    /// What a router on the way to the peer said that it takes.
    Router {
        /// Interface that the route leaves by.
        interface: InterfaceName,
    },
    /// `underlay.mtu` of the own configuration.
    Configuration,
    /// What the peer has published of itself.
    PeerRecord,
}

/// A limit of the underlay's packets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MtuSource {
    /// Whose.
    #[serde(flatten)]
    pub origin: MtuOrigin,
    /// Bytes of a whole underlay packet.
    pub bytes: u32,
}

/// What does not go together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum MismatchKind {
    /// The underlays of the two nodes differ; each peer gets its own value, nothing is lost.
    UnderlayDiffers,
    /// The route to the peer carries less than the interface does, or than the peer's underlay.
    RouteSmaller,
    /// The configured MTU exceeds the underlay's, and is not used.
    ConfiguredTooLarge,
    /// The underlay leaves less than a family needs, which is refused.
    TooSmall,
    /// The path swallows packets that the underlay promised to carry.
    PathLimited,
}

/// Something that does not go together, with its remedy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MtuMismatch {
    /// How much it hurts, as in `huskctl status`.
    pub severity: Severity,
    /// Kind.
    pub kind: MismatchKind,
    /// What, one sentence.
    pub message: String,
    /// What to do about it, one sentence.
    pub remedy: String,
}

/// A row of `huskctl mtu`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MtuReport {
    /// Peer, or the own node for what pods get.
    pub node: NodeName,
    /// True for the own node.
    pub own: bool,
    /// Underlay address.
    pub address: Option<IpAddr>,
    /// Where the bytes go.
    pub ledger: Ledger,
    /// All that limits the underlay's packets; the smallest is the ledger's underlay MTU.
    #[serde(default)]
    pub sources: Vec<MtuSource>,
    /// Bytes of the largest packet of a pod that passes the path, where that is less than the ledger says.
    #[serde(default)]
    pub probed: Option<u32>,
    /// MTU in bytes of the routes to the node; for the own node that of its pods' interfaces.
    #[serde(default)]
    pub mtu: Option<u32>,
    /// What does not go together.
    #[serde(default)]
    pub mismatches: Vec<MtuMismatch>,
}

/// A row of `huskctl mtu --what-if`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WhatIfReport {
    /// Mode.
    pub mode: Mode,
    /// Where the bytes go; its outer headers are of the family that was asked for.
    pub ledger: Ledger,
    /// Families whose packets would be refused, and why.
    pub refused: BTreeMap<Family, String>,
}
