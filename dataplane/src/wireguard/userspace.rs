//! WireGuard devices of userspace processes, over the cross-platform control socket
//! (<https://www.wireguard.com/xplatform/>): Husk's own process, or any other that speaks the protocol.
//!
//! A connection carries one request and its answer. `get=1` makes the process print the configuration, the private key
//! included; `set=1` is followed by what changes. All is text, one `key=value` to a line, ended by an empty line; keys are
//! in hexadecimal. An answer ends with `errno=N`, 0 for success.
//!
//! All changes go in one request, so that the process makes them in one step. When it refuses, nothing tells which of them
//! is to blame: they are sent again one by one. A single allowed-ip is taken away by `allowed_ip=-PREFIX`, as the bundled
//! process and newer other ones understand it; when sent again, the peer's list is replaced instead, which all understand.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use husk_overlay::keys::PublicKey;
use husk_overlay::name::InterfaceName;
use husk_overlay::prefix::Prefix;
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt};
use nix::sys::time::TimeVal;
use zeroize::Zeroizing;

use super::{KeyRing, PeerUpdate, WireguardAction, WireguardState, private_key};
use crate::error::{Error, Refusal};

mod decode;

/// How long one request may take. A process that answers more slowly than this is stuck.
const TIME_LIMIT: Duration = Duration::from_secs(5);

/// Largest answer in bytes: 5,000 peers with a dozen prefixes each take about 5 MiB.
const MAX_ANSWER: usize = 64 << 20;

/// The userspace devices whose control sockets lie in a directory.
pub(super) struct UserspaceDevices {
    directory: PathBuf,
}

/// How single allowed-ips are taken away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Removal {
    /// One by one; older processes refuse it.
    Single,
    /// By replacing the list of the peer.
    Replace,
}

impl UserspaceDevices {
    pub(super) fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned() }
    }

    pub(super) fn read(&self, interface: &InterfaceName) -> Result<Option<WireguardState>, Error> {
        let path = self.path(interface);
        let answer = match exchange(&path, b"get=1\n\n") {
            Ok(answer) => answer,
            Err(error) if is_absent(&error) => return Ok(None),
            Err(source) => return Err(Error::File { operation: "ask", path, source }),
        };
        let (operation, object) = ("read", device(interface));
        match decode::answer(&answer) {
            Ok((state, 0)) => Ok(Some(state)),
            Ok((_, errno)) => Err(refused(operation, object, errno)),
            Err(reason) => Err(Error::Malformed { operation, object, reason }),
        }
    }

    pub(super) fn apply(
        &self,
        interface: &InterfaceName,
        actions: &[&WireguardAction],
        keys: &KeyRing,
    ) -> Vec<Result<(), Error>> {
        if let Ok(whole) = request(actions, Removal::Single, interface, keys)
            && self.set(interface, &whole, String::new()).is_ok()
        {
            return actions.iter().map(|_| Ok(())).collect();
        }
        let one_by_one = actions.iter().map(|action| {
            let single = request(std::slice::from_ref(action), Removal::Replace, interface, keys)?;
            self.set(interface, &single, format!(" ({action})"))
        });
        one_by_one.collect()
    }

    fn set(&self, interface: &InterfaceName, request: &str, what: String) -> Result<(), Error> {
        let path = self.path(interface);
        let answer = match exchange(&path, request.as_bytes()) {
            Ok(answer) => answer,
            Err(error) if is_absent(&error) => {
                return Err(Error::WaitingForUserspaceDevice { interface: interface.to_string() });
            }
            Err(source) => return Err(Error::File { operation: "configure the device behind", path, source }),
        };
        let (operation, object) = ("configure", device(interface) + &what);
        match decode::answer(&answer) {
            Ok((_, 0)) => Ok(()),
            Ok((_, errno)) => Err(refused(operation, object, errno)),
            Err(reason) => Err(Error::Malformed { operation, object, reason }),
        }
    }

    fn path(&self, interface: &InterfaceName) -> PathBuf {
        self.directory.join(format!("{interface}.sock"))
    }
}

fn device(interface: &InterfaceName) -> String {
    format!("userspace WireGuard device {interface}")
}

fn refused(operation: &'static str, object: String, errno: i32) -> Error {
    let explanation = Some("its process said so".to_owned());
    // Most processes print the number as it is, some negate it, as the kernel does.
    Error::Refused(Refusal { operation, object, errno: Errno::from_raw(errno.wrapping_abs()), explanation })
}

/// No socket, or one that a process left behind when it was killed.
fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

