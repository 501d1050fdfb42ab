//! The manifests of a cluster source, in the form Kubernetes gives its objects: `apiVersion`, `kind`, `metadata`, `spec`.
//!
//! ```yaml
//! apiVersion: husk.dev/v1alpha1
//! kind: AddressBlock
//! metadata:
//!   name: 10.42.0.64-26
//! spec:
//!   cidr: 10.42.0.64/26
//!   node: node-a
//! ```
//!
//! Reading is tolerant of fields it does not know, which a newer version may have written, and of objects of others. It is
//! strict about everything else: a manifest with a problem is left out as a whole and becomes an
//! [`Issue`](crate::issue::Issue) that names file, key, value and remedy. A node half understood would be a node half encrypted.

mod read;
mod snapshot;
mod write;

pub use read::{Parsed, from_json, parse_all};
pub use snapshot::snapshot_from;

use crate::name::NodeName;
use crate::prefix::Prefix;
use crate::record::{NodeRecord, Pool};

/// API group of Husk's objects.
const GROUP: &str = "husk.dev";

/// API version of the objects this version of Husk reads and writes.
pub const API_VERSION: &str = "husk.dev/v1alpha1";

/// An object of the cluster source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Manifest {
    /// `OverlayNode`: what a node publishes of itself.
    Node(NodeRecord),
    /// `AddressPool`: what blocks are cut from. Without `blockLength` blocks have 64 addresses, whatever the reader's own
    /// configuration says: all readers have to agree.
    Pool(Pool),
    /// `AddressBlock`: who owns a block. Its name is its CIDR, so that creating it is the allocation lock.
    Block {
        /// The block.
        cidr: Prefix,
        /// Its owner.
        node: NodeName,
    },
}

impl Manifest {
    /// The `kind`.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Node(_) => "OverlayNode",
            Self::Pool(_) => "AddressPool",
            Self::Block { .. } => "AddressBlock",
        }
    }

    /// The `metadata.name`.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::Node(record) => record.name.to_string(),
            Self::Pool(pool) => pool.name.clone(),
            Self::Block { cidr, .. } => block_name(*cidr),
        }
    }

    /// The manifest as a YAML document; equal manifests give equal text, and [`parse_all`] reads it back.
    #[must_use]
    pub fn to_yaml(&self) -> String {
        write::to_yaml(self)
    }

    /// The manifest as an object for an API server, which sets the time of its creation itself; [`from_json`] reads it back.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        write::to_json(self)
    }
}

/// The manifest that says who owns a block.
#[must_use]
pub fn block(cidr: Prefix, node: &NodeName) -> Manifest {
    Manifest::Block { cidr, node: node.clone() }
}

/// Name of the object, and of the file, that locks a block: its CIDR with `-` for what Kubernetes allows in no name.
#[must_use]
pub fn block_name(cidr: Prefix) -> String {
    let name = cidr.to_string().replace([':', '/'], "-");
    // Names begin with a letter or digit. The text of an address never begins with `0:`, so that names stay unique.
    if name.starts_with('-') { format!("0{name}") } else { name }
}

#[cfg(test)]
mod tests;
