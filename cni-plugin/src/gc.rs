//! GC: removes what belongs to no valid attachment of the network: leases, interfaces and, with these, routes.
//!
//! The specification wants GC to have the network to itself: the runtime waits for every ADD before it makes its list of valid
//! attachments, and begins none before GC has ended (section 3, "Lifecycle & Ordering"). Runtimes are not that strict, so that
//! an attachment survives whose ADD was under way when we began, or began since, though the list does not have it:
//! - an ADD takes its lease before it makes an interface, keeps the lease file locked to its end, and notes in it when that was;
//! - a lease that is locked, or that was made or wired since our start, is left alone;
//! - interfaces are listed before leases are looked at: one without a lease is not that of an ADD under way;
//! - what is removed is the lease and the interface that were found, by its index: a container that is deleted and added again
//!   at that moment keeps what it got.
//!
//! An attachment whose ADD ended before our start and that is not in the list is garbage by all that can be known.

use std::time::Duration;

use husk_dataplane::pod;
use husk_ipam::lease::{BootTime, Garbage, LeaseStore};
use husk_overlay::ipc::SOCKET_FILE;
use husk_overlay::issue::Issue;

use crate::deadline::Deadline;
use crate::error::{Code, Failure};
use crate::netconf::NetConf;
use crate::version::Version;
use crate::{attachment, daemon};

/// Collects garbage. `started` is when the process began, [since boot](husk_ipam::lease::since_boot). Goes on past errors, and
/// reports them all; what the deadline leaves no time for is left to the next GC.
pub(crate) fn gc(conf: &NetConf, started: Duration, deadline: Deadline) -> Result<(), Failure> {
    conf.version.require(Version::V1_1_0, "GC")?;
    let valid = conf.valid_attachments()?;
    let store = attachment::leases(conf, deadline);
    let interfaces = pod::host_interfaces()?;
    let mut problems = Vec::new();
    let mut removed = false;
    // A store that cannot be looked at may hold what should go, and is no store that is missing.
    if store.exists()? {
        let locked = store.lock()?;
        problems.extend(locked.sweep().err().map(|error| error.to_string()));
        let (garbage, issues) = locked.collectable(&conf.network, &valid, started)?;
        drop(locked);
        problems.extend(issues.iter().map(Issue::to_string));
        for found in &garbage {
            if deadline.is_over() {
                return Err(given_up(deadline, problems));
            }
            removed = true;
            let store = attachment::leases(conf, deadline);
            problems.extend(remove(&store, found).err().map(|failure| format!("{}: {failure}", found.endpoint.id)));
        }
    }
    for interface in interfaces {
        // The alias tells whose it is; without one that fits, it is not ours to judge.
        let Some(id) = attachment::of_alias(&interface.alias) else { continue };
        let ours = id.network == conf.network && id.host_interface() == interface.name;
        if !ours || valid.contains(&id) {
            continue;
        }
        match store.has_lease(&id) {
            Ok(false) => {}
            Ok(true) => continue,
            Err(error) => {
                problems.push(error.to_string());
                continue;
            }
        }
        if deadline.is_over() {
            return Err(given_up(deadline, problems));
        }
        removed = true;
        problems
            .extend(pod::detach_index(&interface.name, interface.index).err().map(|error| format!("{id}: {error}")));
    }
    if removed {
        daemon::notify_released(&conf.run_file(SOCKET_FILE));
    }
    if problems.is_empty() {
        return Ok(());
    }
    Err(Failure::new(Code::Residue, "some of what belongs to no attachment could not be removed")
        .with_details(problems))
}

/// Takes down what was found to be garbage, in the order of a DEL, and nothing that has been made of the same name since.
fn remove(store: &LeaseStore, found: &Garbage) -> Result<(), Failure> {
    let interface = &found.endpoint.host_interface;
    let locked = store.lock()?;
    if !locked.is_unchanged(found)? {
        return Ok(());
    }
    let index = pod::host_interface_index(interface)?;
    drop(locked);
    if let Some(index) = index {
        pod::detach_index(interface, index)?;
    }
    store.lock()?.collect(found, BootTime::now())?;
    Ok(())
}

/// What is left is safe: the next GC finds it, and so does a DEL.
fn given_up(deadline: Deadline, problems: Vec<String>) -> Failure {
    let seconds = deadline.seconds();
    Failure::new(Code::Residue, format!("what belongs to no attachment could not all be removed within {seconds} s"))
        .with_details(problems)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::path::Path;

    use husk_dataplane::netns::Netns;
    use husk_ipam::lease::{DEFAULT_LOCK_WAIT, Demand, Supply};
    use husk_overlay::endpoint::{AttachmentId, NetnsIdentity};
    use husk_overlay::ipc::LEASE_DIRECTORY;
    use husk_overlay::prefix::Family;
    use husk_overlay::record::DualStack;
    use serde_json::json;

    const LONG: Duration = Duration::from_secs(3600);

    fn id(container: &str) -> AttachmentId {
        AttachmentId {
            network: "husk".parse().unwrap(),
            container_id: container.parse().unwrap(),
            ifname: "eth0".parse().unwrap(),
        }
    }

    fn lease(store: &LeaseStore, container: &str) {
        let supply = Supply {
            blocks: &["10.42.0.0/26".parse().unwrap()],
            families: &[Family::Ipv4].into(),
            reserved: DualStack::default(),
            cool_down: Duration::ZERO,
        };
        let netns = NetnsIdentity { path: "/run/netns/x".to_owned(), device: 4, inode: 7 };
        let demand = Demand::plain(id(container), netns);
        store.lock().unwrap().allocate(&supply, &demand, BootTime::now()).unwrap();
    }

    /// GC of a network with nothing valid, whose process began now.
    fn collect(run_directory: &Path, deadline: Deadline) -> Result<(), Failure> {
        let conf = json!({
            "cniVersion": "1.1.0", "name": "husk", "runDirectory": run_directory, "cni.dev/valid-attachments": [],
        });
        let conf = NetConf::parse(conf.to_string().as_bytes()).unwrap();
        let started = husk_ipam::lease::since_boot();
        Netns::new_unnamed().unwrap().run_in(|| gc(&conf, started, deadline)).unwrap()
    }

    /// However much there is to do, and whoever is in the way.
    #[test]
    fn what_there_is_no_time_for_is_left_to_the_next_gc() {
        let run_directory = tempfile::tempdir().unwrap();
        let store = LeaseStore::new(run_directory.path().join(LEASE_DIRECTORY), DEFAULT_LOCK_WAIT);
        ["a", "b"].into_iter().for_each(|container| lease(&store, container));
        std::thread::sleep(Duration::from_millis(20));
        let failure = collect(run_directory.path(), Deadline::after(Duration::ZERO)).unwrap_err();
        assert_eq!(failure.code, Code::Residue);
        assert!(failure.message.contains("within 0 s"), "{failure}");
        assert!(store.has_lease(&id("a")).unwrap() && store.has_lease(&id("b")).unwrap());

        // Somebody keeps the store to himself for ever.
        let lock = File::open(store.directory().join("lock")).unwrap();
        lock.lock().unwrap();
        let failure = collect(run_directory.path(), Deadline::after(Duration::from_millis(30))).unwrap_err();
        assert_eq!(failure.code, Code::TryAgainLater);
        assert!(failure.message.contains("stayed locked"), "{failure}");
        drop(lock);

        collect(run_directory.path(), Deadline::after(LONG)).unwrap();
        assert!(!store.has_lease(&id("a")).unwrap() && !store.has_lease(&id("b")).unwrap());
    }
}
