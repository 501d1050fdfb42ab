//! ADD: lease, wire, have the pod admitted; or leave nothing behind.

use std::collections::BTreeSet;
use std::time::Duration;

use husk_dataplane::netns::Netns;
use husk_dataplane::pod::{self, PodSpec};
use husk_ipam::Error as LeaseError;
use husk_ipam::lease::{BootTime, Demand, Lease, LeaseStore, Supply};
use husk_overlay::endpoint::AttachmentId;
use husk_overlay::ipc::{NODE_FILE, NodeFile, Request, SOCKET_FILE};
use husk_overlay::name::InterfaceName;
use husk_overlay::prefix::Family;
use serde_json::Value;

use crate::daemon::{self, Daemon};
use crate::error::{Code, Failure};
use crate::invocation::Attach;
use crate::netconf::NetConf;
use crate::{attachment, node, result};

/// Connects a pod and returns the result to print.
pub(crate) fn add(conf: &NetConf, attach: &Attach) -> Result<Value, Failure> {
    conf.refuse_unknown_fields()?;
    let dns = conf.dns()?;
    let previous = conf.previous_result()?;
    let netns = open_netns(&attach.netns)?;
    let id = attachment::id(conf, &attach.container);
    let demand = Demand {
        netns: netns.identity()?,
        pod_mac: conf.requested_mac(attach.args.mac.as_deref())?.unwrap_or_else(|| id.pod_mac()),
        pod_namespace: attach.args.pod_namespace.clone(),
        pod_name: attach.args.pod_name.clone(),
        addresses: conf.requested_addresses(attach.args.ip.as_deref())?,
        allow_cooling: false,
        id,
    };
    let socket = conf.run_file(SOCKET_FILE);
    node::read(&conf.run_file(NODE_FILE)).map_err(|failure| daemon::reason(&socket, failure))?;
    // Found out now, a missing daemon costs nothing that has to be undone.
    let daemon = Daemon::connect(&socket)?;

    let store = attachment::leases(conf);
    let (lease, node) = Allocation { conf, store: &store, netns: &netns }.lease(demand)?;
    let undo = Undo { conf, store: &store, id: &lease.endpoint.id, armed: true };
    let spec = PodSpec::of(&lease.endpoint, node.pod_mtu);
    let added = pod::attach(&spec, &netns)
        .map_err(Failure::from)
        .and_then(|()| daemon.ask(&Request::Admit { id: lease.endpoint.id.clone() }))
        .and_then(|()| still_leased(&store, &lease.endpoint.id))
        .and_then(|()| result::render(conf.version, previous, &spec, &attach.netns, &dns));
    match added {
        Ok(result) => {
            undo.disarm();
            Ok(result)
        }
        Err(failure) => Err(failure.with_details(undo.now())),
    }
}

/// Opens the pod's namespace, which must not be the host's: wiring it would change the host's own routes.
pub(crate) fn open_netns(path: &str) -> Result<Netns, Failure> {
    let invalid = |reason: String| Failure::new(Code::InvalidEnvironment, format!("CNI_NETNS: {reason}"));
    let netns = Netns::open(path).map_err(|error| invalid(error.to_string()))?;
    let (theirs, ours) = (netns.identity()?, Netns::current()?.identity()?);
    if (theirs.device, theirs.inode) == (ours.device, ours.inode) {
        return Err(invalid(format!("{path} is the host's own network namespace")));
    }
    Ok(netns)
}

/// A runtime that lost patience may have sent a DEL without ending this ADD first.
fn still_leased(store: &LeaseStore, id: &AttachmentId) -> Result<(), Failure> {
    if store.has_lease(id)? {
        return Ok(());
    }
    Err(Failure::new(
        Code::TryAgainLater,
        format!("attachment {id} was deleted (CNI DEL or GC) while it was being added"),
    ))
}

/// What getting a lease needs.
struct Allocation<'a> {
    conf: &'a NetConf,
    store: &'a LeaseStore,
    netns: &'a Netns,
}

