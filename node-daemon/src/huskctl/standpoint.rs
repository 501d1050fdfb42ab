//! Whether this process is where the daemon is: in the network namespace of the host.
//!
//! What a command finds out by itself (interfaces, rules, routes, tracked connections) it finds in its own network namespace. In
//! another one it would take an empty host for the node, and mend the wrong one. Namespaces are compared by the device and inode
//! of their files, which are the same for every process of a kernel, whatever pid or mount namespace it is in.

use std::ffi::OsString;
use std::fmt;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use husk_dataplane::netns::Netns;
use husk_overlay::endpoint::NetnsIdentity;
use husk_overlay::ipc::{Request, Response};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use super::exchange_within;
use crate::programs;
use crate::report::quoted;

/// How long the daemon may take, which answers this without its loop. One that hangs is looked at from wherever somebody is.
const LIMIT: Duration = Duration::from_secs(2);

/// Another network namespace than the daemon's.
#[derive(Debug)]
pub(super) struct Elsewhere {
    own: u64,
    daemons: u64,
    /// What to run instead; none where this process cannot see the daemon's.
    command: Option<String>,
}

impl fmt::Display for Elsewhere {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { own, daemons, command } = self;
        // As proc(5) names them: what `readlink /proc/PID/ns/net` and `lsns` show.
        write!(
            f,
            "this command looks at the host itself, and runs in another network namespace (net:[{own}]) than the daemon \
             (net:[{daemons}]): what it finds here is not the node's. "
        )?;
        match command {
            Some(command) => write!(f, "Run: {command}"),
            None => f.write_str(
                "Run it on the node outside of containers, or in the daemon's own: kubectl -n husk-system exec POD -- huskctl",
            ),
        }
    }
}

impl std::error::Error for Elsewhere {}

/// Why what this process sees is not what the daemon sees, if so. None where no daemon says otherwise: one that is dead leaves its
/// host to be looked at.
pub(super) fn elsewhere(socket: &Path) -> Option<Elsewhere> {
    let Ok(Response::Report { report }) = exchange_within(LIMIT, socket, &Request::NetworkNamespace) else {
        return None;
    };
    let daemons: NetnsIdentity = serde_json::from_value(report).ok()?;
    let own = Netns::current().and_then(|netns| netns.identity()).ok()?;
    if is_same(&own, &daemons) {
        return None;
    }
    let path = daemon_process(socket).map(|pid| format!("/proc/{pid}/ns/net"));
    // A process id means another process where /proc is of another pid namespace.
    let path = path.filter(|path| {
        let found = Netns::open(path).and_then(|netns| netns.identity());
        found.is_ok_and(|found| is_same(&found, &daemons))
    });
    let command = path.map(|path| command(&path, &programs::own_name("huskctl"), std::env::args_os().skip(1)));
    Some(Elsewhere { own: own.inode, daemons: daemons.inode, command })
}

/// Refuses where the host cannot be seen from.
///
/// # Errors
/// [`Elsewhere`]
pub(super) fn ensure_here(socket: &Path) -> Result<(), Elsewhere> {
    elsewhere(socket).map_or(Ok(()), Err)
}

fn is_same(one: &NetnsIdentity, other: &NetnsIdentity) -> bool {
    (one.device, one.inode) == (other.device, other.inode)
}

/// The same command in another network namespace (nsenter(1)).
fn command(netns: &str, program: &str, arguments: impl Iterator<Item = OsString>) -> String {
    let words = arguments.map(|it| quoted(&it.to_string_lossy()));
    let own = std::iter::once(quoted(program)).chain(words).collect::<Vec<_>>().join(" ");
    format!("nsenter {} {own}", quoted(&format!("--net={netns}")))
}

/// Process id of who answers at the daemon's socket; none where this process cannot see it.
pub(crate) fn daemon_process(socket: &Path) -> Option<i32> {
    let stream = UnixStream::connect(socket).ok()?;
    getsockopt(&stream.as_fd(), PeerCredentials).ok().map(|it| it.pid()).filter(|pid| *pid > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_command_is_run_where_the_daemon_is() {
        let arguments = ["doctor", "--host-root", "/mnt/a b"].map(OsString::from);
        let command = command("/proc/77/ns/net", "huskctl", arguments.into_iter());
        assert_eq!(command, "nsenter --net=/proc/77/ns/net huskctl doctor --host-root '/mnt/a b'");
        let told = Elsewhere { own: 5, daemons: 7, command: Some(command) }.to_string();
        assert!(
            told.contains("(net:[5])")
                && told.ends_with("Run: nsenter --net=/proc/77/ns/net huskctl doctor --host-root '/mnt/a b'")
        );
        let told = Elsewhere { own: 5, daemons: 7, command: None }.to_string();
        assert!(told.ends_with("kubectl -n husk-system exec POD -- huskctl"), "{told}");
    }

    #[test]
    fn without_a_daemon_a_host_is_looked_at_from_wherever_one_is() {
        let directory = tempfile::tempdir().unwrap();
        assert!(elsewhere(&directory.path().join("daemon.sock")).is_none());
    }
}
