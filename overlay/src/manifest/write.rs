//! From manifests to YAML.

use std::collections::BTreeSet;

use serde::Serialize;

use super::{API_VERSION, Manifest};
use crate::mac::MacAddress;
use crate::name::{InstanceId, NodeName};
use crate::prefix::Prefix;
use crate::record::{DualStack, EspRecord, WireguardRecord};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Object<'a> {
    api_version: &'static str,
    kind: &'static str,
    metadata: Metadata,
    spec: Spec<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    creation_timestamp: Option<jiff::Timestamp>,
}

#[derive(Serialize)]
#[serde(untagged, rename_all_fields = "camelCase")]
enum Spec<'a> {
    Node {
        instance: &'a InstanceId,
        addresses: DualStack,
        underlay_mtu: u32,
        blocks: &'a BTreeSet<Prefix>,
        router: DualStack,
        #[serde(skip_serializing_if = "Option::is_none")]
        vxlan_mac: Option<MacAddress>,
        #[serde(skip_serializing_if = "<[_]>::is_empty")]
        wireguard: &'a [WireguardRecord],
        #[serde(skip_serializing_if = "Option::is_none")]
        esp: Option<&'a EspRecord>,
    },
    Pool {
        cidr: Prefix,
        block_length: u8,
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        disabled: bool,
    },
    Block {
        cidr: Prefix,
        node: &'a NodeName,
    },
}

pub(super) fn to_yaml(manifest: &Manifest) -> String {
    let creation_timestamp = match manifest {
        Manifest::Node(record) => Some(record.created),
        Manifest::Pool(_) | Manifest::Block { .. } => None,
    };
    let object = object(manifest, creation_timestamp);
    serde_saphyr::to_string(&object).expect("text, numbers, lists and maps have a YAML form")
}

pub(super) fn to_json(manifest: &Manifest) -> serde_json::Value {
    serde_json::to_value(object(manifest, None)).expect("text, numbers, lists and maps have a JSON form")
}

fn object(manifest: &Manifest, creation_timestamp: Option<jiff::Timestamp>) -> Object<'_> {
    let spec = match manifest {
        Manifest::Node(record) => Spec::Node {
            instance: &record.instance,
            addresses: record.addresses,
            underlay_mtu: record.underlay_mtu,
            blocks: &record.blocks,
            router: record.router,
            vxlan_mac: record.vxlan_mac,
            wireguard: &record.wireguard,
            esp: record.esp.as_ref(),
        },
        Manifest::Pool(pool) => {
            Spec::Pool { cidr: pool.cidr, block_length: pool.block_length, disabled: pool.disabled }
        }
        Manifest::Block { cidr, node } => Spec::Block { cidr: *cidr, node },
    };
    let metadata = Metadata { name: manifest.name(), creation_timestamp };
    Object { api_version: API_VERSION, kind: manifest.kind(), metadata, spec }
}
