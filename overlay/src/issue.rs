//! Issues: what is wrong, found by a pure function, shown to people. A plan never fails; it has issues instead.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How much an issue hurts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum Severity {
    /// Traffic flows as it should; somebody ought to look.
    Warning,
    /// Some traffic does not flow, and is dropped rather than sent in plaintext.
    Error,
    /// The node cannot serve pods: ADD and STATUS say so.
    Blocking,
}

/// Closed set of kinds, for metrics, events and tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "PascalCase")]
pub enum IssueKind {
    /// The own node has no underlay address of the family the tunnels use.
    NoUnderlayAddress,
    /// The cluster CIDR contains an address of this host, or the route to it.
    UnderlayOverlap,
    /// A device, key or kernel feature that the mode needs is missing.
    EncapsulationUnavailable,
    /// Two hosts use the same node name.
    DuplicateNode,
    /// The kernel lacks a family that the cluster has.
    FamilyUnavailable,
    /// Two nodes claim the same block.
    DuplicateBlock,
    /// Two nodes publish the same key.
    DuplicateKey,
    /// Two nodes publish the same address.
    DuplicateAddress,
    /// A block outside the cluster CIDR, or of no known pool.
    ForeignBlock,
    /// A peer's record lacks what the mode needs.
    IncompletePeer,
    /// Nothing that a peer sends can be decrypted.
    KeyMismatch,
    /// A peer's address cannot be reached by any route.
    NoRouteToPeer,
    /// The MTU left for pods is too small.
    MtuTooSmall,
    /// A configured MTU exceeds the underlay's.
    MtuTooLarge,
    /// The path to a peer passes less than the underlay promises.
    PathMtu,
    /// Peers answer no probes that are sent to them through the tunnel.
    PeerSilent,
    /// A firewall of this host drops the probes of paths.
    ProbesDropped,
    /// The VXLAN device does without offload, which is broken.
    BrokenOffload,
    /// No address block could be had.
    PoolExhausted,
    /// Kubernetes has given the node no CIDR.
    NoNodeCidr,
    /// A block with pods in it belongs to somebody else by now, or to nobody.
    BlockLost,
    /// The `Node` object of this node is missing.
    NodeMissing,
    /// The configuration file is bad, and the one before it stays in force.
    BadConfig,
    /// A manifest could not be read.
    BadManifest,
    /// A policy, or another object that policy is made of, could not be understood; what could not is closed.
    BadPolicy,
    /// A lease could not be read, or contradicts another.
    BadLease,
    /// The kernel refused a change.
    ApplyFailed,
    /// Somebody else's firewall may drop packets of pods.
    ForeignFirewall,
    /// Lines of a log of flows or decisions could not be written.
    LogUnwritable,
    /// The cluster source does not answer or has not delivered yet.
    SourceUnavailable,
    /// An address at which the daemon was to serve metrics, or its page, is not to be had.
    ListenFailed,
    /// A part of the daemon has ended, which is a bug.
    Defect,
}

impl IssueKind {
    /// Every other node of the cluster finds this out about the same thing, at about the same time: one node that is unplugged
    /// is one to 4,999 others. To be told where a node is asked, and not where all tell.
    #[must_use]
    pub fn is_seen_by_all(self) -> bool {
        self == Self::PeerSilent
    }
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Issue {
    /// How much it hurts.
    pub severity: Severity,
    /// Kind.
    pub kind: IssueKind,
    /// What it is about: a node, a block, a file, a device.
    pub subject: String,
    /// What is wrong and why, one sentence.
    pub message: String,
    /// What to do about it, one sentence.
    pub remedy: String,
}

impl fmt::Display for Issue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} ({})", self.subject, self.message, self.remedy)
    }
}
