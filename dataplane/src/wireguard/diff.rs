//! What has to change so that a device is configured as desired. Pure; the order of the result is the order to apply it in.
//!
//! A peer that roams is followed: while there is a session, its endpoint is where an authenticated packet came from last, and
//! setting it back to what is desired would cut the peer off until it sends again, pass after pass. Without a session the
//! desired endpoint is where to look for it. Whoever knows better, for example that the peer has published another address,
//! says so with [`set_endpoint`].

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use husk_overlay::kernel::{WireguardDevice, WireguardPeer};
use husk_overlay::keys::PublicKey;
use husk_overlay::name::InterfaceName;
use husk_overlay::prefix::Prefix;
use serde::Serialize;

use super::{WireguardPeerStatus, WireguardState};

/// How long a session is good for after its handshake: `REJECT_AFTER_TIME` of the WireGuard paper, section 6.1, and of
/// drivers/net/wireguard/messages.h.
const REJECT_AFTER_TIME: Duration = Duration::from_secs(180);

/// One change to a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct WireguardChange {
    /// The device.
    pub interface: InterfaceName,
    /// A process behind a TUN device is told, not the kernel.
    pub userspace: bool,
    /// What changes.
    #[serde(flatten)]
    pub action: WireguardAction,
}

/// What changes of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", tag = "change")]
pub enum WireguardAction {
    /// The device gets the private key that belongs to this public key. All its sessions end.
    SetPrivateKey {
        /// Public half.
        public_key: PublicKey,
    },
    /// The device listens elsewhere.
    SetListenPort {
        /// UDP port.
        listen_port: u16,
    },
    /// An outsider's firewall mark goes.
    ClearFirewallMark,
    /// A peer is missing.
    AddPeer {
        /// Its public key.
        public_key: PublicKey,
        /// Its configuration.
        peer: WireguardPeer,
    },
    /// A peer is configured differently.
    UpdatePeer {
        /// Its public key.
        public_key: PublicKey,
        /// What differs.
        update: PeerUpdate,
    },
    /// A peer is too many.
    RemovePeer {
        /// Its public key.
        public_key: PublicKey,
    },
}

/// What changes of a peer; what is none stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PeerUpdate {
    /// Where to send.
    pub endpoint: Option<SocketAddr>,
    /// Persistent keepalive in seconds; 0 is off.
    pub keepalive: Option<u16>,
    /// An outsider's preshared key goes.
    pub clear_preshared_key: bool,
    /// Allowed-ips.
    pub allowed_ips: Option<AllowedIpsUpdate>,
}

/// What changes of a peer's allowed-ips.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AllowedIpsUpdate {
    /// Prefixes it gets, if need be from another peer.
    pub add: BTreeSet<Prefix>,
    /// Prefixes that nobody shall have any more.
    pub remove: BTreeSet<Prefix>,
    /// Prefixes that go to another peer, which takes them by getting them.
    pub moved: BTreeSet<Prefix>,
    /// All that it has in the end.
    pub result: BTreeSet<Prefix>,
}

/// The change that lets a device send to a peer at another endpoint, whatever the peer's session says.
#[must_use]
pub fn set_endpoint(
    interface: &InterfaceName,
    userspace: bool,
    public_key: PublicKey,
    endpoint: SocketAddr,
) -> WireguardChange {
    let update = PeerUpdate { endpoint: Some(endpoint), ..PeerUpdate::default() };
    let action = WireguardAction::UpdatePeer { public_key, update };
    WireguardChange { interface: interface.clone(), userspace, action }
}

/// What has to change from `actual` to `desired`; a device that is missing is like one without configuration.
#[must_use]
pub fn diff(
    interface: &InterfaceName,
    desired: &WireguardDevice,
    actual: Option<&WireguardState>,
) -> Vec<WireguardChange> {
    let nothing = WireguardState::default();
    let actual = actual.unwrap_or(&nothing);
    let mut actions = Vec::new();
    if actual.public_key != Some(desired.public_key) {
        actions.push(WireguardAction::SetPrivateKey { public_key: desired.public_key });
    }
    if actual.listen_port != desired.listen_port {
        actions.push(WireguardAction::SetListenPort { listen_port: desired.listen_port });
    }
    if actual.firewall_mark != 0 {
        actions.push(WireguardAction::ClearFirewallMark);
    }
    actions.extend(peer_actions(&desired.peers, actual));
    let change = |action| WireguardChange { interface: interface.clone(), userspace: desired.userspace, action };
    actions.into_iter().map(change).collect()
}

