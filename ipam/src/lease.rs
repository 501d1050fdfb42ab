//! Pod leases: the store in `/run/husk/leases`.
//!
//! One file per attachment, whose content is the endpoint record the daemon reads, and whose *name* tells the attachment
//! (as a hash) and the addresses. So one directory listing is all that finding a free address takes, and a file whose
//! content is damaged still keeps its addresses from being given away.
//!
//! - A lease appears by `rename` from a temporary file and is released by `rename` to a tombstone: each is one step, so
//!   that a crash at any instruction leaves the store valid. What a crash can leave is a temporary file, which the next
//!   ADD, DEL, GC or pass of the daemon removes.
//! - Whoever changes the store holds an exclusive `flock` on its file `lock`; the kernel drops it with its holder.
//! - The plugin also holds an `flock` on the lease file itself until its ADD is done. Whoever collects abandoned leases
//!   (CNI GC, the daemon) can so tell one whose wiring is under way from one whose maker died.
//! - Released addresses rest for a while (cool-down), so that peers and clients that remember the old pod do not meet
//!   a new one; addresses are taken round robin, so that even then they come back late.
//!
//! Times are those of `CLOCK_BOOTTIME`: the store does not outlive the boot, and the wall clock may jump.

mod choose;
mod collect;
mod evidence;
mod file_name;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod load;
mod lock;
mod locked;
mod ports;
mod record;
mod unfinished;
mod wired;

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use husk_overlay::bandwidth::Bandwidth;
use husk_overlay::endpoint::{AttachmentId, Endpoint, NetnsIdentity};
use husk_overlay::mac::MacAddress;
use husk_overlay::port_mapping::PortMapping;
use husk_overlay::prefix::{Family, Prefix};
use husk_overlay::record::DualStack;

pub use collect::Garbage;
pub use evidence::{Evidence, NetnsEvidence, stale};
pub use load::Leases;
pub use locked::LockedStore;
pub use record::VERSION;

use crate::Error;
use file_name::Entry;
use wired::Wiring;

/// How long a process waits for the store's lock unless told otherwise. A holder needs it for about a millisecond.
pub const DEFAULT_LOCK_WAIT: Duration = Duration::from_secs(5);

/// Milliseconds since boot, time asleep included (`CLOCK_BOOTTIME`, clock_gettime(2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct BootTime(pub u64);

impl BootTime {
    /// Reads the clock.
    #[must_use]
    pub fn now() -> Self {
        Self(u64::try_from(since_boot().as_millis()).unwrap_or(u64::MAX))
    }
}

/// The clock of [`BootTime`], exactly: for what is compared with the end of a wiring, which may be some microseconds ago.
#[must_use]
pub fn since_boot() -> Duration {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)
        .map(Duration::from)
        .expect("CLOCK_BOOTTIME exists since Linux 2.6.39")
}

/// What a node has to give.
#[derive(Debug, Clone)]
pub struct Supply<'a> {
    /// Its blocks; earlier ones are filled first, so that later ones fall empty and can be given back.
    pub blocks: &'a [Prefix],
    /// Families every pod gets an address of.
    pub families: &'a BTreeSet<Family>,
    /// Addresses no pod gets.
    pub reserved: DualStack,
    /// How long a released address rests.
    pub cool_down: Duration,
}

/// What an attachment wants.
#[derive(Debug, Clone)]
pub struct Demand {
    /// The attachment.
    pub id: AttachmentId,
    /// Its network namespace.
    pub netns: NetnsIdentity,
    /// Ethernet address of the pod end.
    pub pod_mac: MacAddress,
    /// Kubernetes namespace of the pod.
    pub pod_namespace: Option<String>,
    /// Kubernetes name of the pod.
    pub pod_name: Option<String>,
    /// Kubernetes uid of the pod.
    pub pod_uid: Option<String>,
    /// Addresses it must get, at most one per family; the others are chosen. A requested address need not have rested.
    pub addresses: Vec<IpAddr>,
    /// Take the address that has rested longest when all that are free still rest.
    pub allow_cooling: bool,
    /// Ports of the host that shall lead to the pod; they must not clash with one another.
    pub port_mappings: Vec<PortMapping>,
    /// How much it may receive and send.
    pub bandwidth: Option<Bandwidth>,
}

impl Demand {
    /// What an attachment wants for which nothing is asked but addresses, whichever they are.
    #[must_use]
    pub fn plain(id: AttachmentId, netns: NetnsIdentity) -> Self {
        Self {
            pod_mac: id.pod_mac(),
            id,
            netns,
            pod_namespace: None,
            pod_name: None,
            pod_uid: None,
            addresses: Vec::new(),
            allow_cooling: false,
            port_mappings: Vec::new(),
            bandwidth: None,
        }
    }
}

/// A lease just made. While this value lives, the attachment counts as being wired; nobody collects the lease.
#[derive(Debug)]
pub struct Lease {
    /// The endpoint as recorded.
    pub endpoint: Endpoint,
    /// Holds the lock on the lease file.
    wiring: Wiring,
}

