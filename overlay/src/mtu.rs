//! The MTU calculus: how many bytes of an underlay packet are left for a pod's packet, and where the others went.
//!
//! This is the only home of overhead constants. A packet is a stack of [`Layer`]s, outermost first. Each layer takes
//! its bytes from what the layer around it left, until the pod's packet remains. All layers of a stack have outer
//! headers of one family.
//!
//! VXLAN and WireGuard cost a constant. ESP does not: it encrypts whole cipher blocks, so that its cost depends on the
//! size (AES-GCM in tunnel mode over IPv4 costs 54 bytes at 1500, 55 at 9001 and 56 at 1450). The [`Ledger`] therefore
//! holds for the underlay MTU it was made for and for no other.

mod ledger;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use ledger::{Component, Entry, Ledger, Part, ledger};

use crate::prefix::Family;

/// Smallest link MTU that IPv6 works over (RFC 8200, section 5).
pub const MINIMUM_IPV6: u32 = 1280;

/// Smallest MTU Husk accepts for IPv4: every host has to accept datagrams of this size (RFC 791, section 3.1), and
/// senders that know nothing of the path rely on it.
pub const MINIMUM_IPV4: u32 = 576;

/// Smallest MTU in bytes that a family works with.
#[must_use]
pub const fn minimum(family: Family) -> u32 {
    match family {
        Family::Ipv4 => MINIMUM_IPV4,
        Family::Ipv6 => MINIMUM_IPV6,
    }
}

/// Largest packet IPv4 can describe (RFC 791, total length) and largest interface MTU Husk accepts.
pub const MAXIMUM: u32 = 65535;

/// Largest MTU that Linux gives a route: of a larger one it makes this (net/ipv4/metrics.c `ip_metrics_convert`), for IPv6 too.
pub const LARGEST_OF_ROUTE: u32 = 65520;

/// IPv4 header without options (RFC 791).
const IPV4_HEADER: u32 = 20;
/// IPv6 header without extensions (RFC 8200).
const IPV6_HEADER: u32 = 40;
/// UDP header (RFC 768).
const UDP_HEADER: u32 = 8;
/// VXLAN header (RFC 7348, section 5).
const VXLAN_HEADER: u32 = 8;
/// Ethernet header without VLAN tag (IEEE 802.3): VXLAN carries whole frames.
const ETHERNET_HEADER: u32 = 14;
/// WireGuard transport data header: type 4, receiver index 4, counter 8 (WireGuard white paper, section 5.4.6).
const WIREGUARD_HEADER: u32 = 16;
/// Poly1305 tag (RFC 8439) at the end of a WireGuard message.
const WIREGUARD_TAG: u32 = 16;
/// WireGuard pads the plaintext to a multiple of this (`MESSAGE_PADDING_MULTIPLE`, drivers/net/wireguard/messages.h),
/// though never beyond the MTU of the packet's device (`calculate_skb_padding`, drivers/net/wireguard/send.c).
const WIREGUARD_PADDING: u32 = 16;
/// ESP header: SPI 4, sequence number 4 (RFC 4303, section 2). The upper half of an extended sequence number is not sent.
const ESP_HEADER: u32 = 8;
/// ESP trailer: pad length 1, next header 1 (RFC 4303, section 2). Encrypted with the payload.
const ESP_TRAILER: u32 = 2;

/// Cipher and authentication of an ESP layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Cipher {
    /// AES-GCM with a 16-byte ICV, any key length (RFC 4106). The salt is not sent.
    AesGcm,
    /// AES-CBC (RFC 3602) with HMAC-SHA-256-128 (RFC 4868).
    AesCbcSha256,
}

impl Cipher {
    /// Bytes of the initialisation vector in each packet.
    fn iv(self) -> u32 {
        match self {
            Self::AesGcm => 8,
            Self::AesCbcSha256 => 16,
        }
    }

    /// Bytes of the integrity check value at the packet's end.
    fn icv(self) -> u32 {
        16
    }

