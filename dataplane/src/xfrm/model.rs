//! What is found, and what is changed.

use std::fmt;
use std::net::IpAddr;

use husk_overlay::kernel::{
    XfrmAction, XfrmDirection, XfrmParameters, XfrmPolicy, XfrmPolicyKey, XfrmState, XfrmStateKey,
};
use serde::Serialize;

/// A security association as the kernel has it. Holds no key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ActualXfrmState {
    /// What it is; none if it is set up as Husk never does, by somebody else under our request id.
    pub parameters: Option<XfrmParameters>,
    /// Underlay address of the sender.
    pub source: IpAddr,
    /// Packets so far.
    pub packets: u64,
    /// Bytes so far.
    pub bytes: u64,
    /// Packets that came with its SPI and failed its integrity check; they count nowhere else.
    pub undecryptable: u32,
}

/// A policy as the kernel has it; none if it is set up as Husk never does, by somebody else under our marks.
pub type ActualXfrmPolicy = Option<XfrmPolicy>;

/// A change to a security association. None is ever changed in place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum XfrmStateChange {
    /// Install it.
    Add {
        /// Which.
        key: XfrmStateKey,
        /// What it shall be.
        state: Box<XfrmState>,
    },
    /// Remove it.
    Remove {
        /// Which.
        key: XfrmStateKey,
    },
}

/// A change to a policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum XfrmPolicyChange {
    /// Install it. One that somebody else has made for the same packets is left alone, and this one refused.
    Add {
        /// Which.
        key: XfrmPolicyKey,
        /// What it shall be.
        policy: XfrmPolicy,
    },
    /// Put it in the place of one of ours, in one step: every packet meets either the one or the other.
    Replace {
        /// Which.
        key: XfrmPolicyKey,
        /// What it shall be.
        policy: XfrmPolicy,
    },
    /// Remove it.
    Remove {
        /// Which.
        key: XfrmPolicyKey,
    },
}

impl XfrmPolicyChange {
    /// Which policy it is about.
    #[must_use]
    pub fn key(&self) -> &XfrmPolicyKey {
        match self {
            Self::Add { key, .. } | Self::Replace { key, .. } | Self::Remove { key } => key,
        }
    }

    /// What the policy shall be; none if it goes.
    #[must_use]
    pub fn policy(&self) -> Option<&XfrmPolicy> {
        match self {
            Self::Add { policy, .. } | Self::Replace { policy, .. } => Some(policy),
            Self::Remove { .. } => None,
        }
    }
}

impl fmt::Display for XfrmStateChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Add { key, state } => {
                let from = state.parameters.source;
                write!(f, "add the association {:#010x} from {from} to {}", key.spi, key.destination)
            }
            Self::Remove { key } => write!(f, "remove the association {:#010x} to {}", key.spi, key.destination),
        }
    }
}

impl fmt::Display for XfrmPolicyChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match self {
            Self::Add { .. } => "add",
            Self::Replace { .. } => "replace",
            Self::Remove { .. } => "remove",
        };
        write!(f, "{word} {}", policy_name(self.key()))?;
        let Some(policy) = self.policy() else { return Ok(()) };
        match &policy.action {
            XfrmAction::Block => f.write_str(" that blocks"),
            XfrmAction::Protect(template) => match template.spi {
                Some(spi) => write!(f, " by the association {spi:#010x} to {}", template.destination),
                None => write!(f, " by any association from {} to {}", template.source, template.destination),
            },
        }
    }
}

/// A policy in words.
pub(super) fn policy_name(key: &XfrmPolicyKey) -> String {
    let direction = match key.direction {
        XfrmDirection::In => "in",
        XfrmDirection::Out => "out",
        XfrmDirection::Forward => "fwd",
    };
    let port = key.udp_port.map(|port| format!(" UDP port {port}")).unwrap_or_default();
    format!("the {direction} policy from {} to {}{port}", key.source, key.destination)
}
