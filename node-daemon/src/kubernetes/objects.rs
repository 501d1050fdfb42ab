//! The kinds of the group `husk.dev` as Kubernetes needs them described, and what is kept of objects that arrive.
//!
//! Objects are read by [`husk_overlay::manifest`], as strictly as those of a directory: one that makes no sense is an Issue and
//! hides no other. So the types here only describe; nothing is read into them.

#![expect(clippy::duplicated_attributes, reason = "every printer column has the same keys")]

use husk_overlay::manifest::Manifest;
use husk_overlay::prefix::Prefix;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, ObjectMeta};
use kube::core::DynamicObject;
use kube::{CustomResource, CustomResourceExt as _, Resource};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a CIDR looks like. The reader knows better; this keeps typing errors out.
const CIDR: &str = "^[0-9a-fA-F.:]+/[0-9]{1,3}$";

/// What an X25519 public key looks like: 32 bytes in base64 (RFC 4648).
const PUBLIC_KEY: &str = "^[A-Za-z0-9+/]{43}=$";

/// What a node publishes of itself. Written by the node's daemon, which undoes what others change.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, CustomResource)]
#[kube(
    group = "husk.dev",
    version = "v1alpha1",
    kind = "OverlayNode",
    plural = "overlaynodes",
    shortname = "onode",
    category = "husk",
    status = "OverlayNodeStatus",
    doc = "What a node of the overlay publishes of itself: addresses, blocks, MTU and public keys. Written by the node's daemon.",
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type=='Ready')].status"),
    printcolumn(name = "Address", type_ = "string", json_path = ".spec.addresses.ipv4"),
    printcolumn(name = "Blocks", type_ = "string", json_path = ".spec.blocks"),
    printcolumn(name = "MTU", type_ = "integer", json_path = ".spec.underlayMtu"),
    printcolumn(name = "Issues", type_ = "integer", json_path = ".status.issues"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "IPv6", type_ = "string", json_path = ".spec.addresses.ipv6", priority = "1"),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type=='Ready')].message",
        priority = "1"
    )
)]
#[serde(rename_all = "camelCase")]
pub struct OverlayNodeSpec {
    /// What tells this host from another one that uses the same node name.
    #[schemars(regex(pattern = "^[0-9a-f]{16,64}$"))]
    pub instance: String,
    /// Underlay addresses.
    pub addresses: Addresses,
    /// MTU in bytes of the underlay interface.
    #[schemars(range(min = 1, max = 65535))]
    pub underlay_mtu: i32,
    /// CIDRs of the blocks whose addresses the node's pods have.
    #[schemars(inner(regex(pattern = CIDR)))]
    pub blocks: Vec<String>,
    /// The node's own addresses inside the overlay.
    pub router: Addresses,
    /// Ethernet address of the VXLAN device.
    #[schemars(regex(pattern = "^([0-9a-f]{2}:){5}[0-9a-f]{2}$"))]
    pub vxlan_mac: Option<String>,
    /// WireGuard devices: two while keys are being replaced.
    #[schemars(length(max = 2))]
    pub wireguard: Option<Vec<Wireguard>>,
    /// What peers need for ESP.
    pub esp: Option<Esp>,
}

/// At most one address per family.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Addresses {
    /// IPv4 address.
    #[schemars(regex(pattern = r"^[0-9]+\.[0-9]+\.[0-9]+\.[0-9]+$"))]
    pub ipv4: Option<String>,
    /// IPv6 address.
    #[schemars(regex(pattern = "^[0-9a-fA-F:.]+$"))]
    pub ipv6: Option<String>,
}

/// A WireGuard device.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Wireguard {
    /// Which of the node's two devices.
    #[schemars(range(min = 0, max = 1))]
    pub slot: i32,
    /// Rotation generation of the key.
    #[schemars(range(min = 0))]
    pub generation: i64,
    /// UDP port.
    #[schemars(range(min = 1, max = 65535))]
    pub port: i32,
    /// Public key in base64.
    #[schemars(regex(pattern = PUBLIC_KEY))]
    pub public_key: String,
}

/// What peers need for ESP.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Esp {
    /// Cipher.
    #[schemars(regex(pattern = "^aes-gcm-(128|256)$"))]
    pub cipher: String,
    /// UDP port of UDP encapsulation.
    #[schemars(range(min = 1, max = 65535))]
    pub udp_port: Option<i32>,
    /// Epochs the node can receive under, oldest first.
    #[schemars(length(max = 2))]
    pub epochs: Vec<Epoch>,
}

/// The life of one key.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Epoch {
    /// Number; higher is newer.
    #[schemars(range(min = 0))]
    pub epoch: i64,
    /// Public key in base64.
    #[schemars(regex(pattern = PUBLIC_KEY))]
    pub public_key: String,
    /// What the SPIs of associations towards the node are made with.
    #[schemars(range(min = 0))]
    pub spi_salt: i64,
}

/// How a node is, as its daemon says.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OverlayNodeStatus {
    /// `Ready`: pods can be added to the node.
    #[serde(default)]
    pub conditions: Vec<Condition>,
    /// Number of open issues; `huskctl status` on the node and the Events of the `Node` object tell which.
    pub issues: Option<i32>,
    /// MTU in bytes of the interfaces of pods.
    pub pod_mtu: Option<i32>,
    /// Version of the daemon.
    pub version: Option<String>,
}