    /// Payload and trailer together are padded to a multiple of this. For GCM it is ESP's own alignment (RFC 4303,
    /// section 2.4), for CBC the cipher's block.
    fn block(self) -> u32 {
        match self {
            Self::AesGcm => 4,
            Self::AesCbcSha256 => 16,
        }
    }
}

impl fmt::Display for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::AesGcm => "AES-GCM",
            Self::AesCbcSha256 => "AES-CBC-SHA256",
        })
    }
}

/// What ESP wraps (RFC 4303, section 3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum EspMode {
    /// A whole packet, behind a new outer header.
    Tunnel,
    /// The payload of the packet inside, whose header becomes the outer header.
    Transport,
}

/// One layer of encapsulation or encryption.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", tag = "layer")]
pub enum Layer {
    /// VXLAN over UDP (RFC 7348).
    Vxlan,
    /// WireGuard over UDP.
    Wireguard,
    /// IPsec ESP (RFC 4303).
    Esp {
        /// What is wrapped.
        mode: EspMode,
        /// Cipher.
        cipher: Cipher,
        /// A UDP header goes before ESP, for NAT traversal (RFC 3948).
        udp_encapsulation: bool,
    },
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vxlan => f.pad("VXLAN"),
            Self::Wireguard => f.pad("WireGuard"),
            Self::Esp { mode, cipher, udp_encapsulation } => {
                let mode = match mode {
                    EspMode::Tunnel => "tunnel",
                    EspMode::Transport => "transport",
                };
                let udp = if *udp_encapsulation { " in UDP" } else { "" };
                f.pad(&format!("ESP {mode} {cipher}{udp}"))
            }
        }
    }
}

/// Layers around a pod's packet, outermost first; none means that it travels as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Stack(pub Vec<Layer>);

impl fmt::Display for Stack {
    /// Innermost first, as people say it: "VXLAN in ESP transport AES-GCM".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.pad("no encapsulation");
        }
        let names: Vec<String> = self.0.iter().rev().map(ToString::to_string).collect();
        f.pad(&names.join(" in "))
    }
}

/// Why there is no usable MTU.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MtuError {
    /// The headers alone fill the packet.
    #[error(
        "{stack} over {outer} leaves no byte of an underlay MTU of {underlay_mtu} for pods: it needs more than {overhead} bytes for itself"
    )]
    NothingLeft {
        /// The layers.
        stack: Stack,
        /// Family of the outer headers.
        outer: Family,
        /// Underlay MTU in bytes.
        underlay_mtu: u32,
        /// Bytes the layers take at least.
        overhead: u32,
    },
    /// Less than IPv6 needs on every link.
    #[error(
        "an MTU of {mtu} is left for pods, and IPv6 needs {MINIMUM_IPV6} on every link (RFC 8200, section 5): {missing} bytes are missing"
    )]
    TooSmallForIpv6 {
        /// MTU left, in bytes.
        mtu: u32,
        /// Bytes missing.
        missing: u32,
    },
    /// Less than every IPv4 host has to accept.
    #[error(
        "an MTU of {mtu} is left for pods, and IPv4 senders rely on {MINIMUM_IPV4} (RFC 791, section 3.1): {missing} bytes are missing"
    )]
    TooSmallForIpv4 {
        /// MTU left, in bytes.
        mtu: u32,
        /// Bytes missing.
        missing: u32,
    },
}

/// The largest pod packet, in bytes, whose wire form fits an underlay MTU in bytes, with `outer` as family of all outer
/// headers. The result does not depend on the family of the pod's packet; see [`check`] for the floor of each family.
///
/// # Errors
/// [`MtuError::NothingLeft`] when not even one byte remains.
pub fn inner_mtu(stack: &Stack, outer: Family, underlay_mtu: u32) -> Result<u32, MtuError> {
    stack.0.iter().try_fold(underlay_mtu, |mtu, layer| layer.inner(outer, mtu)).filter(|mtu| *mtu > 0).ok_or_else(
        || MtuError::NothingLeft {
            stack: stack.clone(),
            outer,
            underlay_mtu,
            overhead: underlay_needed(stack, outer, 1) - 1,
        },
    )
}

