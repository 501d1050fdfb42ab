//! Peers that publish another address.
//!
//! A WireGuard device follows a peer that roams, and comparing tables leaves a peer with a session where it is. But one that
//! says it has moved may never be heard of at its new address before something is sent there.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use husk_dataplane::kernel::{Change, Kernel};
use husk_dataplane::wireguard::{self, KeyRing};
use husk_overlay::issue::{Issue, IssueKind, Severity};
use husk_overlay::keys::PublicKey;
use husk_overlay::name::InterfaceName;
use husk_overlay::plan::Plan;

use super::{Engine, Node, failures};
use crate::source::ClusterSource;

/// What devices were last told of where their peers are.
pub(super) type KnownEndpoints = BTreeMap<(InterfaceName, PublicKey), SocketAddr>;

impl<K: Kernel, S: ClusterSource, N: Node> Engine<K, S, N> {
    /// Sends to where peers have moved to since the last pass. What is new altogether is told by the comparison of tables.
    pub(super) fn follow_peers(&mut self, plan: &Plan, keys: &KeyRing, issues: &mut Vec<Issue>) {
        let mut planned = KnownEndpoints::new();
        let mut changes = Vec::new();
        for (interface, device) in &plan.desired.wireguard {
            for (public_key, peer) in &device.peers {
                let Some(endpoint) = peer.endpoint else { continue };
                let peer = (interface.clone(), *public_key);
                if self.told.get(&peer).is_some_and(|before| *before != endpoint) {
                    let change = wireguard::set_endpoint(interface, device.userspace, *public_key, endpoint);
                    changes.push((peer.clone(), Change::Wireguard(change)));
                }
                planned.insert(peer, endpoint);
            }
        }
        let (peers, changes): (Vec<_>, Vec<_>) = changes.into_iter().unzip();
        let results = if changes.is_empty() { Vec::new() } else { self.parts.kernel.apply(&changes, keys) };
        for ((peer, change), result) in peers.into_iter().zip(&changes).zip(results) {
            match result {
                Ok(()) => tracing::info!(%change, "a peer has moved"),
                // Whoever makes the device anew tells it all.
                Err(error) if failures::lacks_interface(&error) => {}
                Err(error) => {
                    // What was told before stays known, so that the next pass tries again.
                    if let Some(before) = self.told.get(&peer) {
                        planned.insert(peer, *before);
                    }
                    issues.push(Issue {
                        severity: Severity::Error,
                        kind: IssueKind::ApplyFailed,
                        subject: change.to_string(),
                        message: error.to_string(),
                        remedy: error.remedy().into(),
                    });
                }
            }
        }
        self.told = planned;
    }
}
