//! `huskctl mtu probe`: what the path to a peer really carries.

use std::time::Duration;

use husk_overlay::name::NodeName;
use husk_overlay::probe::{Path, Report};
use serde::{Deserialize, Serialize};

/// A path, and what probing found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct PathReport {
    /// The path.
    #[serde(flatten)]
    pub path: Path,
    /// What was found.
    #[serde(flatten)]
    pub report: Report,
}

/// A path is being probed because somebody asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProbeStarted {
    /// To whom.
    pub peer: NodeName,
    /// When it began, as time since boot: what was concluded later is the answer.
    pub begun: Duration,
}
