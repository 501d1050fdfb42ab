//! The node's address blocks: claimed when pods need addresses, given back when they are empty.
//!
//! A block is given back in an order that lets no pod get an address of it on the way: it leaves the record and
//! `node.json`; then the lease store is looked at under its lock, under which the plugin reads `node.json` and leases; only
//! a block without a lease then goes back to the allocation lock. One that was leased in between is taken up again.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use husk_dataplane::kernel::Kernel;
use husk_ipam::block;
use husk_ipam::lease::BootTime;
use husk_overlay::config::{BlockOrigin, Config};
use husk_overlay::endpoint::Endpoint;
use husk_overlay::ipc::Response;
use husk_overlay::issue::{Issue, IssueKind, Severity};
use husk_overlay::name::NodeName;
use husk_overlay::plan::{Plan, router_addresses};
use husk_overlay::prefix::{Family, Prefix};
use husk_overlay::record::{DualStack, Pool, Snapshot};

use super::{Engine, Node};
use crate::source::{Claim, ClusterSource, SourceError};

/// What this node did with blocks that the source's list need not show yet.
#[derive(Debug, Default)]
pub(super) struct BlockChanges {
    /// Ours by the allocation lock's word; kept until the source lists them.
    granted: BTreeSet<Prefix>,
    /// On their way back, or given back; kept until the source does not list them as ours any more.
    leaving: BTreeSet<Prefix>,
}

impl BlockChanges {
    /// Brings a snapshot up to date.
    pub(super) fn apply_to(&mut self, snapshot: &mut Snapshot, own: &NodeName) {
        self.granted.retain(|block| !snapshot.blocks.contains_key(block));
        self.leaving.retain(|block| snapshot.blocks.get(block) == Some(own));
        snapshot.blocks.extend(self.granted.iter().map(|block| (*block, own.clone())));
        snapshot.blocks.retain(|block, _| !self.leaving.contains(block));
    }
}

/// The node's blocks in the order pods are given addresses from them.
pub(super) fn in_order(plan: &Plan) -> Vec<Prefix> {
    plan.record.as_ref().map(|record| record.blocks.iter().copied().collect()).unwrap_or_default()
}

/// The pools of the cluster: those that manifests define, else one per cluster CIDR.
pub(super) fn pools(config: &Config, defined: &BTreeMap<String, Pool>) -> Vec<Pool> {
    if !defined.is_empty() {
        return defined.values().cloned().collect();
    }
    let default = |cidr: &Prefix| Pool {
        name: format!("default-{}", cidr.family().to_string().to_lowercase()),
        cidr: *cidr,
        block_length: config.block_lengths.get(cidr.family()),
        disabled: false,
    };
    config.cluster_cidrs.iter().map(default).collect()
}

/// Why a node has no block of a family.
fn no_block(family: Family, kind: IssueKind, message: String, remedy: &str) -> Issue {
    let (subject, remedy) = (format!("{family} blocks"), remedy.to_owned());
    Issue { severity: Severity::Blocking, kind, subject, message, remedy }
}

/// Every block is somebody's.
fn pool_exhausted(family: Family) -> Issue {
    no_block(
        family,
        IssueKind::PoolExhausted,
        format!("every {family} block of the cluster's pools belongs to a node"),
        "enlarge clusterCIDRs, add an AddressPool, or remove the manifests of nodes that are gone",
    )
}

/// Blocks come from Kubernetes only, and there is none, or none with a free address.
fn no_node_cidr(family: Family, own: &[Prefix]) -> Issue {
    match own.iter().find(|block| block.family() == family) {
        None => no_block(
            family,
            IssueKind::NoNodeCidr,
            format!("spec.podCIDRs of the Node object has no {family} CIDR within the cluster CIDRs"),
            "start kube-controller-manager with --allocate-node-cidrs and a --cluster-cidr as in clusterCIDRs, or set ipam.blocks to pools",
        ),
        Some(block) => Issue {
            severity: Severity::Error,
            ..no_block(
                family,
                IssueKind::PoolExhausted,
                format!(
                    "every address of the node's CIDR {block} is taken, and with ipam.blocks: node-cidrs there are no others"
                ),
                "raise --node-cidr-mask-size of kube-controller-manager for new nodes, or set ipam.blocks to pools",
            )
        },
    }
}

