//! Leases that nobody deleted: which they are, and how they go without taking another with them.

use std::collections::BTreeSet;
use std::time::Duration;

use husk_overlay::endpoint::{AttachmentId, Endpoint};
use husk_overlay::issue::Issue;
use husk_overlay::name::NetworkName;

use super::load::{self, Leases};
use super::{BootTime, Evidence, LockedStore, NetnsEvidence, file_name, lock, record, since_boot, stale, wired};
use crate::Error;

/// A lease that garbage collection may remove.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Garbage {
    /// What it is of.
    pub endpoint: Endpoint,
    created: BootTime,
}

impl LockedStore<'_> {
    /// The leases of a network that garbage collection may remove: those not in `valid`, made before `started`
    /// ([since boot](since_boot)) and whose wiring is not under way, sorted by attachment. Also returns what is wrong with the
    /// store; a damaged lease is left alone, as it does not tell its network.
    ///
    /// A pod that came up after the runtime made its list of valid attachments is not in the list. Its lease is still locked by
    /// its ADD; or, if the caller took `started` before it did anything else, its wiring ended after that.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn collectable(
        &self,
        network: &NetworkName,
        valid: &BTreeSet<AttachmentId>,
        started: Duration,
    ) -> Result<(Vec<Garbage>, Vec<Issue>), Error> {
        let keep: BTreeSet<String> = valid.iter().map(file_name::key).collect();
        let Leases { endpoints, created, issues, .. } = load::load_where(&self.store.directory, |key, path| {
            // In this order: an ADD notes the time before it unlocks.
            Ok(!keep.contains(key) && !lock::is_held(path)? && !wired::ended_since(path, started, since_boot()))
        })?;
        let garbage = endpoints.into_iter().filter(|(id, _)| id.network == *network).filter_map(|(id, endpoint)| {
            created
                .get(&id)
                .filter(|created| u128::from(created.0) < started.as_millis())
                .map(|created| Garbage { endpoint, created: *created })
        });
        Ok((garbage.collect(), issues))
    }

    /// True as long as the lease is the one that was found: neither released nor, though nobody should, made anew for the same
    /// attachment. While this holds and the store is locked, the host interface is of that lease.
    ///
    /// # Errors
    /// [`Error::Io`], also when the lease cannot be read any more.
    pub fn is_unchanged(&self, garbage: &Garbage) -> Result<bool, Error> {
        let Some((path, _)) = self.store.lease_file(&garbage.endpoint.id)? else { return Ok(false) };
        let record = record::read(&path)?;
        Ok(record.created == garbage.created.0 && record.endpoint == garbage.endpoint)
    }

    /// Releases the lease if it is [unchanged](Self::is_unchanged); true if it was.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn collect(&self, garbage: &Garbage, now: BootTime) -> Result<bool, Error> {
        Ok(self.is_unchanged(garbage)? && self.release(&garbage.endpoint.id, now)?.is_some())
    }

    /// Releases the lease of an endpoint that [`LeaseStore::load`](super::LeaseStore::load) returned, if it is provably
    /// [`stale`]; true if it was. The evidence is gathered under the lock, the host interface being the caller's to look for, after which
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
}
