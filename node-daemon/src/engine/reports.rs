//! Answers to `huskctl`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use husk_dataplane::kernel::{Kernel, diff};
use husk_dataplane::reconcile::survey;
use husk_overlay::facts::Facts;
use husk_overlay::ipc::{Request, Response};
use husk_overlay::kernel::Desired;
use husk_overlay::mode::Mode;
use husk_overlay::plan::PeerPlan;
use husk_overlay::prefix::Prefix;
use serde::Serialize;

use super::trace::Question;
use super::{Ask, Engine, Node, Pass, blocks};
use crate::keys::Technology;
use crate::report::{
    BlockReport, DiffReport, IpamReport, KeysSummary, LastPass, PeerReport, PeerState, PoolReport, Status,
};
use crate::source::ClusterSource;

/// A WireGuard session older than this is dead (`REJECT_AFTER_TIME`, WireGuard paper section 6.1); a peer that sent nothing
/// under ESP for as long is idle.
const SESSION: Duration = Duration::from_secs(180);

impl<K: Kernel, S: ClusterSource, N: Node> Engine<K, S, N> {
    /// Answers.
    pub(super) fn answer(&mut self, ask: Ask) {
        let response = match &ask.request {
            Request::Blocks { families } => self.more_blocks(families),
            Request::Status => self.report(Self::status),
            Request::Peers => self.report(Self::peers),
            Request::Top => self.report(Self::counted),
            Request::Mtu => self.report(Self::mtu),
            Request::Probes => self.report(|engine, _| engine.paths()),
            Request::ProbesOf { peer } => self.report(|engine, _| engine.paths_of(peer)),
            Request::ProbePeer { peer } => self.probe_peer(peer),
            Request::Diff => self.difference(),
            Request::Ipam => self.report(Self::ipam),
            Request::Keys => self.keys(),
            Request::RotateKeys => self.rotate_keys(),
            Request::Policy => self.report(|engine, _| engine.policy_report()),
            Request::PolicyOf { pod } => self.policy_of(pod),
            Request::Trace { source, destination, protocol, port, size } => {
                self.trace(&Question { source, destination, protocol: *protocol, port: *port, size: *size })
            }
            Request::Capture { target } => self.capture_of(target),
            Request::Quarantine { pod, on } => self.quarantine(pod, *on),
            Request::Admit { .. }
            | Request::Detach { .. }
            | Request::Released
            | Request::Ended { .. }
            | Request::Ready
            | Request::NetworkNamespace
            | Request::Ui
            | Request::Flows { .. } => Response::Refused { reason: "this question is not for the loop".into() },
        };
        // The client may have given up.
        let _ = ask.answer.send(response);
    }

    pub(super) fn report<T: Serialize>(&mut self, make: impl FnOnce(&mut Self, &Pass) -> T) -> Response {
        let Some(last) = self.last.take() else {
            let reason = self.state.borrow().reason.clone();
            return Response::NotReady {
                reason: reason.unwrap_or_else(|| "the daemon has not finished its first pass".into()),
                issues: Vec::new(),
            };
        };
        let report = serde_json::to_value(make(self, &last));
        self.last = Some(last);
        match report {
            Ok(report) => Response::Report { report },
            Err(error) => Response::Refused { reason: error.to_string() },
        }
    }

