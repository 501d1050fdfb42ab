//! DEL: takes an attachment down, whatever is left of it, with nobody's help.
//!
//! Who deletes an interface has to wait until the kernel has forgotten it, several times as long as it takes until it is
//! gone. So a daemon that is there is asked to delete it, and says when it is gone. That is a matter of speed alone: the DEL
//! then does everything as if nobody had been asked, and finds less to do. Hence
//!
//! - the addresses are released after the interface is gone for certain, as the kernel itself tells this process that there
//!   is none;
//! - a daemon that is missing, hung, of another release, in another namespace or killed in the middle costs a quarter of a
//!   second at most;
//! - a daemon that comes to it too late finds nothing: the interface is named by an index that no other ever gets;
//! - killed at any point, a DEL leaves either the interface and the lease, or the lease alone, or nothing, as it always did,
//!   and its repetition, garbage collection or the daemon does the rest. There is no state between these that would have to
//!   be written down: the daemon remembers nothing of what it was asked.

use husk_dataplane::pod;
use husk_overlay::ipc::SOCKET_FILE;

use crate::deadline::Deadline;
use crate::error::Failure;
use crate::invocation::Container;
use crate::netconf::NetConf;
use crate::{attachment, daemon};

/// Disconnects a pod. Neither its namespace nor the daemon nor any state is needed, and it can be repeated.
pub(crate) fn del(conf: &NetConf, container: &Container, deadline: Deadline) -> Result<(), Failure> {
    let (id, socket) = (attachment::id(conf, container), conf.run_file(SOCKET_FILE));
    let interface = id.host_interface();
    if let Ok(Some(index)) = pod::host_interface_index(&interface) {
        daemon::vacate(&socket, interface, index);
    }
    attachment::remove(&attachment::leases(conf, deadline), &id)
}
