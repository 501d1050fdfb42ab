//! The verdict on a connection, and why: the meaning of policy in its plainest form.
//!
//! The compiler says the same in sets and maps; tests hold the two against each other.

use std::net::IpAddr;
use std::sync::Arc;

use husk_overlay::prefix::Family;
use serde::{Deserialize, Serialize};

use crate::cluster::{Cluster, LocalPod};
use crate::object::{Direction, ObjectName, Peer, Pod, PolicyRule, PortMatch, Protocol, QUARANTINE_LABEL};
use crate::rules::{Effect, Level, Origin, Rule, means_pod, named_ports, rules_of};

/// What happens with a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum Verdict {
    /// It passes.
    Allow,
    /// It is dropped.
    Deny,
}

/// A connection: who began it, who answers (after translation of service addresses), and on which port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Connection {
    /// Who began it.
    pub originator: IpAddr,
    /// Who answers.
    pub responder: IpAddr,
    /// IANA protocol number.
    pub protocol: u8,
    /// Port of who answers; meaningless for protocols without ports.
    pub port: u16,
}

/// The verdict and how it came about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Decision {
    /// The verdict.
    pub verdict: Verdict,
    /// The two sides, egress first.
    pub sides: [Side; 2],
}

impl Decision {
    /// The rule that denied; none for what is allowed, and for what was denied for lack of knowledge.
    #[must_use]
    pub fn denied_by(&self) -> Option<&Origin> {
        self.sides.iter().find(|side| side.verdict == Verdict::Deny).and_then(|side| side.decided_by.as_ref())
    }
}

/// What policy says on one side of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Side {
    /// Which side.
    pub direction: Direction,
    /// The pod on that side; none if the address is no pod's.
    pub pod: Option<ObjectName>,
    /// Who decides on that side.
    pub scope: Scope,
    /// The verdict of this side.
    pub verdict: Verdict,
    /// The rule that decided; none where no rule matched.
    pub decided_by: Option<Origin>,
    /// All rules that were asked, in order, the deciding one last.
    pub asked: Vec<Asked>,
}

/// Who decides on a side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum Scope {
    /// This node: the pod is one of its own.
    ThisNode,
    /// Another node, or nobody: the address is none of a pod of this node.
    Elsewhere,
    /// This node, which does not know the pod's labels yet and lets nothing pass.
    Unknown,
    /// Nobody: a pod always reaches itself.
    Itself,
}

/// A rule that was asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Asked {
    /// The rule.
    pub origin: Origin,
    /// Its tier.
    pub level: Level,
    /// What it does with what it matches.
    pub effect: Effect,
    /// What came of it.
    pub outcome: Outcome,
}

/// What came of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum Outcome {
    /// It matched.
    Matched,
    /// None of its peers is at the other end.
    OtherPeer,
    /// It is for other ports or protocols.
    OtherPort,
    /// A rule before it passed its whole tier over.
    Skipped,
}

/// The verdict on a connection, as far as this node has a say in it.
#[must_use]
pub fn verdict(cluster: &Cluster, connection: &Connection) -> Decision {
    let sides = Direction::ALL.map(|direction| side(cluster, connection, direction));
    let denied = sides.iter().any(|side| side.verdict == Verdict::Deny);
    Decision { verdict: if denied { Verdict::Deny } else { Verdict::Allow }, sides }
}

fn side(cluster: &Cluster, connection: &Connection, direction: Direction) -> Side {
    let (own, other) = match direction {
        Direction::Egress => (connection.originator, connection.responder),
        Direction::Ingress => (connection.responder, connection.originator),
    };
    let allowed = |pod: Option<ObjectName>, scope| Side {
        direction,
        pod,
        scope,
        verdict: Verdict::Allow,
        decided_by: None,
        asked: Vec::new(),
    };
    if cluster.is_unknown(own) {
        return Side { verdict: Verdict::Deny, ..allowed(None, Scope::Unknown) };
    }
    let found = cluster.owner(own).and_then(|(name, _)| cluster.local().get_key_value(name));
    let Some((name, local)) = found else {
        return allowed(cluster.owner(own).map(|(name, _)| name.clone()), Scope::Elsewhere);
    };
    if own == other {
        return allowed(Some(name.clone()), Scope::Itself);
    }
    judged(cluster, connection, direction, (name, local))
}

