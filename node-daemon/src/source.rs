//! The cluster source: where the records of nodes, the pools and the owners of blocks come from.

pub mod bounded;
pub mod directory;

use std::io;

use husk_overlay::name::NodeName;
use husk_overlay::prefix::Prefix;
use husk_overlay::record::{NodeRecord, Snapshot};

/// Why a source did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The source does not answer; what was known stays in force.
    #[error("the cluster source {subject} is not available: {reason}; the last known state stays in force")]
    Unavailable {
        /// Directory or server.
        subject: String,
        /// Why.
        reason: String,
    },
    /// Reading or writing failed.
    #[error("cluster source: {0}")]
    Io(#[from] io::Error),
}

/// Answer of the allocation lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// The block is ours now.
    Granted,
    /// Somebody else has it.
    Taken,
}

/// A source of cluster state. Every call is bounded in time.
pub trait ClusterSource {
    /// The full current state.
    ///
    /// # Errors
    /// When the source cannot be read as a whole; parts that cannot be read are issues in the snapshot.
    fn snapshot(&mut self) -> Result<Snapshot, SourceError>;

    /// Publishes the own record.
    ///
    /// # Errors
    /// When it could not be written; the old record stays.
    fn publish(&mut self, record: &NodeRecord) -> Result<(), SourceError>;

    /// Asks the allocation lock for a block.
    ///
    /// # Errors
    /// When the source does not answer; the block may or may not be ours, the next snapshot tells.
    fn claim(&mut self, block: Prefix, node: &NodeName) -> Result<Claim, SourceError>;

    /// Gives a block back, if it is this node's.
    ///
    /// # Errors
    /// When the source does not answer.
    fn release(&mut self, block: Prefix, node: &NodeName) -> Result<(), SourceError>;

    /// Removes the own record: the node leaves.
    ///
    /// # Errors
    /// When the source does not answer.
    fn withdraw(&mut self, node: &NodeName) -> Result<(), SourceError>;
}
