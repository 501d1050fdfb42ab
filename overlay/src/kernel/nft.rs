//! A small typed model of an nftables table: as much as Husk's rules need, printable and comparable.
//!
//! `dataplane` turns it into one `nft -j -f -` transaction. The statements follow libnftables-json(5).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::port_mapping::TransportProtocol;
use crate::prefix::{Family, Prefix};

/// Name of a counter object; counters keep their value when rules are rewritten.
pub type CounterName = String;

/// The whole of a table of family `inet`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NftTable {
    /// Named counters.
    pub counters: BTreeSet<CounterName>,
    /// Named sets; elements change one by one, without touching rules.
    pub sets: BTreeMap<String, Set>,
    /// Named maps; elements change one by one, too.
    pub maps: BTreeMap<String, Map>,
    /// Chains with their rules in order.
    pub chains: BTreeMap<String, Chain>,
}

/// A named set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Set {
    /// Type of the elements.
    pub element_type: ElementType,
    /// Elements.
    pub elements: BTreeSet<SetElement>,
}

/// What a set holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ElementType {
    /// Single addresses (`ipv4_addr`, `ipv6_addr`).
    Address(Family),
    /// Prefixes (the same types with flag `interval`).
    Prefix(Family),
    /// Two addresses, one behind the other.
    Pair(Family),
}

/// An element of a set.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum SetElement {
    /// One address.
    Address(IpAddr),
    /// A prefix.
    Prefix(Prefix),
    /// Two addresses of one family.
    Pair(IpAddr, IpAddr),
}

/// A named map: what is found under an addressee.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Map {
    /// What is looked up.
    pub key: MapKeyType,
    /// What is found.
    pub value: MapValueType,
    /// Elements.
    #[serde(with = "super::entries")]
    pub elements: BTreeMap<Addressee, MapValue>,
}

/// What a map is looked up by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum MapKeyType {
    /// Transport protocol and destination port.
    Port,
    /// Destination address, transport protocol and destination port.
    AddressAndPort(Family),
}

/// Whom packets are addressed to: the key of a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Addressee {
    /// Destination address; none in a map without addresses.
    pub address: Option<IpAddr>,
    /// Transport protocol.
    pub protocol: TransportProtocol,
    /// Destination port.
    pub port: u16,
}

/// Type of what a map holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum MapValueType {
    /// Addresses.
    Address(Family),
    /// Ports.
    Port,
}

/// What is found in a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum MapValue {
    /// An address.
    Address(IpAddr),
    /// A port.
    Port(u16),
}

/// A base chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Chain {
    /// `filter`, `nat` or `route`.
    pub kind: ChainKind,
    /// Where packets meet it.
    pub hook: Hook,
    /// Order among the chains of a hook; lower is earlier.
    pub priority: i32,
    /// Rules in order. The policy of every chain is accept: Husk drops by rule, so that a reason can be named.
    pub rules: Vec<Rule>,
}

/// Chain type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ChainKind {
    /// Filtering.
    Filter,
    /// Address translation.
    Nat,
}

/// Netfilter hook.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Hook {
    /// On arrival, before routing.
    Prerouting,
    /// To the host itself.
    Input,
    /// Through the host.
    Forward,
    /// From the host itself.
    Output,
    /// On departure.
    Postrouting,
}

/// One rule. Its name stands in the kernel as a comment, together with a digest of the statements, so that a rule that
/// an outsider removed or replaced is recognised.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// Short name for people and for recognition.
    pub name: String,
    /// Statements in order.
    pub statements: Vec<Statement>,
}

/// A statement of a rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Statement {
    /// Go on only if this matches.
    Match(Match),
    /// Count packets and bytes in a named counter.
    Counter(CounterName),
    /// Let pass (this chain only).
    Accept,
    /// Drop.
    Drop,
    /// Source NAT to the address of the outgoing interface with flags `random,fully-random`: ports chosen in sequence collide
    /// when two packets are translated at once.
    Masquerade,
    /// Source NAT to this address, with ports as for [`Statement::Masquerade`]. Unlike masquerading, which ends a connection
    /// whose packets leave by another interface than before (`nf_nat_oif_changed` in net/netfilter/nf_nat_core.c), it does
    /// not care about interfaces.
    TranslateSource(IpAddr),
    /// Destination NAT to the address and the port that two maps have for the packet's addressee; nothing happens unless both
    /// have it. They are two because nft takes no map to an address *and* a port in JSON (seen with 1.0.6).
    TranslateDestination {
        /// Family of the packets; implied by addresses in keys.
        family: Family,
        /// Keys of both maps.
        key: MapKeyType,
        /// Map to addresses.
        addresses: String,
        /// Map to ports.
        ports: String,
    },
    /// Clamp the TCP MSS option of SYN packets to the route's MTU.
    ClampMss,
    /// Set the DF bit of an IPv4 packet (RFC 791 section 3.1), and clear the other flags and the offset that share its field: for
    /// packets that are no fragments. The header's checksum follows. Implies the family.
    DontFragment,
}