    fn status(&mut self, last: &Pass) -> Status {
        let state = self.state.borrow().clone();
        let config = &self.parts.config;
        let device = last.plan.desired.wireguard.values().next();
        let destinations: BTreeSet<Prefix> = last.plan.desired.routes.keys().map(|route| route.destination).collect();
        let peers = last.plan.peers.values().filter(|peer| peer.refused.is_none());
        // One that has been accepted may have to wait for keys before it can be sent to.
        let routed = peers.filter(|peer| peer.blocks.iter().all(|block| destinations.contains(block))).count();
        let router = last.plan.record.as_ref().map(|record| record.router).unwrap_or_default();
        let blocks = last.plan.record.as_ref().map(|record| record.blocks.clone()).unwrap_or_default();
        Status {
            node: self.parts.node_name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            mode: config.mode,
            encrypted: config.mode.encrypted(),
            cipher: config.mode.uses_esp().then_some(config.ipsec.cipher),
            udp_encapsulation: config.ipsec.udp_port.filter(|_| config.mode.uses_esp()),
            keys: Technology::of(config.mode).map(|_| summary_of(&last.facts, self.keeping.is_under_way())),
            wireguard_device: device.map(|device| if device.userspace { "userspace" } else { "kernel" }.to_owned()),
            ready: state.ready,
            reason: state.reason,
            addresses: last.facts.addresses,
            underlay_interface: last.facts.underlay_interface.clone(),
            underlay_mtu: last.facts.underlay_mtu,
            pod_mtu: last.plan.pod_mtu,
            blocks,
            router,
            endpoints: self.leases.endpoints.len(),
            peers: (routed, last.plan.peers.len()),
            source: match &config.source {
                husk_overlay::config::SourceConfig::Directory { path } => format!("directory {}", path.display()),
                husk_overlay::config::SourceConfig::Kubernetes { .. } => crate::kubernetes::source::SUBJECT.into(),
            },
            passes: self.passes,
            last_pass: LastPass {
                microseconds: u64::try_from(last.took.as_micros()).unwrap_or(u64::MAX),
                changes: last.outcome.changes(),
                failures: last.outcome.failures.len(),
            },
            counters: self.parts.node.counters(),
            xfrm_errors: xfrm_errors(config.mode, &mut self.parts.node),
            issues: state.issues,
        }
    }

    pub(super) fn peers(&mut self, last: &Pass) -> Vec<PeerReport> {
        let traffic = self.traffic(last);
        let mut paths = self.paths_by_peer();
        let rows = last.plan.peers.iter().map(|(name, peer)| {
            let traffic = traffic.get(name).copied().unwrap_or_default();
            let state = state_of(peer, self.parts.config.mode, traffic.handshake_age.or(traffic.received_age));
            PeerReport {
                node: name.clone(),
                state,
                reason: peer.refused.clone(),
                endpoint: traffic.endpoint.map(|endpoint| endpoint.to_string()).or_else(|| {
                    match (peer.address, peer.port) {
                        (Some(address), Some(port)) => Some(SocketAddr::new(address, port).to_string()),
                        (address, _) => address.map(|address| address.to_string()),
                    }
                }),
                public_key: peer.public_key,
                handshake_age: traffic.handshake_age.map(|age| age.as_secs()),
                received_age: traffic.received_age.map(|age| age.as_secs()),
                received: traffic.received,
                sent: traffic.sent,
                mtu: peer.mtu.filter(|_| peer.refused.is_none()),
                paths: paths.remove(name).unwrap_or_default(),
                router: peer.router,
                blocks: peer.blocks.clone(),
            }
        });
        rows.collect()
    }

    /// The next pass, with apply left out.
    fn difference(&mut self) -> Response {
        self.read_source();
        let facts = match self.facts() {
            Ok(facts) => facts,
            Err(error) => return Response::Refused { reason: format!("{error:#}") },
        };
        // What is wrong with a lease is an issue of the next pass.
        self.read_leases(&mut Vec::new());
        let mut desired: Desired = self.plan(&facts).desired;
        self.read_policy_objects(&mut Vec::new());
        self.compile_policy(&mut desired);
        let (actual, failures) = survey(&mut self.parts.kernel, &desired);
        if let Some(failure) = failures.first() {
            let reason = format!("the table {} cannot be read: {}", failure.table, failure.error);
            return Response::Refused { reason };
        }
        let changes = diff(&desired, &actual, self.sweep()).iter().map(ToString::to_string).collect();
        match serde_json::to_value(DiffReport { changes }) {
            Ok(report) => Response::Report { report },
            Err(error) => Response::Refused { reason: error.to_string() },
        }
    }

