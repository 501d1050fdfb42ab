//! From YAML to manifests.

use std::collections::BTreeSet;

use super::{API_VERSION, GROUP, Manifest, block_name};
use crate::config::BlockLengths;
use crate::config::reader::{Complaint, Fields, Problems, UnknownKeys};
use crate::esp::Aead;
use crate::issue::{Issue, IssueKind, Severity};
use crate::mac::MacAddress;
use crate::marks::WIREGUARD_INTERFACES;
use crate::name::NodeName;
use crate::prefix::{Prefix, PrefixError};
use crate::record::{DualStack, EspEpochRecord, EspRecord, NodeRecord, Pool, WireguardRecord};
use crate::yaml::{self, Value};

/// Issues that one text can have. Garbage has one per document, and nobody reads more.
const MAX_ISSUES: usize = 100;

/// What a text says.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Parsed {
    /// Husk's own objects.
    pub manifests: Vec<Manifest>,
    /// Objects that policy is made of, as they are: who makes policy reads them.
    pub policy_objects: Vec<serde_json::Value>,
    /// What is wrong.
    pub issues: Vec<Issue>,
}

/// Reads all objects of a text, which may have many documents. `file` is what issues call it. Objects of other API
/// groups are passed over, but for those that policy is made of; whatever else is no valid manifest becomes an issue and
/// hides no other document.
#[must_use]
pub fn parse_all(file: &str, text: &str) -> Parsed {
    let mut parsed = Parsed::default();
    for document in yaml::documents(text) {
        match document {
            Ok(tree) if is_of_policy(&tree) => {
                parsed.policy_objects.extend(policy_object(file, &tree, &mut parsed.issues));
            }
            Ok(tree) => match read(file, &tree) {
                Ok(manifest) => parsed.manifests.extend(manifest),
                Err(found) => parsed.issues.extend(found),
            },
            Err(reason) => {
                parsed.issues.push(bad(file, reason, "correct the YAML there, or remove the file".to_owned()));
            }
        }
    }
    let issues = &mut parsed.issues;
    if issues.len() > MAX_ISSUES {
        let message = format!("{} more problems are in the file", issues.len() - MAX_ISSUES);
        issues.truncate(MAX_ISSUES);
        issues.push(bad(file, message, "correct those that are shown first, or remove the file".to_owned()));
    }
    parsed
}

/// True for what policy is made of. Its versions are its reader's business.
fn is_of_policy(tree: &Value) -> bool {
    let (Some(version), Some(kind)) = (text_at(tree, "apiVersion"), text_at(tree, "kind")) else { return false };
    match (version.split_once('/').map_or("", |(group, _)| group), kind) {
        ("", "Namespace" | "Pod") | ("networking.k8s.io", "NetworkPolicy") => true,
        (group, _) => group == "policy.networking.k8s.io",
    }
}

/// The object. A policy with keys that occur twice is handed on, as its reader closes what it does not understand; a pod or a
/// namespace is not.
fn policy_object(file: &str, tree: &Value, issues: &mut Vec<Issue>) -> Option<serde_json::Value> {
    let mut repeated = Vec::new();
    let json = tree.to_json("", &mut repeated);
    let object = describe(tree);
    let issue = |path: &String| {
        let message = format!("{object}{path}: the key occurs twice in one map");
        bad(file, message, "remove all but one".to_owned())
    };
    issues.extend(repeated.iter().map(issue));
    let is_policy = text_at(tree, "apiVersion").is_some_and(|version| version != "v1");
    (is_policy || repeated.is_empty()).then_some(json)
}

/// Reads an object that an API server delivered. `subject` is what issues call it.
///
/// # Errors
/// Everything that is wrong with it. An object of another API group is nothing.
pub fn from_json(subject: &str, object: &serde_json::Value) -> Result<Option<Manifest>, Vec<Issue>> {
    read(subject, &Value::from(object))
}

fn bad(file: &str, message: String, remedy: String) -> Issue {
    Issue { severity: Severity::Error, kind: IssueKind::BadManifest, subject: file.to_owned(), message, remedy }
}

