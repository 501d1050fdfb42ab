//! WireGuard devices: key, port, peers and their allowed-ips.
//!
//! A device is one of two things that are told the same: a device of the kernel, over generic netlink (`kernel`), or a
//! TUN device with a process behind it, over the cross-platform control socket (`userspace`).
//!
//! Changes are incremental, since whatever is replaced as a whole is missing for a moment. What is added is added before
//! anything is removed: a prefix that moves from one peer to another is simply given to the new one, which takes it from
//! the old in one step, in the kernel as in the bundled userspace device. So at no moment does a peer that is to stay lack
//! a prefix that is to stay with it, and the key and sessions of a peer are touched only when the peer itself goes.

mod diff;
mod kernel;
mod model;
mod userspace;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use husk_overlay::esp::{self, Association, EspKey, PresharedKey};
use husk_overlay::kernel::{WireguardDevice, WireguardPeer};
use husk_overlay::keys::{KeyError, PrivateKey, PublicKey};
use husk_overlay::name::InterfaceName;
use serde::Serialize;

pub use diff::{AllowedIpsUpdate, PeerUpdate, WireguardAction, WireguardChange, diff, set_endpoint};

use crate::error::Error;

/// The private keys of this node by public key, those of WireGuard devices and of ESP epochs, and the cluster's preshared key
/// if it has one. Deliberately without `Debug`.
#[derive(Default)]
pub struct KeyRing {
    private: BTreeMap<PublicKey, PrivateKey>,
    preshared: Option<PresharedKey>,
}

impl KeyRing {
    /// Puts a key in.
    pub fn insert(&mut self, key: PrivateKey) {
        self.private.insert(key.public(), key);
    }

    /// The private key that belongs to a public one.
    #[must_use]
    pub fn get(&self, public_key: &PublicKey) -> Option<&PrivateKey> {
        self.private.get(public_key)
    }

    /// Adds the secret that is mixed into the keys of ESP associations.
    #[must_use]
    pub fn with_preshared(self, preshared: PresharedKey) -> Self {
        Self { preshared: Some(preshared), ..self }
    }

    /// The key of an ESP association one of whose ends this node is; none if the private key of neither end is in here.
    ///
    /// # Errors
    /// Those of [`husk_overlay::esp::derive`].
    pub fn esp_key(&self, association: &Association) -> Option<Result<EspKey, KeyError>> {
        let ends = [&association.sender, &association.receiver];
        let own = ends.into_iter().find_map(|end| self.get(&end.public_key))?;
        Some(esp::derive(association, own, self.preshared.as_ref()))
    }
}

impl FromIterator<PrivateKey> for KeyRing {
    fn from_iter<I: IntoIterator<Item = PrivateKey>>(keys: I) -> Self {
        let mut ring = Self::default();
        keys.into_iter().for_each(|key| ring.insert(key));
        ring
    }
}

/// What a device is configured to, and what its peers are doing. Holds no secret.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct WireguardState {
    /// When it was read, as time since the Unix epoch: what the times of handshakes are compared with.
    pub read_at: Duration,
    /// Public half of the device's key; none when it has no key yet.
    pub public_key: Option<PublicKey>,
    /// UDP port it listens on; 0 when it has none yet.
    pub listen_port: u16,
    /// Firewall mark of the packets it sends; 0 is none, which is what Husk wants.
    pub firewall_mark: u32,
    /// Configuration of the peers.
    pub peers: BTreeMap<PublicKey, WireguardPeer>,
    /// Peers that have a preshared key, which Husk never sets.
    pub preshared: BTreeSet<PublicKey>,
    /// What the peers are doing.
    pub status: BTreeMap<PublicKey, WireguardPeerStatus>,
}

impl WireguardState {
    /// The configuration as the desired state has it; none while the device has no key.
    #[must_use]
    pub fn device(&self, userspace: bool) -> Option<WireguardDevice> {
        let public_key = self.public_key?;
        Some(WireguardDevice { userspace, public_key, listen_port: self.listen_port, peers: self.peers.clone() })
    }
}

/// What a peer is doing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct WireguardPeerStatus {
    /// When the last handshake was completed, as time since the Unix epoch; none when there was none yet.
    pub last_handshake: Option<Duration>,
    /// Bytes received from the peer, WireGuard's overhead included.
    pub received_bytes: u64,
    /// Bytes sent to the peer, WireGuard's overhead included.
    pub sent_bytes: u64,
    /// Where the peer was last heard from, or is configured to be.
    pub endpoint: Option<SocketAddr>,
}

/// Access to the WireGuard devices of one network namespace.
pub struct Wireguard {
    kernel: kernel::KernelDevices,
    userspace: userspace::UserspaceDevices,
}

impl Wireguard {
    /// Access to the devices of the calling thread's network namespace. Control sockets of userspace devices are looked for
    /// in `socket_directory`, usually [`husk_overlay::marks::WIREGUARD_SOCKET_DIRECTORY`].
    ///
    /// # Errors
    /// [`Error::Socket`] when no netlink socket can be had.
    pub fn open(socket_directory: &Path) -> Result<Self, Error> {
        Ok(Self {
            kernel: kernel::KernelDevices::open()?,
            userspace: userspace::UserspaceDevices::new(socket_directory),
        })
    }

    /// Whether the kernel has WireGuard. Asking makes it load the module.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the reason when it has not; the errors of a broken exchange.
    pub fn kernel_support(&mut self) -> Result<(), Error> {
        self.kernel.family().map(drop)
    }

    /// Reads a device; none when there is no such device, or no process behind it.
    ///
    /// # Errors
    /// [`Error::Refused`] when the interface is something else, [`Error::Malformed`] when the answer is not understood, and
    /// the errors of a broken exchange.
    pub fn read(&mut self, interface: &InterfaceName, userspace: bool) -> Result<Option<WireguardState>, Error> {
        let state = if userspace { self.userspace.read(interface) } else { self.kernel.read(interface) }?;
        // The one place where this crate asks for the time of day. One that stands before the epoch has no handshakes to
        // compare with.
        let read_at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(state.map(|state| WireguardState { read_at, ..state }))
    }

    /// Makes the changes in order; one result for each. A failed change does not stop the others.
    pub fn apply(&mut self, changes: &[WireguardChange], keys: &KeyRing) -> Vec<Result<(), Error>> {
        let mut results = Vec::with_capacity(changes.len());
        for group in changes.chunk_by(|one, next| one.interface == next.interface && one.userspace == next.userspace) {
            let (interface, userspace) = (&group[0].interface, group[0].userspace);
            let actions: Vec<&WireguardAction> = group.iter().map(|change| &change.action).collect();
            results.extend(if userspace {
                self.userspace.apply(interface, &actions, keys)
            } else {
                self.kernel.apply(interface, &actions, keys)
            });
        }
        results
    }
}

/// A peer that only its key is known of yet.
fn unconfigured() -> WireguardPeer {
    WireguardPeer { endpoint: None, allowed_ips: BTreeSet::new(), keepalive: 0 }
}

/// The private key that an action needs.
fn private_key<'a>(
    keys: &'a KeyRing,
    public_key: &PublicKey,
    interface: &InterfaceName,
) -> Result<&'a PrivateKey, Error> {
    keys.get(public_key).ok_or_else(|| Error::NoPrivateKey { interface: interface.to_string() })
}