/// Pods have addresses of a block that is not the node's any more.
fn lost_block(block: Prefix, pods: usize, owner: Option<&NodeName>) -> Issue {
    let owner = owner.map_or_else(|| "nobody, as the cluster source says".to_owned(), ToString::to_string);
    Issue {
        severity: Severity::Error,
        kind: IssueKind::BlockLost,
        subject: format!("block {block}"),
        message: format!("it belongs to {owner}, and {pods} pods of this node have addresses of it; other nodes do not reach them"),
        remedy: "delete these pods, so that they come back with addresses of this node's blocks; huskctl ipam show names them".into(),
    }
}

fn in_cluster(config: &Config, prefix: &Prefix) -> bool {
    config.cluster_cidrs.iter().any(|cidr| cidr.covers(prefix))
}

/// Where the search for one more block starts: behind the lowest one a node has, since its own address in the overlay is
/// the first of its lowest block and should stay; without a block at `random`, so that nodes that start at once look at
/// different places.
fn search_start(pools: &[Pool], own: &[Prefix], family: Family, random: u128) -> u128 {
    let Some(lowest) = own.iter().filter(|block| block.family() == family).min() else { return random };
    let Some(pool) = pools.iter().find(|pool| pool.cidr.covers(lowest)) else { return random };
    let step = u32::from(family.bits().saturating_sub(pool.block_length));
    let index = pool.cidr.index_of(lowest.address()).unwrap_or(0);
    index.checked_shr(step).unwrap_or(0).saturating_add(1)
}

impl<K: Kernel, S: ClusterSource, N: Node> Engine<K, S, N> {
    /// Own blocks that pods can be given addresses from, in ascending order.
    fn own_blocks(&self) -> Vec<Prefix> {
        let own = self.snapshot.blocks.iter().filter(|(_, owner)| **owner == self.parts.node_name);
        own.map(|(block, _)| *block).filter(|block| in_cluster(&self.parts.config, block)).collect()
    }

    /// Whose blocks are whose is known, and this host is the one that its node name stands for.
    fn owners_are_known(&self) -> bool {
        self.delivered && self.source_issue.is_none() && !self.name_taken
    }

    /// The pools that blocks are cut from.
    fn usable_pools(&self) -> Vec<Pool> {
        let mut pools = pools(&self.parts.config, &self.snapshot.pools);
        pools.retain(|pool| in_cluster(&self.parts.config, &pool.cidr));
        pools
    }

    /// Every family needs a block before the first pod comes.
    pub(super) fn ensure_blocks(&mut self, issues: &mut Vec<Issue>) {
        if !self.owners_are_known() {
            return;
        }
        for pool in self.snapshot.pools.values().filter(|pool| !in_cluster(&self.parts.config, &pool.cidr)) {
            issues.push(Issue {
                severity: Severity::Warning,
                kind: IssueKind::ForeignBlock,
                subject: format!("AddressPool {}", pool.name),
                message: format!("its CIDR {} is not within the cluster CIDRs; no block is taken from it", pool.cidr),
                remedy: "correct the pool's spec.cidr, or clusterCIDRs on all nodes".into(),
            });
        }
        let still_lost = self.recover_blocks(issues);
        let own = self.own_blocks();
        let families: Vec<Family> = self.parts.config.families().collect();
        for family in families {
            let has_block = own.iter().any(|block| block.family() == family);
            issues.extend(if has_block { self.exhausted(family, &own) } else { self.claim(family).err() });
        }
        self.held = self.own_blocks().into_iter().chain(still_lost).collect();
    }

    /// The next pod will have to wait: every address of the node's blocks is taken, and there is no other block for it.
    fn exhausted(&self, family: Family, own: &[Prefix]) -> Option<Issue> {
        let fixed = self.parts.config.ipam.blocks == BlockOrigin::NodeCidrs;
        let another = || block::candidates(&self.usable_pools(), &self.snapshot.blocks, family, 0).next().is_some();
        if !fixed && another() {
            return None;
        }
        // Where they cannot be read, retire_blocks says so.
        let in_use = self.addresses_in_use().ok()?;
        let router = self.router_in(own);
        let mut blocks = own.iter().filter(|block| block.family() == family);
        if blocks.any(|block| block::free_in(block, &in_use, &router) > 0) {
            return None;
        }
        let issue = if fixed { no_node_cidr(family, own) } else { pool_exhausted(family) };
        // Pods that run are not concerned, and one that goes makes room for another.
        Some(Issue { severity: Severity::Error, ..issue })
    }

