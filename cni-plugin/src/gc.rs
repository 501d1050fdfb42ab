//! GC: removes what belongs to no valid attachment of the network: leases, interfaces and, with these, routes.
//!
//! The runtime made its list of valid attachments some time before we run, and an ADD may be under way or may have ended
//! since. Such an attachment is not in the list and must survive:
//! - an ADD takes its lease before it makes an interface, and keeps the lease file locked to its end;
//! - a lease that is locked, or younger than our start, is left alone;
//! - interfaces are listed before leases are looked at: one without a lease is not that of an ADD under way.

use husk_dataplane::pod;
use husk_ipam::lease::BootTime;
use husk_overlay::ipc::SOCKET_FILE;
use husk_overlay::issue::Issue;

use crate::error::{Code, Failure};
use crate::netconf::NetConf;
use crate::version::Version;
use crate::{attachment, daemon};

/// Collects garbage. `started` is the time the process began. Goes on past errors, and reports them all.
pub(crate) fn gc(conf: &NetConf, started: BootTime) -> Result<(), Failure> {
    conf.version.require(Version::V1_1_0, "GC")?;
    let valid = conf.valid_attachments()?;
    let store = attachment::leases(conf);
    let interfaces = pod::host_interfaces()?;
    let mut problems = Vec::new();
    let mut removed = false;
    if store.directory().exists() {
        let (endpoints, issues) = store.lock()?.collectable(&conf.network, &valid, started)?;
        problems.extend(issues.iter().map(Issue::to_string));
        for id in endpoints.keys() {
            removed = true;
            problems.extend(attachment::remove(&store, id).err().map(|failure| format!("{id}: {failure}")));
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
        removed = true;
        problems.extend(pod::detach(&interface.name).err().map(|error| format!("{id}: {error}")));
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
