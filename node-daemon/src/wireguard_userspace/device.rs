//! Applies changes to the running device so that what did not change is not disturbed.
//!
//! The library's own control server replaces a peer whenever anything of it is set, and with the peer go its session,
//! its counters and the packets that wait in it. Its lower interface changes a peer in place, but forgets to take a
//! prefix from the peer that held it before. So this module keeps the table of who owns which prefix, and hands the
//! library complete lists, old and new owner in one step.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Write as _;
use std::io;
use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context as _, Result};
use gotatun::device::configure::{DeviceWrite, PeerStats};
use gotatun::device::{DeviceTransports, Peer};
use gotatun::tun::tun;
use gotatun::x25519;
use husk_overlay::keys::PublicKey;
use husk_overlay::name::InterfaceName;
use husk_overlay::prefix::Prefix;
use nix::errno::Errno;
use tokio::sync::Mutex;
use zeroize::Zeroizing;

use super::protocol::{AllowedIp, PeerChange, Refusal, Set, write_key};
use super::transport::{Failure, Sockets, Tunnel, try_port};

type Transports = (Sockets, Tunnel, Tunnel);

/// The running device.
pub(super) struct Device {
    library: gotatun::device::Device<Transports>,
    /// Held for the whole of a request, so that requests of several clients do not mix.
    state: Mutex<State>,
}

/// What the library does not keep, or not exactly.
#[derive(Default)]
struct State {
    routing: CryptokeyRouting,
    /// A port set before there is a key; the library binds its socket only with one.
    waiting_port: Option<u16>,
}

/// Which peer may send from a prefix, and gets what is sent to it. A prefix has one owner.
#[derive(Default)]
struct CryptokeyRouting {
    owners: HashMap<Prefix, PublicKey>,
    peers: HashMap<PublicKey, BTreeSet<Prefix>>,
}

impl CryptokeyRouting {
    /// Applies a peer's changes in order; a new peer enters. Returns the other peers that lost a prefix.
    fn apply(&mut self, change: &PeerChange) -> BTreeSet<PublicKey> {
        let key = change.public_key;
        let mut own = self.peers.remove(&key).unwrap_or_default();
        let mut losers = BTreeSet::new();
        if change.replace_allowed_ips {
            for prefix in std::mem::take(&mut own) {
                self.owners.remove(&prefix);
            }
        }
        for step in &change.allowed_ips {
            match step {
                AllowedIp::Add(prefix) => {
                    if let Some(before) = self.owners.insert(*prefix, key)
                        && before != key
                    {
                        if let Some(theirs) = self.peers.get_mut(&before) {
                            theirs.remove(prefix);
                        }
                        losers.insert(before);
                    }
                    own.insert(*prefix);
                }
                AllowedIp::Remove(prefix) => {
                    if own.remove(prefix) {
                        self.owners.remove(prefix);
                    }
                }
            }
        }
        self.peers.insert(key, own);
        losers
    }

    fn remove(&mut self, key: &PublicKey) -> bool {
        let Some(prefixes) = self.peers.remove(key) else {
            return false;
        };
        for prefix in prefixes {
            self.owners.remove(&prefix);
        }
        true
    }

    /// A peer's prefixes in the library's terms.
    fn as_peer(&self, key: &PublicKey) -> Peer {
        let mut peer = Peer::new(library_key(key));
        let prefixes = self.peers.get(key).into_iter().flatten();
        peer.allowed_ips = prefixes.filter_map(|prefix| prefix.to_string().parse().ok()).collect();
        peer
    }
}

fn library_key(key: &PublicKey) -> x25519::PublicKey {
    x25519::PublicKey::from(*key.as_bytes())
}

