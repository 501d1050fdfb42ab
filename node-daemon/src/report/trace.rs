//! `huskctl trace`

use std::net::{IpAddr, SocketAddr};

use husk_overlay::name::{InterfaceName, NodeName};
use husk_overlay::prefix::Prefix;
use husk_policy::compile::path::Path;
use husk_policy::object::{Direction, ObjectName};
use husk_policy::verdict::{Connection, Side, Verdict};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `huskctl trace`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TraceReport {
    /// The connection.
    pub connection: Connection,
    /// Who begins it.
    pub source: TraceEnd,
    /// Who answers.
    pub destination: TraceEnd,
    /// The verdict of both sides, as far as this node knows what the other one will say.
    pub verdict: Verdict,
    /// Egress, then ingress.
    pub sides: Vec<TraceSide>,
    /// What the packet passes, in this order; what has no part in this connection is there too.
    #[serde(default)]
    pub hops: Vec<Hop>,
    /// The first hop that is broken; none if none is.
    #[serde(default)]
    pub broken: Option<HopName>,
    /// The other node that the packets go to, or come from.
    #[serde(default)]
    pub peer: Option<TracePeer>,
    /// What was asked for, where that is an address that the kernel makes another; all else is about that other one.
    #[serde(default)]
    pub translated: Option<Translation>,
    /// Where its packets cross this node; none if they do not, or do not get that far.
    #[serde(default)]
    pub crossing: Option<Crossing>,
}

/// Where packets of a connection cross this node, as packet filters of the host see them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Crossing {
    /// Interface that they come by; none if this node sends them itself.
    pub input: Option<InterfaceName>,
    /// Interface that they leave by; none if they are for this node itself.
    pub output: Option<InterfaceName>,
    /// Packets of the tunnel that carry them between the nodes; none where they go as they are.
    pub carrier: Option<Carrier>,
    /// Address ranges of pods and nodes in the overlay.
    pub cluster_cidrs: Vec<Prefix>,
}

/// Packets of a tunnel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Carrier {
    /// Underlay interface that they leave by.
    pub interface: InterfaceName,
    /// This node's underlay address.
    pub own: Option<IpAddr>,
    /// The other node's.
    pub peer: IpAddr,
    /// IANA protocol number.
    pub protocol: u8,
    /// UDP port at which this node receives them; none for a protocol without ports.
    pub own_port: Option<u16>,
    /// The other node's.
    pub peer_port: Option<u16>,
}

/// A destination that is translated, as a Service's address is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Translation {
    /// Address and port that were asked for.
    pub from: SocketAddr,
    /// Where they lead.
    pub to: SocketAddr,
    /// Connections that went there, of those that this node tracks.
    pub connections: u64,
    /// Tracked connections to what was asked for, wherever they went.
    pub of: u64,
    /// The source that they have behind it, where that is another by then: what the other end and its policy see.
    #[serde(default)]
    pub masqueraded: Option<IpAddr>,
}

/// The other node of a connection between two.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TracePeer {
    /// Its name.
    pub node: NodeName,
    /// Where its daemon answers inside the tunnel; none where that is not known.
    pub inside: Option<IpAddr>,
    /// Its underlay address.
    pub underlay: Option<IpAddr>,
    /// UDP port of its tunnel, in modes that have one.
    pub port: Option<u16>,
}

/// Something that a packet passes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Hop {
    /// What.
    pub name: HopName,
    /// Whether packets pass it.
    #[serde(flatten)]
    pub standing: HopStanding,
    /// What was looked at, one phrase each.
    pub evidence: Vec<String>,
}

/// What a packet passes, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum HopName {
    /// The pod or host that begins.
    Source,
    /// Its address is its own.
    Antispoofing,
    /// Policy on what it sends.
    EgressPolicy,
    /// The route of the packet on this node.
    Route,
    /// Whether packets of that size pass.
    Mtu,
    /// Husk's own rules against leaks on this node.
    Firewall,
    /// Packet filters of others on this node.
    OtherFirewalls,
    /// The tunnel to the other node: device, peer, keys.
    Tunnel,
    /// The way of the tunnel's own packets.
    Underlay,
    /// Address translation.
    Nat,
    /// What probing found of the path between the nodes.
    Probe,
    /// Policy on what the other end receives.
    IngressPolicy,
    /// The pod or host that answers.
    Destination,
}

impl std::fmt::Display for HopName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Source => "source",
            Self::Antispoofing => "antispoofing",
            Self::EgressPolicy => "egress policy",
            Self::Route => "route",
            Self::Mtu => "MTU",
            Self::Firewall => "firewall",
            Self::OtherFirewalls => "other firewalls",
            Self::Tunnel => "tunnel",
            Self::Underlay => "underlay",
            Self::Nat => "NAT",
            Self::Probe => "live probe",
            Self::IngressPolicy => "ingress policy",
            Self::Destination => "destination",
        })
    }
}

/// Whether packets pass a hop.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", tag = "standing")]
pub enum HopStanding {
    /// They do.
    Passes,
    /// They do not.
    Broken {
        /// Why not, one sentence.
        cause: String,
        /// What to do about it, one sentence.
        remedy: String,
        /// The same as commands for a shell, in order; none where it takes more than commands.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        commands: Vec<String>,
    },
    /// This node cannot tell.
    Unknown {
        /// Why not, and who can, one sentence.
        why: String,
    },
    /// It has no part in this connection.
    NotHere,
}

/// An end of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TraceEnd {
    /// Address.
    pub address: IpAddr,
    /// The pod that has it.
    pub pod: Option<ObjectName>,
    /// What it is.
    pub place: Place,
}

/// What an address is, seen from this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase", tag = "is")]
pub enum Place {
    /// Of a pod of this node.
    PodHere,
    /// Of a pod of another node.
    PodElsewhere {
        /// Its node, where it is known.
        node: Option<String>,
    },
    /// This node's own.
    ThisNode,
    /// Another node's own.
    OtherNode {
        /// Its name.
        node: String,
    },
    /// Nobody's in the cluster.
    External,
}

/// One side of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TraceSide {
    /// Which side.
    pub direction: Direction,
    /// Who decides.
    pub decider: Decider,
    /// What policy says, with every rule that was asked; also for a pod of another node, as that node should see it.
    pub side: Side,
    /// What the rules in the kernel say.
    pub live: Live,
}

/// Who decides on a side.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase", tag = "is")]
pub enum Decider {
    /// This node.
    ThisNode,
    /// Another node; what is said of it here is what it should say.
    OtherNode {
        /// Its name, where it is known.
        node: Option<String>,
    },
    /// Nobody: a node's own traffic with its pods is always allowed.
    Host,
    /// Nobody: the address is no pod's, or a pod talks with itself.
    Nobody,
    /// Nobody: policy is not enforced (`policy.enabled`).
    Disabled,
}

/// What the rules in the kernel say of a side.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase", tag = "is")]
pub enum Live {
    /// The same.
    Agrees {
        /// How they come to it.
        path: Path,
    },
    /// Something else.
    Differs {
        /// How they come to it.
        path: Path,
    },
    /// They could not be read.
    Unreadable {
        /// Why.
        reason: String,
    },
    /// They are not on this node, or have no part in it.
    NotHere,
}
