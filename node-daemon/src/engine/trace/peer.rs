//! What a trace looks at of another node: its tunnel, the way to it, and what probing found.

use std::net::IpAddr;

use husk_dataplane::Sweep;
use husk_dataplane::kernel::{Actual, Kernel, Table};
use husk_dataplane::links;
use husk_dataplane::way::{Packet, Way};
use husk_overlay::kernel::XfrmAction;
use husk_overlay::mode::Mode;
use husk_overlay::name::{InterfaceName, NodeName};
use husk_overlay::plan::PeerPlan;
use husk_overlay::prefix::Family;
use husk_overlay::probe::Path;

use super::gather::in_words;
use crate::engine::traffic::age_of;
use crate::engine::{Engine, Node, Pass};
use crate::report::{Place, TraceEnd};
use crate::source::ClusterSource;
use crate::trace::{Device, Entries, PeerEvidence, Tunnel, TunnelKind, UnderlayEvidence};

impl<K: Kernel, S: ClusterSource, N: Node> Engine<K, S, N> {
    /// The node that the overlay leads to for an end elsewhere; none where no node owns the address.
    pub(super) fn peer_of(&mut self, end: &TraceEnd, last: &Pass) -> Option<PeerEvidence> {
        if !self.is_in_cluster(end.address) {
            return None;
        }
        let name = match &end.place {
            Place::PodElsewhere { node: Some(node) } | Place::OtherNode { node } => {
                last.plan.peers.keys().find(|name| name.as_str() == node).cloned()
            }
            _ => None,
        };
        let name =
            name.or_else(|| self.owner_of_block(end.address).filter(|name| last.plan.peers.contains_key(name)))?;
        let plan = last.plan.peers.get(&name)?.clone();
        let family = Family::of(end.address);
        let remedy = last
            .plan
            .issues
            .iter()
            .find(|issue| issue.subject == name.as_str() && plan.refused.as_ref() == Some(&issue.message));
        let remedy = remedy.map(|issue| issue.remedy.clone());
        let path = Path { peer: name.clone(), family };
        let now = self.parts.node.uptime();
        let probe = self.parts.node.probes().remove(&path).map(|report| {
            let ago = report.concluded.map(|at| now.saturating_sub(at));
            (report, ago)
        });
        Some(PeerEvidence {
            refused: plan.refused.clone(),
            remedy,
            ledger: plan.ledger.clone(),
            probed: plan.probed.map(|limit| limit.bytes),
            mtu: plan.mtu.filter(|_| plan.refused.is_none()),
            tunnel: Tunnel { devices: self.devices(last), kind: self.tunnel(&plan, last) },
            underlay: plan.address.map(|address| self.underlay(address, last)),
            probe,
            name,
        })
    }

    /// Who owns the block that an address lies in, refused or not.
    pub(super) fn owner_of_block(&self, address: IpAddr) -> Option<NodeName> {
        let holders = self.snapshot.blocks.iter().filter(|(block, _)| block.contains(address));
        holders.map(|(_, owner)| owner.clone()).next()
    }

    fn underlay(&mut self, address: IpAddr, last: &Pass) -> UnderlayEvidence {
        let source = last.facts.addresses.get(Family::of(address));
        let way = self.parts.node.way(&Packet { source, destination: address, input: None }).map_err(in_words);
        let neighbour = match &way {
            Ok(Way::Leaves { interface, via, .. }) => self.parts.node.neighbour(interface, via.unwrap_or(address)),
            _ => None,
        };
        UnderlayEvidence { address, way, neighbour }
    }

    fn devices(&mut self, last: &Pass) -> Vec<Device> {
        let desired = &last.plan.desired;
        let mut actual = Actual::default();
        let read = self.parts.kernel.read(Table::Links, desired, &mut actual);
        let wrong = |name, link: &husk_overlay::kernel::Link| {
            if let Err(error) = &read {
                // What cannot be looked at is not said to be wrong; the rest of the hop fails to be read likewise.
                tracing::debug!(%error, "tunnel devices cannot be read");
                return None;
            }
            match actual.links.get(name) {
                None => return Some("is missing".to_owned()),
                Some(found) if !found.up => return Some("is down".to_owned()),
                Some(_) => {}
            }
            let one = [(InterfaceName::clone(name), link.clone())].into();
            let changes = links::diff(&one, &actual.links, Sweep::Withheld);
            changes.first().map(|change| format!("is not as planned: {change}"))
        };
        let devices = desired.links.iter();
        devices.map(|(name, link)| Device { name: name.clone(), wrong: wrong(name, link) }).collect()
    }