impl Allocation<'_> {
    /// Gets a lease, from another block if need be, at last an address that has not rested long enough.
    fn lease(&self, mut demand: Demand) -> Result<(Lease, NodeFile), Failure> {
        let shortages = match self.attempt(&demand) {
            Err(LeaseFailure::Lease(LeaseError::AlreadyLeased { id, .. })) => {
                self.remove_leftover(&id)?;
                return self.attempt(&demand).map_err(Failure::from);
            }
            Err(LeaseFailure::Lease(LeaseError::Exhausted(shortages))) => shortages,
            other => return other.map_err(Failure::from),
        };
        let families: BTreeSet<Family> = shortages.iter().map(|shortage| shortage.family).collect();
        let refusal = Daemon::connect(&self.conf.run_file(SOCKET_FILE))
            .and_then(|daemon| daemon.ask(&Request::Blocks { families }))
            .err();
        demand.allow_cooling = refusal.is_some();
        let second = match self.attempt(&demand) {
            // Other pods were faster to use the new block.
            Err(LeaseFailure::Lease(LeaseError::Exhausted(_))) if !demand.allow_cooling => {
                demand.allow_cooling = true;
                self.attempt(&demand)
            }
            other => other,
        };
        second.map_err(|failure| Failure::from(failure).with_details(refusal.map(|refusal| refusal.to_string())))
    }

    /// One attempt. The node file is read with the store locked: the daemon takes a block out of it before it looks,
    /// with the store locked, whether the block is free of leases.
    fn attempt(&self, demand: &Demand) -> Result<(Lease, NodeFile), LeaseFailure> {
        let locked = self.store.lock()?;
        let node = node::read(&self.conf.run_file(NODE_FILE))?;
        let supply = Supply {
            blocks: &node.blocks,
            families: &node.families,
            reserved: node.router,
            cool_down: Duration::from_secs(node.cool_down.into()),
        };
        let lease = locked.allocate(&supply, demand, BootTime::now())?;
        Ok((lease, node))
    }

    /// Removes the lease of an ADD that was killed before it made an interface. Anything more than that is an attachment
    /// that exists, which the runtime has to delete first.
    fn remove_leftover(&self, id: &AttachmentId) -> Result<(), Failure> {
        let exists = |what: String| {
            Failure::new(
                Code::AlreadyAttached,
                format!(
                    "attachment {id} exists already: {what}; it must be deleted (CNI DEL) before it can be added again"
                ),
            )
        };
        if self.store.is_being_wired(id)? {
            return Err(exists("another ADD is at work on it".to_owned()));
        }
        let host_interface = id.host_interface();
        if pod::interface_exists(&Netns::current()?, &host_interface)? {
            return Err(exists(format!("its interface {host_interface} is on the host")));
        }
        let pod_interface: &InterfaceName = &id.ifname;
        if pod::interface_exists(self.netns, pod_interface)? {
            return Err(exists(format!("{pod_interface} is in {}", self.netns.path())));
        }
        self.store.release(id, BootTime::now())?;
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

/// Takes an attachment down unless it is disarmed, also when this process panics.
struct Undo<'a> {
    conf: &'a NetConf,
    store: &'a LeaseStore,
    id: &'a AttachmentId,
    armed: bool,
}

impl Undo<'_> {
    fn disarm(mut self) {
        self.armed = false;
    }

    /// Undoes now, and tells what could not be undone.
    fn now(mut self) -> Option<String> {
        self.armed = false;
        self.run().err().map(|failure| format!("and it could not be undone, which CNI DEL will: {failure}"))
    }

    fn run(&self) -> Result<(), Failure> {
        let removed = attachment::remove(self.store, self.id);
        daemon::notify_released(&self.conf.run_file(SOCKET_FILE));
        removed
    }
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        if self.armed {
            // Only a panic leads here, and that is what the runtime will be told about.
            let _ = self.run();
        }
    }
}
