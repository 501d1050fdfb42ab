//! What is told of a flow.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use husk_dataplane::connections::{Count, Tracked};
use husk_dataplane::nflog::Logged;
use husk_policy::cluster::Cluster;
use husk_policy::compile::LOG_PREFIX;
use husk_policy::object::{Direction, Protocol};
use husk_policy::rules::Origin;
use husk_policy::verdict::{Connection, Scope, Verdict, verdict};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::connections::Change;

/// A flow: denied packets of one connection in one direction within a second, or a connection that has begun or ended. The
/// JSON form is stable:
///
/// ```json
/// { "sequence": 17, "time": "2026-11-28T12:00:00.25Z", "count": 3, "direction": "ingress", "verdict": "denied",
///   "source": { "address": "10.42.0.5", "port": 40312, "pod": "web-1", "namespace": "shop" },
///   "destination": { "address": "10.42.1.9", "port": 5432, "pod": "db-0", "namespace": "shop" },
///   "protocol": "TCP", "icmp": null, "answer": false, "length": 60,
///   "reason": "default deny by: shop/db", "policy": { "defaultDeny": { "policies": [ … ] } }, "changedSince": false,
///   "addressed": null, "sent": null, "received": null, "milliseconds": null }
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Flow {
    /// Number, without gaps; from 1 with every daemon.
    pub sequence: u64,
    /// When the first packet came, the connection began, or it ended (RFC 3339). A closed connection ends when the kernel
    /// forgets it, one without an end of its own after a silence.
    #[schemars(with = "String")]
    pub time: Timestamp,
    /// Packets that were told of; 1 for connections.
    pub count: u64,
    /// Whose policy it met: that of who sends (egress) or of who receives (ingress), seen from who began the connection. Of
    /// connections: egress if a pod of this node began it.
    pub direction: Direction,
    /// What became of it.
    pub verdict: FlowVerdict,
    /// Who sent the packets, or began the connection.
    pub source: FlowEnd,
    /// Whom they were for, after translation of service addresses.
    pub destination: FlowEnd,
    /// `TCP`, `UDP`, `SCTP`, `ICMP`, `ICMPv6`, or the number.
    pub protocol: String,
    /// Type and code of an ICMP message.
    pub icmp: Option<Icmp>,
    /// The packets answer those of the connection's originator.
    pub answer: bool,
    /// Octets of the first packet; 0 for connections.
    pub length: u32,
    /// The policy responsible, in words; empty for connections.
    pub reason: String,
    /// The rule responsible; none if the pod is not known, or policy has changed since.
    pub policy: Option<Origin>,
    /// By the policy of now it would be allowed.
    pub changed_since: bool,
    /// Whom the originator addressed, where that is another than who answers: the address and port of a service.
    pub addressed: Option<SocketAddr>,
    /// What the originator sent, of connections that ended; none where the kernel does not count
    /// (`net.netfilter.nf_conntrack_acct`).
    pub sent: Option<FlowCount>,
    /// What came back, likewise.
    pub received: Option<FlowCount>,
    /// How long a connection that ended was known to the kernel; none where its beginning was not seen.
    pub milliseconds: Option<u64>,
}

/// What became of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum FlowVerdict {
    /// It was dropped.
    Denied,
    /// A connection has begun: its first packet was let through.
    New,
    /// A connection has ended.
    Closed,
}

/// What went one way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct FlowCount {
    /// Packets.
    pub packets: u64,
    /// Bytes, IP headers included.
    pub bytes: u64,
}

/// An end of a flow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FlowEnd {
    /// Address.
    pub address: IpAddr,
    /// Port, where the protocol has ports.
    pub port: Option<u16>,
    /// Name of the pod that has the address, if one has.
    pub pod: Option<String>,
    /// Its namespace.
    pub namespace: Option<String>,
}

/// Type and code of an ICMP message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Icmp {
    /// Type.
    #[serde(rename = "type")]
    pub kind: u8,
    /// Code.
    pub code: u8,
}

