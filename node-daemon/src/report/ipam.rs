//! `huskctl ipam`

use husk_overlay::endpoint::Endpoint;
use husk_overlay::prefix::Prefix;
use husk_overlay::record::Pool;
use serde::{Deserialize, Serialize};

/// `huskctl ipam show`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct IpamReport {
    /// Pools with the number of blocks cut from each.
    pub pools: Vec<PoolReport>,
    /// Own blocks.
    pub blocks: Vec<BlockReport>,
    /// Leases on this node.
    pub leases: Vec<Endpoint>,
    /// What `huskctl ipam check` found.
    pub findings: Vec<String>,
}

/// `huskctl ipam release`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReleaseReport {
    /// Whose lease was released.
    pub released: Endpoint,
}

/// A pool and its fill.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PoolReport {
    /// The pool.
    pub pool: Pool,
    /// Blocks owned by any node.
    pub used_blocks: u64,
    /// Blocks in all; saturates.
    pub total_blocks: u64,
}

/// A block and its fill.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BlockReport {
    /// The block.
    pub block: Prefix,
    /// Addresses leased.
    pub leased: u64,
    /// Addresses pods can have in all.
    pub total: u64,
}
