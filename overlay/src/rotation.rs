//! Rotation of keys: what a node does with its own, and why. The same words serve both technologies: for IPsec an *epoch* is
//! the life of one node's key, for WireGuard a *generation* is the life of a device's key and is numbered alike on all
//! nodes.
//!
//! The protocol (make before break, confirmed in band, without any write per pair of nodes):
//!
//! 1. A node makes its new key receivable from every peer it is connected with, and only then publishes it.
//! 2. A peer that sees a published key makes itself able to receive under it, and only then sends with it, at once.
//! 3. The node sends with its new key to a peer once it has received from that peer under it: the peer can receive it too.
//! 4. An old key goes when all peers use the new one and nothing was received under the old one for a grace period, at the
//!    latest after its hard lifetime. A peer whose daemon is dead keeps talking under the old key until then.
//!
//! Everything is decided from what the kernel holds and counts, from what was published and from what was written down before
//! it was installed, pass after pass; what a daemon that dies on the way leaves behind is where the next one goes on.
//!
//! Why IPsec loses no packet between connected nodes, at any interleaving of daemons, records and packets. A packet needs a
//! pair of epochs: one of its sender and one of its receiver.
//!
//! - The receiver's epoch was published, and before it was, the node could receive under it whatever the sender had
//!   published.
//!   What was published is never taken back ([`crate::facts::EspFacts::published`]): some peer may know it.
//! - The sender's epoch is one the receiver has used itself. It does so only when it can receive under it, with each own
//!   epoch
//!   that the sender may choose: those from the newest on that was heard from the sender, which never goes back.
//! - Neither direction ever goes back to an older epoch of the other node: it may be gone. An association for sending that is
//!   installed proves what was known when it was made, so that this needs no memory.
//! - An old epoch is destroyed when to each peer an association under a newer one has been there, and is named, for the grace
//!   period: the peer has used the newer one, so both have stopped using the old one, and what was under way has arrived.
//!   *The grace period has to be longer than the longest time a packet is under way.* That nothing was sent or received under
//!   the old epoch meanwhile covers daemons that hang between two steps of a pass.
//! - The kernel is read at the start of a pass; a policy names an association that was there then; one that has vanished
//!   since is
//!   not made anew ([`crate::kernel::XfrmState::fresh`]).
//!
//! Associations whose SPI is taken (1 of 2^32 per pair of them) are left out until a new epoch brings other SPIs: an epoch
//! that is not published yet is replaced; a new peer gets no association under older epochs if there is none under the
//! newest, since it would move there. Two nodes that rotate at once, each of which lacks the SPI to receive the other's new
//! epoch under its own old one, wait for each other until the hard lifetime ends it; that is the one way to it with all
//! daemons alive.
//!
//! `overlay/tests/rotation` simulates all of this; `overlay/src/plan/esp` is the code.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::esp::AssociationId;
use crate::facts::SpentAssociation;
use crate::name::NodeName;

/// Why a node makes a new key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum Cause {
    /// It has none.
    First,
    /// The one it has is old.
    Age,
    /// The one it has has protected much.
    Volume,
    /// Somebody asked.
    Request,
    /// An association that was installed is gone, and is never made again under the same keys.
    Lost,
    /// Two associations towards this node have one SPI.
    Collision,
    /// Other nodes have begun a generation.
    Cluster,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::First => "the node has no key",
            Self::Age => "the key is old enough",
            Self::Volume => "the key has protected enough",
            Self::Request => "asked for",
            Self::Lost => "an association under the key was removed",
            Self::Collision => "two associations have one SPI",
            Self::Cluster => "other nodes have begun",
        })
    }
}

/// What to do with the own keys before the next pass: after the record was published, in the order of the list, then pass
/// again at once; and, but for the first key, only when the source has delivered the whole cluster. A plan that was not carried out to its end needs no repair: the next one asks for what is still to be
/// done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum KeyAction {
    /// Make a key for this epoch.
    Begin {
        /// Its number.
        epoch: u64,
        /// Why.
        cause: Cause,
    },
    /// Destroy the key of this epoch, and what was written down of its associations. The plan asks for it when no peer has a use
    /// for the epoch any more, whether or not it still stands in the record.
    Retire {
        /// Its number.
        epoch: u64,
    },
}

/// The own keys, as `huskctl keys status` shows them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Rotation {
    /// What to do before the next pass.
    pub actions: Vec<KeyAction>,
    /// Epochs the node can receive under and has published, or may publish now. For IPsec it has to be written down before
    /// the record goes out, with the time for those that are new: [`crate::facts::EspFacts::published`].
    pub published: BTreeSet<u64>,
    /// What has to be written down before xfrm is changed, in place of what was written down of the same association:
    /// [`crate::facts::EspFacts::spent`]. Only what is new, and what has ended before everything else.
    pub spend: BTreeMap<AssociationId, SpentAssociation>,
    /// Peers that have not confirmed an epoch yet, by epoch. A rotation is over when the newest epoch is the only one.
    pub unconfirmed: BTreeMap<u64, BTreeSet<NodeName>>,
    /// Why a requested rotation has to wait, if it has to.
    pub waiting: Option<String>,
}

/// The keys in use between this node and a peer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PeerKeys {
    /// Own epoch packets to the peer are sent with; none while nothing can be sent.
    pub own: Option<u64>,
    /// The peer's epoch they are sent with; for WireGuard the same generation.
    pub peer: Option<u64>,
    /// Newest own epoch that the peer is known to send with.
    pub confirmed: Option<u64>,
}