/// What became of a lease that this process made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It stands.
    Held,
    /// It was released.
    Released,
    /// It was released, and the attachment has another one.
    Replaced,
}

/// The lease store of a node.
#[derive(Debug, Clone)]
pub struct LeaseStore {
    directory: PathBuf,
    lock_wait: Duration,
}

impl LeaseStore {
    /// The store in a directory, which need not exist yet. Nothing is read or written.
    #[must_use]
    pub fn new(directory: impl Into<PathBuf>, lock_wait: Duration) -> Self {
        Self { directory: directory.into(), lock_wait }
    }

    /// Where the store is.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// True if there is a store, be it empty.
    ///
    /// # Errors
    /// [`Error::Io`] when that cannot be found out.
    pub fn exists(&self) -> Result<bool, Error> {
        self.directory.try_exists().map_err(Error::io("look for", &self.directory))
    }

    /// Creates the directory if need be (mode 0700; its parent must exist) and locks the store.
    ///
    /// # Errors
    /// [`Error::Locked`] if it stays locked for the waiting time; [`Error::Io`].
    pub fn lock(&self) -> Result<LockedStore<'_>, Error> {
        match fs::DirBuilder::new().mode(0o700).create(&self.directory) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                return Err(Error::io("create directory", &self.directory)(error));
            }
            _ => {}
        }
        Ok(LockedStore { store: self, _lock: lock::acquire(&self.directory, self.lock_wait)? })
    }

    /// Releases the lease of an attachment and returns its addresses; none if it has no lease. A damaged lease file is
    /// released like any other. Works, and creates nothing, when there is no store.
    ///
    /// # Errors
    /// [`Error::Locked`], [`Error::Io`].
    pub fn release(&self, id: &AttachmentId, now: BootTime) -> Result<Option<DualStack>, Error> {
        // No lock is needed to see that there is nothing to do: a runtime does not run ADD and DEL of one attachment
        // at once.
        if self.lease_file(id)?.is_some() {
            return self.lock()?.release(id, now);
        }
        // Killed before it had a lease, the attachment's ADD may have left half of one.
        self.sweep()?;
        Ok(None)
    }

    /// The lease of an attachment, read without the lock; none if it has no lease.
    ///
    /// # Errors
    /// [`Error::Io`]; a file that is no valid lease is one with [`ErrorKind::InvalidData`].
    pub fn find(&self, id: &AttachmentId) -> Result<Option<Endpoint>, Error> {
        match self.lease_file(id)? {
            None => Ok(None),
            Some((path, _)) => match record::read(&path) {
                Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(None),
                other => other.map(|record| Some(record.endpoint)),
            },
        }
    }

    /// True if the attachment has a lease, damaged or not.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn has_lease(&self, id: &AttachmentId) -> Result<bool, Error> {
        Ok(self.lease_file(id)?.is_some())
    }

    /// True while the process that made the lease is still wiring the attachment.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn is_being_wired(&self, id: &AttachmentId) -> Result<bool, Error> {
        match self.lease_file(id)? {
            None => Ok(false),
            Some((path, _)) => lock::is_held(&path),
        }
    }

    /// What became of a lease that this process made and still holds.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn standing(&self, lease: &Lease) -> Result<Standing, Error> {
        Ok(match self.lease_file(&lease.endpoint.id)? {
            None => Standing::Released,
            Some((path, _)) if lock::is_file_at(lease.wiring.file(), &path)? => Standing::Held,
            // It may also have been released between the two looks.
            Some(_) if self.has_lease(&lease.endpoint.id)? => Standing::Replaced,
            Some(_) => Standing::Released,
        })
    }

    /// Every lease, read without the lock, and what is wrong with the store. A lease that is released meanwhile may be
    /// missing or present, others are not affected.
    ///
    /// # Errors
    /// [`Error::Io`] if the directory cannot be listed; a missing one is an empty store.
    pub fn load(&self) -> Result<Leases, Error> {
        load::load(&self.directory)
    }

    /// Every file of the store; none if there is no store.
    fn entries(&self) -> Result<Vec<(Entry, PathBuf)>, Error> {
        let listing = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(Error::io("list", &self.directory))?,
        };
        let mut entries = Vec::new();
        for item in listing {
            let item = item.map_err(Error::io("list", &self.directory))?;
            entries.push((Entry::parse(&item.file_name()), item.path()));
        }
        Ok(entries)
    }

    fn lease_file(&self, id: &AttachmentId) -> Result<Option<(PathBuf, DualStack)>, Error> {
        let key = file_name::key(id);
        Ok(self.entries()?.into_iter().find_map(|(entry, path)| match entry {
            Entry::Lease { key: it, addresses } if it == key => Some((path, addresses)),
            _ => None,
        }))
    }
}

#[cfg(test)]
mod tests;