fn peer_actions(desired: &BTreeMap<PublicKey, WireguardPeer>, actual: &WireguardState) -> Vec<WireguardAction> {
    let owned: BTreeSet<&Prefix> = desired.values().flat_map(|peer| &peer.allowed_ips).collect();
    // Who gets comes before who loses, and who goes is last: a prefix has an owner all the time.
    let (mut gaining, mut losing) = (Vec::new(), Vec::new());
    for (key, peer) in desired {
        let Some(present) = actual.peers.get(key) else {
            gaining.push(WireguardAction::AddPeer { public_key: *key, peer: peer.clone() });
            continue;
        };
        let mut update = peer_update(peer, present, actual.preshared.contains(key), &owned);
        if actual.status.get(key).is_some_and(|status| has_session(status, actual.read_at)) {
            update.endpoint = None;
        }
        if update == PeerUpdate::default() {
            continue;
        }
        let loses = update.allowed_ips.as_ref().is_some_and(|it| !it.remove.is_empty() || !it.moved.is_empty());
        let action = WireguardAction::UpdatePeer { public_key: *key, update };
        if loses { losing.push(action) } else { gaining.push(action) }
    }
    let gone = actual.peers.keys().filter(|key| !desired.contains_key(*key));
    let gone = gone.map(|key| WireguardAction::RemovePeer { public_key: *key });
    gaining.into_iter().chain(losing).chain(gone).collect()
}

/// True if the last handshake is young enough for its session to be in use. A handshake that seems to lie far in the future
/// was made before the clock was set back: nothing is known of its age.
fn has_session(status: &WireguardPeerStatus, now: Duration) -> bool {
    status.last_handshake.is_some_and(|handshake| handshake.abs_diff(now) < REJECT_AFTER_TIME)
}

fn peer_update(
    desired: &WireguardPeer,
    actual: &WireguardPeer,
    preshared: bool,
    owned: &BTreeSet<&Prefix>,
) -> PeerUpdate {
    let lost = || actual.allowed_ips.difference(&desired.allowed_ips);
    let allowed_ips = (desired.allowed_ips != actual.allowed_ips).then(|| AllowedIpsUpdate {
        add: desired.allowed_ips.difference(&actual.allowed_ips).copied().collect(),
        remove: lost().filter(|prefix| !owned.contains(prefix)).copied().collect(),
        moved: lost().filter(|prefix| owned.contains(prefix)).copied().collect(),
        result: desired.allowed_ips.clone(),
    });
    PeerUpdate {
        // A peer without a desired endpoint may be wherever it says it is.
        endpoint: desired.endpoint.filter(|endpoint| actual.endpoint != Some(*endpoint)),
        keepalive: (desired.keepalive != actual.keepalive).then_some(desired.keepalive),
        clear_preshared_key: preshared,
        allowed_ips,
    }
}

impl fmt::Display for WireguardChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "wireguard device {}: {}", self.interface, self.action)
    }
}

impl fmt::Display for WireguardAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SetPrivateKey { public_key } => write!(f, "set the private key of public key {public_key}"),
            Self::SetListenPort { listen_port } => write!(f, "listen on UDP port {listen_port}"),
            Self::ClearFirewallMark => f.write_str("clear the firewall mark"),
            Self::AddPeer { public_key, peer } => {
                write!(f, "add peer {public_key}")?;
                if let Some(endpoint) = peer.endpoint {
                    write!(f, " at {endpoint}")?;
                }
                write!(f, " for {}", Prefixes(&peer.allowed_ips))
            }
            Self::UpdatePeer { public_key, update } => write!(f, "peer {public_key}: {update}"),
            Self::RemovePeer { public_key } => write!(f, "remove peer {public_key}"),
        }
    }
}

impl fmt::Display for PeerUpdate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if let Some(endpoint) = self.endpoint {
            parts.push(format!("send to {endpoint}"));
        }
        match self.keepalive {
            Some(0) => parts.push("no keepalive".to_owned()),
            Some(seconds) => parts.push(format!("keepalive every {seconds} s")),
            None => {}
        }
        if self.clear_preshared_key {
            parts.push("remove a preshared key".to_owned());
        }
        if let Some(update) = &self.allowed_ips {
            for (verb, prefixes) in
                [("allow", &update.add), ("no longer allow", &update.remove), ("leave to another peer", &update.moved)]
            {
                if !prefixes.is_empty() {
                    parts.push(format!("{verb} {}", Prefixes(prefixes)));
                }
            }
        }
        f.write_str(&parts.join("; "))
    }
}

/// Up to four prefixes by name, more by number.
struct Prefixes<'a>(&'a BTreeSet<Prefix>);

impl fmt::Display for Prefixes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.len() {
            0 => f.write_str("no prefixes"),
            1..=4 => f.write_str(&self.0.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")),
            many => write!(f, "{many} prefixes"),
        }
    }
}

#[cfg(test)]
#[path = "diff_tests.rs"]
mod tests;