/// The smallest underlay MTU in bytes under which [`inner_mtu`] is at least `inner`: what a remedy tells people.
#[must_use]
pub fn underlay_needed(stack: &Stack, outer: Family, inner: u32) -> u32 {
    stack.0.iter().rev().fold(inner, |mtu, layer| layer.around(outer, mtu))
}

/// The MTU in bytes under which a WireGuard packet fits even if the sender pads to 16 without regard to its device's
/// MTU, as foreign implementations do; none when nothing is left.
#[must_use]
pub fn wireguard_padding_proof(outer: Family, underlay_mtu: u32) -> Option<u32> {
    Layer::Wireguard.inner(outer, underlay_mtu).map(|mtu| round_down(mtu, WIREGUARD_PADDING)).filter(|mtu| *mtu > 0)
}

/// Whether pods can use a family over an MTU in bytes. A result too small is a reason, never clamped: a pod that
/// believes in a larger MTU than the wire has would lose exactly its full packets.
///
/// # Errors
/// [`MtuError::TooSmallForIpv6`] below 1280, [`MtuError::TooSmallForIpv4`] below 576.
pub fn check(inner: Family, mtu: u32) -> Result<(), MtuError> {
    match inner {
        Family::Ipv6 if mtu < MINIMUM_IPV6 => Err(MtuError::TooSmallForIpv6 { mtu, missing: MINIMUM_IPV6 - mtu }),
        Family::Ipv4 if mtu < MINIMUM_IPV4 => Err(MtuError::TooSmallForIpv4 { mtu, missing: MINIMUM_IPV4 - mtu }),
        Family::Ipv4 | Family::Ipv6 => Ok(()),
    }
}

fn ip_header(family: Family) -> u32 {
    match family {
        Family::Ipv4 => IPV4_HEADER,
        Family::Ipv6 => IPV6_HEADER,
    }
}

fn round_down(bytes: u32, block: u32) -> u32 {
    bytes - bytes % block
}

impl Layer {
    /// The largest packet this layer can wrap into `mtu` bytes. For ESP in transport mode that packet has the outer
    /// header already.
    fn inner(self, outer: Family, mtu: u32) -> Option<u32> {
        let left = mtu.checked_sub(self.fixed(outer))?;
        match self {
            Self::Vxlan | Self::Wireguard => Some(left),
            Self::Esp { mode, cipher, .. } => {
                let payload = round_down(left, cipher.block()).checked_sub(ESP_TRAILER)?;
                Some(payload + self.carried_header(mode, outer))
            }
        }
    }

    /// The size of the packet this layer makes of a packet of `inner` bytes at the layer's own MTU.
    fn around(self, outer: Family, inner: u32) -> u32 {
        match self {
            Self::Vxlan | Self::Wireguard => inner.saturating_add(self.fixed(outer)),
            Self::Esp { mode, cipher, .. } => {
                let payload = inner.saturating_sub(self.carried_header(mode, outer)).saturating_add(ESP_TRAILER);
                payload.div_ceil(cipher.block()).saturating_mul(cipher.block()).saturating_add(self.fixed(outer))
            }
        }
    }

    /// Bytes that do not depend on the size; for ESP all but padding and trailer.
    fn fixed(self, outer: Family) -> u32 {
        let headers = match self {
            Self::Vxlan => UDP_HEADER + VXLAN_HEADER + ETHERNET_HEADER,
            Self::Wireguard => UDP_HEADER + WIREGUARD_HEADER + WIREGUARD_TAG,
            Self::Esp { cipher, udp_encapsulation, .. } => {
                ESP_HEADER + cipher.iv() + cipher.icv() + if udp_encapsulation { UDP_HEADER } else { 0 }
            }
        };
        ip_header(outer) + headers
    }

    /// In transport mode the inner packet's own header is the one on the wire.
    fn carried_header(self, mode: EspMode, outer: Family) -> u32 {
        match mode {
            EspMode::Tunnel => 0,
            EspMode::Transport => ip_header(outer),
        }
    }
}

#[cfg(test)]
mod tests;