impl Device {
    /// Creates the TUN device, down and without addresses, and a device without key and peers on it.
    pub(super) async fn create(interface: &InterfaceName) -> Result<(Self, Failure)> {
        let mut configuration = tun::Configuration::default();
        configuration.tun_name(interface.as_str());
        let opened = tun::create_as_async(&configuration).map_err(io::Error::from);
        let opened = opened.map_err(|error| explain(interface, error))?;
        let (tunnel, failure) = Tunnel::new(opened, interface).context("the TUN device is gone again")?;
        let builder = gotatun::device::build().with_udp(Sockets::new()).with_ip(tunnel);
        let library = builder.build().await.context("cannot start the WireGuard device")?;
        Ok((Self { library, state: Mutex::default() }, failure))
    }

    /// Applies a request. A peer is changed in place; only a changed key or port interrupts anything.
    pub(super) async fn set(&self, set: Set) -> Result<(), Refusal> {
        let mut state = self.state.lock().await;
        self.set_device(&mut state, &set).await?;
        if set.replace_peers {
            let peers: Vec<_> = state.routing.peers.keys().copied().collect();
            for key in peers {
                self.remove(&mut state, &key).await?;
            }
        }
        let own = self.library.read(async |device| device.private_key().map(x25519::PublicKey::from)).await;
        for change in &set.peers {
            let key = &change.public_key;
            if change.remove {
                self.remove(&mut state, key).await?;
                continue;
            }
            let known = state.routing.peers.contains_key(key);
            let is_self = own.is_some_and(|own| own == library_key(key));
            if is_self || (change.update_only && !known) {
                continue;
            }
            if own.is_none() {
                return Err(Refusal::new(Errno::ENOKEY, "a peer needs the device's private key to be set before"));
            }
            self.set_peer(&mut state, change, known).await?;
        }
        Ok(())
    }

    async fn set_device(&self, state: &mut State, set: &Set) -> Result<(), Refusal> {
        let private_key = match &set.private_key {
            Some(bytes) if **bytes == [0; 32] => {
                let reason = "the private key cannot be taken away from a userspace device; stop its process instead";
                return Err(Refusal::new(Errno::EOPNOTSUPP, reason));
            }
            other => other.as_ref().map(|bytes| x25519::StaticSecret::from(**bytes)),
        };
        let (has_key, bound) = self.library.read(async |d| (d.private_key().is_some(), d.listen_port())).await;
        let mut port = set.listen_port.or(state.waiting_port.take());
        if !has_key && private_key.is_none() {
            state.waiting_port = port.take();
        }
        if let Some(mark) = set.fwmark {
            let marked = self.library.write(async |device| device.set_fwmark(mark)).await;
            marked.and_then(|inner| inner).map_err(|error| refusal("cannot set the mark of the socket", &error))?;
        }
        if private_key.is_none() && port.is_none() {
            return Ok(());
        }
        if let Some(port) = port.filter(|port| *port != 0 && *port != bound) {
            let free = try_port(port).await.map_err(gotatun::device::Error::IoError);
            free.map_err(|error| refusal(&format!("cannot use UDP port {port}"), &error))?;
        }
        let changed = self
            .library
            .write(async |device| {
                if let Some(port) = port {
                    device.set_listen_port(port);
                }
                if let Some(private_key) = private_key {
                    device.set_private_key(private_key).await;
                }
            })
            .await;
        if let Err(error) = changed {
            // The library has closed the old socket by now, and would take the same request for no change next time.
            // Going back mends both.
            let restored = self.library.write(async |device| device.set_listen_port(bound)).await;
            if restored.is_err() {
                tracing::error!(port = bound, "cannot open the former UDP socket again");
            }
            return Err(refusal("cannot open the UDP socket", &error));
        }
        Ok(())
    }

