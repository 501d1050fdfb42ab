//! A WireGuard peer that was just set up has no session, but the other side may think it has one.
//!
//! The other side then sends under keys that nobody here knows any more, and notices only when nothing has come back for
//! 15 seconds (`KEEPALIVE_TIMEOUT` + `REKEY_TIMEOUT`, WireGuard paper section 6.5). So the node sends a packet of its own
//! through the tunnel, which makes the device start a handshake, and the other side goes over to the new session.
//!
//! Where both sides start one at the same time, both fail: each forgets its own for the other's, and answers what nobody waits
//! for any more (`wg_noise_handshake_consume_initiation` in drivers/net/wireguard/noise.c). The next attempt is five seconds
//! later (`REKEY_TIMEOUT`). Nodes learn of each other at about the same time, so of two the one with the greater name waits.

use std::net::IpAddr;
use std::time::Duration;

use husk_dataplane::kernel::{Actual, Kernel, Table};
use husk_dataplane::reconcile::Outcome;
use husk_overlay::mode::Mode;
use husk_overlay::name::NodeName;
use husk_overlay::plan::Plan;

use super::{Engine, Node};
use crate::source::ClusterSource;

/// How long the node with the greater name leaves the first word to the other: longer than a handshake takes on most paths.
const COURTESY: Duration = Duration::from_millis(200);

impl<K: Kernel, S: ClusterSource, N: Node> Engine<K, S, N> {
    /// After a pass that changed WireGuard devices: one packet to each peer without a session.
    pub(super) fn start_sessions(&mut self, plan: &Plan, outcome: &Outcome) {
        if !outcome.applied.contains_key(&Table::Wireguard) {
            return;
        }
        let mut actual = Actual::default();
        if let Err(error) = self.parts.kernel.read(Table::Wireguard, &plan.desired, &mut actual) {
            tracing::debug!(%error, "sessions with new peers start with their first packet");
            return;
        }
        let has_none = |key| {
            let mut devices = actual.wireguard.values();
            devices.any(|device| device.status.get(key).is_some_and(|status| status.last_handshake.is_none()))
        };
        let fresh = plan.peers.iter().filter(|(_, peer)| peer.public_key.as_ref().is_some_and(has_none));
        self.greet(plan, fresh.map(|(name, _)| name).collect());
    }

    /// Sends a packet through the tunnel to each of these peers.
    pub(super) fn greet(&mut self, plan: &Plan, peers: Vec<&NodeName>) {
        let router = |name| plan.peers.get(name).and_then(|peer| peer.router.iter().next());
        let own = &self.parts.node_name;
        let waits = |name: &NodeName| self.parts.config.mode == Mode::Wireguard && own > name;
        let (second, first): (Vec<_>, Vec<_>) = peers.into_iter().partition(|name| waits(name));
        for (peers, after) in [(first, Duration::ZERO), (second, COURTESY)] {
            let routers: Vec<IpAddr> = peers.into_iter().filter_map(router).collect();
            self.parts.node.greet(&routers, after);
        }
    }
}
