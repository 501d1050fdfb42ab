//! The nftables table that enforces network policy, as a value: sets, verdict maps and chains, in as few forms as the compiler
//! in `husk-policy` needs.
//!
//! It is a table of its own ([`crate::marks::NFT_POLICY_TABLE`]), since its sets grow with the cluster: `dataplane` reads and
//! changes it over netlink, element by element, and the small table `inet husk` stays small for `nft`.
//!
//! The sets that grow map addresses to numbers, classes of peers, rather than to verdicts that lead to chains: with every change
//! of a rule the kernel follows each jump of each element of each map (net/netfilter/nft_lookup.c, `nft_lookup_validate`), which
//! for a hundred pods with ten thousand peers takes seconds. What a class may do is looked up by class, protocol and port in one
//! more map, see [`PolicyAction::Judge`].

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{CounterName, Hook};
use crate::prefix::Family;

/// Name of a set, map or chain.
pub type PolicyName = Arc<str>;

/// The whole of the table of family `inet`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PolicyTable {
    /// Named counters.
    pub counters: BTreeSet<CounterName>,
    /// Named sets and verdict maps.
    pub sets: BTreeMap<PolicyName, Arc<PolicySet>>,
    /// Chains.
    pub chains: BTreeMap<PolicyName, Arc<PolicyChain>>,
}

/// A set or a map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicySet {
    /// What its keys are.
    pub key: PolicyKey,
    /// What its values are.
    pub value: PolicyValueKind,
    /// Elements, which do not overlap; each with a value of the kind above.
    pub elements: BTreeMap<PolicyElement, PolicyValue>,
}

/// Type of what a set holds under its keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PolicyValueKind {
    /// Nothing: it is a set.
    None,
    /// Numbers of classes (nft's type `mark`, 32 bits in host byte order).
    Class,
    /// Verdicts.
    Verdict,
}

/// What a set holds under a key.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum PolicyValue {
    /// Nothing.
    None,
    /// Number of a class.
    Class(u32),
    /// Verdict.
    Verdict(PolicyVerdict),
}

/// Type of the keys of a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PolicyKey {
    /// An address (`ipv4_addr`, `ipv6_addr`).
    Address(Family),
    /// Ranges of addresses (the same with flag `interval`).
    AddressRange(Family),
    /// Two addresses, one behind the other.
    AddressPair(Family),
    /// Class of the peer, range of transport protocols, range of ports (`mark . inet_proto . inet_service`, flag `interval`).
    ClassAndService,
}

/// Key of an element.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PolicyElement {
    /// One address.
    Address(IpAddr),
    /// All addresses from the first to the last, both included; of one family.
    AddressRange(IpAddr, IpAddr),
    /// Two addresses of one family.
    AddressPair(IpAddr, IpAddr),
    /// Class, transport protocols (IANA protocol numbers) and ports; from the first to the last, both included.
    ClassAndService {
        /// Number of the class.
        class: u32,
        /// Protocols.
        protocols: (u8, u8),
        /// Ports.
        ports: (u16, u16),
    },
}

/// What follows for a packet.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum PolicyVerdict {
    /// It passes this hook.
    Accept,
    /// It is dropped.
    Drop,
    /// The chain that jumped here goes on; at the end of a base chain it passes.
    Return,
    /// That chain goes on, and this one after it returns.
    Jump(PolicyName),
    /// That chain goes on instead of this one.
    Goto(PolicyName),
}

/// A chain.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PolicyChain {
    /// Where packets meet it, and its priority among the chains of that hook; none for a chain that others lead to. The policy
    /// of a base chain is accept.
    pub hook: Option<(Hook, i32)>,
    /// Rules in order.
    pub rules: Vec<PolicyRule>,
}

/// A rule: what has to match, and what is done then, in this order: count, log, act.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyRule {
    /// All of them have to match; none always does.
    pub matches: Vec<PolicyMatch>,
    /// Counter object that counts the packet.
    pub counter: Option<CounterName>,
    /// Tells user space of the packet.
    pub log: Option<PolicyLog>,
    /// What is done.
    pub action: PolicyAction,
}

