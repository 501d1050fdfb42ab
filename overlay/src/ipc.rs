//! What daemon and plugin tell each other: the file `/run/husk/node.json` and the messages on `/run/husk/daemon.sock`.
//!
//! A message is a 32-bit big-endian length followed by that many bytes of JSON.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::endpoint::AttachmentId;
use crate::issue::Issue;
use crate::name::{InterfaceName, NodeName};
use crate::prefix::{Family, Prefix};
use crate::record::DualStack;

/// Version of `node.json` and of the messages; plugin and daemon of different versions refuse each other with a reason.
pub const VERSION: u32 = 1;

/// Largest message in bytes: room for the status of a 5,000-node cluster.
pub const MAX_MESSAGE: u32 = 16 << 20;

/// File name of the node file below the run directory.
pub const NODE_FILE: &str = "node.json";

/// File name of the daemon's socket below the run directory.
pub const SOCKET_FILE: &str = "daemon.sock";

/// Directory of leases below the run directory.
pub const LEASE_DIRECTORY: &str = "leases";

/// The daemon's word to the plugin: all it needs to wire a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeFile {
    /// [`VERSION`]
    pub version: u32,
    /// Boot id of the kernel (`/proc/sys/kernel/random/boot_id`) the file was written under.
    pub boot_id: String,
    /// MTU in bytes of pod interfaces.
    pub pod_mtu: u32,
    /// Blocks pods get addresses from, in the order they were allocated.
    pub blocks: Vec<Prefix>,
    /// Families every pod gets an address of.
    pub families: BTreeSet<Family>,
    /// Addresses within the blocks that no pod may get: the node's own.
    pub router: DualStack,
    /// Cluster CIDRs.
    pub cluster_cidrs: Vec<Prefix>,
    /// Seconds an address rests before it is used again.
    pub cool_down: u32,
    /// UDP ports of the host that no pod may have: the node's tunnels listen there.
    #[serde(default)]
    pub tunnel_ports: BTreeSet<u16>,
}

/// What the plugin or `huskctl` asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "request")]
pub enum Request {
    /// A pod was wired: answer when it is admitted.
    Admit {
        /// Which one.
        id: AttachmentId,
    },
    /// A pod is to be deleted: answer when its interface is gone, and go on waiting for the kernel to forget it.
    Detach {
        /// Name of its host interface.
        interface: InterfaceName,
        /// Index of that interface: another one that gets its name later is not meant.
        index: u32,
    },
    /// A pod's addresses were released: a wake-up, nothing is waited for.
    Released,
    /// An ADD or DEL of the plugin is over; nothing is waited for. Of a DEL it is a wake-up, too, as [`Request::Released`] is.
    Ended {
        /// Which command it was.
        command: Attaching,
        /// Microseconds from the start of the plugin's process.
        microseconds: u64,
        /// Error code that the runtime is told (CNI specification, section 5); none if all went well.
        error: Option<u32>,
    },
    /// No address is left: answer when `node.json` has another block of each of these families.
    Blocks {
        /// Families that ran out.
        families: BTreeSet<Family>,
    },
    /// Can ADD work?
    Ready,
    /// Which network namespace the daemon is in: a [`crate::endpoint::NetnsIdentity`].
    NetworkNamespace,
    /// Everything `huskctl status` prints.
    Status,
    /// Everything `huskctl peers` prints.
    Peers,
    /// What `huskctl top` makes rates of.
    Top,
    /// Everything `huskctl mtu` prints.
    Mtu,
    /// What probing found: all paths, a list of [`crate::probe::Path`] with [`crate::probe::Report`].
    Probes,
    /// The same of the paths to one peer.
    ProbesOf {
        /// Node name.
        peer: NodeName,
    },
    /// Probe the paths to a peer now, and look for what passes anew: answered when it is begun.
    ProbePeer {
        /// Node name.
        peer: String,
    },
    /// What the next pass would change.
    Diff,
    /// Pools, blocks and leases.
    Ipam,
    /// Everything `huskctl keys status` prints.
    Keys,
    /// New keys, now: answer when they are begun, or with what they have to wait for.
    RotateKeys,
    /// Everything `huskctl policy list` prints.
    Policy,
    /// The rules of a pod.
    PolicyOf {
        /// Namespace and name, name alone in the namespace `default`, or an address.
        pod: String,
    },
    /// What becomes of a connection, and why.
    Trace {
        /// Who begins it: a pod by name as above, an address, the name of a node, or `host` for this one.
        source: String,
        /// Whom it is for, alike.
        destination: String,
        /// IANA protocol number.
        protocol: u8,
        /// Port of whom it is for; none for protocols without.
        port: Option<u16>,
        /// Bytes of a packet of it, IP header included; none means any.
        #[serde(default)]
        size: Option<u32>,
    },
    /// Where the packets of somebody are to be seen.
    Capture {
        /// A pod of this node by name as above or by an address, the name of another node, or `host` for this one.
        target: String,
    },
    /// Flows that were recorded.
    Flows {
        /// Those after this sequence number, the oldest first; none means the newest ones.
        after: Option<u64>,
        /// Those that were denied.
        denied: bool,
        /// Connections that began or ended.
        connections: bool,
        /// Somebody goes on asking: only then, and while they are logged, are connections recorded.
        follow: bool,
    },
    /// Where the page is, and its key.
    Ui,
    /// Cuts a pod of this node off, or lets it onto the network again.
    Quarantine {
        /// The pod, as above.
        pod: String,
        /// Cut off.
        on: bool,
    },
}

/// A command of the plugin that the daemon counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Attaching {
    /// `ADD`
    Add,
    /// `DEL`
    Del,
}

/// The daemon's answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "response")]
pub enum Response {
    /// Done.
    Done,
    /// Not now: say error 11 and let the runtime try again.
    NotReady {
        /// Why.
        reason: String,
        /// Issues behind it.
        issues: Vec<Issue>,
    },
    /// It cannot be done.
    Refused {
        /// Why, and what would help.
        reason: String,
    },
    /// The answer to a question, in the form of the type that belongs to it.
    Report {
        /// JSON of the report.
        report: serde_json::Value,
    },
}

/// Writes one message.
///
/// # Errors
/// When the peer is gone, or the message exceeds [`MAX_MESSAGE`].
pub fn write_message<T: Serialize>(out: &mut impl Write, message: &T) -> io::Result<()> {
    let body = serde_json::to_vec(message)?;
    let length = u32::try_from(body.len()).ok().filter(|length| *length <= MAX_MESSAGE).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidInput, format!("message of {} bytes exceeds {MAX_MESSAGE}", body.len()))
    })?;
    let mut framed = Vec::with_capacity(body.len() + 4);
    framed.extend_from_slice(&length.to_be_bytes());
    framed.extend_from_slice(&body);
    out.write_all(&framed)
}

/// Reads one message.
///
/// # Errors
/// When the peer closes early, announces more than [`MAX_MESSAGE`], or sends something else.
pub fn read_message<T: DeserializeOwned>(input: &mut impl Read) -> io::Result<T> {
    let mut length = [0; 4];
    input.read_exact(&mut length)?;
    let length = u32::from_be_bytes(length);
    if length > MAX_MESSAGE {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("the other side announces a message of {length} bytes, more than {MAX_MESSAGE}"),
        ));
    }
    // Grown as bytes arrive: a liar who announces much and sends little costs nothing.
    let mut body = Vec::new();
    input.take(u64::from(length)).read_to_end(&mut body)?;
    if body.len() < length as usize {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the other side closed within a message"));
    }
    serde_json::from_slice(&body)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, format!("message is not understood: {error}")))
}
