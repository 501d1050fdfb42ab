//! Answers to `huskctl keys`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use husk_dataplane::kernel::Kernel;
use husk_overlay::facts::OwnEpoch;
use husk_overlay::ipc::Response;
use husk_overlay::name::NodeName;
use husk_overlay::record::NodeRecord;

use super::{Engine, Node, Pass};
use crate::keys::Technology;
use crate::report::{
    AssociationReport, Direction, EpochReport, KeysReport, PeerKeysReport, RotationDue, RotationReport,
};
use crate::source::ClusterSource;

impl<K: Kernel, S: ClusterSource, N: Node> Engine<K, S, N> {
    /// Everything about keys but the keys.
    pub(super) fn keys(&mut self) -> Response {
        match Technology::of(self.parts.config.mode) {
            Some(technology) => self.report(|engine, last| engine.keys_report(technology, last)),
            None => self.no_keys(),
        }
    }

    /// Asks for new keys, and passes at once.
    pub(super) fn rotate_keys(&mut self) -> Response {
        let Some(technology) = Technology::of(self.parts.config.mode) else { return self.no_keys() };
        let newest = self.last.as_ref().and_then(|last| last.epochs().keys().next_back().copied());
        self.keeping.requested = true;
        self.pass();
        let begun = self.keeping.begun.filter(|_| !self.keeping.requested);
        let reason = self.state.borrow().reason.clone();
        self.report(|_, last| RotationReport {
            technology,
            begun,
            target: begun.unwrap_or_else(|| newest.map_or(0, |newest| newest + 1)),
            waiting: last.plan.rotation.waiting.clone().or_else(|| reason.filter(|_| begun.is_none())),
        })
    }

    fn no_keys(&self) -> Response {
        let mode = self.parts.config.mode;
        Response::Refused {
            reason: format!(
                "mode {mode} does not encrypt, and has no keys; modes wireguard, ipsec and vxlan-ipsec have"
            ),
        }
    }

    fn keys_report(&mut self, technology: Technology, last: &Pass) -> KeysReport {
        let config = &self.parts.config;
        let rotation = &last.plan.rotation;
        let own = last.epochs();
        let recorded = self.snapshot.nodes.get(&self.parts.node_name).map(epochs_of).unwrap_or_default();
        let waited_for: BTreeMap<u64, BTreeSet<NodeName>> = rotation.unconfirmed.clone();
        let epochs: Vec<EpochReport> = own
            .iter()
            .map(|(epoch, own)| EpochReport {
                epoch: *epoch,
                public_key: own.public_key,
                age: last.facts.uptime.saturating_sub(own.created).as_secs(),
                published: recorded.contains(epoch),
                confirmed: peers_with(last, |keys| keys.confirmed == Some(*epoch)),
                unconfirmed: waited_for.get(epoch).cloned().unwrap_or_default(),
            })
            .collect();
        let settled = matches!(epochs.as_slice(), [only] if only.published)
            && rotation.actions.is_empty()
            && !self.keeping.requested
            && recorded.len() == 1;
        let interval = config.rotation.interval.map(|seconds| Duration::from_secs(seconds.into()));
        let newest = own.values().next_back();
        let due = newest.zip(interval).map(|(newest, interval)| {
            let left = |end: Duration| (newest.created + end).saturating_sub(last.facts.uptime).as_secs();
            RotationDue { earliest: left(interval / 2), latest: left(interval) }
        });
        let peers = last.plan.peers.iter().map(|(name, peer)| PeerKeysReport {
            node: name.clone(),
            published: self.snapshot.nodes.get(name).map(|it| epochs_of(it).into_iter().collect()).unwrap_or_default(),
            sending_own: peer.keys.own,
            sending_peer: peer.keys.peer,
            confirmed: peer.keys.confirmed,
            refused: peer.refused.clone(),
        });
        KeysReport {
            mode: config.mode,
            technology,
            cipher: (technology == Technology::Esp).then_some(config.ipsec.cipher),
            epochs,
            settled,
            requested: self.keeping.requested,
            waiting: rotation.waiting.clone(),
            due,
            peers: peers.collect(),
            associations: self.association_reports(technology, last),
        }
    }

    fn association_reports(&mut self, technology: Technology, last: &Pass) -> Vec<AssociationReport> {
        if technology != Technology::Esp {
            return Vec::new();
        }
        let own = &last.facts.node;
        let installed = self.associations(last);
        let reports = installed.into_iter().map(|(key, used)| {
            let association = last.plan.desired.xfrm_states.get(&key).map(|state| &state.association);
            let outbound = last.facts.addresses.iter().any(|address| address == used.source);
            let ends = association
                .map(|it| if it.sender.node == *own { (&it.sender, &it.receiver) } else { (&it.receiver, &it.sender) });
            AssociationReport {
                peer: ends.map(|(_, peer)| peer.node.clone()),
                direction: if outbound { Direction::Out } else { Direction::In },
                spi: key.spi,
                source: used.source,
                destination: key.destination,
                own_epoch: ends.map(|(own, _)| own.epoch),
                peer_epoch: ends.map(|(_, peer)| peer.epoch),
                packets: used.packets,
                bytes: used.bytes,
                quiet: used.quiet.as_secs(),
            }
        });
        let mut reports: Vec<AssociationReport> = reports.collect();
        reports.sort_by_key(|it| (it.peer.clone(), it.direction, it.own_epoch, it.peer_epoch, it.spi));
        reports
    }
}

impl Pass {
    /// Own epochs, of the technology in use.
    fn epochs(&self) -> &BTreeMap<u64, OwnEpoch> {
        self.facts.esp.as_ref().map_or(&self.facts.wireguard_epochs, |esp| &esp.epochs)
    }
}

/// Epochs, or generations, that a record publishes.
fn epochs_of(record: &NodeRecord) -> BTreeSet<u64> {
    let esp = record.esp.iter().flat_map(|esp| &esp.epochs).map(|epoch| epoch.epoch);
    esp.chain(record.wireguard.iter().map(|device| device.generation)).collect()
}

fn peers_with(last: &Pass, test: impl Fn(&husk_overlay::rotation::PeerKeys) -> bool) -> BTreeSet<NodeName> {
    last.plan.peers.iter().filter(|(_, peer)| test(&peer.keys)).map(|(name, _)| name.clone()).collect()
}
