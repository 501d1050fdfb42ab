//! Pod leases: the store in `/run/husk/leases`.
//!
//! One file per attachment, whose content is the endpoint record the daemon reads, and whose *name* tells the attachment
//! (as a hash) and the addresses. So one directory listing is all that finding a free address takes, and a file whose
//! content is damaged still keeps its addresses from being given away.
//!
//! - A lease appears by `rename` from a temporary file and is released by `rename` to a tombstone: each is one step, so
//!   that a crash at any instruction leaves the store valid. What a crash can leave is a temporary file, which the next
//!   holder of the lock removes.
//! - Whoever changes the store holds an exclusive `flock` on its file `lock`; the kernel drops it with its holder.
//! - The plugin also holds an `flock` on the lease file itself until its ADD is done. Whoever collects abandoned leases
//!   (CNI GC, the daemon) can so tell one whose wiring is under way from one whose maker died.
//! - Released addresses rest for a while (cool-down), so that peers and clients that remember the old pod do not meet
//!   a new one; addresses are taken round robin, so that even then they come back late.
//!
//! Times are those of `CLOCK_BOOTTIME`: the store does not outlive the boot, and the wall clock may jump.

mod choose;
mod evidence;
mod file_name;
mod load;
mod lock;
mod record;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{ErrorKind, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use husk_overlay::endpoint::{AttachmentId, Endpoint, Endpoints, NetnsIdentity};
use husk_overlay::issue::Issue;
use husk_overlay::mac::MacAddress;
use husk_overlay::name::NetworkName;
use husk_overlay::prefix::{Family, Prefix};
use husk_overlay::record::DualStack;

pub use evidence::{Evidence, NetnsEvidence, stale};
pub use load::Leases;
pub use record::VERSION;

use crate::Error;
use file_name::Entry;

/// How long a process waits for the store's lock unless told otherwise. A holder needs it for about a millisecond.
pub const DEFAULT_LOCK_WAIT: Duration = Duration::from_secs(5);

/// Milliseconds since boot, time asleep included (`CLOCK_BOOTTIME`, clock_gettime(2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct BootTime(pub u64);

impl BootTime {
    /// Reads the clock.
    #[must_use]
    pub fn now() -> Self {
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)
            .map(Duration::from)
            .expect("CLOCK_BOOTTIME exists since Linux 2.6.39");
        Self(u64::try_from(now.as_millis()).unwrap_or(u64::MAX))
    }
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
    /// Addresses it must get, at most one per family; the others are chosen. A requested address need not have rested.
    pub addresses: Vec<IpAddr>,
    /// Take the address that has rested longest when all that are free still rest.
    pub allow_cooling: bool,
}

/// A lease just made. While this value lives, the attachment counts as being wired; nobody collects the lease.
#[derive(Debug)]
pub struct Lease {
    /// The endpoint as recorded.
    pub endpoint: Endpoint,
    /// Holds the lock on the lease file.
    _wiring: File,
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
        if self.lease_file(id)?.is_none() { Ok(None) } else { self.lock()?.release(id, now) }
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

/// The store while this process alone may change it. Dropping it unlocks.
#[derive(Debug)]
pub struct LockedStore<'a> {
    store: &'a LeaseStore,
    _lock: File,
}

