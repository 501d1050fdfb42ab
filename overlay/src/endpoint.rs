//! Endpoints: attachments of pods on this node. The lease file that the plugin writes is the endpoint record.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::bandwidth::Bandwidth;
use crate::mac::MacAddress;
use crate::name::{ContainerId, InterfaceName, NetworkName};
use crate::port_mapping::PortMapping;
use crate::record::DualStack;

/// What names an attachment (CNI specification 1.1: network name, container id and interface name).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct AttachmentId {
    /// CNI network.
    pub network: NetworkName,
    /// Container (sandbox).
    pub container_id: ContainerId,
    /// Interface inside the pod.
    pub ifname: InterfaceName,
}

impl AttachmentId {
    /// Name of the host end of its veth pair.
    #[must_use]
    pub fn host_interface(&self) -> InterfaceName {
        crate::marks::pod_interface(self.network.as_str(), self.container_id.as_str(), self.ifname.as_str())
    }

    /// Ethernet address of the pod end.
    #[must_use]
    pub fn pod_mac(&self) -> MacAddress {
        self.derived_mac("pod")
    }

    /// Ethernet address of the host end.
    #[must_use]
    pub fn host_mac(&self) -> MacAddress {
        self.derived_mac("host")
    }

    fn derived_mac(&self, side: &str) -> MacAddress {
        MacAddress::derived(&["veth", side, self.network.as_str(), self.container_id.as_str(), self.ifname.as_str()])
    }
}

impl std::fmt::Display for AttachmentId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}/{}", self.network, self.container_id, self.ifname)
    }
}

/// A network namespace's identity: device and inode of its nsfs file, and the path the runtime gave.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct NetnsIdentity {
    /// Path the runtime handed over.
    pub path: String,
    /// `st_dev` of that file.
    pub device: u64,
    /// `st_ino` of that file. An inode number may be used again once the namespace is gone; the path and the host
    /// interface decide then.
    pub inode: u64,
}

/// An attachment with its addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Endpoint {
    /// Who it is.
    #[serde(flatten)]
    pub id: AttachmentId,
    /// Its addresses.
    pub addresses: DualStack,
    /// Ethernet address of the pod end.
    pub pod_mac: MacAddress,
    /// Host end of the veth pair.
    pub host_interface: InterfaceName,
    /// The pod's network namespace.
    pub netns: NetnsIdentity,
    /// Kubernetes namespace of the pod, from `CNI_ARGS`, if the runtime said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_namespace: Option<String>,
    /// Kubernetes name of the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_name: Option<String>,
    /// Kubernetes uid of the pod, which tells it from another one of its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_uid: Option<String>,
    /// Ports of the host that lead to it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub port_mappings: Vec<PortMapping>,
    /// How much it may receive and send.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Bandwidth>,
}

impl Endpoint {
    /// Kubernetes `namespace/name` if known, else the attachment's id.
    #[must_use]
    pub fn display_name(&self) -> String {
        match (&self.pod_namespace, &self.pod_name) {
            (Some(namespace), Some(name)) => format!("{namespace}/{name}"),
            _ => self.id.to_string(),
        }
    }
}

/// The endpoints of a node by id.
pub type Endpoints = BTreeMap<AttachmentId, Endpoint>;

/// The endpoint that owns an address.
#[must_use]
pub fn owner_of(endpoints: &Endpoints, address: IpAddr) -> Option<&Endpoint> {
    endpoints.values().find(|endpoint| endpoint.addresses.iter().any(|own| own == address))
}