    fn tunnel(&mut self, plan: &PeerPlan, last: &Pass) -> Result<TunnelKind, String> {
        match self.parts.config.mode {
            Mode::Direct => Ok(TunnelKind::Direct),
            Mode::Vxlan => Ok(TunnelKind::Vxlan {
                vni: self.parts.config.vxlan.vni,
                port: self.parts.config.vxlan.port,
                entries: self.forwarding(plan, last)?,
            }),
            Mode::Wireguard => self.wireguard(plan, last),
            Mode::Ipsec => self.esp(plan, last, None),
            Mode::VxlanIpsec => {
                let forwarding = self.forwarding(plan, last)?;
                self.esp(plan, last, Some(forwarding))
            }
        }
    }

    fn read(&mut self, tables: &[Table], last: &Pass) -> Result<Actual, String> {
        let mut actual = Actual::default();
        for table in tables {
            let read = self.parts.kernel.read(*table, &last.plan.desired, &mut actual);
            read.map_err(|error| error.to_string())?;
        }
        Ok(actual)
    }

    /// Forwarding entries that lead to a peer, and neighbours that its router addresses are known by.
    fn forwarding(&mut self, plan: &PeerPlan, last: &Pass) -> Result<Entries, String> {
        let actual = self.read(&[Table::Links, Table::Neighbours, Table::Fdb], last)?;
        let desired = &last.plan.desired;
        let mut entries = Entries::default();
        for (key, destination) in desired.fdb.iter().filter(|(_, destination)| Some(**destination) == plan.address) {
            entries.wanted += 1;
            entries.found += usize::from(actual.fdb.get(key).is_some_and(|found| found.iter().eq([destination])));
        }
        let routers = |address: IpAddr| plan.router.iter().any(|router| router == address);
        for (key, mac) in desired.neighbours.iter().filter(|(key, _)| routers(key.address)) {
            entries.wanted += 1;
            entries.found += usize::from(actual.neighbours.get(key) == Some(mac));
        }
        Ok(entries)
    }

    fn wireguard(&mut self, plan: &PeerPlan, last: &Pass) -> Result<TunnelKind, String> {
        let actual = self.read(&[Table::Wireguard], last)?;
        let Some(key) = plan.public_key else {
            return Err("the peer has published no key yet".into());
        };
        let wanted = last.plan.desired.wireguard.values().find_map(|device| device.peers.get(&key));
        let devices = || actual.wireguard.values();
        let found = devices().find_map(|device| device.peers.get(&key));
        let status = devices().find_map(|device| device.status.get(&key)).copied().unwrap_or_default();
        let same = |(wanted, found): (&husk_overlay::kernel::WireguardPeer, &husk_overlay::kernel::WireguardPeer)| {
            wanted.allowed_ips == found.allowed_ips
        };
        Ok(TunnelKind::Wireguard {
            configured: wanted.zip(found).is_some_and(same),
            generation: plan.keys.own,
            endpoint: status.endpoint,
            handshake: status.last_handshake.map(age_of),
            bytes: (status.sent_bytes, status.received_bytes),
        })
    }

    fn esp(&mut self, plan: &PeerPlan, last: &Pass, forwarding: Option<Entries>) -> Result<TunnelKind, String> {
        let actual = self.read(&[Table::XfrmStates, Table::XfrmPolicies], last)?;
        let (desired, address) = (&last.plan.desired, plan.address);
        let is_theirs = |source: IpAddr, destination: IpAddr| Some(source) == address || Some(destination) == address;
        let mut associations = Entries::default();
        for (key, state) in &desired.xfrm_states {
            if is_theirs(state.parameters.source, key.destination) {
                associations.wanted += 1;
                let found = actual.xfrm_states.get(key).and_then(|found| found.parameters.as_ref());
                associations.found += usize::from(found == Some(&state.parameters));
            }
        }
        let (mut policies, mut spis) = (Entries::default(), Vec::new());
        for (key, policy) in &desired.xfrm_policies {
            let XfrmAction::Protect(template) = &policy.action else { continue };
            if !is_theirs(template.source, template.destination) {
                continue;
            }
            policies.wanted += 1;
            policies.found +=
                usize::from(actual.xfrm_policies.get(key).is_some_and(|found| found.as_ref() == Some(policy)));
            spis.extend(template.spi);
        }
        spis.sort_unstable();
        spis.dedup();
        let own = plan.keys.own.and_then(|epoch| last.facts.esp.as_ref()?.epochs.get(&epoch));
        let now = self.parts.node.uptime();
        let errors = self.parts.node.xfrm_errors().into_iter().filter(|(_, packets)| *packets > 0);
        Ok(TunnelKind::Esp {
            epochs: plan.keys.own.zip(plan.keys.peer),
            key_age: own.map(|own| now.saturating_sub(own.created)),
            associations,
            spis,
            policies,
            errors: errors.map(|(name, packets)| format!("{name} {packets}")).collect(),
            forwarding,
        })
    }
}
