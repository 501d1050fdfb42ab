//! The byte ledger: the calculus written out for people, layer by layer.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{
    ESP_HEADER, ESP_TRAILER, ETHERNET_HEADER, EspMode, Layer, MtuError, Stack, UDP_HEADER, VXLAN_HEADER,
    WIREGUARD_HEADER, WIREGUARD_TAG, inner_mtu, ip_header, wireguard_padding_proof,
};
use crate::prefix::Family;

/// What some bytes of a full-sized packet are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum Component {
    /// IP header between underlay addresses.
    OuterIpHeader,
    /// UDP header.
    UdpHeader,
    /// VXLAN header.
    VxlanHeader,
    /// Ethernet header of the frame that VXLAN carries.
    InnerEthernetHeader,
    /// WireGuard type, receiver index and counter.
    WireguardHeader,
    /// WireGuard authentication tag.
    WireguardTag,
    /// ESP SPI and sequence number.
    EspHeader,
    /// ESP initialisation vector.
    EspIv,
    /// Padding in the packet. Smaller packets have some; one of full size has none.
    Padding,
    /// ESP pad length and next header.
    EspTrailer,
    /// ESP integrity check value.
    EspIcv,
    /// Not sent: too few bytes for one more cipher block.
    BlockRemainder,
}

impl fmt::Display for Component {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::OuterIpHeader => "outer IP header",
            Self::UdpHeader => "UDP header",
            Self::VxlanHeader => "VXLAN header",
            Self::InnerEthernetHeader => "inner Ethernet header",
            Self::WireguardHeader => "WireGuard header",
            Self::WireguardTag => "WireGuard tag",
            Self::EspHeader => "ESP SPI and sequence number",
            Self::EspIv => "ESP IV",
            Self::Padding => "padding",
            Self::EspTrailer => "ESP trailer",
            Self::EspIcv => "ESP ICV",
            Self::BlockRemainder => "unused: less than a cipher block",
        })
    }
}

/// One kind of bytes within a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Part {
    /// What they are.
    pub component: Component,
    /// How many.
    pub bytes: u32,
}

/// One layer of the ledger.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    /// Name of the layer.
    pub layer: String,
    /// Bytes it takes from a full-sized packet; the sum of its parts.
    pub bytes: u32,
    /// What the bytes are, in wire order. The header that ESP transport mode moves to the front counts where it was
    /// made, in the layer inside.
    pub parts: Vec<Part>,
    /// Bytes left for what is inside; none when the layer does not fit.
    pub mtu: Option<u32>,
}

/// Where the bytes of a full-sized underlay packet go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Ledger {
    /// The layers, outermost first.
    pub stack: Stack,
    /// Family of the outer headers.
    pub outer: Family,
    /// Underlay MTU in bytes.
    pub underlay_mtu: u32,
    /// A line per layer, outermost first; ends with the first layer that does not fit.
    pub entries: Vec<Entry>,
    /// Bytes left for a pod's packet; none when nothing is left.
    pub inner: Option<u32>,
    /// Only with WireGuard as the one layer: the MTU that would suit senders which pad without regard to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub padding_proof: Option<u32>,
}

impl Ledger {
    /// Bytes all layers take together; none when nothing is left for pods.
    #[must_use]
    pub fn overhead(&self) -> Option<u32> {
        Some(self.underlay_mtu - self.inner?)
    }

    /// The MTU left for pods.
    ///
    /// # Errors
    /// [`MtuError::NothingLeft`] when there is none.
    pub fn inner_mtu(&self) -> Result<u32, MtuError> {
        inner_mtu(&self.stack, self.outer, self.underlay_mtu)
    }
}

impl fmt::Display for Ledger {
    /// In a sentence: "1500 bytes - WireGuard 60 (outer IP header 20, UDP header 8, …) = 1440".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.underlay_mtu)?;
        for entry in &self.entries {
            let parts: Vec<String> =
                entry.parts.iter().filter(|part| part.bytes > 0).map(ToString::to_string).collect();
            write!(f, " - {} {} ({})", entry.layer, entry.bytes, parts.join(", "))?;
        }
        match self.inner {
            Some(inner) => write!(f, " = {inner}"),
            None => f.write_str(": nothing is left"),
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.component, self.bytes)
    }
}

/// Writes out where the bytes of a packet of `underlay_mtu` bytes go.
#[must_use]
pub fn ledger(stack: &Stack, outer: Family, underlay_mtu: u32) -> Ledger {
    let mut entries = Vec::with_capacity(stack.0.len());
    let mut mtu = Some(underlay_mtu);
    for layer in &stack.0 {
        let Some(before) = mtu else { break };
        mtu = layer.inner(outer, before);
        let parts = parts(*layer, outer, before);
        let bytes = parts.iter().map(|part| part.bytes).sum();
        entries.push(Entry { layer: layer.to_string(), bytes, parts, mtu });
    }
    let padding_proof = if stack.0 == [Layer::Wireguard] { wireguard_padding_proof(outer, underlay_mtu) } else { None };
    Ledger { stack: stack.clone(), outer, underlay_mtu, entries, inner: mtu.filter(|left| *left > 0), padding_proof }
}

/// The parts of a layer within a packet of `mtu` bytes, in wire order.
fn parts(layer: Layer, outer: Family, mtu: u32) -> Vec<Part> {
    let part = |component, bytes| Part { component, bytes };
    let ip = part(Component::OuterIpHeader, ip_header(outer));
    let udp = part(Component::UdpHeader, UDP_HEADER);
    match layer {
        Layer::Vxlan => vec![
            ip,
            udp,
            part(Component::VxlanHeader, VXLAN_HEADER),
            part(Component::InnerEthernetHeader, ETHERNET_HEADER),
        ],
        Layer::Wireguard => vec![
            ip,
            udp,
            part(Component::WireguardHeader, WIREGUARD_HEADER),
            part(Component::Padding, 0),
            part(Component::WireguardTag, WIREGUARD_TAG),
        ],
        Layer::Esp { mode, cipher, udp_encapsulation } => {
            let mut parts = Vec::with_capacity(8);
            if mode == EspMode::Tunnel {
                parts.push(ip);
            }
            if udp_encapsulation {
                parts.push(udp);
            }
            let remainder = mtu.saturating_sub(layer.fixed(outer)) % cipher.block();
            parts.extend([
                part(Component::EspHeader, ESP_HEADER),
                part(Component::EspIv, cipher.iv()),
                part(Component::Padding, 0),
                part(Component::EspTrailer, ESP_TRAILER),
                part(Component::EspIcv, cipher.icv()),
                part(Component::BlockRemainder, remainder),
            ]);
            parts
        }
    }
}
