//! Whether there are addresses left for pods: of the pools that blocks are cut from, and where those cannot grow of the node's blocks.

use std::path::PathBuf;

use husk_overlay::config::{BlockOrigin, Config, SourceConfig};
use husk_overlay::manifest::Manifest;
use husk_overlay::prefix::Prefix;
use husk_overlay::record::Pool;

use super::issues::{self, Teller};
use super::{Action, Check, Evidence, Finding, Fix, Looked, Outcome};
use crate::report::{BlockReport, IpamReport, PoolReport};

/// The check.
pub(super) const CHECK: Check =
    Check { id: "address-pools", title: "there are addresses left for more pods and more nodes", look };

/// Percent of a pool, or of blocks that cannot grow, above which to do something.
const NEARLY_FULL: u64 = 90;

/// Blocks that no cluster runs out of.
const MANY: u64 = 1 << 32;

/// Names of the pools that are there without any manifest begin with this.
const DEFAULT: &str = "default-";

fn look(evidence: &Evidence) -> Looked {
    let (config, ipam) = (evidence.config()?, evidence.ipam()?);
    let mut findings = Vec::new();
    match config.ipam.blocks {
        BlockOrigin::Pools => findings.extend(of_pools(config, ipam)),
        BlockOrigin::NodeCidrs => findings.extend(of_node_cidrs(&ipam.blocks)),
    }
    if findings.is_empty() {
        findings = issues::findings(evidence, Teller::Pools)?;
    }
    // The number saturates (IPv6), and nobody reads twenty digits.
    let total = |it: &PoolReport| if it.total_blocks > MANY { "plenty".into() } else { it.total_blocks.to_string() };
    let pool = |it: &PoolReport| format!("{}: {} of {} blocks", it.pool.name, it.used_blocks, total(it));
    let seen: Vec<String> = ipam.pools.iter().map(pool).collect();
    Ok(Outcome::of(findings, seen.join(", ")))
}

/// The share that is used in percent, rounded down; 0 of nothing.
fn percent(used: u64, total: u64) -> u64 {
    u64::try_from(u128::from(used) * 100 / u128::from(total.max(1))).unwrap_or(u64::MAX)
}

fn of_pools(config: &Config, ipam: &IpamReport) -> Vec<Finding> {
    let nearly = |it: &&PoolReport| !it.pool.disabled && percent(it.used_blocks, it.total_blocks) >= NEARLY_FULL;
    ipam.pools.iter().filter(nearly).map(|it| of_pool(config, ipam, it)).collect()
}

fn of_pool(config: &Config, ipam: &IpamReport, it: &PoolReport) -> Finding {
    let PoolReport { pool, used_blocks, total_blocks } = it;
    let own = ipam.blocks.iter().filter(|block| pool.cidr.covers(&block.block));
    let mut told =
        vec![format!("{} ({}): {used_blocks} of {total_blocks} blocks belong to a node", pool.name, pool.cidr)];
    told.extend(
        own.map(|it| format!("block {} of this node: {} of {} addresses taken", it.block, it.leased, it.total)),
    );
    let fix = enlarge(config, &ipam.pools, pool);
    if used_blocks >= total_blocks {
        let cause = format!(
            "the address pool {} is full: a node whose blocks are full takes no more pods, and new nodes none at all",
            pool.name
        );
        return Finding::error(cause, told, fix);
    }
    let share = percent(*used_blocks, *total_blocks);
    Finding::warning(format!("{share} % of the blocks of the address pool {} belong to a node", pool.name), told, fix)
}

/// One more pool as large as this one, where the cluster CIDR has room; else a larger cluster CIDR.
fn enlarge(config: &Config, pools: &[PoolReport], full: &Pool) -> Fix {
    let because = "how the address space of the cluster grows only you can decide";
    let gone = "Blocks of nodes that are gone for good can be freed, too: remove their records";
    let cidr = config.cluster_cidrs.iter().find(|cidr| cidr.covers(&full.cidr));
    let defined = !full.name.starts_with(DEFAULT);
    if let Some(free) = cidr.filter(|_| defined).and_then(|cidr| free(*cidr, full.cidr.length(), pools)) {
        let name = format!("{}-more", full.name);
        let added = Pool { name: name.clone(), cidr: free, block_length: full.block_length, disabled: false };
        let contents = Manifest::Pool(added).to_yaml();
        return match &config.source {
            SourceConfig::Directory { path } => {
                let path = path.join("pools").join(format!("{name}.yaml"));
                Fix::by_hand(
                    format!("add a pool, on the next free addresses of the cluster CIDR. {gone}"),
                    [Action::WriteFile { path, contents }],
                    because,
                )
            }
            SourceConfig::Kubernetes { .. } => {
                let path = PathBuf::from(format!("{name}.yaml"));
                let apply = Action::run_on_host("kubectl", ["apply", "-f", &format!("{name}.yaml")]);
                Fix::by_hand(
                    format!("add a pool, on the next free addresses of the cluster CIDR. {gone}"),
                    [Action::WriteFile { path, contents }, apply],
                    because,
                )
            }
        };
    }
    let larger = |prefix: &Prefix| {
        let length = if Some(prefix) == cidr { prefix.length().saturating_sub(1) } else { prefix.length() };
        Prefix::containing(prefix.address(), length).unwrap_or(*prefix).to_string()
    };
    let cidrs: Vec<String> = config.cluster_cidrs.iter().map(larger).collect();
    let pool = if defined { ", and add an AddressPool of the new half" } else { "" };
    Fix::by_hand(
        format!(
            "write a larger cluster CIDR into the configuration of all nodes, `clusterCIDRs: [{}]`, and restart \
             their daemons{pool}. {gone}",
            cidrs.join(", ")
        ),
        [],
        because,
    )
}

