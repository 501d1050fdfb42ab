//! STATUS: could an ADD work now?

use husk_overlay::ipc::{NODE_FILE, Request, SOCKET_FILE};

use crate::daemon::{self, Daemon};
use crate::error::{Code, Failure};
use crate::netconf::NetConf;
use crate::node;
use crate::version::Version;

/// Asks the daemon. Existing pods do not depend on it, so that the code is never 51 (limited connectivity).
pub(crate) fn status(conf: &NetConf) -> Result<(), Failure> {
    conf.version.require(Version::V1_1_0, "STATUS")?;
    conf.refuse_unknown_fields()?;
    let socket = conf.run_file(SOCKET_FILE);
    node::read(&conf.run_file(NODE_FILE))
        .map_err(|failure| daemon::reason(&socket, failure))
        .and_then(|_| Daemon::connect(&socket))
        .and_then(|daemon| daemon.ask(&Request::Ready))
        .map_err(|failure| Failure { code: Code::NotAvailable, ..failure })
}
