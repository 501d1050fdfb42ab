//! What is told of address pools: whether blocks can be cut from them, and how many are.

use std::collections::BTreeMap;

use husk_overlay::name::NodeName;
use husk_overlay::prefix::Prefix;
use husk_overlay::record::{Pool, Snapshot};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;

use super::client::{Failure, bounded};
use super::objects::{AddressPool, AddressPoolStatus};
use super::source::FIELD_MANAGER;

/// Type of the condition.
const USABLE: &str = "Usable";

/// Writes the status of every pool where it is not as it should be.
pub(super) async fn tell(client: &Client, snapshot: &Snapshot, cluster_cidrs: &[Prefix]) -> Result<(), Failure> {
    let api: Api<AddressPool> = Api::all(client.clone());
    for pool in snapshot.pools.values() {
        let Some(object) = bounded(api.get_opt(&pool.name)).await? else { continue };
        let now = status(pool, &snapshot.blocks, cluster_cidrs, object.metadata.generation, object.status.as_ref());
        if object.status.as_ref() == Some(&now) {
            continue;
        }
        let patch = Patch::Merge(json!({ "status": now }));
        let parameters = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
        bounded(api.patch_status(&pool.name, &parameters, &patch)).await?;
    }
    Ok(())
}

fn status(
    pool: &Pool,
    blocks: &BTreeMap<Prefix, NodeName>,
    cluster_cidrs: &[Prefix],
    generation: Option<i64>,
    before: Option<&AddressPoolStatus>,
) -> AddressPoolStatus {
    let total =
        1_u128.checked_shl(u32::from(pool.block_length.saturating_sub(pool.cidr.length()))).unwrap_or(u128::MAX);
    let used = blocks.keys().filter(|block| pool.cidr.covers(block)).count();
    let (usable, reason, message) = if !cluster_cidrs.iter().any(|cidr| cidr.covers(&pool.cidr)) {
        (false, "OutsideClusterCIDRs", format!("{} is not within clusterCIDRs of the configuration", pool.cidr))
    } else if pool.disabled {
        (false, "Disabled", "no new blocks are cut from the pool, as spec.disabled says".into())
    } else if used as u128 >= total {
        (false, "Exhausted", "every block belongs to a node; add a pool".into())
    } else {
        (true, "BlocksLeft", format!("{used} of {total} blocks belong to nodes"))
    };
    let value = if usable { "True" } else { "False" };
    let old = before.and_then(|status| status.conditions.iter().find(|condition| condition.type_ == USABLE));
    let since = old.filter(|old| old.status == value).map(|old| old.last_transition_time.clone());
    let condition = Condition {
        type_: USABLE.into(),
        status: value.into(),
        reason: reason.into(),
        message,
        last_transition_time: since.unwrap_or_else(|| Time(Timestamp::now())),
        observed_generation: generation,
    };
    AddressPoolStatus { conditions: vec![condition], used: Some(format!("{used}/{total}")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(pool: &Pool, owned: &[&str]) -> (String, String) {
        let node = NodeName::new("a").unwrap();
        let blocks = owned.iter().map(|block| (block.parse().unwrap(), node.clone())).collect();
        let cidrs = ["10.42.0.0/16".parse().unwrap()];
        let status = status(pool, &blocks, &cidrs, Some(1), None);
        assert_eq!(super::status(pool, &blocks, &cidrs, Some(1), Some(&status)), status, "and not written again");
        (status.conditions[0].reason.clone(), status.used.unwrap())
    }

    #[test]
    fn a_pool_says_whether_it_has_blocks_left_and_why_not() {
        let pool =
            |cidr: &str| Pool { name: "p".into(), cidr: cidr.parse().unwrap(), block_length: 26, disabled: false };
        let small = pool("10.42.0.0/25");
        let tell = |reason: &str, used: &str| (reason.to_owned(), used.to_owned());
        assert_eq!(told(&small, &["10.42.0.0/26", "10.42.1.0/26"]), tell("BlocksLeft", "1/2"));
        assert_eq!(told(&small, &["10.42.0.0/26", "10.42.0.64/26"]), tell("Exhausted", "2/2"));
        assert_eq!(told(&Pool { disabled: true, ..small }, &[]), tell("Disabled", "0/2"));
        assert_eq!(told(&pool("10.43.0.0/25"), &[]), tell("OutsideClusterCIDRs", "0/2"));
    }
}