/// What the node of a pod that is not of this node will say on a side, if it knows what this one knows; none where the address
/// is no such pod's.
#[must_use]
pub fn elsewhere(cluster: &Cluster, connection: &Connection, direction: Direction) -> Option<Side> {
    let own = match direction {
        Direction::Egress => connection.originator,
        Direction::Ingress => connection.responder,
    };
    let (name, pod) = cluster.owner(own).filter(|(name, _)| !cluster.local().contains_key(*name))?;
    let quarantined = pod.labels.get(QUARANTINE_LABEL).is_some_and(|value| value == "true");
    let theirs = LocalPod { pod: Arc::new(pod.clone()), quarantined };
    Some(Side { scope: Scope::Elsewhere, ..judged(cluster, connection, direction, (name, &theirs)) })
}

fn judged(
    cluster: &Cluster,
    connection: &Connection,
    direction: Direction,
    (name, local): (&ObjectName, &LocalPod),
) -> Side {
    let other = match direction {
        Direction::Egress => connection.responder,
        Direction::Ingress => connection.originator,
    };
    let peer = cluster.owner(other);
    let receiver = match direction {
        Direction::Ingress => Some(local.pod.as_ref()),
        Direction::Egress => peer.map(|(_, pod)| pod),
    };
    let question = Question { cluster, connection, other, peer, receiver };
    let mut asked = Vec::new();
    let mut passed = None;
    let mut decided = None;
    for Rule { level, effect, matches, origin } in rules_of(cluster, name, local, direction).rules {
        let outcome = if passed == Some(level) { Outcome::Skipped } else { question.outcome(&matches) };
        asked.push(Asked { origin: origin.clone(), level, effect, outcome });
        if outcome == Outcome::Matched {
            match effect {
                Effect::Pass => passed = Some(level),
                Effect::Allow => decided = Some((Verdict::Allow, origin)),
                Effect::Deny => decided = Some((Verdict::Deny, origin)),
            }
        }
        if decided.is_some() {
            break;
        }
    }
    let (verdict, decided_by) = decided.map_or((Verdict::Allow, None), |(verdict, origin)| (verdict, Some(origin)));
    Side { direction, pod: Some(name.clone()), scope: Scope::ThisNode, verdict, decided_by, asked }
}

/// What rules are asked.
struct Question<'a> {
    cluster: &'a Cluster,
    connection: &'a Connection,
    /// Address at the other end.
    other: IpAddr,
    /// The pod at the other end.
    peer: Option<(&'a ObjectName, &'a Pod)>,
    /// The pod whose ports have names.
    receiver: Option<&'a Pod>,
}

impl Question<'_> {
    fn outcome(&self, rule: &PolicyRule) -> Outcome {
        if !rule.peers.as_ref().is_none_or(|peers| peers.iter().any(|peer| self.is(peer))) {
            Outcome::OtherPeer
        } else if !rule.ports.as_ref().is_none_or(|ports| ports.iter().any(|port| self.is_at(port))) {
            Outcome::OtherPort
        } else {
            Outcome::Matched
        }
    }

    fn is(&self, peer: &Peer) -> bool {
        match peer {
            Peer::Pods { .. } => self.peer.is_some_and(|(name, pod)| means_pod(peer, self.cluster, name, pod)),
            Peer::Block { cidr, except } => {
                cidr.contains(self.other) && !except.iter().any(|block| block.contains(self.other))
            }
        }
    }

    fn is_at(&self, wanted: &PortMatch) -> bool {
        let Some(protocol) = Protocol::of(self.connection.protocol) else { return false };
        match wanted {
            PortMatch::All(of) => *of == protocol,
            PortMatch::Range(of, first, last) => *of == protocol && (*first..=*last).contains(&self.connection.port),
            PortMatch::Named(..) => {
                self.receiver.is_some_and(|pod| named_ports(pod, wanted).iter().any(|resolved| self.is_at(resolved)))
            }
        }
    }
}

/// ICMP or ICMPv6, by IANA protocol number.
fn is_icmp(protocol: u8) -> bool {
    matches!(protocol, 1 | 58)
}

impl std::fmt::Display for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { originator, responder, protocol, port } = self;
        match (Protocol::of(*protocol), Family::of(*responder)) {
            (Some(protocol), Family::Ipv4) => write!(f, "{protocol} {originator} -> {responder}:{port}"),
            (Some(protocol), Family::Ipv6) => write!(f, "{protocol} {originator} -> [{responder}]:{port}"),
            // Policy knows no difference between the two, as neither has ports.
            (None, Family::Ipv4) if is_icmp(*protocol) => write!(f, "ICMP {originator} -> {responder}"),
            (None, Family::Ipv6) if is_icmp(*protocol) => write!(f, "ICMPv6 {originator} -> {responder}"),
            (None, _) => write!(f, "protocol {protocol} {originator} -> {responder}"),
        }
    }
}