    /// Claims again what the source has forgotten, as one does that was restored from an older state: pods have addresses
    /// of these blocks. Returns the blocks that it could not get back.
    fn recover_blocks(&mut self, issues: &mut Vec<Issue>) -> Vec<Prefix> {
        let own = self.own_blocks();
        let leaving = &self.block_changes.leaving;
        let lost = self.held.iter().filter(|block| !own.contains(block) && !leaving.contains(block)).copied();
        let mut still_lost = Vec::new();
        for block in lost.collect::<Vec<_>>() {
            let within = |pod: &&Endpoint| pod.addresses.iter().any(|address| block.contains(address));
            let pods = self.leases.endpoints.values().filter(within).count();
            if pods == 0 {
                continue;
            }
            let mut others = self.snapshot.blocks.iter().filter(|(_, owner)| **owner != self.parts.node_name);
            let owner = others.find(|(other, _)| other.overlaps(&block)).map(|(_, owner)| owner.clone());
            let claimed = match (&owner, self.parts.config.ipam.blocks) {
                (None, BlockOrigin::Pools) => self.parts.source.claim(block, &self.parts.node_name),
                _ => Ok(Claim::Taken),
            };
            // As long as pods are in it, every pass looks whether it can be had.
            if !matches!(claimed, Ok(Claim::Granted)) {
                still_lost.push(block);
            }
            match claimed {
                Ok(Claim::Granted) => {
                    tracing::warn!(%block, pods, "the cluster source had forgotten this node's block; it was claimed again");
                    self.block_changes.granted.insert(block);
                    self.snapshot.blocks.insert(block, self.parts.node_name.clone());
                }
                Ok(Claim::Taken) => issues.push(lost_block(block, pods, owner.as_ref())),
                Err(error) => issues.push(Issue {
                    severity: Severity::Error,
                    kind: IssueKind::SourceUnavailable,
                    subject: format!("block {block}"),
                    message: format!("the cluster source has forgotten it, and it could not be claimed again: {error}"),
                    remedy: "make the source writable for this node; nothing has to be restarted".into(),
                }),
            }
        }
        still_lost
    }

    /// Claims one more block of a family.
    fn claim(&mut self, family: Family) -> Result<Prefix, Issue> {
        if self.parts.config.ipam.blocks == BlockOrigin::NodeCidrs {
            return Err(no_node_cidr(family, &self.own_blocks()));
        }
        let pools = self.usable_pools();
        let start = search_start(&pools, &self.own_blocks(), family, self.parts.block_offset);
        let candidates = block::candidates(&pools, &self.snapshot.blocks, family, start)
            .filter(|block| !self.block_changes.leaving.contains(block));
        let (source, node) = (&mut self.parts.source, &self.parts.node_name);
        let claimed = block::claim(candidates, |block| -> Result<block::Claim, SourceError> {
            Ok(match source.claim(*block, node)? {
                Claim::Granted => block::Claim::Created,
                Claim::Taken => block::Claim::Taken,
            })
        });
        match claimed {
            Ok(Some(block)) => {
                tracing::info!(%block, "claimed an address block");
                self.block_changes.granted.insert(block);
                self.snapshot.blocks.insert(block, node.clone());
                Ok(block)
            }
            Ok(None) => Err(pool_exhausted(family)),
            Err(error) => Err(no_block(
                family,
                IssueKind::SourceUnavailable,
                format!("no block could be claimed: {error}"),
                "make the source writable for this node; nothing has to be restarted",
            )),
        }
    }