/// A comparison.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Match {
    /// What is looked at.
    pub key: MatchKey,
    /// How.
    pub operator: MatchOperator,
    /// With what.
    pub value: MatchValue,
}

/// Left-hand side of a comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum MatchKey {
    /// Name of the incoming interface.
    InputInterface,
    /// Name of the outgoing interface.
    OutputInterface,
    /// Source address; implies the family.
    Source(Family),
    /// Destination address; implies the family.
    Destination(Family),
    /// Source and destination address, one behind the other; implies the family.
    AddressPair(Family),
    /// Kind of the destination address in the routing tables (`fib daddr type`): `local` for one of the host's.
    DestinationKind,
    /// Layer 4 protocol, also behind IPv6 extension headers.
    Protocol,
    /// Bytes of the packet, its IP header included.
    Length,
    /// UDP source port.
    UdpSourcePort,
    /// UDP destination port.
    UdpDestinationPort,
    /// TCP destination port.
    TcpDestinationPort,
    /// Type of an ICMP message of the family, by nft's name; implies the family and the protocol.
    IcmpType(Family),
    /// Code of an ICMP message (RFC 792, RFC 4443 section 2.1). Only behind [`MatchKey::IcmpType`].
    IcmpCode,
    /// MTU in bytes that an ICMP error of the family names: "fragmentation needed" (RFC 1191 section 4) or "packet too big"
    /// (RFC 4443 section 3.2). Only behind [`MatchKey::IcmpType`], and [`MatchKey::IcmpCode`] for IPv4, which make sure that it
    /// is one.
    IcmpMtu(Family),
    /// State of the packet's connection (`ct state`); an ICMP error that quotes a packet of no known one is `invalid`.
    ConnectionState,
    /// Source of the first packet of the connection, which for an ICMP error is that of the packet it quotes; implies the
    /// family.
    ConnectionSource(Family),
    /// Destination of the first packet of the connection; implies the family.
    ConnectionDestination(Family),
    /// Layer 4 protocol of the packet that an ICMP error of the family quotes. Only behind [`MatchKey::IcmpType`], which makes
    /// sure that there is one.
    QuotedProtocol(Family),
    /// UDP destination port of the packet that an ICMP error of the family quotes, if its IP header has neither options nor
    /// extensions. Only behind [`MatchKey::QuotedProtocol`].
    QuotedUdpDestinationPort(Family),
    /// TCP flags, masked with SYN|RST.
    TcpSynRst,
    /// Interface that the route back to the source leads to, given the incoming interface (`fib saddr . iif oif`):
    /// missing when a reply would leave elsewhere.
    ReversePathInterface,
    /// Family of the packet.
    NetworkFamily,
    /// An IPsec association of this host protected the packet on its way here (`meta ipsec`): present or missing. Chains of
    /// the hooks prerouting, input and forward only, and a kernel with `CONFIG_XFRM` (net/netfilter/nft_meta.c,
    /// `NFT_META_SECPATH`).
    Decrypted,
    /// The packet's route leads through an IPsec transformation (`rt ipsec`): present or missing. Needs a kernel with
    /// `CONFIG_XFRM` (net/netfilter/nft_rt.c, `NFT_RT_XFRM`).
    Transformation,
}

/// Comparison operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum MatchOperator {
    /// Equal, or contained in.
    Equal,
    /// Not equal, or not contained in.
    NotEqual,
    /// Less than a number.
    Less,
    /// More than a number.
    Greater,
}

/// Right-hand side of a comparison.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum MatchValue {
    /// Text; a trailing `*` matches any interface with the prefix.
    Text(String),
    /// One of several texts.
    AnyOf(Vec<String>),
    /// Number.
    Number(u32),
    /// A named set of this table.
    Set(String),
    /// Any address of a prefix.
    Prefix(Prefix),
    /// Any value, for look-ups that may find nothing (`exists`).
    Present,
    /// No value, for look-ups that may find nothing (`missing`).
    Missing,
    /// IPv4 or IPv6.
    Family(Family),
}
