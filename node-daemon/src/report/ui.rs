//! `huskctl ui`

use std::net::SocketAddr;

use husk_overlay::name::NodeName;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `huskctl ui`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct UiReport {
    /// Name of the node whose page it is.
    pub node: NodeName,
    /// Where it is served: a loopback address of that node.
    pub address: SocketAddr,
    /// What a browser is given, with the key that the page asks for.
    pub url: String,
    /// The daemon runs in Kubernetes.
    pub kubernetes: bool,
}
