//! What traffic is allowed: NetworkPolicy and ClusterNetworkPolicy to verdicts to a ruleset. No I/O happens here.
//!
//! Reading order: [`selector`] and [`object`] are what a cluster source delivers; [`cluster`] is that as one node sees it;
//! [`rules`] are those of one pod in order, [`verdict`] what they say of a connection, and [`compile`] makes the same of them as
//! sets and maps for the kernel.

pub mod cluster;
pub mod compile;
pub mod object;
pub mod read;
pub mod rules;
pub mod selector;
pub mod verdict;
