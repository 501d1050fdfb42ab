//! ADD: lease, wire, have the pod admitted; or leave nothing behind.

use std::io::ErrorKind;

use husk_dataplane::Error as KernelError;
use husk_dataplane::netns::Netns;
use husk_dataplane::pod::{self, PodSpec};
use husk_ipam::lease::{DEFAULT_LOCK_WAIT, Demand, Lease, LeaseStore, Standing};
use husk_overlay::ipc::{NODE_FILE, Request, SOCKET_FILE};
use serde_json::Value;

use crate::allocation::Allocation;
use crate::daemon::{self, Daemon};
use crate::deadline::Deadline;
use crate::error::{Code, Failure};
use crate::host_ports::refuse_impossible;
use crate::invocation::Attach;
use crate::netconf::NetConf;
use crate::result::Made;
use crate::{attachment, node, result};

/// Connects a pod and returns the result to print.
pub(crate) fn add(conf: &NetConf, attach: &Attach, deadline: Deadline) -> Result<Value, Failure> {
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
        pod_uid: attach.args.pod_uid.clone(),
        addresses: conf.requested_addresses(attach.args.ip.as_deref())?,
        bandwidth: conf.bandwidth()?,
        port_mappings: conf.port_mappings()?,
        allow_cooling: false,
        id,
    };
    let socket = conf.run_file(SOCKET_FILE);
    let node_file = conf.run_file(NODE_FILE);
    let node = node::read(&node_file).or_else(|failure| {
        daemon::reason(&socket, deadline, failure)?;
        node::read(&node_file)
    })?;
    refuse_impossible(&demand.port_mappings, &node)?;
    // Found out now, a missing daemon costs nothing that has to be undone.
    let daemon = Daemon::connect(&socket, deadline)?;

    let (lease, node) = Allocation { conf, netns: &netns, deadline }.lease(demand)?;
    let store = attachment::leases(conf, deadline);
    let undo = Undo { conf, lease: &lease, armed: true };
    let spec = PodSpec::of(&lease.endpoint, node.pod_mtu);
    let added = pod::attach(&spec, &netns).map_err(Failure::from).and_then(|default_routes| {
        daemon.ask(&Request::Admit { id: lease.endpoint.id.clone() })?;
        deleted_meanwhile(&store, &lease)?;
        result::render(conf.version, previous, &Made { spec: &spec, sandbox: &attach.netns, default_routes }, &dns)
    });
    match added {
        Ok(result) => {
            undo.disarm();
            Ok(result)
        }
        Err(failure) => {
            let failure = deleted_meanwhile(&store, &lease).err().unwrap_or(failure);
            Err(failure.with_details(undo.now()))
        }
    }
}

/// Opens the pod's namespace, which must not be the host's: wiring it would change the host's own routes.
pub(crate) fn open_netns(path: &str) -> Result<Netns, Failure> {
    let invalid = |reason: String| Failure::new(Code::InvalidEnvironment, format!("CNI_NETNS: {reason}"));
    let netns = Netns::open(path).map_err(|error| match &error {
        // The path may be right; that it cannot be opened now is not what the runtime should change.
        KernelError::Namespace { source, .. }
            if !matches!(
                source.kind(),
                ErrorKind::NotFound | ErrorKind::NotADirectory | ErrorKind::PermissionDenied
            ) =>
        {
            Failure::new(Code::Io, format!("CNI_NETNS: {error}"))
        }
        _ => invalid(error.to_string()),
    })?;
    let (theirs, ours) = (netns.identity()?, Netns::current()?.identity()?);
    if (theirs.device, theirs.inode) == (ours.device, ours.inode) {
        return Err(invalid(format!("{path} is the host's own network namespace")));
    }
    Ok(netns)
}

/// A runtime that lost patience may have sent a DEL without ending this ADD first, which explains any other failure.
fn deleted_meanwhile(store: &LeaseStore, lease: &Lease) -> Result<(), Failure> {
    if store.standing(lease)? == Standing::Held {
        return Ok(());
    }
    Err(Failure::new(
        Code::TryAgainLater,
        format!("attachment {} was deleted (CNI DEL or GC) while it was being added", lease.endpoint.id),
    ))
}

/// Takes an attachment down unless it is disarmed, also when this process panics.
struct Undo<'a> {
    conf: &'a NetConf,
    lease: &'a Lease,
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
        // The time of the ADD may be over; what it made has to go all the same.
        let store = attachment::leases(self.conf, Deadline::after(DEFAULT_LOCK_WAIT));
        if store.standing(self.lease)? == Standing::Replaced {
            // Deleted, and added anew by another ADD: what there is of it is not ours.
            return Ok(());
        }
        let removed = attachment::remove(&store, &self.lease.endpoint.id);
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
