//! Address pools, node blocks and pod leases.
//!
//! A cluster has [pools](husk_overlay::record::Pool); [`block`] cuts node blocks from them, under a lock that the cluster
//! source provides; [`lease`] hands the addresses of a node's blocks to its pods, under a lock of the node's own.
//!
//! A node that gives a block back must not do so while a pod gets an address of it. The order that makes this safe:
//! the plugin reads `node.json` *with the lease store locked*; the daemon first publishes `node.json` without the
//! block, then locks the store, and gives the block back only if no address of it [is in
//! use](lease::LockedStore::addresses).

pub mod block;
mod error;
pub mod lease;

pub use error::{Error, PortClash, Shortage};