impl Flow {
    /// The flow that a packet belongs to, among these pods and policies; none for a packet of somebody else's rule. `now` is
    /// when it came where the kernel did not say.
    #[must_use]
    pub fn of(logged: &Logged, cluster: &Cluster, now: Timestamp) -> Option<Self> {
        let direction = logged.prefix.strip_prefix(LOG_PREFIX)?;
        let direction = Direction::ALL.into_iter().find(|it| it.to_string() == direction)?;
        let connection = Connection {
            originator: logged.connection.originator,
            responder: logged.connection.responder,
            protocol: logged.connection.protocol,
            port: logged.connection.port,
        };
        let sides = verdict(cluster, &connection).sides;
        let side = sides.into_iter().find(|side| side.direction == direction)?;
        let (reason, policy, changed_since) = match (side.verdict, side.decided_by) {
            (Verdict::Deny, Some(origin)) => (origin.to_string(), Some(origin), false),
            (Verdict::Deny, None) => ("the pod's labels are not known yet".to_owned(), None, false),
            (Verdict::Allow, _) if side.scope == Scope::Elsewhere => {
                ("no pod of this node has the address any more".to_owned(), None, true)
            }
            (Verdict::Allow, _) => ("policy has changed since: it would be allowed now".to_owned(), None, true),
        };
        let packet = &logged.packet;
        let time =
            logged.time.and_then(|time| Timestamp::from_duration(jiff::SignedDuration::try_from(time).ok()?).ok());
        let end = |address, port| FlowEnd::of(cluster, address, port);
        Some(Self {
            sequence: 0,
            time: time.unwrap_or(now),
            count: 1,
            direction,
            verdict: FlowVerdict::Denied,
            source: end(packet.source, packet.ports.map(|(source, _)| source)),
            destination: end(packet.destination, packet.ports.map(|(_, destination)| destination)),
            protocol: protocol(packet.protocol),
            icmp: packet.icmp.map(|(kind, code)| Icmp { kind, code }),
            answer: packet.source == connection.responder && packet.destination == connection.originator,
            length: packet.length,
            reason,
            policy,
            changed_since,
            addressed: None,
            sent: None,
            received: None,
            milliseconds: None,
        })
    }

    /// The flow of a connection that has begun or ended. `local` says which addresses are those of this node's pods.
    pub(super) fn of_connection(
        change: &Change,
        cluster: &Cluster,
        local: impl Fn(IpAddr) -> bool,
        now: Timestamp,
    ) -> Self {
        let Tracked { original, answer, counts, .. } = change.connection;
        let count = |count: Count| FlowCount { packets: count.packets, bytes: count.bytes };
        let counts = counts.filter(|_| change.ended).map(|(sent, received)| (count(sent), count(received)));
        let (source, destination) = (original.source, answer.source);
        let addressed = SocketAddr::new(original.destination, original.ports.map_or(0, |(_, to)| to));
        let answers = SocketAddr::new(destination, answer.ports.map_or(0, |(from, _)| from));
        Self {
            sequence: 0,
            time: now,
            count: 1,
            direction: if local(source) { Direction::Egress } else { Direction::Ingress },
            verdict: if change.ended { FlowVerdict::Closed } else { FlowVerdict::New },
            source: FlowEnd::of(cluster, source, original.ports.map(|(from, _)| from)),
            destination: FlowEnd::of(cluster, destination, answer.ports.map(|(from, _)| from)),
            protocol: protocol(original.protocol),
            icmp: original.icmp.map(|(kind, code)| Icmp { kind, code }),
            answer: false,
            length: 0,
            reason: String::new(),
            policy: None,
            changed_since: false,
            addressed: (addressed != answers).then_some(addressed),
            sent: counts.map(|(sent, _)| sent),
            received: counts.map(|(_, received)| received),
            milliseconds: change.lasted.map(|lasted| u64::try_from(lasted.as_millis()).unwrap_or(u64::MAX)),
        }
    }

