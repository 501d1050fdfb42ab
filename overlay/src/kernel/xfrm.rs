//! IPsec state of the kernel (xfrm): security associations and the policies that use them.
//!
//! All carry [`crate::marks::XFRM_REQID`]; in tunnel mode both belong to the xfrm interface by
//! [`crate::marks::XFRM_IF_ID`].

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::esp::{Aead, Association};
use crate::mtu::EspMode;
use crate::prefix::Prefix;

/// What makes an SA one SA: the kernel accepts no second one with the same key. The protocol is ESP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct XfrmStateKey {
    /// Underlay address of the receiver.
    pub destination: IpAddr,
    /// Security parameters index.
    pub spi: u32,
}

/// A security association.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct XfrmState {
    /// What can be read back.
    pub parameters: XfrmParameters,
    /// Whose keys it has; not read back.
    pub association: Association,
    /// It was not in the kernel when the plan was made, and may be added. One that was there and has vanished since must not
    /// come back: packets may have been protected by it. Not read back.
    pub fresh: bool,
}

/// What an SA is, apart from its key. Extended sequence numbers are always on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct XfrmParameters {
    /// Underlay address of the sender.
    pub source: IpAddr,
    /// Tunnel or transport.
    pub mode: EspMode,
    /// Interface id; 0 is none.
    pub if_id: u32,
    /// Cipher.
    pub cipher: Aead,
    /// Packets that may arrive late; a multiple of 32 (the kernel keeps a bitmap of 32-bit words).
    pub replay_window: u32,
    /// UDP ports (source, destination) of UDP encapsulation (RFC 3948), if there is any.
    pub udp: Option<(u16, u16)>,
}

/// Which packets a policy is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum XfrmDirection {
    /// To the host itself.
    In,
    /// From the host, or out of an xfrm interface.
    Out,
    /// Through the host.
    Forward,
}

/// What makes a policy one policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct XfrmPolicyKey {
    /// Direction.
    pub direction: XfrmDirection,
    /// Source addresses, of the same family as the destination's.
    pub source: Prefix,
    /// Destination addresses.
    pub destination: Prefix,
    /// UDP packets to this port only; none means all packets.
    pub udp_port: Option<u16>,
    /// Interface id; 0 is none.
    pub if_id: u32,
}

/// What becomes of the packets a policy is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct XfrmPolicy {
    /// Lower wins.
    pub priority: u32,
    /// What becomes of the packets.
    pub action: XfrmAction,
}

/// What becomes of packets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum XfrmAction {
    /// They are, or have been, protected by an SA like this.
    Protect(XfrmTemplate),
    /// They are dropped.
    Block,
}

/// Which SAs protect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct XfrmTemplate {
    /// Underlay address of the sender.
    pub source: IpAddr,
    /// Underlay address of the receiver.
    pub destination: IpAddr,
    /// Tunnel or transport.
    pub mode: EspMode,
    /// The one SA that is used; none means any between the two, which is what receiving wants during a rotation.
    pub spi: Option<u32>,
}
