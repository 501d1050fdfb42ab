//! How things stand, for metrics and the page: a sample after a pass, made of what the pass knows already.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use husk_dataplane::kernel::Kernel;
use husk_overlay::name::NodeName;
use husk_overlay::plan::PeerPlan;

use super::traffic::age_of;
use super::{Engine, Node, Pass, blocks, reports};
use crate::keys::Technology;
use crate::metrics::{AddressSample, KeySample, Live, PathSample, PeerSample, PoolSample, Sample, SourceSample};
use crate::source::ClusterSource;

impl<K: Kernel, S: ClusterSource, N: Node> Engine<K, S, N> {
    /// Has everything counted and told there.
    pub fn measure_with(&mut self, live: Live) {
        self.live = live;
    }

    /// After a pass: leaves a sample, if the last one is old enough.
    pub(super) fn leave_sample(&mut self) {
        if !self.live.wants_sample() {
            return;
        }
        let Some(last) = self.last.take() else { return };
        let sample = self.sample(&last);
        self.last = Some(last);
        self.live.set_sample(sample);
    }

    fn sample(&mut self, last: &Pass) -> Sample {
        let device = last.plan.desired.wireguard.values().next();
        let summary = reports::summary_of(&last.facts, self.keeping.is_under_way());
        let held = last.facts.esp.as_ref().map_or(&last.facts.wireguard_epochs, |esp| &esp.epochs).len();
        let keys = Technology::of(self.parts.config.mode).map(|_| KeySample {
            age: summary.age.map(Duration::from_secs),
            held,
            rotating: summary.rotating,
        });
        Sample {
            underlay_mtu: Some(last.facts.underlay_mtu).filter(|mtu| *mtu > 0),
            pod_mtu: last.plan.pod_mtu,
            device: device.map_or("none", |device| if device.userspace { "userspace" } else { "kernel" }),
            keys,
            source: SourceSample {
                up: self.delivered && self.source_issue.is_none(),
                age: self.source_answered.map(|at| at.elapsed()),
            },
            endpoints: self.leases.endpoints.len(),
            pools: self.pool_samples(),
            addresses: self.address_samples(last),
            peers: self.peer_samples(last),
        }
    }

    fn pool_samples(&self) -> Vec<PoolSample> {
        // No block is taken from one that is disabled: how full it is troubles nobody.
        let usable = blocks::pools(&self.parts.config, &self.snapshot.pools).into_iter().filter(|pool| !pool.disabled);
        let pools = usable.map(|pool| {
            let used = self.snapshot.blocks.keys().filter(|block| pool.cidr.covers(block)).count() as u64;
            let total = pool.cidr.subnet_count(pool.block_length);
            PoolSample { name: pool.name, blocks: u64::try_from(total).unwrap_or(u64::MAX), used }
        });
        pools.collect()
    }

    fn address_samples(&self, last: &Pass) -> BTreeMap<husk_overlay::prefix::Family, AddressSample> {
        let router = last.plan.record.as_ref().map(|record| record.router).unwrap_or_default();
        let mut samples = BTreeMap::<_, AddressSample>::new();
        for block in blocks::in_order(&last.plan) {
            let sample = samples.entry(block.family()).or_default();
            let reserved = router.iter().filter(|address| block.contains(*address)).count() as u128;
            let usable = u64::try_from(block.size().saturating_sub(reserved)).unwrap_or(u64::MAX);
            sample.blocks += 1;
            sample.total = sample.total.saturating_add(usable);
        }
        for address in self.leases.endpoints.values().flat_map(|endpoint| endpoint.addresses.iter()) {
            samples.entry(husk_overlay::prefix::Family::of(address)).or_default().leased += 1;
        }
        samples
    }

    fn peer_samples(&mut self, last: &Pass) -> Vec<PeerSample> {
        let mut paths = BTreeMap::<NodeName, Vec<PathSample>>::new();
        for (path, report) in self.parts.node.probes() {
            paths.entry(path.peer).or_default().push(PathSample {
                family: path.family,
                standing: report.standing,
                promised: report.promised,
                passes: report.passes,
                rtt: report.rtt,
                loss_per_mille: report.loss_per_mille,
            });
        }
        let received = received(last);
        let heard = |peer: &PeerPlan| match Technology::of(self.parts.config.mode)? {
            Technology::Wireguard => self.counted.last_handshake(&peer.public_key?).map(age_of),
            Technology::Esp => received.get(&peer.address?).copied(),
        };
        let peers = last.plan.peers.iter().map(|(node, peer)| {
            let heard = heard(peer);
            PeerSample {
                node: node.clone(),
                state: reports::state_of(peer, self.parts.config.mode, heard),
                reason: peer.refused.clone(),
                address: peer.address,
                heard,
                mtu: peer.mtu.filter(|_| peer.refused.is_none()),
                paths: paths.remove(node).unwrap_or_default(),
            }
        });
        peers.collect()
    }
}

/// Since when nothing was received under IPsec from each underlay address that anything ever was.
fn received(last: &Pass) -> BTreeMap<IpAddr, Duration> {
    let mut received = BTreeMap::<IpAddr, Duration>::new();
    let installed = last.facts.esp.iter().flat_map(|esp| esp.installed.values());
    for used in installed.filter(|used| used.packets > 0) {
        let quiet = received.entry(used.source).or_insert(used.quiet);
        *quiet = (*quiet).min(used.quiet);
    }
    received
}
