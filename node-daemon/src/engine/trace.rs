//! Answers to `huskctl trace`: what policy says of a connection, what the kernel's rules say, and whether that is the same; and
//! what else the packets pass, which [`gather`] looks at and [`crate::trace`] judges.

mod gather;
mod peer;

use std::net::IpAddr;

use husk_dataplane::kernel::Kernel;
use husk_dataplane::way::{Packet, Way};
use husk_overlay::ipc::Response;
use husk_overlay::prefix::Family;
use husk_overlay::record::DualStack;
use husk_policy::cluster::Cluster;
use husk_policy::compile::path::follow;
use husk_policy::object::{Direction, Pod, Protocol};
use husk_policy::verdict::{Connection, Decision, Scope, Side, Verdict, elsewhere, verdict};

use super::pod_names::{Named, find};
use super::policy_reports::answer;
use super::{Engine, Node, Pass};
use crate::report::{Decider, Live, Place, TraceEnd, TracePeer, TraceReport, TraceSide};
use crate::source::ClusterSource;
use crate::trace::{self, PeerEvidence};

/// What is asked.
pub(super) struct Question<'a> {
    pub(super) source: &'a str,
    pub(super) destination: &'a str,
    /// IANA protocol number.
    pub(super) protocol: u8,
    pub(super) port: Option<u16>,
    /// Bytes of a packet.
    pub(super) size: Option<u32>,
}

impl<K: Kernel, S: ClusterSource, N: Node> Engine<K, S, N> {
    /// What becomes of a connection, and why.
    pub(super) fn trace(&mut self, question: &Question<'_>) -> Response {
        let Some(last) = self.last.take() else {
            return Response::NotReady {
                reason: "the daemon has not finished its first pass".into(),
                issues: Vec::new(),
            };
        };
        let report = self.try_trace(question, &last);
        self.last = Some(last);
        match report {
            Ok(report) => answer(&report),
            Err(reason) => Response::Refused { reason },
        }
    }

    fn try_trace(&mut self, question: &Question<'_>, last: &Pass) -> Result<TraceReport, String> {
        let cluster = self.policy.cluster();
        let (source, destination) = self.ends(&cluster, question, last)?;
        if question.port.is_none() && Protocol::of(question.protocol).is_some() {
            return Err("TCP, UDP and SCTP have ports: name the one of the destination with --port".into());
        }
        let port = question.port.unwrap_or_default();
        let connection = Connection { originator: source, responder: destination, protocol: question.protocol, port };
        let Decision { sides: [egress, ingress], .. } = verdict(&cluster, &connection);
        let [source, destination] = [source, destination].map(|address| self.end(&cluster, address, last));
        let mut sides = Vec::new();
        for (side, own, other) in [(egress, &source, &destination), (ingress, &destination, &source)] {
            sides.push(self.side(&cluster, &connection, (side, own, other)));
        }
        let denied = sides.iter().any(|side| side.side.verdict == Verdict::Deny);
        let verdict = if denied { Verdict::Deny } else { Verdict::Allow };
        let mut report = TraceReport {
            connection,
            source,
            destination,
            verdict,
            sides,
            hops: Vec::new(),
            broken: None,
            peer: None,
            translated: None,
            crossing: None,
        };
        let evidence = self.gather(&report, question.size, last);
        report.hops = trace::hops(&evidence);
        report.broken = trace::first_broken(&report.hops);
        report.crossing.clone_from(&evidence.crossing);
        report.peer = evidence.peer.as_ref().map(|peer| trace_peer(peer, &report, last));
        Ok(report)
    }

    fn end(&self, cluster: &Cluster, address: IpAddr, last: &Pass) -> TraceEnd {
        let owner = cluster.owner(address);
        let record = last.plan.record.as_ref();
        let routers = record.into_iter().flat_map(|record| record.router.iter());
        let is_own = last.facts.addresses.iter().chain(routers).any(|own| own == address) || address.is_loopback();
        let node = self
            .snapshot
            .nodes
            .values()
            .find(|record| record.addresses.iter().chain(record.router.iter()).any(|theirs| theirs == address));
        let elsewhere = |address| {
            self.owner_of_block(address).filter(|node| *node != self.parts.node_name).map(|node| node.to_string())
        };
        let place = match (owner, node) {
            (Some((name, _)), _) if cluster.local().contains_key(name) => Place::PodHere,
            _ if cluster.is_unknown(address) => Place::PodHere,
            // Manifests in a directory need not say where a pod is; its address does.
            (Some((_, pod)), _) => Place::PodElsewhere { node: pod.node.clone().or_else(|| elsewhere(address)) },
            _ if is_own => Place::ThisNode,
            (None, Some(record)) if record.name == self.parts.node_name => Place::ThisNode,
            (None, Some(record)) => Place::OtherNode { node: record.name.to_string() },
            // The source need not tell of every node's pods.
            (None, None) => match elsewhere(address) {
                Some(node) => Place::PodElsewhere { node: Some(node) },
                None => Place::External,
            },
        };
        TraceEnd { address, pod: owner.map(|(name, _)| name.clone()), place }
    }

