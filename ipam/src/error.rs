//! What can go wrong with addresses.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use husk_overlay::endpoint::AttachmentId;
use husk_overlay::port_mapping::PortMapping;
use husk_overlay::prefix::{Family, Prefix};

/// A family of which no address is left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shortage {
    /// Family.
    pub family: Family,
    /// Blocks of this family the node has.
    pub blocks: Vec<Prefix>,
    /// Addresses of them that are leased.
    pub leased: usize,
    /// Addresses of them that were released and still rest.
    pub cooling: usize,
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.blocks.is_empty() {
            return write!(f, "{}: this node has no block", self.family);
        }
        write!(f, "{}: {} leased, {} cooling down in", self.family, self.leased, self.cooling)?;
        self.blocks.iter().try_for_each(|block| write!(f, " {block}"))
    }
}

/// What can go wrong with addresses.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file operation failed.
    #[error("{operation} {}: {source}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Somebody else kept the store locked.
    #[error(
        "the lease store {} stayed locked for {} ms by {holder}; if that process hangs, end it, and the lock goes with it",
        path.display(),
        waited.as_millis()
    )]
    Locked {
        /// The store.
        path: PathBuf,
        /// How long this process waited.
        waited: Duration,
        /// Who holds the lock, as far as the kernel tells.
        holder: String,
    },
    /// The attachment has a lease already.
    #[error(
        "attachment {id} already has a lease ({}); it must be deleted (CNI DEL) before it can be added again",
        file.display()
    )]
    AlreadyLeased {
        /// The attachment.
        id: AttachmentId,
        /// Its lease.
        file: PathBuf,
    },
    /// Nothing is left.
    #[error(
        "no pod address left ({}); the node needs another block: enlarge the pool or add one, or run fewer pods here",
        .0.iter().map(Shortage::to_string).collect::<Vec<_>>().join("; ")
    )]
    Exhausted(Vec<Shortage>),
    /// No family was asked for.
    #[error("a pod needs an address of at least one family, but none was asked for")]
    NoFamily,
    /// Two requested addresses of one family.
    #[error("{first} and {second} were both requested; a pod gets one address per family")]
    TwoOfAFamily {
        /// One.
        first: IpAddr,
        /// The other.
        second: IpAddr,
    },
    /// A requested address of a family that pods here do not have.
    #[error("{0} was requested, but pods on this node have no {family} addresses", family = Family::of(*.0))]
    FamilyNotServed(IpAddr),
    /// A requested address that is not this node's.
    #[error(
        "{address} was requested, but lies in none of this node's blocks ({}); request an address of these, or none",
        blocks.iter().map(Prefix::to_string).collect::<Vec<_>>().join(", ")
    )]
    NotOurs {
        /// The address.
        address: IpAddr,
        /// What the node has.
        blocks: Vec<Prefix>,
    },
    /// A requested address the node keeps to itself.
    #[error("{0} was requested, but it is the node's own address in the overlay; request another")]
    Reserved(IpAddr),
    /// A requested address that a pod has.
    #[error("{address} was requested, but it is leased ({}); request another", file.display())]
    Taken {
        /// The address.
        address: IpAddr,
        /// The lease that has it.
        file: PathBuf,
    },
    /// A port of the host that another pod has.
    #[error(transparent)]
    PortClaimed(Box<PortClash>),
}

/// Two pods that want the same port of the host.
#[derive(Debug, thiserror::Error)]
#[error(
    "attachment {id} wants the host port {mapping}, which clashes with {held} of {pod} (attachment {holder}); delete that \
     pod or choose another host port"
)]
pub struct PortClash {
    /// The mapping that is refused.
    pub mapping: PortMapping,
    /// Who wanted it.
    pub id: AttachmentId,
    /// The mapping that it clashes with.
    pub held: PortMapping,
    /// The pod that has it, for people.
    pub pod: String,
    /// Its attachment.
    pub holder: AttachmentId,
}

impl Error {
    /// An [`Error::Io`] in the form `map_err` wants.
    pub(crate) fn io(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { operation, path, source }
    }
}
