//! What was counted of peers, pods and tunnels, for `huskctl top`.

use husk_dataplane::kernel::Kernel;
use husk_dataplane::link_counters::LinkCounters;
use husk_overlay::marks;

use super::{Engine, Node, Pass};
use crate::report::{Counted, CountedLink, CountedPeer, CountedPod, Totals};
use crate::source::ClusterSource;

impl<K: Kernel, S: ClusterSource, N: Node> Engine<K, S, N> {
    /// Everything that is counted.
    pub(super) fn counted(&mut self, last: &Pass) -> Counted {
        let links = self.parts.node.link_counters();
        let at = self.parts.node.uptime();
        let peers = self.peers(last).into_iter().map(|peer| CountedPeer {
            state: peer.state,
            received: peer.received,
            sent: peer.sent,
            rtt: peer.paths.values().filter_map(|path| path.rtt).max(),
            loss_per_mille: peer.paths.values().filter_map(|path| path.loss_per_mille).max(),
            node: peer.node,
        });
        let peers = peers.collect();
        let tunnels = links.iter().filter(|(name, _)| marks::is_tunnel_interface(name.as_str()));
        // A pod has as many rows as it has interfaces of ours, which is one but for networks that are chained.
        let pods = self.leases.endpoints.values().map(|endpoint| CountedPod {
            pod: endpoint.display_name(),
            interface: endpoint.host_interface.clone(),
            totals: links.get(&endpoint.host_interface).map(|link| seen_by_pod(host(*link))),
        });
        Counted {
            node: self.parts.node_name.clone(),
            mode: self.parts.config.mode,
            at,
            tunnels: tunnels
                .map(|(interface, link)| CountedLink { interface: interface.clone(), totals: host(*link) })
                .collect(),
            peers,
            pods: pods.collect(),
        }
    }
}

fn host(link: LinkCounters) -> Totals {
    Totals {
        received: link.received_bytes,
        sent: link.sent_bytes,
        received_packets: link.received_packets,
        sent_packets: link.sent_packets,
        dropped: link.dropped,
    }
}

/// What the host's end of the pair receives, the pod has sent.
fn seen_by_pod(host: Totals) -> Totals {
    Totals {
        received: host.sent,
        sent: host.received,
        received_packets: host.sent_packets,
        sent_packets: host.received_packets,
        dropped: host.dropped,
    }
}