    async fn set_peer(&self, state: &mut State, change: &PeerChange, known: bool) -> Result<(), Refusal> {
        let losers = state.routing.apply(change);
        let routing = &state.routing;
        let mut peer = routing.as_peer(&change.public_key);
        let addresses_change = change.replace_allowed_ips || !change.allowed_ips.is_empty();
        let preshared_key = change.preshared_key.as_ref().map(|key| Some(**key).filter(|key| *key != [0; 32]));
        let applied = self
            .library
            .write(async |device| {
                for loser in &losers {
                    give_addresses(device, routing.as_peer(loser)).await;
                }
                if !known {
                    peer.endpoint = change.endpoint;
                    peer.keepalive = change.keepalive;
                    peer.preshared_key = preshared_key.flatten();
                    device.add_peer(peer);
                    return;
                }
                let key = peer.public_key;
                let modified = device.modify_peer(&key, |update| {
                    if let Some(preshared_key) = preshared_key {
                        update.set_preshared_key(preshared_key);
                    }
                    if let Some(endpoint) = change.endpoint {
                        update.set_endpoint(Some(endpoint));
                    }
                    if let Some(keepalive) = change.keepalive {
                        update.set_keepalive(Some(keepalive));
                    }
                    if addresses_change {
                        update.clear_allowed_ips();
                        update.add_allowed_ips(peer.allowed_ips);
                    }
                });
                modified.await;
            })
            .await;
        applied.map_err(|error| refusal("cannot change a peer", &error))
    }

    async fn remove(&self, state: &mut State, key: &PublicKey) -> Result<(), Refusal> {
        if !state.routing.remove(key) {
            return Ok(());
        }
        let key = library_key(key);
        let removed = self.library.write(async |device| device.remove_peer(&key).await).await;
        removed.map(drop).map_err(|error| refusal("cannot remove a peer", &error))
    }

    /// The device as `get` prints it, without `errno`; wiped when dropped.
    pub(super) async fn describe(&self) -> Zeroizing<String> {
        let waiting_port = self.state.lock().await.waiting_port;
        let read = self.library.read(async |device| {
            let key = device.private_key().map(|key| Zeroizing::new(key.to_bytes()));
            (key, device.listen_port(), device.fwmark(), device.peers().await)
        });
        let (key, port, mark, mut peers) = read.await;
        peers.sort_by_key(|stats| *stats.peer.public_key.as_bytes());
        // Allocated once, as growing would leave copies of the private key behind.
        let prefixes: usize = peers.iter().map(|stats| stats.peer.allowed_ips.len()).sum();
        let mut text = Zeroizing::new(String::with_capacity(256 + 512 * peers.len() + 64 * prefixes));
        if let Some(key) = key {
            write_key(&mut text, "private_key", &key);
        }
        let _ = writeln!(text, "listen_port={}", waiting_port.unwrap_or(port));
        if let Some(mark) = mark.filter(|mark| *mark != 0) {
            let _ = writeln!(text, "fwmark={mark}");
        }
        let now = SystemTime::now();
        for stats in &peers {
            describe_peer(&mut text, stats, now);
        }
        text
    }
}

fn describe_peer(text: &mut String, stats: &PeerStats, now: SystemTime) {
    let PeerStats { peer, stats, .. } = stats;
    write_key(text, "public_key", peer.public_key.as_bytes());
    write_key(text, "preshared_key", &peer.preshared_key.unwrap_or_default());
    text.push_str("protocol_version=1\n");
    if let Some(endpoint) = peer.endpoint {
        let _ = writeln!(text, "endpoint={endpoint}");
    }
    let handshake = stats.last_handshake.and_then(|ago| now.checked_sub(ago));
    let handshake = handshake.and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok()).unwrap_or_default();
    let _ = writeln!(text, "last_handshake_time_sec={}", handshake.as_secs());
    let _ = writeln!(text, "last_handshake_time_nsec={}", handshake.subsec_nanos());
    let _ = writeln!(text, "tx_bytes={}\nrx_bytes={}", stats.tx_bytes, stats.rx_bytes);
    let _ = writeln!(text, "persistent_keepalive_interval={}", peer.keepalive.unwrap_or(0));
    for prefix in &peer.allowed_ips {
        let _ = writeln!(text, "allowed_ip={prefix}");
    }
}

