//! The cluster source: where the records of nodes, the pools and the owners of blocks come from, and what policy is made of.

pub mod bounded;
pub mod directory;

use std::io;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use husk_overlay::config::{Config, SourceConfig};
use husk_overlay::name::NodeName;
use husk_overlay::prefix::Prefix;
use husk_overlay::record::{NodeRecord, Snapshot};
use husk_policy::object::Objects;
use tokio::runtime::Handle;

use self::bounded::{Bounded, Limits};
use self::directory::DirectorySource;
use crate::kubernetes::KubernetesSource;
use crate::kubernetes::source::{Options as KubernetesOptions, SUBJECT as KUBERNETES, Wake};

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

    /// What policy is made of; the very same value while nothing has changed.
    ///
    /// # Errors
    /// When it cannot be read as a whole; what of it could not be understood is closed, and an issue among the objects.
    fn policy_objects(&mut self) -> Result<Arc<Objects>, SourceError>;

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

/// How a source is opened.
pub struct Opening<'a> {
    /// Own node.
    pub node: &'a NodeName,
    /// This node has seen the cluster before.
    pub joined: bool,
    /// How long calls may take.
    pub limits: Limits,
    /// Where requests to an API server run.
    pub runtime: &'a Handle,
    /// Called when an API server has news; folders are watched by others.
    pub wake: Wake,
    /// The same for what policy is made of, which takes no whole pass.
    pub policy_wake: Wake,
}

/// Opens the cluster source of the configuration. One that is not available is opened by a later call.
///
/// # Errors
/// When the configuration names what can be no source.
pub fn open(config: &Config, opening: &Opening<'_>) -> Result<Bounded> {
    match &config.source {
        SourceConfig::Directory { path } => {
            let (root, joined) = (path.clone(), opening.joined);
            Bounded::open(path.display().to_string(), opening.limits, move || DirectorySource::open(&root, joined))
                .with_context(|| format!("cannot use {} (source.directory.path) as cluster directory", path.display()))
        }
        SourceConfig::Kubernetes { kubeconfig } => {
            let options = KubernetesOptions {
                kubeconfig: kubeconfig.clone(),
                node: opening.node.clone(),
                ipam: config.ipam,
                cluster_cidrs: config.cluster_cidrs.clone(),
                // The call itself has to be over in time.
                patience: opening.limits.read * 3 / 4,
            };
            let runtime = opening.runtime.clone();
            let wakes = [Wake::clone(&opening.wake), Wake::clone(&opening.policy_wake)];
            Bounded::open(KUBERNETES.into(), opening.limits, move || KubernetesSource::open(&options, &runtime, &wakes))
                .context("cannot use the Kubernetes API as cluster source")
        }
    }
}