    fn ipam(&mut self, last: &Pass) -> IpamReport {
        let pools = blocks::pools(&self.parts.config, &self.snapshot.pools).into_iter().map(|pool| {
            let used = self.snapshot.blocks.keys().filter(|block| pool.cidr.covers(block)).count();
            let total = pool.cidr.subnet_count(pool.block_length);
            PoolReport {
                used_blocks: u64::try_from(used).unwrap_or(u64::MAX),
                total_blocks: u64::try_from(total).unwrap_or(u64::MAX),
                pool,
            }
        });
        let router = last.plan.record.as_ref().map(|record| record.router).unwrap_or_default();
        let own = blocks::in_order(&last.plan).into_iter().map(|block| {
            let leased = self.leases.endpoints.values().flat_map(|lease| lease.addresses.iter());
            let reserved = router.iter().filter(|address| block.contains(*address)).count();
            let total = block.size().saturating_sub(reserved as u128);
            BlockReport {
                block,
                leased: leased.filter(|address| block.contains(*address)).count() as u64,
                total: u64::try_from(total).unwrap_or(u64::MAX),
            }
        });
        let bad = |issue: &&husk_overlay::issue::Issue| {
            use husk_overlay::issue::IssueKind::{BadLease, DuplicateBlock, ForeignBlock, PoolExhausted};
            matches!(issue.kind, BadLease | DuplicateBlock | ForeignBlock | PoolExhausted)
        };
        let mut findings: Vec<String> =
            self.state.borrow().issues.iter().filter(bad).map(ToString::to_string).collect();
        let missing = self
            .leases
            .endpoints
            .values()
            .filter(|lease| !last.facts.pod_interfaces.contains_key(&lease.host_interface));
        findings.extend(missing.map(|lease| {
            format!(
                "{}: its lease exists, its host interface {} does not; it is released once the network namespace is gone",
                lease.display_name(),
                lease.host_interface
            )
        }));
        let leased: std::collections::BTreeSet<_> =
            self.leases.endpoints.values().map(|lease| &lease.host_interface).collect();
        let orphans = last.facts.pod_interfaces.keys().filter(|interface| !leased.contains(interface));
        findings.extend(orphans.map(|interface| {
            format!("{interface}: a pod interface without a lease; the next GC of the runtime removes it")
        }));
        IpamReport {
            pools: pools.collect(),
            blocks: own.collect(),
            leases: self.leases.endpoints.values().cloned().collect(),
            findings,
        }
    }
}

/// How a peer is doing that was last heard from so long ago.
pub(super) fn state_of(peer: &PeerPlan, mode: Mode, heard: Option<Duration>) -> PeerState {
    match (&peer.refused, Technology::of(mode)) {
        (Some(_), _) => PeerState::Refused,
        (None, None) => PeerState::Configured,
        (None, Some(Technology::Wireguard)) if peer.public_key.is_none() => PeerState::Configured,
        (None, Some(Technology::Esp)) if peer.keys.own.is_none() => PeerState::Waiting,
        (None, Some(_)) if heard.is_some_and(|age| age < SESSION) => PeerState::Connected,
        (None, Some(_)) => PeerState::Idle,
    }
}

pub(super) fn summary_of(facts: &Facts, rotating: bool) -> KeysSummary {
    let epochs = facts.esp.as_ref().map_or(&facts.wireguard_epochs, |esp| &esp.epochs);
    let newest = epochs.iter().next_back();
    let age = newest.map(|(_, own)| facts.uptime.saturating_sub(own.created).as_secs());
    KeysSummary { newest: newest.map(|(epoch, _)| *epoch), age, rotating }
}

fn xfrm_errors(mode: Mode, node: &mut impl Node) -> BTreeMap<String, u64> {
    let mut errors = if mode.uses_esp() { node.xfrm_errors() } else { BTreeMap::new() };
    errors.retain(|_, packets| *packets > 0);
    errors
}
