//! Where the packets of somebody are to be seen: the question of `huskctl capture`.

use std::collections::BTreeMap;
use std::net::IpAddr;

use husk_dataplane::capture::{Filter, Test};
use husk_dataplane::kernel::Kernel;
use husk_dataplane::way::{Packet, Way};
use husk_overlay::endpoint::Endpoint;
use husk_overlay::ipc::Response;
use husk_overlay::mode::Mode;
use husk_overlay::name::{InterfaceName, NodeName};
use husk_overlay::plan::PeerPlan;
use husk_overlay::prefix::{Family, Prefix};
use husk_policy::cluster::DEFAULT_NAMESPACE;

use super::{Engine, Node, Pass};
use crate::firewall::ESP;
use crate::report::{CaptureReport, Tap, TunnelPorts, VerifyPath};
use crate::source::ClusterSource;

/// Most addresses whose names are told, those of this node first.
const NAMES: usize = 4096;

/// What people call this node.
const THIS_HOST: &str = "host";

impl<K: Kernel, S: ClusterSource, N: Node> Engine<K, S, N> {
    pub(super) fn capture_of(&mut self, target: &str) -> Response {
        let Some(last) = self.last.take() else { return self.report(|_, _| ()) };
        let report = self.taps(target, &last);
        self.last = Some(last);
        match report {
            Ok(report) => super::policy_reports::answer(&report),
            Err(reason) => Response::Refused { reason },
        }
    }

    fn taps(&mut self, target: &str, last: &Pass) -> Result<CaptureReport, String> {
        let pods = self.pods_named(target);
        if !pods.is_empty() {
            return Ok(self.of_pod(&pods, last));
        }
        if target == THIS_HOST || target == self.parts.node_name.as_str() {
            return self.of_host(last);
        }
        if let Some((name, peer)) = last.plan.peer_named(target) {
            return self.of_peer(&name.clone(), &peer.clone(), last);
        }
        Err(self.nobody(target))
    }

    /// The attachments of the pod of this node that a text names.
    fn pods_named(&self, text: &str) -> Vec<Endpoint> {
        let address: Option<IpAddr> = text.parse().ok();
        let full = if text.contains('/') { text.to_owned() } else { format!("{DEFAULT_NAMESPACE}/{text}") };
        let is_meant = |lease: &&Endpoint| match address {
            Some(address) => lease.addresses.iter().any(|own| own == address),
            None => lease.display_name() == full || lease.display_name() == text,
        };
        self.leases.endpoints.values().filter(is_meant).cloned().collect()
    }

    fn nobody(&self, target: &str) -> String {
        let cluster = self.policy.cluster();
        if let Ok(super::pod_names::Named::Pod(name, Some(pod))) = super::pod_names::find(&cluster, target)
            && let (Some(node), Some(address)) = (&pod.node, pod.addresses.iter().next())
        {
            return format!(
                "{name} is a pod of node {node}: run huskctl capture there, or see what this node exchanges with it: huskctl \
                 capture {node} --filter \"host {address}\""
            );
        }
        format!(
            "there is no pod of this node and no other node named {target:?}; huskctl ipam show lists the pods, huskctl peers the \
             nodes, and host stands for this one"
        )
    }

    fn of_pod(&mut self, pods: &[Endpoint], last: &Pass) -> CaptureReport {
        let addresses: Vec<Test> = pods
            .iter()
            .flat_map(|pod| pod.addresses.iter())
            .map(|address| Test::Address(Prefix::host(address)))
            .collect();
        let name = pods.first().map(Endpoint::display_name).unwrap_or_default();
        let inner = pods.iter().map(|pod| Tap { interface: pod.host_interface.clone(), filter: Filter::default() });
        let is_direct = self.parts.config.mode == Mode::Direct;
        let clause = if is_direct { addresses } else { self.tunnel_protocols() };
        let filter = Filter { clauses: vec![clause] };
        let outer = last
            .facts
            .underlay_interface
            .iter()
            .map(|interface| Tap { interface: interface.clone(), filter: filter.clone() });
        let note = (!is_direct).then(|| {
            "on the underlay the packets of one pod cannot be told from those of others: these are all tunnel packets of this node"
                .to_owned()
        });
        CaptureReport {
            target: format!("the pod {name}"),
            mode: self.parts.config.mode,
            inner: inner.collect(),
            outer: outer.collect(),
            outer_note: note,
            ports: self.tunnel_ports(),
            verify: None,
            names: self.names(last, None),
        }
    }

    fn of_host(&mut self, last: &Pass) -> Result<CaptureReport, String> {
        let underlay = last.facts.underlay_interface.clone();
        let underlay = underlay.ok_or("this node has no underlay interface; see huskctl status")?;
        let is_direct = self.parts.config.mode == Mode::Direct;
        let cidrs = self.parts.config.cluster_cidrs.iter().map(|cidr| Test::Address(*cidr)).collect();
        let clause = if is_direct { cidrs } else { self.tunnel_protocols() };
        let outer = vec![Tap { interface: underlay, filter: Filter { clauses: vec![clause] } }];
        let tunnels = last.plan.desired.links.keys();
        let inner = tunnels.map(|interface| Tap { interface: interface.clone(), filter: Filter::default() });
        Ok(CaptureReport {
            target: "the tunnels of this node".into(),
            mode: self.parts.config.mode,
            inner: if is_direct { outer.clone() } else { inner.collect() },
            outer,
            outer_note: None,
            ports: self.tunnel_ports(),
            verify: None,
            names: self.names(last, None),
        })
    }