/// Candidates that are tried: a cluster has a handful of pools.
const TRIED: u128 = 4096;

/// The first part of this length that no pool has.
fn free(cidr: Prefix, length: u8, pools: &[PoolReport]) -> Option<Prefix> {
    let parts = (0..cidr.subnet_count(length).min(TRIED)).filter_map(|index| cidr.subnet(length, index));
    parts.into_iter().find(|part| pools.iter().all(|it| !it.pool.cidr.overlaps(part)))
}

fn of_node_cidrs(blocks: &[BlockReport]) -> Vec<Finding> {
    let nearly = blocks.iter().filter(|it| percent(it.leased, it.total) >= NEARLY_FULL);
    let finding = |it: &BlockReport| {
        let told = vec![format!("{}: {} of {} addresses taken", it.block, it.leased, it.total)];
        let fix = Fix::by_hand(
            "start kube-controller-manager with a smaller --node-cidr-mask-size (it counts for new nodes), or set \
             `ipam: {blocks: pools}`, with which a node takes \
             more blocks when it needs them",
            [],
            "how the address space of the cluster is divided only you can decide",
        );
        if it.leased >= it.total {
            return Finding::error(
                format!("the node's CIDR {} is full: the node takes no more pods", it.block),
                told,
                fix,
            );
        }
        Finding::warning(
            format!(
                "{} % of the node's CIDR {} are taken, and there is no other",
                percent(it.leased, it.total),
                it.block
            ),
            told,
            fix,
        )
    };
    nearly.map(finding).collect()
}

#[cfg(test)]
mod tests {
    use husk_overlay::issue::Severity;

    use super::*;

    fn prefix(text: &str) -> Prefix {
        text.parse().unwrap()
    }

    fn pool(name: &str, cidr: &str, used: u64, total: u64) -> PoolReport {
        let pool = Pool { name: name.into(), cidr: prefix(cidr), block_length: 26, disabled: false };
        PoolReport { pool, used_blocks: used, total_blocks: total }
    }

    fn judged(pools: Vec<PoolReport>) -> Vec<Finding> {
        let config = Config::new(vec![prefix("10.42.0.0/16")]);
        of_pools(&config, &IpamReport { pools, blocks: Vec::new(), leases: Vec::new(), findings: Vec::new() })
    }

    #[test]
    fn nine_tenths_warn_and_all_is_an_error() {
        assert!(judged(vec![pool("default-ipv4", "10.42.0.0/16", 921, 1024)]).is_empty());
        let warned = judged(vec![pool("default-ipv4", "10.42.0.0/16", 922, 1024)]).remove(0);
        assert_eq!(warned.severity, Severity::Warning);
        let full = judged(vec![pool("default-ipv4", "10.42.0.0/16", 1024, 1024)]).remove(0);
        assert_eq!(full.severity, Severity::Error);
        assert!(full.fix.words.contains("clusterCIDRs: [10.42.0.0/15]"), "{}", full.fix.words);
        let mut off = pool("old", "10.42.0.0/24", 4, 4);
        off.pool.disabled = true;
        assert!(judged(vec![off]).is_empty(), "nobody takes blocks of it");
    }

    #[test]
    fn a_pool_of_the_next_free_addresses_is_offered_as_a_file() {
        let full = judged(vec![pool("a", "10.42.0.0/24", 4, 4), pool("b", "10.42.1.0/24", 0, 4)]).remove(0);
        let Some(Action::WriteFile { path, contents }) = full.fix.actions.first() else { panic!("{full:?}") };
        assert_eq!(path.to_str(), Some("/etc/husk/cluster/pools/a-more.yaml"));
        assert!(contents.contains("cidr: 10.42.2.0/24") && contents.contains("kind: AddressPool"), "{contents}");
        let whole = judged(vec![pool("a", "10.42.0.0/16", 1024, 1024)]).remove(0);
        assert!(whole.fix.words.contains("10.42.0.0/15"), "{}", whole.fix.words);
    }

    #[test]
    fn blocks_that_cannot_grow_count_themselves() {
        let block = |leased| BlockReport { block: prefix("10.42.0.0/24"), leased, total: 253 };
        assert!(of_node_cidrs(&[block(200)]).is_empty());
        assert_eq!(of_node_cidrs(&[block(240)])[0].severity, Severity::Warning);
        assert_eq!(of_node_cidrs(&[block(253)])[0].severity, Severity::Error);
    }
}
