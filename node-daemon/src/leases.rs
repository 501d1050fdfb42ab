//! The lease store seen without the daemon: what is in it, and how the lease of a pod that is gone is released by hand.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use husk_dataplane::netlink::{Protocol, Socket};
use husk_dataplane::underlay;
use husk_ipam::lease::{BootTime, LeaseStore, NetnsEvidence};
use husk_overlay::endpoint::Endpoint;
use husk_overlay::ipc::LEASE_DIRECTORY;
use husk_overlay::marks;
use husk_overlay::name::InterfaceName;

/// How long the store may be locked by others.
const LOCK: Duration = Duration::from_secs(2);

/// The store below the daemon's run directory.
#[must_use]
pub fn store(run_directory: &Path) -> LeaseStore {
    LeaseStore::new(run_directory.join(LEASE_DIRECTORY), LOCK)
}

/// The host's ends of pods' interfaces, in the calling thread's network namespace.
///
/// # Errors
/// When the kernel does not list them.
pub fn pod_interfaces() -> Result<BTreeSet<InterfaceName>, husk_dataplane::Error> {
    let mut socket = Socket::open(Protocol::Route)?;
    let names = underlay::interfaces(&mut socket)?.into_iter().map(|it| it.name);
    Ok(names.filter(|name| marks::is_pod_interface(name.as_str())).collect())
}

/// Releases the lease of an address, if its pod is provably gone: no network namespace, no host interface, and nobody who sets it up.
/// The proof is taken under the lock of the store, where it cannot change any more. As after every release, the addresses rest
/// before another pod gets one. Returns whose it was.
///
/// # Errors
/// When nobody has a lease of the address, or the pod may be there yet, with the reason; and of the store.
pub fn release(run_directory: &Path, address: IpAddr) -> Result<Endpoint> {
    let store = store(run_directory);
    let leases = store.load()?.endpoints;
    let endpoint = leases.into_values().find(|it| it.addresses.iter().any(|own| own == address));
    let endpoint = endpoint.with_context(|| format!("no pod of this node has a lease of {address}"))?;
    let locked = store.lock()?;
    let interface_exists = pod_interfaces()?.contains(&endpoint.host_interface);
    if locked.reclaim(&endpoint, interface_exists, BootTime::now())? {
        return Ok(endpoint);
    }
    let (pod, netns) = (endpoint.display_name(), &endpoint.netns.path);
    let reason = match NetnsEvidence::observe(&endpoint.netns) {
        _ if interface_exists => format!("its host interface {} exists", endpoint.host_interface),
        NetnsEvidence::Alive => format!("its network namespace {netns} exists"),
        NetnsEvidence::Unknown => format!("it cannot be told whether its network namespace {netns} exists"),
        NetnsEvidence::Missing | NetnsEvidence::Replaced => "it is being set up, or was deleted just now".to_owned(),
    };
    bail!("the lease of {address} stays with {pod}: {reason}; it goes when the pod is deleted")
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt as _;

    use husk_ipam::lease::{Demand, Lease, Supply};
    use husk_overlay::endpoint::{AttachmentId, NetnsIdentity};
    use husk_overlay::name::{ContainerId, NetworkName};
    use husk_overlay::prefix::{Family, Prefix};

    use super::*;

    const COOL_DOWN: Duration = Duration::from_secs(60);

    /// A lease of a pod whose namespace is this file.
    fn lease(run: &Path, netns: &Path) -> Lease {
        let found = fs::metadata(netns).unwrap();
        let netns = NetnsIdentity { path: netns.display().to_string(), device: found.dev(), inode: found.ino() };
        let id = AttachmentId {
            network: NetworkName::new("husk").unwrap(),
            container_id: ContainerId::new("c1").unwrap(),
            ifname: InterfaceName::new("eth0").unwrap(),
        };
        let blocks: [Prefix; 1] = ["10.42.0.0/26".parse().unwrap()];
        let supply = Supply {
            blocks: &blocks,
            families: &[Family::Ipv4].into(),
            reserved: husk_overlay::record::DualStack::default(),
            cool_down: COOL_DOWN,
        };
        let store = store(run);
        store.lock().unwrap().allocate(&supply, &Demand::plain(id, netns), BootTime::now()).unwrap()
    }

    #[test]
    fn a_lease_is_released_only_when_its_pod_is_gone_and_its_address_rests() {
        let run = tempfile::tempdir().unwrap();
        let netns = run.path().join("netns");
        fs::write(&netns, "").unwrap();
        let held = lease(run.path(), &netns);
        let address = held.endpoint.addresses.iter().next().unwrap();
        let refused = || release(run.path(), address).unwrap_err().to_string();
        assert!(refused().contains("exists; it goes when the pod is deleted"), "{}", refused());
        fs::remove_file(&netns).unwrap();
        assert!(refused().contains("it is being set up"), "{}", refused());
        drop(held);
        assert_eq!(release(run.path(), address).unwrap().id.container_id.as_str(), "c1");
        let resting = store(run.path()).lock().unwrap().addresses(COOL_DOWN, BootTime::now()).unwrap();
        assert_eq!(resting, [address].into(), "nobody gets it at once");
        assert!(refused().contains("no pod of this node has a lease"), "{}", refused());
    }
}