/// Tells user space of packets (NFLOG).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyLog {
    /// NFLOG group.
    pub group: u16,
    /// Text that comes with the packet.
    pub prefix: String,
    /// Octets of the packet that come with it.
    pub snap_length: u32,
}

/// What has to match.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PolicyMatch {
    /// Family of the packet (`meta nfproto`).
    Family(Family),
    /// It came from an interface of a pod: the name begins with `husk`, but not with `husk-`.
    FromPod,
    /// It goes to an interface of a pod.
    ToPod,
    /// Connection tracking knows no connection it belongs to (`ct state invalid,untracked`).
    Stateless,
    /// Fewer packets than this per second have come by (`limit rate N/second burst M packets`).
    Below {
        /// Packets per second.
        rate: u64,
        /// Packets that may come at once.
        burst: u32,
    },
    /// A field of the packet is in a set. Never matches a packet without the field.
    In(PolicyField, PolicyName),
    /// A field of the packet is in no element of a set. Never matches a packet without the field.
    NotIn(PolicyField, PolicyName),
}

/// A field of a packet or of its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PolicyField {
    /// Source address of the packet.
    Source(Family),
    /// Destination address of the packet.
    Destination(Family),
    /// Who began the connection: source of its first packet, before any translation (`ct original ip saddr`).
    Originator(Family),
    /// Who answers: destination of its first packet, after any translation (`ct reply ip saddr`).
    Responder(Family),
    /// [`Self::Originator`] and [`Self::Responder`], one behind the other.
    OriginatorAndResponder(Family),
}

impl PolicyField {
    /// The family of packets that have the field.
    #[must_use]
    pub fn family(self) -> Family {
        match self {
            Self::Source(family)
            | Self::Destination(family)
            | Self::Originator(family)
            | Self::Responder(family)
            | Self::OriginatorAndResponder(family) => family,
        }
    }
}

/// What a rule does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PolicyAction {
    /// The next rule goes on.
    Continue,
    /// A verdict.
    Verdict(PolicyVerdict),
    /// The verdict that a map has for a field; without one, or without the field, the next rule goes on.
    Lookup(PolicyField, PolicyName),
    /// The verdict that a map with keys [`PolicyKey::ClassAndService`] has for the class of the peer, the transport protocol of
    /// the connection (`ct protocol`) and the port of who answers (`ct reply proto-src`). An ICMP error has those of the connection
    /// it is about. Without one, or without a class, the next rule goes on.
    ///
    /// nft's language has no look-up whose key is the result of another; its netlink messages do, where registers pass values on.
    Judge {
        /// Where the class comes from.
        class: PolicyClass,
        /// The map.
        services: PolicyName,
    },
}

/// Where the class of a peer comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PolicyClass {
    /// A map has it for a field.
    Of(PolicyField, PolicyName),
    /// It is always this one.
    Always(u32),
}

impl fmt::Display for PolicyVerdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Accept => f.write_str("accept"),
            Self::Drop => f.write_str("drop"),
            Self::Return => f.write_str("return"),
            Self::Jump(chain) => write!(f, "jump {chain}"),
            Self::Goto(chain) => write!(f, "goto {chain}"),
        }
    }
}

impl fmt::Display for PolicyValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => Ok(()),
            Self::Class(class) => write!(f, " : {class:#010x}"),
            Self::Verdict(verdict) => write!(f, " : {verdict}"),
        }
    }
}

impl fmt::Display for PolicyElement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => write!(f, "{address}"),
            Self::AddressRange(first, last) if first == last => write!(f, "{first}"),
            Self::AddressRange(first, last) => write!(f, "{first}-{last}"),
            Self::AddressPair(one, other) => write!(f, "{one} . {other}"),
            Self::ClassAndService { class, protocols, ports } => {
                write!(f, "{class:#010x} . {}-{} . {}-{}", protocols.0, protocols.1, ports.0, ports.1)
            }
        }
    }
}