    fn of_peer(&mut self, name: &NodeName, peer: &PeerPlan, last: &Pass) -> Result<CaptureReport, String> {
        let refused = || peer.refused.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
        let underlay = peer.address.ok_or_else(|| format!("{name} has no underlay address{}", refused()))?;
        let interface = self.leads_to(underlay, last)?;
        let own_prefix = |address| Test::Address(Prefix::host(address));
        let routers = peer.router.iter().map(own_prefix);
        let inside: Vec<Test> = peer.blocks.iter().map(|block| Test::Address(*block)).chain(routers).collect();
        let at_peer = own_prefix(underlay);
        let mode = self.parts.config.mode;
        let (inner, outer) = if mode == Mode::Direct {
            let tap = Tap { interface: interface.clone(), filter: Filter { clauses: vec![inside.clone()] } };
            (vec![tap.clone()], vec![tap])
        } else {
            let filter = Filter { clauses: vec![inside.clone()] };
            let inner = last.plan.desired.links.keys();
            let inner = inner.map(|interface| Tap { interface: interface.clone(), filter: filter.clone() });
            let filter = Filter { clauses: vec![vec![at_peer], self.tunnel_protocols()] };
            (inner.collect(), vec![Tap { interface: interface.clone(), filter }])
        };
        // Whatever goes to it or to its pods, in whichever form.
        let any = Filter { clauses: vec![std::iter::once(at_peer).chain(inside).collect()] };
        // In mode direct nodes probe each other from their own addresses; pods' packets come from within the cluster, and what is
        // sent from one comes from the address that the route says.
        let sender = |inside: IpAddr| {
            let target = peer.probe.get(&Family::of(inside));
            target.map_or(Family::of(inside).unspecified(), |target| target.own)
        };
        let inside: BTreeMap<IpAddr, IpAddr> = peer.router.iter().map(|inside| (inside, sender(inside))).collect();
        let verify = peer.mtu.filter(|_| !inside.is_empty()).map(|mtu| VerifyPath {
            node: name.clone(),
            underlay,
            inside,
            stack: peer.ledger.stack.clone(),
            mtu,
            tap: Tap { interface, filter: any },
        });
        Ok(CaptureReport {
            target: format!("node {name}"),
            mode,
            inner,
            outer,
            outer_note: None,
            ports: self.tunnel_ports(),
            verify: verify.filter(|_| peer.refused.is_none()),
            names: self.names(last, Some(name)),
        })
    }

    /// The interface by which packets to an underlay address leave.
    fn leads_to(&mut self, address: IpAddr, last: &Pass) -> Result<InterfaceName, String> {
        match self.parts.node.way(&Packet { source: None, destination: address, input: None }) {
            Ok(Way::Leaves { interface, .. }) => Ok(interface),
            Ok(Way::Local) => Err(format!("{address} is an address of this host")),
            _ => last.facts.underlay_interface.clone().ok_or_else(|| format!("this host has no route to {address}")),
        }
    }

    /// What the packets of the tunnels are known by; that packets which should be encrypted are not is seen, too.
    fn tunnel_protocols(&self) -> Vec<Test> {
        let ports = self.tunnel_ports();
        let udp = ports.vxlan.into_iter().chain(ports.wireguard).chain(ports.esp).map(Test::Port);
        let esp = self.parts.config.mode.uses_esp().then_some(Test::Protocol(ESP));
        udp.chain(esp).collect()
    }

    fn tunnel_ports(&self) -> TunnelPorts {
        let config = &self.parts.config;
        let wireguard = [0, 1].map(|slot| config.wireguard.port_of(slot)).to_vec();
        TunnelPorts {
            vxlan: config.mode.uses_vxlan().then_some(config.vxlan.port),
            wireguard: if config.mode.uses_wireguard() { wireguard } else { Vec::new() },
            esp: config.ipsec.udp_port.filter(|_| config.mode.uses_esp()),
        }
    }

    /// Who has which address: the pods of this node, the nodes, then the other pods as far as there is room; of one peer
    /// only, if it is named.
    fn names(&self, last: &Pass, peer: Option<&NodeName>) -> BTreeMap<IpAddr, String> {
        let mut names = BTreeMap::new();
        let mut add = |address: IpAddr, name: &dyn Fn() -> String| {
            if names.len() < NAMES {
                names.entry(address).or_insert_with(name);
            }
        };
        for lease in self.leases.endpoints.values() {
            lease.addresses.iter().for_each(|address| add(address, &|| lease.display_name()));
        }
        let own = last.plan.record.iter().flat_map(|record| record.router.iter()).chain(last.facts.addresses.iter());
        own.for_each(|address| add(address, &|| self.parts.node_name.to_string()));
        let nodes = last.plan.peers.iter().filter(|(name, _)| peer.is_none_or(|wanted| wanted == *name));
        for (name, plan) in nodes {
            plan.address.into_iter().chain(plan.router.iter()).for_each(|address| add(address, &|| name.to_string()));
        }
        let cluster = self.policy.cluster();
        let is_theirs =
            |node: Option<&String>| peer.is_none_or(|wanted| node.is_some_and(|node| node == wanted.as_str()));
        let pods = cluster.objects().pods.iter().filter(|(_, pod)| is_theirs(pod.node.as_ref()) && !pod.host_network);
        for (name, pod) in pods {
            pod.addresses.iter().for_each(|address| add(*address, &|| name.to_string()));
        }
        names
    }
}