/// An address pool: what blocks are cut from. Made by people; with `ipam.blocks: pools`. Without any, every cluster CIDR is a pool.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, CustomResource)]
#[kube(
    group = "husk.dev",
    version = "v1alpha1",
    kind = "AddressPool",
    plural = "addresspools",
    shortname = "apool",
    category = "husk",
    status = "AddressPoolStatus",
    doc = "Addresses that the blocks of nodes are cut from. Made by people; without any, every cluster CIDR is a pool.",
    printcolumn(name = "CIDR", type_ = "string", json_path = ".spec.cidr"),
    printcolumn(name = "Block", type_ = "integer", json_path = ".spec.blockLength"),
    printcolumn(name = "Disabled", type_ = "boolean", json_path = ".spec.disabled"),
    printcolumn(name = "Usable", type_ = "string", json_path = ".status.conditions[?(@.type=='Usable')].status"),
    printcolumn(name = "Used", type_ = "string", json_path = ".status.used"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct AddressPoolSpec {
    /// All addresses of the pool; within the cluster CIDRs.
    #[schemars(regex(pattern = CIDR))]
    pub cidr: String,
    /// Length in bits of the blocks cut from it: 26 and 122, 64 addresses each, where nothing is given.
    #[schemars(range(min = 1, max = 126))]
    pub block_length: Option<i32>,
    /// No new blocks are cut from a disabled pool; existing ones stay.
    pub disabled: Option<bool>,
}

/// How a pool is, as one of the daemons found.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AddressPoolStatus {
    /// `Usable`: blocks can be cut from the pool.
    #[serde(default)]
    pub conditions: Vec<Condition>,
    /// Blocks that belong to nodes, of how many there are.
    pub used: Option<String>,
}

/// Who owns a block. Its name is its CIDR, with `-` for `:` and `/`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, CustomResource)]
#[kube(
    group = "husk.dev",
    version = "v1alpha1",
    kind = "AddressBlock",
    plural = "addressblocks",
    shortname = "ablock",
    category = "husk",
    doc = "A block of addresses and the node that owns it. Its name is its CIDR, so that creating it is the allocation lock.",
    printcolumn(name = "CIDR", type_ = "string", json_path = ".spec.cidr"),
    printcolumn(name = "Node", type_ = "string", json_path = ".spec.node"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct AddressBlockSpec {
    /// The block.
    #[schemars(regex(pattern = CIDR))]
    pub cidr: String,
    /// The name of the node that owns it.
    #[schemars(length(min = 1, max = 253))]
    pub node: String,
}

/// The definitions of Husk's kinds, for an API server.
#[must_use]
pub fn definitions() -> Vec<CustomResourceDefinition> {
    vec![OverlayNode::crd(), AddressPool::crd(), AddressBlock::crd()]
}

/// The same as YAML documents, as they are applied: equal definitions give equal text.
///
/// # Errors
/// When they have no YAML form, which no test has seen.
pub fn definitions_yaml() -> anyhow::Result<String> {
    let mut all = String::new();
    for definition in definitions() {
        all += "---\n";
        all += &serde_saphyr::to_string(&definition)?;
    }
    Ok(all)
}

/// What is kept of an object of Husk's kinds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// `metadata.uid`
    pub uid: String,
    /// `metadata.resourceVersion`
    pub version: String,
    /// `metadata.generation`: grows with the content, not with the status; starts anew with another uid.
    pub generation: i64,
    /// What it says, or what is wrong with it.
    pub read: Result<Manifest, Vec<husk_overlay::issue::Issue>>,
}

impl Kept {
    /// Name and content of an object; none of one that has no name, which no API server sends.
    #[must_use]
    pub fn of(object: DynamicObject) -> Option<(String, Self)> {
        let name = object.metadata.name.clone()?;
        let uid = object.metadata.uid.clone().unwrap_or_default();
        let version = object.metadata.resource_version.clone().unwrap_or_default();
        let generation = object.metadata.generation.unwrap_or_default();
        let kind = object.types.as_ref().map(|types| types.kind.clone()).unwrap_or_default();
        let subject = format!("{kind} {name}");
        let read = match serde_json::to_value(&object) {
            Ok(value) => husk_overlay::manifest::from_json(&subject, &value),
            Err(error) => Err(vec![unreadable(&subject, &error.to_string())]),
        };
        let read =
            read.and_then(|manifest| manifest.ok_or_else(|| vec![unreadable(&subject, "it is of another group")]));
        Some((name, Self { uid, version, generation, read }))
    }

    /// True if it is the same object with the same content, whatever its status is by now.
    #[must_use]
    pub fn says_the_same(&self, other: &Self) -> bool {
        self.uid == other.uid && self.read == other.read
    }
}

