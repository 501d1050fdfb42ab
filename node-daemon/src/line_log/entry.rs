//! What a line says. One form for all logs; see docs/flows.md.

use std::collections::BTreeSet;
use std::net::IpAddr;

use husk_overlay::issue::Issue;
use husk_overlay::mode::Mode;
use husk_overlay::name::NodeName;
use husk_overlay::rotation::Cause;
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::flows::{Flow, FlowKind, FlowVerdict};
use crate::keys::Technology;

/// A line of a log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LogLine {
    /// When it was told (RFC 3339).
    #[schemars(with = "String")]
    pub time: Timestamp,
    /// Node name.
    pub node: NodeName,
    /// What happened.
    #[serde(flatten)]
    pub entry: Entry,
}

/// What a line is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "camelCase")]
pub enum Entry {
    /// Traffic.
    Flow {
        /// What became of it.
        event: FlowVerdict,
        /// As `huskctl flows --output json` has it.
        flow: Box<Flow>,
    },
    /// A decision.
    Audit(Event),
}

/// A decision of a person or of the daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "event", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Event {
    /// The daemon runs. Pods and peers it knew then are those of the lines before, as far as these go.
    DaemonStarted {
        /// Its version.
        version: String,
        /// Process id.
        pid: u32,
        /// Encapsulation.
        mode: Mode,
        /// SHA-256 of the text of the configuration in force, in hexadecimal digits.
        configuration: String,
    },
    /// The daemon ends; the data plane stays.
    DaemonStopped {
        /// Why: a signal, or a new configuration.
        reason: String,
    },
    /// The configuration file has changed, and what it says now is taken into use: the daemon starts anew.
    ConfigurationTaken {
        /// The file.
        file: String,
    },
    /// A pod was let onto the network.
    PodAdmitted {
        /// Namespace and name.
        pod: String,
        /// Its addresses.
        addresses: Vec<IpAddr>,
        /// The runtime's container id.
        container: String,
        /// Its host interface.
        interface: String,
    },
    /// A pod's addresses were given back.
    PodReleased {
        /// Namespace and name.
        pod: String,
        /// Its addresses.
        addresses: Vec<IpAddr>,
        /// The runtime's container id.
        container: String,
    },
    /// A node has come to the cluster, or one that was refused is accepted.
    PeerJoined {
        /// Node name.
        peer: NodeName,
        /// Its underlay addresses.
        addresses: BTreeSet<IpAddr>,
    },
    /// A node has left the cluster.
    PeerLeft {
        /// Node name.
        peer: NodeName,
    },
    /// Nothing is sent to a node of the cluster.
    PeerRefused {
        /// Node name.
        peer: NodeName,
        /// Why.
        reason: String,
    },
    /// A key was made; for all but the first one that is the start of a rotation.
    KeyMade {
        /// What it is for.
        technology: Technology,
        /// Its epoch, for WireGuard its generation.
        epoch: u64,
        /// Why.
        cause: Cause,
    },
    /// A key was destroyed: the end of a rotation.
    KeyDestroyed {
        /// What it was for.
        technology: Technology,
        /// Its epoch, for WireGuard its generation.
        epoch: u64,
    },
    /// Somebody asked for new keys.
    KeyRotationAsked {
        /// Who.
        by: Client,
    },
    /// A pod was cut off.
    QuarantineSet {
        /// The pod as it was named.
        pod: String,
        /// Who asked for it.
        by: Client,
    },
    /// A pod that was cut off was let onto the network again.
    QuarantineReleased {
        /// The pod as it was named.
        pod: String,
        /// Who asked for it.
        by: Client,
    },
    /// Something is wrong.
    IssueRaised {
        /// What.
        issue: Issue,
    },
    /// It is no longer wrong.
    IssueCleared {
        /// What was.
        issue: Issue,
    },
    /// Flows that are missing at this place of this log, because more came than the kernel had room to tell of.
    FlowsLost {
        /// Which ones.
        flows: FlowKind,
        /// Their number.
        count: u64,
    },
    /// Lines that are missing at this place of this log, because they came too fast or the disk had no room.
    LinesLost {
        /// Their number.
        count: u64,
    },
}

/// Who asked the daemon's socket.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Client {
    /// User id, as the kernel vouches for it (unix(7), `SO_PEERCRED`).
    pub uid: Option<u32>,
    /// Process id, likewise.
    pub pid: Option<i32>,
    /// Name of the process, as it calls itself.
    pub command: Option<String>,
    /// User id that the session was opened with, which sudo and su leave as it is (`/proc/PID/loginuid`); none for services.
    pub login_uid: Option<u32>,
}

/// `/proc/PID/loginuid` of a process that belongs to no session.
const NOBODY: u32 = u32::MAX;

impl Client {
    /// What is known of the process at the other end of a socket. It may have ended, and its number may belong to another by
    /// now, so that only `uid` and `pid` are certain.
    #[must_use]
    pub fn of(uid: u32, pid: Option<i32>) -> Self {
        let read = |name: &str| {
            let text = std::fs::read_to_string(format!("/proc/{}/{name}", pid?)).ok()?;
            Some(text.trim_end().to_owned())
        };
        let login_uid = read("loginuid").and_then(|text| text.parse().ok()).filter(|uid| *uid != NOBODY);
        Self { uid: Some(uid), pid, command: read("comm"), login_uid }
    }
}