/// The text of a `set` request; wiped when dropped.
fn request(
    actions: &[&WireguardAction],
    removal: Removal,
    interface: &InterfaceName,
    keys: &KeyRing,
) -> Result<Zeroizing<String>, Error> {
    let mut body = String::new();
    let mut key = None;
    for action in actions {
        match action {
            WireguardAction::SetPrivateKey { public_key } => key = Some(private_key(keys, public_key, interface)?),
            WireguardAction::SetListenPort { listen_port } => line(&mut body, "listen_port", listen_port),
            WireguardAction::ClearFirewallMark => line(&mut body, "fwmark", ""),
            WireguardAction::AddPeer { public_key, peer } => {
                line(&mut body, "public_key", Hex(public_key.as_bytes()));
                if let Some(endpoint) = peer.endpoint {
                    line(&mut body, "endpoint", endpoint);
                }
                line(&mut body, "persistent_keepalive_interval", peer.keepalive);
                allowed_ips(&mut body, &peer.allowed_ips);
            }
            WireguardAction::UpdatePeer { public_key, update } => update_peer(&mut body, public_key, update, removal),
            WireguardAction::RemovePeer { public_key } => {
                line(&mut body, "public_key", Hex(public_key.as_bytes()));
                line(&mut body, "remove", true);
            }
        }
    }
    // Made large enough at once: a string that grows leaves copies of the key behind.
    let mut text = Zeroizing::new(String::with_capacity(body.len() + 128));
    text.push_str("set=1\n");
    if let Some(key) = key {
        line(&mut text, "private_key", Hex(key.expose()));
    }
    text.push_str(&body);
    text.push('\n');
    Ok(text)
}

fn update_peer(text: &mut String, public_key: &PublicKey, update: &PeerUpdate, removal: Removal) {
    line(text, "public_key", Hex(public_key.as_bytes()));
    line(text, "update_only", true);
    if update.clear_preshared_key {
        line(text, "preshared_key", Hex(&[0; 32]));
    }
    if let Some(endpoint) = update.endpoint {
        line(text, "endpoint", endpoint);
    }
    if let Some(seconds) = update.keepalive {
        line(text, "persistent_keepalive_interval", seconds);
    }
    let Some(update) = &update.allowed_ips else { return };
    let loses = !update.remove.is_empty() || !update.moved.is_empty();
    if loses && removal == Removal::Replace {
        line(text, "replace_allowed_ips", true);
        allowed_ips(text, &update.result);
    } else {
        allowed_ips(text, &update.add);
        for prefix in &update.remove {
            line(text, "allowed_ip", format_args!("-{prefix}"));
        }
    }
}

fn allowed_ips(text: &mut String, prefixes: &BTreeSet<Prefix>) {
    for prefix in prefixes {
        line(text, "allowed_ip", prefix);
    }
}

fn line(text: &mut String, key: &str, value: impl std::fmt::Display) {
    writeln!(text, "{key}={value}").expect("writing to a String cannot fail");
}

/// Bytes as lower-case hexadecimal digits.
struct Hex<'a>(&'a [u8; 32]);

impl std::fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Sends a request and returns the answer up to its empty line; both are bounded in time and size.
fn exchange(path: &Path, request: &[u8]) -> io::Result<Zeroizing<Vec<u8>>> {
    let deadline = Instant::now() + TIME_LIMIT;
    let mut stream = open(path)?;
    stream.write_all(request).map_err(timed_out)?;
    let mut answer = Zeroizing::new(Vec::with_capacity(8 << 10));
    let mut chunk = Zeroizing::new([0; 8 << 10]);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(timed_out(io::ErrorKind::WouldBlock.into()));
        }
        stream.set_read_timeout(Some(left))?;
        let length = match stream.read(&mut *chunk) {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(timed_out(error)),
        };
        append(&mut answer, &chunk[..length]);
        if length == 0 || answer.ends_with(b"\n\n") {
            return Ok(answer);
        }
        if answer.len() > MAX_ANSWER {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the answer is longer than any device's can be"));
        }
    }
}

/// Connects with a time limit, which the standard library has none for: a process that does not accept would block us.
fn open(path: &Path) -> io::Result<UnixStream> {
    let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let limit = TimeVal::new(TIME_LIMIT.as_secs().cast_signed(), 0);
    setsockopt(&socket, sockopt::SendTimeout, &limit)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?).map_err(|errno| timed_out(errno.into()))?;
    Ok(UnixStream::from(socket))
}

/// What a socket's time-out means, in words.
fn timed_out(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock {
        let text =
            format!("its process did not answer within {} s; it hangs and has to be restarted", TIME_LIMIT.as_secs());
        io::Error::new(io::ErrorKind::TimedOut, text)
    } else {
        error
    }
}

/// Appends without leaving copies of the content in freed memory.
fn append(answer: &mut Zeroizing<Vec<u8>>, chunk: &[u8]) {
    if answer.capacity() < answer.len() + chunk.len() {
        let mut larger = Zeroizing::new(Vec::with_capacity(2 * (answer.len() + chunk.len())));
        larger.extend_from_slice(answer);
        *answer = larger;
    }
    answer.extend_from_slice(chunk);
}

#[cfg(test)]
#[path = "userspace/tests.rs"]
mod tests;
