//! An attachment and what belongs to it, as ADD, DEL, CHECK and GC see it.

use husk_dataplane::pod;
use husk_ipam::lease::{BootTime, DEFAULT_LOCK_WAIT, LeaseStore};
use husk_overlay::endpoint::AttachmentId;
use husk_overlay::ipc::LEASE_DIRECTORY;

use crate::deadline::Deadline;
use crate::error::Failure;
use crate::invocation::Container;
use crate::netconf::NetConf;

/// The id of an attachment.
pub(crate) fn id(conf: &NetConf, container: &Container) -> AttachmentId {
    AttachmentId { network: conf.network.clone(), container_id: container.id.clone(), ifname: container.ifname.clone() }
}

/// The lease store, whose lock is waited for no longer than the deadline allows now.
pub(crate) fn leases(conf: &NetConf, deadline: Deadline) -> LeaseStore {
    LeaseStore::new(conf.run_file(LEASE_DIRECTORY), deadline.allow(DEFAULT_LOCK_WAIT))
}

/// The attachment that the alias of a host interface names; none if it names none.
pub(crate) fn of_alias(alias: &str) -> Option<AttachmentId> {
    let mut parts = alias.split('/');
    let (network, container_id, ifname) = (parts.next()?, parts.next()?, parts.next()?);
    let id = AttachmentId {
        network: network.parse().ok()?,
        container_id: container_id.parse().ok()?,
        ifname: ifname.parse().ok()?,
    };
    parts.next().is_none().then_some(id)
}

/// Takes an attachment down: first the interface, then the addresses, so that no other pod gets an address that still
/// works. An address stays leased if its interface cannot be deleted.
pub(crate) fn remove(store: &LeaseStore, id: &AttachmentId) -> Result<(), Failure> {
    let detached = pod::detach(&id.host_interface())?;
    let released = store.release(id, BootTime::now())?;
    if !detached && released.is_some() {
        // An ADD was at work, and may have made the interface in between. From now on it finds its lease gone and undoes what
        // it makes.
        pod::detach(&id.host_interface())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alias_leads_back_to_its_attachment() {
        let id = AttachmentId {
            network: "husk".parse().unwrap(),
            container_id: "a.b_c".parse().unwrap(),
            ifname: "eth0".parse().unwrap(),
        };
        assert_eq!(of_alias(&id.to_string()), Some(id));
        for other in ["", "husk", "husk/abc", "husk/abc/eth0/x", "a b/c/eth0", "uplink to rack 7"] {
            assert_eq!(of_alias(other), None, "{other}");
        }
    }
}