    /// Pods ran out of addresses: one more block of each family that has none left, in the kernel and in `node.json` when
    /// the answer is given. Pods that run out together ask together; the first of them gets the block for all.
    pub(super) fn more_blocks(&mut self, families: &BTreeSet<Family>) -> Response {
        if !self.owners_are_known() {
            return Response::NotReady {
                reason: "no block can be claimed while the cluster source is not available".into(),
                issues: self.all_issues(),
            };
        }
        let in_use = match self.addresses_in_use() {
            Ok(in_use) => in_use,
            Err(error) => return Response::Refused { reason: error.to_string() },
        };
        let mut failed = None;
        for family in families {
            if self.parts.config.cluster_cidr(*family).is_some() && !self.has_free_address(*family, &in_use) {
                failed = self.claim(*family).err().or(failed);
            }
        }
        self.pass();
        let state = self.state.borrow();
        match (failed, &state.reason) {
            (Some(issue), _) if issue.kind == IssueKind::PoolExhausted => {
                Response::Refused { reason: issue.to_string() }
            }
            (Some(issue), _) => Response::NotReady { reason: issue.to_string(), issues: vec![issue] },
            (None, Some(reason)) => Response::NotReady { reason: reason.clone(), issues: state.issues.clone() },
            (None, None) => Response::Done,
        }
    }

    /// True if `node.json` names a block of the family in which a pod would still find an address.
    fn has_free_address(&self, family: Family, in_use: &BTreeSet<IpAddr>) -> bool {
        let state = self.state.borrow();
        let Some(node_file) = &state.node_file else { return false };
        let mut blocks = node_file.blocks.iter().filter(|block| block.family() == family);
        blocks.any(|block| block::free_in(block, in_use, &node_file.router) > 0)
    }

    /// Addresses that are leased or rest, read under the store's lock.
    fn addresses_in_use(&self) -> Result<BTreeSet<IpAddr>, husk_ipam::Error> {
        let cool_down = Duration::from_secs(self.parts.config.ipam.cool_down.into());
        self.parts.leases.lock()?.addresses(cool_down, BootTime::now())
    }

    /// Chooses empty blocks to give back: from here on neither the record nor `node.json` names them.
    pub(super) fn retire_blocks(&mut self) {
        let own = self.own_blocks();
        let fixed = self.parts.config.ipam.blocks == BlockOrigin::NodeCidrs;
        if fixed || !self.owners_are_known() || own.len() <= self.parts.config.cluster_cidrs.len() {
            return;
        }
        let in_use = match self.addresses_in_use() {
            Ok(in_use) => in_use,
            Err(error) => {
                tracing::warn!(%error, "address blocks are not looked through");
                return;
            }
        };
        let router = self.router_in(&own);
        for block in block::releasable(&own, &in_use, &router) {
            self.snapshot.blocks.remove(&block);
            self.block_changes.leaving.insert(block);
        }
    }

    /// The node's own addresses in the overlay, as far as its blocks hold them: those of the record that the others know, else
    /// those that the plan will choose.
    fn router_in(&self, own: &[Prefix]) -> DualStack {
        let mut router = router_addresses(&own.iter().copied().collect());
        let published = self.snapshot.nodes.get(&self.parts.node_name).map(|record| record.router).unwrap_or_default();
        for address in published.iter().filter(|address| own.iter().any(|block| block.contains(*address))) {
            router.set(address);
        }
        router
    }

    /// Gives back what was retired. The caller has published the record and written `node.json` without these blocks.
    pub(super) fn release_blocks(&mut self) {
        if self.block_changes.leaving.is_empty() || !self.owners_are_known() {
            return;
        }
        let in_use = match self.addresses_in_use() {
            Ok(in_use) => in_use,
            Err(error) => {
                tracing::warn!(%error, "address blocks are not given back yet");
                return;
            }
        };
        for block in self.block_changes.leaving.clone() {
            if in_use.iter().any(|address| block.contains(*address)) {
                // Leased after it was chosen: the next pass, which the new lease wakes, names it again.
                self.block_changes.leaving.remove(&block);
                continue;
            }
            match self.parts.source.release(block, &self.parts.node_name) {
                Ok(()) => tracing::info!(%block, "gave an empty address block back"),
                Err(error) => tracing::warn!(%block, %error, "an empty address block could not be given back"),
            }
        }
    }
}
