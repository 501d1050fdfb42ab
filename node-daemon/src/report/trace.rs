//! `huskctl trace`

use std::net::IpAddr;

use husk_policy::compile::path::Path;
use husk_policy::object::{Direction, ObjectName};
use husk_policy::verdict::{Connection, Side, Verdict};
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
