//! What went through the tunnels to and from each peer, for reports.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use husk_dataplane::kernel::{Actual, Kernel, Table};
use husk_dataplane::wireguard::WireguardPeerStatus;
use husk_overlay::facts::AssociationUse;
use husk_overlay::kernel::XfrmStateKey;
use husk_overlay::keys::PublicKey;
use husk_overlay::name::NodeName;

use super::{Engine, Node, Pass};
use crate::source::ClusterSource;

/// Traffic with a peer.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Traffic {
    /// Where it was last heard from.
    pub(super) endpoint: Option<SocketAddr>,
    /// Since its last handshake.
    pub(super) handshake_age: Option<Duration>,
    /// Since its last packet.
    pub(super) received_age: Option<Duration>,
    /// Bytes received.
    pub(super) received: Option<u64>,
    /// Bytes sent.
    pub(super) sent: Option<u64>,
}

impl<K: Kernel, S: ClusterSource, N: Node> Engine<K, S, N> {
    /// Traffic with each peer, as the kernel counts it now.
    pub(super) fn traffic(&mut self, last: &Pass) -> BTreeMap<NodeName, Traffic> {
        if last.facts.esp.is_some() {
            return self.traffic_of_associations(last);
        }
        if last.plan.desired.wireguard.is_empty() {
            return BTreeMap::new();
        }
        let mut actual = Actual::default();
        if let Err(error) = self.parts.kernel.read(Table::Wireguard, &last.plan.desired, &mut actual) {
            tracing::warn!(%error, "WireGuard devices cannot be read");
        }
        let live: BTreeMap<PublicKey, WireguardPeerStatus> =
            actual.wireguard.into_values().flat_map(|device| device.status).collect();
        let traffic = last.plan.peers.iter().map(|(name, peer)| {
            // While generations change there are two keys: bytes are those of both, the rest is of the one in use.
            let published = self.snapshot.nodes.get(name).map(|record| record.wireguard.as_slice()).unwrap_or_default();
            let all: Vec<_> = published.iter().filter_map(|device| live.get(&device.public_key)).collect();
            let used = peer.public_key.and_then(|key| live.get(&key));
            let sum = |bytes: fn(&WireguardPeerStatus) -> u64| {
                (!all.is_empty()).then(|| all.iter().map(|status| bytes(status)).sum())
            };
            let traffic = Traffic {
                endpoint: used.and_then(|status| status.endpoint),
                handshake_age: used.and_then(|status| status.last_handshake).map(age_of),
                received_age: None,
                received: sum(|status| status.received_bytes),
                sent: sum(|status| status.sent_bytes),
            };
            (name.clone(), traffic)
        });
        traffic.collect()
    }

    fn traffic_of_associations(&mut self, last: &Pass) -> BTreeMap<NodeName, Traffic> {
        let used = self.associations(last);
        let of = |address: Option<IpAddr>| {
            let address = address?;
            let inbound = used.values().filter(|it| it.source == address);
            let outbound = used.iter().filter(|(key, _)| key.destination == address).map(|(_, used)| used);
            let heard = inbound.clone().filter(|it| it.packets > 0).map(|it| it.quiet).min();
            Some(Traffic {
                endpoint: None,
                handshake_age: None,
                received_age: heard,
                received: Some(inbound.map(|it| it.bytes).sum()),
                sent: Some(outbound.map(|it| it.bytes).sum()),
            })
        };
        let peers = last.plan.peers.iter();
        peers.filter_map(|(name, peer)| Some((name.clone(), of(peer.address)?))).collect()
    }

    /// Associations as the kernel has them now; as they were in the last pass if it does not say.
    pub(super) fn associations(&mut self, last: &Pass) -> BTreeMap<XfrmStateKey, AssociationUse> {
        let mut actual = Actual::default();
        match self.parts.kernel.read(Table::XfrmStates, &last.plan.desired, &mut actual) {
            Ok(()) => self.counted.associations(self.parts.node.uptime(), &actual.xfrm_states),
            Err(error) => {
                tracing::warn!(%error, "IPsec associations cannot be read");
                last.facts.esp.as_ref().map(|esp| esp.installed.clone()).unwrap_or_default()
            }
        }
    }
}

/// Age of a handshake given as time since the Unix epoch.
pub(super) fn age_of(handshake: Duration) -> Duration {
    // A clock that was set back makes the handshake one of the future: as young as can be.
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().saturating_sub(handshake)
}
