//! DEL: takes an attachment down, whatever is left of it, with nobody's help.

use husk_overlay::ipc::SOCKET_FILE;

use crate::error::Failure;
use crate::invocation::Container;
use crate::netconf::NetConf;
use crate::{attachment, daemon};

/// Disconnects a pod. Neither its namespace nor the daemon nor any state is needed, and it can be repeated.
pub(crate) fn del(conf: &NetConf, container: &Container) -> Result<(), Failure> {
    attachment::remove(&attachment::leases(conf), &attachment::id(conf, container))?;
    daemon::notify_released(&conf.run_file(SOCKET_FILE));
    Ok(())
}