/// One document; nothing when it is an object of others.
fn read(file: &str, tree: &Value) -> Result<Option<Manifest>, Vec<Issue>> {
    if is_foreign(tree) {
        return Ok(None);
    }
    if !matches!(tree, Value::Map(_)) {
        let message = format!("{tree}: a manifest is a map with apiVersion, kind, metadata and spec");
        return Err(vec![bad(file, message, "write a manifest, or remove the file".to_owned())]);
    }
    let mut problems = Problems::new(file);
    let manifest = read_object(Fields::of_document(tree, &mut problems, UnknownKeys::Ignored));
    if problems.is_empty() {
        return Ok(manifest);
    }
    let object = describe(tree);
    let issue = |error: crate::config::ConfigError| {
        let place = [Some(error.key.as_str()).filter(|key| !key.is_empty()), error.value.as_deref()];
        let place: String = place.into_iter().flatten().map(|part| format!("{part}: ")).collect();
        bad(file, format!("{object}{place}{}", error.reason), error.remedy)
    };
    Err(problems.into_errors().into_iter().map(issue).collect())
}

fn is_foreign(tree: &Value) -> bool {
    text_at(tree, "apiVersion").is_some_and(|version| version.split('/').next() != Some(GROUP))
        && text_at(tree, "kind").is_some()
}

/// `Kind name: `, as far as the document says.
fn describe(tree: &Value) -> String {
    let kind = text_at(tree, "kind");
    let name = entry(tree, "metadata").and_then(|metadata| text_at(metadata, "name"));
    let words: Vec<String> = [kind, name].into_iter().flatten().map(|word| word.escape_debug().to_string()).collect();
    if words.is_empty() { String::new() } else { format!("{}: ", words.join(" ")) }
}

fn entry<'t>(tree: &'t Value, key: &str) -> Option<&'t Value> {
    let Value::Map(entries) = tree else { return None };
    entries.iter().find(|(name, _)| name == key).map(|(_, value)| value)
}

fn text_at<'t>(tree: &'t Value, key: &str) -> Option<&'t str> {
    let Some(Value::Text(text)) = entry(tree, key) else { return None };
    Some(text)
}

fn read_object(mut top: Fields<'_, '_>) -> Option<Manifest> {
    let version = required(&mut top, "apiVersion", &format!("write {API_VERSION}"), |top, key| top.text(key, "text"));
    let kinds = "OverlayNode, AddressPool and AddressBlock";
    let kind = required(&mut top, "kind", &format!("write one of {kinds}"), |top, key| top.text(key, "text"));
    if version.is_some_and(|version| version != API_VERSION) {
        let complaint = Complaint::bad(
            format!("this version of Husk reads {API_VERSION} only"),
            "upgrade Husk on this node, or write the manifest for this version",
        );
        top.complain("apiVersion", complaint);
        return None;
    }
    version?;
    match kind? {
        "OverlayNode" => read_node(&mut top).map(Manifest::Node),
        "AddressPool" => read_pool(&mut top).map(Manifest::Pool),
        "AddressBlock" => read_block(&mut top),
        _ => {
            let complaint = Complaint::bad(
                format!("this version of Husk knows no such kind; it knows {kinds}"),
                "upgrade Husk on this node, or correct the kind",
            );
            top.complain("kind", complaint);
            None
        }
    }
}