    /// True for packets of the same kind between the same two, for the same reason.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        let same = |flow: &Self| Self { sequence: 0, time: Timestamp::UNIX_EPOCH, count: 0, length: 0, ..flow.clone() };
        // Ports tell most apart, without a copy.
        self.source == other.source && self.destination == other.destination && same(self) == same(other)
    }
}

impl FlowEnd {
    fn of(cluster: &Cluster, address: IpAddr, port: Option<u16>) -> Self {
        let owner = cluster.owner(address).map(|(name, _)| name);
        Self {
            address,
            port,
            pod: owner.map(|name| name.name.clone()),
            namespace: owner.map(|name| name.namespace.clone()),
        }
    }
}

/// The name of a protocol, or its number.
pub(crate) fn protocol(number: u8) -> String {
    match (Protocol::of(number), number) {
        (Some(protocol), _) => protocol.to_string(),
        (None, 1) => "ICMP".into(),
        (None, 58) => "ICMPv6".into(),
        (None, number) => number.to_string(),
    }
}

impl fmt::Display for FlowEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let (Some(namespace), Some(pod)) = (&self.namespace, &self.pod) {
            write!(f, "{namespace}/{pod} ")?;
        }
        match self.port {
            Some(port) => write!(f, "{}", SocketAddr::new(self.address, port)),
            None => write!(f, "{}", self.address),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use husk_dataplane::nflog;
    use husk_overlay::endpoint::Endpoint;
    use husk_policy::cluster::{Membership, Quarantine};
    use husk_policy::object::{NetworkPolicy, ObjectName, Objects};
    use husk_policy::selector::LabelSelector;

    use super::*;

    fn now() -> Timestamp {
        "2026-11-28T12:00:00Z".parse().unwrap()
    }

    fn logged(prefix: &str, destination: &str, port: u16) -> Logged {
        let (source, destination) = ("192.0.2.7".parse().unwrap(), destination.parse().unwrap());
        Logged {
            time: Some(Duration::from_millis(1_800_000_000_250)),
            prefix: prefix.into(),
            input: Some(3),
            output: Some(4),
            packet: nflog::Packet {
                source,
                destination,
                protocol: 6,
                ports: Some((40_000, port)),
                icmp: None,
                length: 60,
            },
            connection: nflog::Connection { originator: source, responder: destination, protocol: 6, port },
        }
    }

    /// A pod shop/db at 10.0.0.1, which is isolated or not.
    pub(in crate::flows) fn cluster(isolated: bool) -> Cluster {
        let policy =
            NetworkPolicy { selector: LabelSelector::default(), ingress: isolated.then(Vec::new), egress: None };
        let objects = Objects {
            network_policies: [(ObjectName::new("shop", "db"), Arc::new(policy))].into(),
            ..Objects::default()
        };
        let endpoint: Endpoint = serde_json::from_value(serde_json::json!({
            "network": "husk", "containerId": "a", "ifname": "eth0", "podName": "db-0", "podNamespace": "shop",
            "hostInterface": "husk0123456789a", "netns": {"path": "/run/netns/a", "device": 4, "inode": 7},
            "addresses": {"ipv4": "10.0.0.1", "ipv6": null}, "podMac": "02:00:00:00:00:01",
        }))
        .unwrap();
        let endpoints = [(endpoint.id.clone(), endpoint)].into();
        Cluster::new(Arc::new(objects), &endpoints, Membership::Optional, &Quarantine::default())
    }

    /// A flow to a port.
    pub(in crate::flows) fn flow(port: u16) -> Flow {
        Flow::of(&logged("husk-denied-ingress", "10.0.0.1", port), &cluster(true), now()).unwrap()
    }

    #[test]
    fn a_flow_names_pods_and_the_policy() {
        let flow = flow(5432);
        let expected = serde_json::json!({
            "sequence": 0, "time": "2027-01-15T08:00:00.25Z", "count": 1, "direction": "ingress", "verdict": "denied",
            "source": { "address": "192.0.2.7", "port": 40000, "pod": null, "namespace": null },
            "destination": { "address": "10.0.0.1", "port": 5432, "pod": "db-0", "namespace": "shop" },
            "protocol": "TCP", "icmp": null, "answer": false, "length": 60, "reason": "default deny by: shop/db",
            "policy": { "defaultDeny": { "policies": [{ "namespace": "shop", "name": "db" }] } },
            "changedSince": false, "addressed": null, "sent": null, "received": null, "milliseconds": null,
        });
        assert_eq!(serde_json::to_value(&flow).unwrap(), expected);
        assert_eq!(format!("{} -> {}", flow.source, flow.destination), "192.0.2.7:40000 -> shop/db-0 10.0.0.1:5432");
    }

    #[test]
    fn what_would_be_allowed_by_now_is_told_so() {
        let flow = |to: &str| Flow::of(&logged("husk-denied-ingress", to, 1), &cluster(false), now()).unwrap();
        assert_eq!((flow("10.0.0.1").policy, flow("10.0.0.1").changed_since), (None, true));
        assert_eq!(flow("10.0.0.2").reason, "no pod of this node has the address any more");
    }

    #[test]
    fn packets_of_other_rules_are_no_flows_and_the_clock_stands_in_for_the_kernel() {
        for prefix in ["", "husk-denied-", "husk-denied-both", "other"] {
            assert_eq!(Flow::of(&logged(prefix, "10.0.0.1", 1), &cluster(true), now()), None, "{prefix}");
        }
        let timeless = Logged { time: None, ..logged("husk-denied-ingress", "10.0.0.1", 1) };
        assert_eq!(Flow::of(&timeless, &cluster(true), now()).unwrap().time, now());
    }

    #[test]
    fn a_connection_is_told_with_who_answers_whom_was_addressed_and_what_it_carried() {
        let mut connection = crate::flows::connections::tests::tracked(40_000);
        // Through the port of a service to the pod's.
        connection.original.source = "192.0.2.7".parse().unwrap();
        connection.original.destination = "10.96.0.10".parse().unwrap();
        connection.answer.source = "10.0.0.1".parse().unwrap();
        connection.answer.ports = Some((5432, 40_000));
        connection.counts = Some((Count { packets: 5, bytes: 400 }, Count { packets: 4, bytes: 9000 }));
        let cluster = cluster(false);
        let of = |ended, lasted| {
            let change = Change { connection, ended, lasted };
            Flow::of_connection(&change, &cluster, |address| address == "10.0.0.1".parse::<IpAddr>().unwrap(), now())
        };
        let expected = serde_json::json!({
            "sequence": 0, "time": "2026-11-28T12:00:00Z", "count": 1, "direction": "ingress", "verdict": "closed",
            "source": { "address": "192.0.2.7", "port": 40000, "pod": null, "namespace": null },
            "destination": { "address": "10.0.0.1", "port": 5432, "pod": "db-0", "namespace": "shop" },
            "protocol": "TCP", "icmp": null, "answer": false, "length": 0, "reason": "", "policy": null,
            "changedSince": false, "addressed": "10.96.0.10:443", "sent": {"packets": 5, "bytes": 400},
            "received": {"packets": 4, "bytes": 9000}, "milliseconds": 1500,
        });
        assert_eq!(serde_json::to_value(of(true, Some(Duration::from_millis(1500)))).unwrap(), expected);
        let begun = of(false, None);
        assert_eq!((begun.verdict, begun.sent, begun.milliseconds), (FlowVerdict::New, None, None));
    }

    #[test]
    fn an_answer_is_told_from_a_question() {
        let mut back = logged("husk-denied-ingress", "10.0.0.1", 5432);
        std::mem::swap(&mut back.packet.source, &mut back.packet.destination);
        back.packet.ports = Some((5432, 40_000));
        let flow = Flow::of(&back, &cluster(true), now()).unwrap();
        assert!(flow.answer && flow.source.pod.as_deref() == Some("db-0"));
        assert_eq!(flow.reason, "default deny by: shop/db");
    }
}