impl LockedStore<'_> {
    /// Makes a lease: one address of every family, or nothing.
    ///
    /// # Errors
    /// [`Error::Exhausted`] when a family has nothing left, also when all that is left still rests and
    /// [`Demand::allow_cooling`] is false; [`Error::AlreadyLeased`]; the errors about requested addresses;
    /// [`Error::Io`].
    pub fn allocate(&self, supply: &Supply<'_>, demand: &Demand, now: BootTime) -> Result<Lease, Error> {
        let key = file_name::key(&demand.id);
        let mut stock = choose::Stock::default();
        for (entry, path) in self.store.entries()? {
            match entry {
                Entry::Lease { key: it, .. } if it == key => {
                    return Err(Error::AlreadyLeased { id: demand.id.clone(), file: path });
                }
                Entry::Lease { addresses, .. } => {
                    stock.leased.extend(addresses.iter().map(|address| (address, path.clone())));
                }
                Entry::Released { addresses, at, .. } if rests(at, now, supply.cool_down) => {
                    for address in addresses.iter() {
                        let released = stock.cooling.entry(address).or_insert(at);
                        *released = at.max(*released);
                    }
                }
                Entry::Released { .. } | Entry::Temporary => remove_if_there(&path)?,
                Entry::Own | Entry::Unknown => {}
            }
        }
        stock.cursors = self.read_cursors();
        let addresses = choose::choose(supply, demand, &stock)?;
        let lease = self.write_lease(&key, addresses, demand, now)?;
        stock.cursors.retain(|block, _| supply.blocks.contains(block));
        for address in addresses.iter() {
            if let Some(block) = supply.blocks.iter().find(|block| block.contains(address)) {
                stock.cursors.insert(*block, address);
            }
        }
        self.write_cursors(&stock.cursors);
        Ok(lease)
    }

    /// Releases the lease of an attachment and returns its addresses; none if it has no lease.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn release(&self, id: &AttachmentId, now: BootTime) -> Result<Option<DualStack>, Error> {
        let Some((path, addresses)) = self.store.lease_file(id)? else { return Ok(None) };
        let tombstone = self.store.directory.join(file_name::released(&file_name::key(id), &addresses, now));
        fs::rename(&path, tombstone).map_err(Error::io("release lease", &path))?;
        Ok(Some(addresses))
    }

    /// Releases the lease of an endpoint that [`LeaseStore::load`] returned, if it is provably [`stale`]; true if it
    /// was. The evidence is gathered under the lock, the host interface being the caller's to look for, after which
    /// nothing can change it: a lease that is being wired or was made anew stays.
    ///
    /// # Errors
    /// [`Error::Io`], also when the lease cannot be read.
    pub fn reclaim(&self, endpoint: &Endpoint, host_interface_exists: bool, now: BootTime) -> Result<bool, Error> {
        let Some((path, _)) = self.store.lease_file(&endpoint.id)? else { return Ok(false) };
        let evidence = Evidence {
            netns: NetnsEvidence::observe(&endpoint.netns),
            host_interface_exists,
            being_wired: lock::is_held(&path)?,
        };
        let gone = record::read(&path)?.endpoint == *endpoint && stale(&evidence);
        Ok(gone && self.release(&endpoint.id, now)?.is_some())
    }

    /// Forgets all leases and releases: those of an earlier boot, whose pods ended with it. Files that Husk did not make stay.
    ///
    /// # Errors
    /// [`Error::Io`]; the store is valid then, and holds what could not be removed.
    pub fn clear(&self) -> Result<(), Error> {
        for (entry, path) in self.store.entries()? {
            match entry {
                Entry::Lease { .. } | Entry::Released { .. } | Entry::Temporary => remove_if_there(&path)?,
                Entry::Own | Entry::Unknown => {}
            }
        }
        Ok(())
    }

    /// Endpoints of a network that garbage collection may remove: those not in `valid`, whose lease was made before
    /// `started` and whose wiring is not under way. Also returns what is wrong with the store; a damaged lease is left
    /// alone, as it does not tell its network.
    ///
    /// A pod that came up after the runtime made its list of valid attachments is not in the list. Its lease is either
    /// still locked by its ADD or, if the caller took `started` before it did anything else, younger than that.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn collectable(
        &self,
        network: &NetworkName,
        valid: &BTreeSet<AttachmentId>,
        started: BootTime,
    ) -> Result<(Endpoints, Vec<Issue>), Error> {
        let keep: BTreeSet<String> = valid.iter().map(file_name::key).collect();
        let Leases { mut endpoints, created, issues, .. } =
            load::load_where(&self.store.directory, |key, path| Ok(!keep.contains(key) && !lock::is_held(path)?))?;
        endpoints.retain(|id, _| id.network == *network && created.get(id).is_some_and(|created| *created < started));
        Ok((endpoints, issues))
    }

    /// Addresses that are leased or cooling down, damaged leases included: what keeps a block in use.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn addresses(&self, cool_down: Duration, now: BootTime) -> Result<BTreeSet<IpAddr>, Error> {
        Ok(self
            .store
            .entries()?
            .into_iter()
            .filter_map(|(entry, _)| match entry {
                Entry::Lease { addresses, .. } => Some(addresses),
                Entry::Released { addresses, at, .. } if rests(at, now, cool_down) => Some(addresses),
                _ => None,
            })
            .flat_map(|addresses| addresses.iter())
            .collect())
    }

    fn write_lease(&self, key: &str, addresses: DualStack, demand: &Demand, now: BootTime) -> Result<Lease, Error> {
        let endpoint = Endpoint {
            id: demand.id.clone(),
            addresses,
            pod_mac: demand.pod_mac,
            host_interface: demand.id.host_interface(),
            netns: demand.netns.clone(),
            pod_namespace: demand.pod_namespace.clone(),
            pod_name: demand.pod_name.clone(),
        };
        let content = record::Record { version: VERSION, created: now.0, endpoint: endpoint.clone() };
        let path = self.store.directory.join(file_name::lease(key, &addresses));
        let file = self.replace(
            &path,
            &serde_json::to_vec(&content).map_err(|error| Error::io("encode lease", &path)(error.into()))?,
        )?;
        Ok(Lease { endpoint, _wiring: file })
    }

    /// Writes a file in one step, and returns it locked: from the moment it is visible, others see it locked.
    fn replace(&self, path: &Path, content: &[u8]) -> Result<File, Error> {
        let temporary = self.store.directory.join(file_name::temporary());
        let written = (|| {
            // A temporary file that lies there is left from a crash: nobody else writes while we hold the lock.
            let mut file =
                fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
            file.try_lock().map_err(|error| match error {
                fs::TryLockError::Error(error) => error,
                fs::TryLockError::WouldBlock => ErrorKind::WouldBlock.into(),
            })?;
            file.write_all(content)?;
            fs::rename(&temporary, path)?;
            Ok(file)
        })();
        written.map_err(|error| {
            // The first error is the one to report; a temporary file that stays is removed by the next allocation.
            let _ = fs::remove_file(&temporary);
            Error::io("write", path)(error)
        })
    }

    /// Where the search for an address went on from. Cursors only spread addresses over time, so that lost or damaged
    /// ones are begun anew.
    fn read_cursors(&self) -> BTreeMap<Prefix, IpAddr> {
        let path = self.store.directory.join(file_name::CURSORS);
        fs::read(path).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
    }

    fn write_cursors(&self, cursors: &BTreeMap<Prefix, IpAddr>) {
        // The lease is made by now, and failing for the sake of a cursor would be worse than an address used again
        // somewhat earlier; the cool-down is kept in any case.
        if let Ok(text) = serde_json::to_vec(cursors) {
            let _ = self.replace(&self.store.directory.join(file_name::CURSORS), &text);
        }
    }
}

/// True while an address released at `at` rests. A release in the future is one of an earlier boot.
fn rests(at: BootTime, now: BootTime, cool_down: Duration) -> bool {
    now.0.checked_sub(at.0).is_some_and(|elapsed| u128::from(elapsed) < cool_down.as_millis())
}

fn remove_if_there(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