    fn side(
        &mut self,
        cluster: &Cluster,
        connection: &Connection,
        (side, own, other): (Side, &TraceEnd, &TraceEnd),
    ) -> TraceSide {
        let direction = side.direction;
        let without_live = |decider, side| TraceSide { direction, decider, side, live: Live::NotHere };
        let allowed = |side: Side| Side { verdict: Verdict::Allow, decided_by: None, asked: Vec::new(), ..side };
        if !self.parts.config.policy.enabled {
            return without_live(Decider::Disabled, allowed(side));
        }
        match (&own.place, &other.place, side.scope) {
            (_, _, Scope::Itself) => without_live(Decider::Nobody, side),
            // A pod in quarantine may not talk to its node, whoever else it may talk with; nor are others asked.
            (Place::PodHere, Place::ThisNode, Scope::ThisNode) => {
                let cut_off = direction == Direction::Egress
                    && side.pod.as_ref().and_then(|name| cluster.local().get(name)).is_some_and(|it| it.quarantined);
                if cut_off {
                    let origin = Some(husk_policy::rules::Origin::Quarantine);
                    let side = Side { verdict: Verdict::Deny, decided_by: origin, asked: Vec::new(), ..side };
                    return without_live(Decider::ThisNode, side);
                }
                without_live(Decider::Host, allowed(side))
            }
            (Place::PodHere, _, _) => {
                let live = self.live(connection, &side);
                TraceSide { direction, decider: Decider::ThisNode, side, live }
            }
            (Place::PodElsewhere { node }, _, _) => {
                let decider = Decider::OtherNode { node: node.clone() };
                // To that node, its own traffic with its pods is its own business.
                let is_its_own = matches!(&other.place, Place::OtherNode { node: of } if Some(of) == node.as_ref());
                let predicted = elsewhere(cluster, connection, direction).filter(|_| !is_its_own);
                without_live(decider, predicted.unwrap_or(side))
            }
            _ => without_live(Decider::Nobody, side),
        }
    }

    /// What the kernel's rules say of a side of a pod of this node.
    fn live(&mut self, connection: &Connection, side: &Side) -> Live {
        let Some(table) = self.policy.table() else {
            return Live::Unreadable { reason: "the policy of this node has not been made yet".into() };
        };
        let node = &mut self.parts.node;
        let path = follow(&table, connection, side.direction, |set, key| node.policy_element(set, &key));
        match path {
            Ok(path) if path.verdict() == side.verdict => Live::Agrees { path },
            Ok(path) => Live::Differs { path },
            Err(error) => Live::Unreadable { reason: format!("{error:#}") },
        }
    }
}

/// The other node, and where it can be knocked at.
fn trace_peer(peer: &PeerEvidence, report: &TraceReport, last: &Pass) -> TracePeer {
    let plan = last.plan.peers.get(&peer.name);
    let family = Family::of(report.connection.responder);
    TracePeer {
        node: peer.name.clone(),
        inside: plan.and_then(|plan| plan.probe.get(&family)).map(|target| target.address),
        underlay: plan.and_then(|plan| plan.address),
        port: plan.and_then(|plan| plan.port),
    }
}

/// Which end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Source,
    Destination,
}

/// What people call this node.
const THIS_HOST: &str = "host";

impl<K: Kernel, S: ClusterSource, N: Node> Engine<K, S, N> {
    /// The addresses of both ends, of one family.
    fn ends(&mut self, cluster: &Cluster, question: &Question<'_>, last: &Pass) -> Result<(IpAddr, IpAddr), String> {
        let sources = self.addresses_of(cluster, question.source, End::Source, last)?;
        let destinations = self.addresses_of(cluster, question.destination, End::Destination, last)?;
        let of = |family, all: &[IpAddr]| all.iter().copied().find(|address| Family::of(*address) == family);
        let pair = Family::ALL.into_iter().find_map(|family| of(family, &sources).zip(of(family, &destinations)));
        let (source, destination) = pair.ok_or_else(|| {
            let (source, destination) = (question.source, question.destination);
            format!("{source} and {destination} have no addresses of one family")
        })?;
        if self.is_this_node(question.source) {
            // The host's own packets have the address that the kernel chooses for where they go.
            let packet = Packet { source: None, destination, input: None };
            if let Ok(Way::Leaves { source: Some(chosen), .. }) = self.parts.node.way(&packet) {
                return Ok((chosen, destination));
            }
        }
        Ok((source, destination))
    }

    fn is_this_node(&self, text: &str) -> bool {
        text == THIS_HOST || text == self.parts.node_name.as_str()
    }

    fn addresses_of(&self, cluster: &Cluster, text: &str, end: End, last: &Pass) -> Result<Vec<IpAddr>, String> {
        // A node talks to pods from its address inside the overlay; who talks to a node means its own.
        let all = |router: DualStack, addresses: DualStack| {
            let all: Vec<IpAddr> = match end {
                End::Source => router.iter().chain(addresses.iter()).collect(),
                End::Destination => addresses.iter().chain(router.iter()).collect(),
            };
            if all.is_empty() { Err(format!("the node {text} has no address yet")) } else { Ok(all) }
        };
        match find(cluster, text) {
            Ok(Named::Address(address)) => Ok(vec![address]),
            // Who asked by address means that one.
            Ok(Named::Pod(..)) if text.parse::<IpAddr>().is_ok() => Ok(text.parse().into_iter().collect()),
            Ok(Named::Pod(name, Some(pod))) if pod.addresses.is_empty() => {
                Err(format!("the pod {name} has no address yet"))
            }
            Ok(Named::Pod(_, Some(Pod { addresses, .. }))) => Ok(addresses.into_iter().collect()),
            Ok(Named::Pod(name, None)) => Err(format!(
                "the cluster source has not told of the pod {name} yet, so that it gets no packet; give its address \
                 (huskctl ipam show)"
            )),
            Err(_) if self.is_this_node(text) => {
                let router = last.plan.record.as_ref().map(|record| record.router).unwrap_or_default();
                all(router, last.facts.addresses)
            }
            Err(reason) => match self.snapshot.nodes.values().find(|record| record.name.as_str() == text) {
                Some(record) => all(record.router, record.addresses),
                None => {
                    let node = if text.contains('/') { "" } else { "nor is it a node's name (huskctl peers); " };
                    Err(format!("{reason}; {node}of a Service give the address (kubectl get service -A)"))
                }
            },
        }
    }
}