async fn give_addresses<T: DeviceTransports>(device: &mut DeviceWrite<'_, T>, peer: Peer) {
    let key = peer.public_key;
    let modified = device.modify_peer(&key, |update| {
        update.clear_allowed_ips();
        update.add_allowed_ips(peer.allowed_ips);
    });
    modified.await;
}

/// What the library's error means to the client.
fn refusal(what: &str, error: &gotatun::device::Error) -> Refusal {
    let errno = match error {
        gotatun::device::Error::IoError(error) | gotatun::device::Error::Bind(error, _) => error.raw_os_error(),
        _ => None,
    };
    Refusal::new(errno.map_or(Errno::EIO, Errno::from_raw), format!("{what}: {error}"))
}

/// Why there is no TUN device, and what to do about it.
fn explain(interface: &InterfaceName, error: io::Error) -> anyhow::Error {
    let node = Path::new("/dev/net/tun");
    let remedy = match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOENT | Errno::ENXIO | Errno::ENODEV) => {
            "the kernel's TUN driver or its device node is missing; load it with `modprobe tun`, and in a container mount \
             /dev/net/tun from the host"
        }
        Some(Errno::EPERM | Errno::EACCES) if nix::unistd::access(node, nix::unistd::AccessFlags::R_OK).is_err() => {
            "this process may not open /dev/net/tun; run it as root, and in a container allow the device"
        }
        Some(Errno::EPERM | Errno::EACCES) => {
            "the capability CAP_NET_ADMIN is missing in this network namespace; run as root or grant it"
        }
        Some(Errno::EBUSY | Errno::EINVAL | Errno::EEXIST) => {
            "the name is taken by another device or process; see `ip -details link show`, and remove it if nothing needs it"
        }
        _ => "see the error of the kernel",
    };
    anyhow::Error::new(error).context(format!("cannot create the TUN device {interface}: {remedy}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(byte: u8) -> PublicKey {
        PublicKey::from_bytes([byte; 32]).unwrap()
    }

    fn change(byte: u8, replace: bool, steps: &[(bool, &str)]) -> PeerChange {
        let mut text = String::from("set=1\n");
        write_key(&mut text, "public_key", &[byte; 32]);
        if replace {
            text.push_str("replace_allowed_ips=true\n");
        }
        for (add, prefix) in steps {
            let _ = writeln!(text, "allowed_ip={}{prefix}", if *add { "" } else { "-" });
        }
        match super::super::protocol::parse(&text) {
            Ok(super::super::protocol::Request::Set(mut set)) => set.peers.remove(0),
            _ => panic!("{text}"),
        }
    }

    fn prefixes(routing: &CryptokeyRouting, byte: u8) -> Vec<String> {
        routing.peers[&key(byte)].iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_prefix_has_one_owner() {
        let mut routing = CryptokeyRouting::default();
        assert!(routing.apply(&change(1, false, &[(true, "10.0.0.0/24"), (true, "fd00::/64")])).is_empty());
        assert_eq!(routing.apply(&change(2, false, &[(true, "10.0.0.0/24")])), BTreeSet::from([key(1)]));
        assert_eq!(prefixes(&routing, 1), ["fd00::/64"]);
        assert_eq!(prefixes(&routing, 2), ["10.0.0.0/24"]);
        // Taking away what another owns changes nothing.
        assert!(routing.apply(&change(1, false, &[(false, "10.0.0.0/24")])).is_empty());
        assert_eq!(routing.owners.get(&"10.0.0.0/24".parse().unwrap()), Some(&key(2)));
        assert!(routing.apply(&change(1, true, &[(true, "10.0.1.0/24")])).is_empty());
        assert_eq!(prefixes(&routing, 1), ["10.0.1.0/24"]);
        assert!(routing.remove(&key(2)) && !routing.remove(&key(2)));
        assert_eq!(routing.owners.len(), 1);
    }
}