fn unreadable(subject: &str, reason: &str) -> husk_overlay::issue::Issue {
    husk_overlay::issue::Issue {
        severity: husk_overlay::issue::Severity::Error,
        kind: husk_overlay::issue::IssueKind::BadManifest,
        subject: subject.to_owned(),
        message: format!("it cannot be read: {reason}"),
        remedy: "write it anew, or delete it".to_owned(),
    }
}

/// As much of a `Node` as is needed.
#[derive(Debug, Clone, Deserialize, Resource)]
#[resource(inherit = Node)]
pub struct NodeCidrs {
    /// Metadata.
    pub metadata: ObjectMeta,
    /// Specification.
    #[serde(default)]
    pub spec: NodeCidrsSpec,
}

/// As much of a `Node`'s specification as is needed.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct NodeCidrsSpec {
    /// CIDRs that Kubernetes gave to the node.
    #[serde(default, rename = "podCIDRs")]
    pub pod_cidrs: Vec<String>,
}

impl NodeCidrs {
    /// The node's name and CIDRs; what is no CIDR is left out, which no API server lets happen.
    #[must_use]
    pub fn kept(self) -> Option<(String, Vec<Prefix>)> {
        let cidrs = self.spec.pod_cidrs.iter().filter_map(|cidr| cidr.parse().ok()).collect();
        Some((self.metadata.name?, cidrs))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use husk_overlay::issue::IssueKind;
    use husk_overlay::prefix::Prefix;
    use serde_json::json;

    /// As they lie in `manifests/`, which people apply.
    const CHECKED_IN: &str = include_str!("../../../manifests/base/crds.yaml");

    #[test]
    fn the_definitions_that_people_apply_are_those_of_the_types() {
        let made = definitions_yaml().unwrap();
        assert!(
            CHECKED_IN.ends_with(&made),
            "manifests/base/crds.yaml is not what huskd crds prints: run hack/manifests build"
        );
    }

    #[test]
    fn every_key_of_a_record_is_described() {
        let node = OverlayNode::crd();
        let schema = serde_json::to_value(&node.spec.versions[0].schema).unwrap();
        let spec = &schema["openAPIV3Schema"]["properties"]["spec"]["properties"];
        let record = json!({
            "apiVersion": "husk.dev/v1alpha1", "kind": "OverlayNode",
            "metadata": { "name": "a", "creationTimestamp": "2026-11-28T08:00:00Z" },
            "spec": {
                "instance": "0123456789abcdef", "addresses": { "ipv4": "192.0.2.1" }, "underlayMtu": 1500,
                "blocks": ["10.42.0.64/26"], "router": { "ipv4": "10.42.0.64" }, "vxlanMac": "02:00:00:00:00:01",
                "wireguard": [{ "slot": 0, "generation": 0, "port": 51820, "publicKey": "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=" }],
                "esp": { "cipher": "aes-gcm-128", "epochs": [
                    { "epoch": 1, "publicKey": "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=", "spiSalt": i64::MAX }
                ]},
            },
        });
        let manifest = husk_overlay::manifest::from_json("a", &record).unwrap().unwrap();
        // What the reader takes is what the types describe, to the last key.
        let written = manifest.to_json();
        described(&written["spec"], spec, "spec");
        assert_eq!(written["spec"], record["spec"]);
        let typed: OverlayNodeSpec = serde_json::from_value(written["spec"].clone()).unwrap();
        assert_eq!(typed.blocks, ["10.42.0.64/26"]);
    }

    fn described(value: &serde_json::Value, properties: &serde_json::Value, path: &str) {
        let items = value.as_array().cloned().unwrap_or_else(|| vec![value.clone()]);
        for (key, value) in items.iter().filter_map(|item| item.as_object()).flatten() {
            let schema = &properties[key];
            assert!(schema.is_object(), "{path}.{key} is not described");
            let nested = if value.is_array() { &schema["items"]["properties"] } else { &schema["properties"] };
            if value.is_object() || value.as_array().is_some_and(|all| all.iter().any(serde_json::Value::is_object)) {
                described(value, nested, &format!("{path}.{key}"));
            }
        }
    }

    fn object(value: serde_json::Value) -> DynamicObject {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn an_object_is_kept_as_what_it_says_or_as_what_is_wrong_with_it() {
        let block = |node: serde_json::Value| {
            object(json!({
                "apiVersion": "husk.dev/v1alpha1", "kind": "AddressBlock",
                "metadata": { "name": "10.42.0.64-26", "uid": "u", "resourceVersion": "7" },
                "spec": { "cidr": "10.42.0.64/26", "node": node },
            }))
        };
        let (name, kept) = Kept::of(block(json!("a"))).unwrap();
        let cidr: Prefix = "10.42.0.64/26".parse().unwrap();
        assert_eq!((name.as_str(), kept.uid.as_str(), kept.version.as_str()), ("10.42.0.64-26", "u", "7"));
        assert_eq!(kept.read, Ok(Manifest::Block { cidr, node: "a".parse().unwrap() }));
        let (_, kept) = Kept::of(block(json!(7))).unwrap();
        let issues = kept.read.unwrap_err();
        assert_eq!(issues[0].kind, IssueKind::BadManifest);
        assert!(issues[0].subject.contains("AddressBlock 10.42.0.64-26"), "{issues:?}");
    }
}
