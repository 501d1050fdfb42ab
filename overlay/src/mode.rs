//! Modes: how pod packets travel between nodes, and the stack of layers each mode puts on the wire.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::mtu::{Cipher, EspMode, Layer, Stack};

/// How pod packets travel between nodes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// As they are, routed by way of the node's underlay address. Nodes share a link.
    Direct,
    /// In VXLAN, in plaintext.
    Vxlan,
    /// In WireGuard.
    #[default]
    Wireguard,
    /// In ESP tunnel mode.
    Ipsec,
    /// In VXLAN, which travels in ESP transport mode.
    VxlanIpsec,
}

impl Mode {
    /// All modes, in the order in which they are explained to people.
    pub const ALL: [Self; 5] = [Self::Direct, Self::Vxlan, Self::Wireguard, Self::Ipsec, Self::VxlanIpsec];

    /// The text form, as in the configuration.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Vxlan => "vxlan",
            Self::Wireguard => "wireguard",
            Self::Ipsec => "ipsec",
            Self::VxlanIpsec => "vxlan-ipsec",
        }
    }

    /// Pod packets are encrypted between nodes; what cannot be encrypted is dropped.
    #[must_use]
    pub fn encrypted(self) -> bool {
        match self {
            Self::Direct | Self::Vxlan => false,
            Self::Wireguard | Self::Ipsec | Self::VxlanIpsec => true,
        }
    }

    /// Pod packets travel inside packets between underlay addresses.
    #[must_use]
    pub fn tunnelled(self) -> bool {
        self != Self::Direct
    }

    /// The mode uses a VXLAN device.
    #[must_use]
    pub fn uses_vxlan(self) -> bool {
        matches!(self, Self::Vxlan | Self::VxlanIpsec)
    }

    /// The mode uses WireGuard devices.
    #[must_use]
    pub fn uses_wireguard(self) -> bool {
        self == Self::Wireguard
    }

    /// The mode uses ESP.
    #[must_use]
    pub fn uses_esp(self) -> bool {
        matches!(self, Self::Ipsec | Self::VxlanIpsec)
    }

    /// What the mode puts around a pod's packet. ESP is AES-GCM (RFC 4106), with a UDP header before it (RFC 3948) if
    /// `udp_encapsulation`; other modes have no use for that.
    #[must_use]
    pub fn stack(self, udp_encapsulation: bool) -> Stack {
        let esp = |mode| Layer::Esp { mode, cipher: Cipher::AesGcm, udp_encapsulation };
        Stack(match self {
            Self::Direct => vec![],
            Self::Vxlan => vec![Layer::Vxlan],
            Self::Wireguard => vec![Layer::Wireguard],
            Self::Ipsec => vec![esp(EspMode::Tunnel)],
            Self::VxlanIpsec => vec![esp(EspMode::Transport), Layer::Vxlan],
        })
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Why a text is not a mode.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a mode: direct, vxlan, wireguard, ipsec and vxlan-ipsec are")]
pub struct ModeError(String);

impl FromStr for Mode {
    type Err = ModeError;
    fn from_str(text: &str) -> Result<Self, ModeError> {
        Self::ALL.into_iter().find(|mode| mode.as_str() == text).ok_or_else(|| ModeError(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_serde_forms_agree_and_round_trip() {
        for mode in Mode::ALL {
            assert_eq!(mode.to_string().parse(), Ok(mode));
            assert_eq!(serde_json::to_string(&mode).unwrap(), format!("\"{mode}\""));
        }
        assert_eq!(Mode::default().to_string(), "wireguard");
        for bad in ["", "WireGuard", "ipsec ", "vxlan_ipsec"] {
            assert!(bad.parse::<Mode>().unwrap_err().to_string().contains("vxlan-ipsec"), "{bad}");
        }
    }

    #[test]
    fn a_mode_is_encrypted_exactly_when_its_stack_is() {
        for mode in Mode::ALL {
            let encrypting = |layer: &Layer| matches!(layer, Layer::Wireguard | Layer::Esp { .. });
            assert_eq!(mode.encrypted(), mode.stack(false).0.iter().any(encrypting), "{mode}");
            assert_eq!(mode.tunnelled(), !mode.stack(false).0.is_empty(), "{mode}");
            assert_eq!(mode.uses_vxlan(), mode.stack(false).0.contains(&Layer::Vxlan), "{mode}");
            assert_eq!(mode.uses_wireguard(), mode.stack(false).0.contains(&Layer::Wireguard), "{mode}");
            let esp = |layer: &Layer| matches!(layer, Layer::Esp { .. });
            assert_eq!(mode.uses_esp(), mode.stack(false).0.iter().any(esp), "{mode}");
            assert_eq!(mode.uses_esp(), mode.stack(true) != mode.stack(false), "{mode}");
        }
    }
}
