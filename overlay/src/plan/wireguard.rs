//! Mode `wireguard`: a device holds all peers; a peer's allowed-ips are its blocks, so that the device itself drops whatever
//! a peer sends from addresses that are not its own.
//!
//! # Generations
//!
//! Allowed-ips are unique within a device, so one device cannot accept a peer's old and new key at once. A rotation is
//! therefore a *generation* of the whole cluster: generation g lives in the device of slot g mod 2, each node has a fresh key
//! in it, and each device is a full mesh of the nodes that publish the generation. For node and peer alike:
//!
//! 1. *Begin.* A node begins generation g + 1 when its key is old or somebody asks, and when nobody it shares g with
//!    publishes
//!    anything but g. A node that sees a higher generation than its own follows. The device is configured before the record
//!    is published.
//! 2. *Move.* In a generation that two nodes have begun and that has no session yet, they have a keepalive, which makes their
//!    devices start a handshake without any traffic. The route to a peer leads into the newest generation common to both
//!    whose handshake is done; what comes in either device is accepted, so that nobody has to move at the same time.
//! 3. *Withdraw.* When all peers that publish the old generation are reached in the newer one, and the old device was quiet
//!    in
//!    both directions for the grace period, the node publishes the newer generation only. It still receives in the old one.
//!    A node that has withdrawn sends nothing in the old generation any more, so that peers take its key out of their device.
//!    The others, who had moved, withdraw when they read this; those who had not move at once, but withdraw only when what they
//!    sent last must have arrived. Until then the key that is published no more stays in their old device, without any
//!    allowed-ips, so that its counters tell how long nothing was sent.
//! 4. *Retire.* When no peer publishes the old generation any more, nobody sends in it, and key and device go.
//!
//! Withdrawing and retiring are two steps, because "quiet" looks back only: a peer may begin to send in the moment the device
//! goes. What peers publish looks ahead: who has withdrawn will not.
//!
//! A peer whose daemon is dead publishes the old generation only. It is reached in the old device, which everybody keeps,
//! until the newer key is [`hard_lifetime`](crate::config::RotationConfig::hard_lifetime) old: then nodes withdraw all the
//! same, and retire a grace period later. From then on they share no generation with that peer, and the next rotation does
//! not wait for it; nor for one that died in between and publishes both. When it comes back it follows: into the other slot,
//! in place of a generation nobody else publishes, or, where both slots are in use by others, by beginning one more
//! generation in the slot that falls free first.
//!
//! A node that lost its keys (a reboot) or never had any begins the newest generation only: nobody can reach it in an
//! older one anyway. Sessions are known by the peer's public key, so that those of its former key say nothing of the new.
//!
//! # What the engine owes
//!
//! All is decided from facts and snapshot, without memory, pass after pass. For that the engine fills in, at the start of
//! every pass:
//!
//! - `wireguard_epochs`: every generation whose private key the node holds, also one that is withdrawn; at most two, of
//!   different parity, not necessarily consecutive. `created` is the time since boot at which the key was made.
//! - `sessions`: an entry for every peer in either device, whether or not its key is still published. `handshaken` says that
//!   *this node may send*: the session is known to be complete on both sides. For the kernel this is a last handshake other
//!   than zero (the initiator sets it with the response, the responder with the first packet it can decrypt:
//!   `wg_timers_handshake_complete`). The userspace device shows a last handshake as soon as it has answered an initiation, and
//!   sends under a session whose answer may be lost: there, bytes must have been received that are no multiple of an
//!   initiation's 148. Once true it stays true as long as the peer is in the device with the device's key; userspace devices
//!   forget their sessions.
//!   `quiet` is for how long the peer's counters of received and sent bytes have both not changed; it starts at zero when the
//!   daemon starts.
//! - `rotation_requested` until a `Begin` was executed, whatever its cause; `uptime`.
//!
//! After reconciliation and after publishing it executes the actions of [`Rotation`], in order, unless the source has not yet
//! delivered the whole cluster, and passes again at once. As long as `unconfirmed` names a peer, or a route has just moved,
//! it sends packets to that peer's router address: they and their answers are the data that completes a handshake at the
//! responder. A userspace device gives up a handshake after 90 seconds, keepalive or not; from then on it is the peer's turn
//! to begin one.

mod devices;
mod generations;
mod offers;

use std::collections::BTreeMap;

use super::Context;
use super::peers::Peer;
use crate::config::WireguardChoice;
use crate::facts::WireguardSupport;
use crate::issue::{Issue, IssueKind, Severity};
use crate::kernel::Desired;
use crate::name::NodeName;
use crate::rotation::Rotation;
use generations::Generations;

/// Renders the devices of all generations held, with peers and routes, and says what to do with the keys.
pub(super) fn render(
    context: &Context<'_>,
    peers: &mut BTreeMap<NodeName, Peer>,
    desired: &mut Desired,
    issues: &mut Vec<Issue>,
) -> Rotation {
    let device = device_choice(context, issues);
    let (Some(userspace), Some(mtu)) = (device, context.inner_mtu) else {
        // Without a device there is nothing to rotate; the keys stay as they are.
        return Rotation { published: context.facts.wireguard_epochs.keys().copied().collect(), ..Rotation::default() };
    };
    let offers = offers::believe(context, peers, issues);
    let generations = Generations::new(context, &offers);
    if !context.facts.wireguard_epochs.is_empty() {
        let devices = devices::Devices { context, generations: &generations, userspace, mtu };
        devices.render(peers, desired, issues);
    }
    generations.rotation()
}

/// Whether the device is a userspace one; none, with an issue, if none can be had. There is no plaintext in its place.
fn device_choice(context: &Context<'_>, issues: &mut Vec<Issue>) -> Option<bool> {
    let mut blocked = |message: String, remedy: &str| {
        issues.push(Issue {
            severity: Severity::Blocking,
            kind: IssueKind::EncapsulationUnavailable,
            subject: "mode wireguard".into(),
            message,
            remedy: remedy.to_owned(),
        });
        None
    };
    match (context.config.wireguard.device, &context.facts.wireguard) {
        (WireguardChoice::Userspace, _) | (WireguardChoice::Auto, Some(WireguardSupport::Userspace)) => Some(true),
        (WireguardChoice::Kernel | WireguardChoice::Auto, Some(WireguardSupport::Kernel)) => Some(false),
        (WireguardChoice::Kernel, _) => blocked(
            "the kernel has no WireGuard, and wireguard.device is kernel".into(),
            "load the module wireguard, or set wireguard.device to auto",
        ),
        (WireguardChoice::Auto, Some(WireguardSupport::Unavailable { reason })) => blocked(
            format!("no WireGuard device can be had: {reason}"),
            "load the module wireguard or provide /dev/net/tun",
        ),
        (WireguardChoice::Auto, None) => {
            blocked("it is not known yet how WireGuard can be had".into(), "wait for the daemon's next pass")
        }
    }
}

#[cfg(test)]
mod tests;
