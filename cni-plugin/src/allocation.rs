//! How an ADD gets its lease: from the node's blocks, from one more of them, or in the place of what a killed ADD left.

use std::collections::BTreeSet;
use std::time::Duration;

use husk_dataplane::netns::Netns;
use husk_dataplane::pod;
use husk_ipam::Error as LeaseError;
use husk_ipam::lease::{BootTime, Demand, Lease, LeaseStore, LockedStore, Supply};
use husk_overlay::endpoint::AttachmentId;
use husk_overlay::ipc::{NODE_FILE, NodeFile, Request, SOCKET_FILE};
use husk_overlay::prefix::Family;

use crate::daemon::Daemon;
use crate::deadline::Deadline;
use crate::error::{Code, Failure};
use crate::netconf::NetConf;
use crate::{attachment, node};

/// How often the daemon is asked for one more block. Pods that come at the same time may be faster to use a new one, but not
/// without end.
const ROUNDS: usize = 8;

/// What getting a lease needs.
pub(crate) struct Allocation<'a> {
    pub(crate) conf: &'a NetConf,
    pub(crate) netns: &'a Netns,
    pub(crate) deadline: Deadline,
}

impl Allocation<'_> {
    /// Gets a lease, from another block if need be, at last an address that has not rested long enough.
    pub(crate) fn lease(&self, mut demand: Demand) -> Result<(Lease, NodeFile), Failure> {
        let mut refusal = None;
        let mut round = 1;
        loop {
            let shortages = match self.attempt(&demand) {
                Err(LeaseFailure::Lease(LeaseError::Exhausted(shortages))) if !demand.allow_cooling => shortages,
                Err(failure) => return Err(Failure::from(failure).with_details(refusal)),
                Ok(lease) => return Ok(lease),
            };
            let families: BTreeSet<Family> = shortages.iter().map(|shortage| shortage.family).collect();
            let asked = Daemon::connect(&self.conf.run_file(SOCKET_FILE), self.deadline)
                .and_then(|daemon| daemon.ask(&Request::Blocks { families }));
            refusal = asked.err().map(|refusal| refusal.to_string());
            demand.allow_cooling = refusal.is_some() || round >= ROUNDS;
            round += 1;
        }
    }

    /// One attempt. The node file is read with the store locked: the daemon takes a block out of it before it looks,
    /// with the store locked, whether the block is free of leases.
    fn attempt(&self, demand: &Demand) -> Result<(Lease, NodeFile), LeaseFailure> {
        let store = attachment::leases(self.conf, self.deadline);
        let locked = store.lock()?;
        let node = node::read(&self.conf.run_file(NODE_FILE))?;
        let supply = Supply {
            blocks: &node.blocks,
            families: &node.families,
            reserved: node.router,
            cool_down: Duration::from_secs(node.cool_down.into()),
        };
        let lease = match locked.allocate(&supply, demand, BootTime::now()) {
            Err(LeaseError::AlreadyLeased { id, .. }) => {
                self.release_leftover(&store, &locked, &id)?;
                locked.allocate(&supply, demand, BootTime::now())?
            }
            other => other?,
        };
        Ok((lease, node))
    }

    /// Releases the lease of an ADD that was killed before it made an interface. Anything more than that is an attachment
    /// that exists, which the runtime has to delete first.
    ///
    /// The store stays locked from here to the new lease: were it not, two ADDs could take each other's for the leftover.
    fn release_leftover(&self, store: &LeaseStore, locked: &LockedStore<'_>, id: &AttachmentId) -> Result<(), Failure> {
        let exists = |what: String| {
            Failure::new(
                Code::AlreadyAttached,
                format!(
                    "attachment {id} exists already: {what}; it must be deleted (CNI DEL) before it can be added again"
                ),
            )
        };
        if store.is_being_wired(id)? {
            return Err(exists("another ADD is at work on it".to_owned()));
        }
        let host_interface = id.host_interface();
        if pod::interface_exists(&Netns::current()?, &host_interface)? {
            return Err(exists(format!("its interface {host_interface} is on the host")));
        }
        if pod::interface_exists(self.netns, &id.ifname)? {
            return Err(exists(format!("{} is in {}", id.ifname, self.netns.path())));
        }
        locked.release(id, BootTime::now())?;
        Ok(())
    }
}

/// Why there is no lease.
enum LeaseFailure {
    Lease(LeaseError),
    Node(Failure),
}

impl From<LeaseError> for LeaseFailure {
    fn from(error: LeaseError) -> Self {
        Self::Lease(error)
    }
}

impl From<Failure> for LeaseFailure {
    fn from(failure: Failure) -> Self {
        Self::Node(failure)
    }
}

impl From<LeaseFailure> for Failure {
    fn from(failure: LeaseFailure) -> Self {
        match failure {
            LeaseFailure::Lease(error) => error.into(),
            LeaseFailure::Node(failure) => failure,
        }
    }
}
