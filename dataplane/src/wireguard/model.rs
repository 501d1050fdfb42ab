//! What a change does to a device, without one: for fakes, and to prove the order of [`super::diff()`].

use husk_overlay::kernel::WireguardPeer;
use husk_overlay::keys::PublicKey;

use super::{PeerUpdate, WireguardAction, WireguardPeerStatus, WireguardState};

impl WireguardAction {
    /// Does to `state` what a device would do.
    pub fn apply_to(&self, state: &mut WireguardState) {
        match self {
            Self::SetPrivateKey { public_key } => state.public_key = Some(*public_key),
            Self::SetListenPort { listen_port } => state.listen_port = *listen_port,
            Self::ClearFirewallMark => state.firewall_mark = 0,
            Self::AddPeer { public_key, peer } => {
                state.take_from_others(public_key, peer);
                let status = WireguardPeerStatus { endpoint: peer.endpoint, ..WireguardPeerStatus::default() };
                state.peers.insert(*public_key, peer.clone());
                state.status.insert(*public_key, status);
            }
            Self::UpdatePeer { public_key, update } => state.update(public_key, update),
            Self::RemovePeer { public_key } => {
                state.peers.remove(public_key);
                state.preshared.remove(public_key);
                state.status.remove(public_key);
            }
        }
    }
}

impl WireguardState {
    fn update(&mut self, public_key: &PublicKey, update: &PeerUpdate) {
        let Some(mut peer) = self.peers.remove(public_key) else { return };
        if update.clear_preshared_key {
            self.preshared.remove(public_key);
        }
        if let Some(endpoint) = update.endpoint {
            peer.endpoint = Some(endpoint);
            self.status.entry(*public_key).or_default().endpoint = Some(endpoint);
        }
        if let Some(keepalive) = update.keepalive {
            peer.keepalive = keepalive;
        }
        if let Some(allowed_ips) = &update.allowed_ips {
            peer.allowed_ips.extend(&allowed_ips.add);
            self.take_from_others(public_key, &peer);
            peer.allowed_ips.retain(|prefix| !allowed_ips.remove.contains(prefix));
        }
        self.peers.insert(*public_key, peer);
    }

    /// A prefix has one owner: who gets it takes it from who had it.
    fn take_from_others(&mut self, public_key: &PublicKey, peer: &WireguardPeer) {
        for (_, other) in self.peers.iter_mut().filter(|(key, _)| *key != public_key) {
            other.allowed_ips.retain(|prefix| !peer.allowed_ips.contains(prefix));
        }
    }
}