/// The value of a key that has to be there.
fn required<'a, 'p, T>(
    fields: &mut Fields<'a, 'p>,
    key: &'static str,
    remedy: &str,
    read: impl FnOnce(&mut Fields<'a, 'p>, &'static str) -> Option<T>,
) -> Option<T> {
    if fields.value(key).is_none() {
        fields.missing(key, "the key is missing", remedy);
        return None;
    }
    read(fields, key)
}

fn read_node(top: &mut Fields<'_, '_>) -> Option<NodeRecord> {
    let mut metadata = top.section("metadata");
    let remedy = "write the node's name";
    let name = required(&mut metadata, "name", remedy, |f, key| f.parsed::<NodeName>(key, "a node name", remedy));
    let remedy = "write when the node joined, for example 2026-01-31T12:00:00Z";
    let created =
        required(&mut metadata, "creationTimestamp", remedy, |f, key| f.parsed(key, "a time in RFC 3339 form", remedy));

    let mut spec = top.section("spec");
    let remedy = "write the content of the file `instance` in the state directory of the node";
    let instance = required(&mut spec, "instance", remedy, |f, key| f.parsed(key, "an instance id", remedy));
    let addresses = read_dual_stack(spec.section("addresses"));
    let why = "an MTU in bytes is at least 1";
    let remedy = "write the MTU of the node's underlay interface in bytes";
    let underlay_mtu = required(&mut spec, "underlayMtu", remedy, |f, key| f.number(key, 1..=u32::MAX, why));
    let blocks = spec.list("blocks", "a list of CIDRs", "blocks: [10.42.0.64/26]", read_cidr).unwrap_or_default();
    let router = read_dual_stack(spec.section("router"));
    let vxlan_mac: Option<MacAddress> =
        spec.parsed("vxlanMac", "an Ethernet address", "write six bytes in hexadecimal, separated by ':'");
    if vxlan_mac.is_some_and(|mac| !mac.is_unicast()) {
        let remedy = "write the address of the node's VXLAN device";
        spec.complain("vxlanMac", Complaint::bad("no device can have this address", remedy));
    }
    let wireguard = spec.sections("wireguard", "a list of WireGuard devices", read_wireguard);
    let slots: BTreeSet<u8> = wireguard.iter().map(|device| device.slot).collect();
    if slots.len() < wireguard.len() {
        let complaint = Complaint::conflict("two devices have the same slot", "remove the one of the lower generation");
        spec.complain("wireguard", complaint);
    }
    let given = spec.value("esp").is_some();
    let esp = read_esp(spec.section("esp"), given);
    Some(NodeRecord {
        name: name?,
        instance: instance?,
        created: created?,
        addresses,
        underlay_mtu: underlay_mtu?,
        blocks: blocks.into_iter().collect(),
        router,
        vxlan_mac,
        wireguard,
        esp,
    })
}

fn read_dual_stack(mut section: Fields<'_, '_>) -> DualStack {
    DualStack {
        ipv4: section.parsed("ipv4", "an IPv4 address", "write one IPv4 address without a prefix length"),
        ipv6: section.parsed("ipv6", "an IPv6 address", "write one IPv6 address without a prefix length"),
    }
}

fn read_wireguard(device: &mut Fields<'_, '_>) -> Option<WireguardRecord> {
    let last_slot = u8::try_from(WIREGUARD_INTERFACES.len() - 1).expect("there are two devices");
    let slot = required(device, "slot", "write the number of the device", |f, key| {
        f.number(key, 0..=last_slot, "a node has two WireGuard devices, 0 and 1")
    });
    let generation = required(device, "generation", "write the generation of the device's key", |f, key| {
        f.number(key, 0..=u64::MAX, "a generation has 64 bits")
    });
    let port = required(device, "port", "write the device's UDP port", |f, key| {
        f.number(key, 1..=u16::MAX, "a UDP port has 16 bits, and 0 is none")
    });
    let remedy = "write the public key as 'wg show' prints it";
    let public_key = required(device, "publicKey", remedy, |f, key| f.parsed(key, "a public key", remedy));
    if let (Some(slot), Some(generation)) = (slot, generation)
        && u64::from(slot) != generation % 2
    {
        let reason = format!("generation {generation} belongs to device {}: generations alternate", generation % 2);
        device.complain("slot", Complaint::conflict(reason, "correct the slot or the generation"));
    }
    Some(WireguardRecord { slot: slot?, generation: generation?, port: port?, public_key: public_key? })
}

/// Epochs a node publishes at most: the old one and the new one of a rotation.
const MAX_EPOCHS: usize = 2;

/// The section is read only if it is `given`, so that a node without ESP needs none of its keys.
fn read_esp(mut section: Fields<'_, '_>, given: bool) -> Option<EspRecord> {
    if !given {
        return None;
    }
    let ciphers = Aead::ALL.map(|cipher| (cipher.as_str(), cipher));
    let remedy = "write the cipher that the node is configured with";
    let cipher = required(&mut section, "cipher", remedy, |f, key| f.choice(key, &ciphers));
    let udp_port = section.number("udpPort", 1..=u16::MAX, "a UDP port has 16 bits; without one the key is left out");
    let remedy = "write the epochs the node can receive under, oldest first";
    let epochs =
        required(&mut section, "epochs", remedy, |f, key| Some(f.sections(key, "a list of epochs", read_epoch)));
    if let Some(epochs) = &epochs {
        let newest = "keep the one or two newest, oldest first";
        let ascending = epochs.iter().map(|epoch| epoch.epoch).is_sorted_by(|older, newer| older < newer);
        if epochs.len() > MAX_EPOCHS {
            let reason = format!("a node publishes {MAX_EPOCHS} epochs at most, and there are {}", epochs.len());
            section.complain("epochs", Complaint::bad(reason, newest));
        } else if !ascending {
            let reason = "the numbers of the epochs do not ascend";
            section.complain("epochs", Complaint::conflict(reason, newest));
        }
    }
    Some(EspRecord { cipher: cipher?, udp_port, epochs: epochs? })
}

fn read_epoch(epoch: &mut Fields<'_, '_>) -> Option<EspEpochRecord> {
    let number = required(epoch, "epoch", "write the number of the epoch", |f, key| {
        f.number(key, 0..=u64::MAX, "an epoch has 64 bits")
    });
    let remedy = "write the public key of the epoch, 32 bytes in base64";
    let public_key = required(epoch, "publicKey", remedy, |f, key| f.parsed(key, "a public key", remedy));
    let spi_salt = required(epoch, "spiSalt", "write the salt that the node has drawn for the epoch", |f, key| {
        f.number(key, 0..=u64::MAX, "a salt has 64 bits")
    });
    Some(EspEpochRecord { epoch: number?, public_key: public_key?, spi_salt: spi_salt? })
}

fn read_cidr(item: &Value) -> Result<Prefix, Complaint> {
    let Value::Text(text) = item else {
        return Err(Complaint::wrong_type(item, "a CIDR", "write address/length, in quotes"));
    };
    text.parse().map_err(|error: PrefixError| {
        let remedy = match &error {
            PrefixError::Syntax(_) => "write address/length, for example 10.42.0.64/26".to_owned(),
            PrefixError::HostBits { canonical, .. } => format!("write {canonical}"),
        };
        Complaint::bad(error.to_string(), remedy)
    })
}

fn read_pool(top: &mut Fields<'_, '_>) -> Option<Pool> {
    let mut metadata = top.section("metadata");
    let name = required(&mut metadata, "name", "name the pool", |f, key| f.text(key, "a name")).map(str::to_owned);
    // Objects of Kubernetes are named like nodes (RFC 1123 subdomains).
    if name.as_deref().is_some_and(|name| NodeName::new(name).is_err()) {
        metadata.complain("name", Complaint::bad("this is no name", "use lower-case letters, digits, '-' and '.'"));
    }
    let mut spec = top.section("spec");
    let remedy = "write the addresses of the pool, for example 10.42.0.0/16";
    let cidr: Option<Prefix> = required(&mut spec, "cidr", remedy, |f, key| f.parsed(key, "a CIDR", remedy));
    let disabled = spec.flag("disabled").unwrap_or(false);
    let length = spec.number("blockLength", 1..=126, "a block has at least four addresses");
    let cidr = cidr?;
    let given = spec.value("blockLength").is_some();
    let block_length = if given { length? } else { BlockLengths::default().get(cidr.family()) };
    let bounds = cidr.length()..=cidr.family().bits() - 2;
    if !bounds.contains(&block_length) {
        let reason = format!("no block of length {block_length} with four addresses fits into {cidr}");
        let remedy = if bounds.is_empty() {
            "use a larger pool".to_owned()
        } else {
            format!("write a length from {} to {}", bounds.start(), bounds.end())
        };
        spec.complain("blockLength", Complaint::conflict(reason, remedy));
    }
    Some(Pool { name: name?, cidr, block_length, disabled })
}

fn read_block(top: &mut Fields<'_, '_>) -> Option<Manifest> {
    let mut spec = top.section("spec");
    let remedy = "write the addresses of the block, for example 10.42.0.64/26";
    let cidr: Option<Prefix> = required(&mut spec, "cidr", remedy, |f, key| f.parsed(key, "a CIDR", remedy));
    let remedy = "write the name of the node that owns the block";
    let node = required(&mut spec, "node", remedy, |f, key| f.parsed(key, "a node name", remedy));
    let mut metadata = top.section("metadata");
    let remedy = "name the block after its CIDR, for example 10.42.0.64-26";
    let name = required(&mut metadata, "name", remedy, |f, key| f.text(key, "a name"))?;
    let cidr = cidr?;
    let right = block_name(cidr);
    if name != right {
        let reason = format!("a block is named after its CIDR, {cidr}, or its name would not be the lock");
        metadata.complain("name", Complaint::conflict(reason, format!("write {right}, or correct spec.cidr")));
    }
    Some(Manifest::Block { cidr, node: node? })
}
