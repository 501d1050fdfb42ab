//! Changes to the store, by whoever holds its lock.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{ErrorKind, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::Duration;

use husk_overlay::endpoint::{AttachmentId, Endpoint};
use husk_overlay::prefix::Prefix;
use husk_overlay::record::DualStack;

use super::file_name::{self, Entry};
use super::wired::Wiring;
use super::{BootTime, Demand, Lease, LeaseStore, Supply, VERSION, choose, ports, record};
use crate::Error;

/// The store while this process alone may change it. Dropping it unlocks.
#[derive(Debug)]
pub struct LockedStore<'a> {
    pub(super) store: &'a LeaseStore,
    pub(super) _lock: File,
}

impl LockedStore<'_> {
    /// Makes a lease: one address of every family, or nothing.
    ///
    /// # Errors
    /// [`Error::Exhausted`] when a family has nothing left, also when all that is left still rests and
    /// [`Demand::allow_cooling`] is false; [`Error::AlreadyLeased`]; the errors about requested addresses;
    /// [`Error::PortClaimed`]; [`Error::Io`].
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
        ports::refuse_claimed(&self.store.directory, &demand.id, &demand.port_mappings)?;
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
        // The lease is released; what cannot be swept now is left to whoever comes next.
        let _ = self.sweep();
        Ok(Some(addresses))
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
            pod_uid: demand.pod_uid.clone(),
            port_mappings: demand.port_mappings.clone(),
            bandwidth: demand.bandwidth,
        };
        let content = record::Record { version: VERSION, created: now.0, endpoint: endpoint.clone() };
        let path = self.store.directory.join(file_name::lease(key, &addresses));
        let file = self.replace(
            &path,
            &serde_json::to_vec(&content).map_err(|error| Error::io("encode lease", &path)(error.into()))?,
        )?;
        Ok(Lease { endpoint, wiring: Wiring::new(file) })
    }

    /// Writes a file in one step, and returns it locked: from the moment it is visible, others see it locked.
    pub(super) fn replace(&self, path: &Path, content: &[u8]) -> Result<File, Error> {
        let temporary = self.store.directory.join(file_name::temporary());
        // A temporary file that lies there is left from a crash: nobody else writes while we hold the lock.
        let opened = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary);
        let mut file = opened.map_err(Error::io("create", &temporary))?;
        let written = (|| {
            file.try_lock().map_err(|error| match error {
                fs::TryLockError::Error(error) => error,
                fs::TryLockError::WouldBlock => ErrorKind::WouldBlock.into(),
            })?;
            file.write_all(content)?;
            fs::rename(&temporary, path)
        })();
        written.map_err(|error| {
            // The first error is the one to report; a temporary file that stays is removed by the next allocation.
            let _ = fs::remove_file(&temporary);
            Error::io("write", path)(error)
        })?;
        Ok(file)
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

pub(super) fn remove_if_there(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}
