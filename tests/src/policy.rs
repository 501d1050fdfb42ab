//! What network policy means, said twice without a line in common with what enforces it: an [`oracle`] that reads the API's prose
//! to the letter, and an [`interpreter`] that does with a table what kernels do. A [`generator`] makes small clusters for both.
//!
//! Packets of a [`frame`] each go through a real kernel in [`wire`].
//!
//! All clusters have pods, if any, at the same few places, so that namespaces of the kernel can stand for them and only policy
//! changes from one cluster to the next.

pub mod frame;
pub mod generator;
pub mod interpreter;
pub mod oracle;
pub mod scene;
pub mod wire;

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use husk_overlay::endpoint::{AttachmentId, Endpoint, Endpoints, NetnsIdentity};
use husk_overlay::kernel::policy::PolicyTable;
use husk_overlay::name::{ContainerId, InterfaceName, NetworkName};
use husk_overlay::prefix::Family;
use husk_policy::cluster::{Cluster, Membership, Quarantine};
use husk_policy::compile::compile;
use husk_policy::object::ObjectName;
use husk_policy::read::collect::objects_from;
use husk_policy::read::{Reading, read};
use serde_json::Value;

/// The node whose rules are judged.
pub const NODE: &str = "here";

/// Another node.
pub const OTHER_NODE: &str = "there";

/// A place where a pod may be.
#[derive(Debug, Clone, Copy)]
pub struct Slot {
    /// Namespace of the pod.
    pub namespace: &'static str,
    /// Name of the pod.
    pub name: &'static str,
    /// It is on [`NODE`].
    pub local: bool,
    /// IPv4 and IPv6 address.
    pub addresses: [IpAddr; 2],
}

const fn v4(a: u8, b: u8, c: u8, d: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(a, b, c, d))
}

const fn v6(first: u16, second: u16, seventh: u16, eighth: u16) -> IpAddr {
    IpAddr::V6(Ipv6Addr::new(first, second, 0, 0, 0, 0, seventh, eighth))
}

const fn slot(namespace: &'static str, name: &'static str, local: bool, [subnet, host]: [u8; 2]) -> Slot {
    let addresses = [v4(10, 1, subnet, host), v6(0xfd01, 0, subnet as u16, host as u16)];
    Slot { namespace, name, local, addresses }
}

/// The places. Their addresses are close together, for CIDRs that hold some of them.
pub static SLOTS: [Slot; 6] = [
    slot("a", "one", true, [0, 1]),
    slot("a", "two", true, [0, 2]),
    slot("b", "three", true, [0, 3]),
    slot("c", "four", true, [0, 4]),
    slot("a", "five", false, [1, 1]),
    slot("b", "six", false, [1, 2]),
];

/// Addresses that are no pod's. The first ones are those of the other node.
pub static EXTERNALS: [[IpAddr; 2]; 2] =
    [[v4(10, 9, 0, 1), v6(0xfd09, 0, 0, 1)], [v4(192, 0, 2, 254), v6(0x2001, 0xdb8, 0, 0xfe)]];

impl Slot {
    /// Identity of the pod that is here now.
    #[must_use]
    pub fn uid(&self) -> String {
        format!("uid-{}", self.name)
    }

    fn is(&self, pod: &Value) -> bool {
        pod["metadata"]["namespace"] == self.namespace && pod["metadata"]["name"] == self.name
    }
}

/// What the node has attached: a pod at each of its places.
///
/// # Panics
/// Never.
#[must_use]
pub fn endpoints() -> Endpoints {
    let attached = SLOTS.iter().filter(|slot| slot.local).map(|slot| {
        let id = AttachmentId {
            network: NetworkName::new("husk").expect("a constant of letters"),
            container_id: ContainerId::new(slot.name).expect("a constant of letters"),
            ifname: InterfaceName::new("eth0").expect("a constant of letters"),
        };
        let endpoint = Endpoint {
            addresses: slot.addresses.into_iter().collect(),
            pod_mac: id.pod_mac(),
            host_interface: id.host_interface(),
            netns: NetnsIdentity { path: format!("/run/netns/{}", slot.name), device: 0, inode: 0 },
            pod_namespace: Some(slot.namespace.to_owned()),
            pod_name: Some(slot.name.to_owned()),
            pod_uid: Some(slot.uid()),
            port_mappings: Vec::new(),
            bandwidth: None,
            id: id.clone(),
        };
        (id, endpoint)
    });
    attached.collect()
}

/// A cluster.
#[derive(Clone)]
pub struct World {
    /// Objects as JSON.
    pub objects: Vec<Value>,
    /// A pod without an object is one without labels, rather than an unknown one.
    pub optional: bool,
    /// Places whose pods are cut off by request.
    pub quarantined: BTreeSet<usize>,
    /// CIDRs that pods which are cut off may talk with.
    pub allowed: BTreeSet<String>,
}

impl World {
    /// The object of the pod at a place.
    #[must_use]
    pub fn pod(&self, slot: &Slot) -> Option<&Value> {
        self.objects.iter().find(|object| object["kind"] == "Pod" && slot.is(object))
    }

    /// The cluster as the node sees it.
    ///
    /// # Panics
    /// When an object is one that the API does not allow.
    #[must_use]
    pub fn cluster(&self) -> Cluster {
        let readings: Vec<Reading> = self.objects.iter().map(read).collect();
        let objects = objects_from(&readings);
        assert_eq!(objects.issues, [], "the API allows all objects");
        let asked = Quarantine {
            pods: self.quarantined.iter().map(|at| ObjectName::new(SLOTS[*at].namespace, SLOTS[*at].name)).collect(),
            allowed: self.allowed.iter().map(|cidr| cidr.parse().expect("the generator makes CIDRs")).collect(),
        };
        let membership = if self.optional { Membership::Optional } else { Membership::Objects };
        Cluster::new(Arc::new(objects), &endpoints(), membership, &asked)
    }

    /// The table that enforces its policy.
    ///
    /// # Panics
    /// As [`Self::cluster`].
    #[must_use]
    pub fn table(&self) -> PolicyTable {
        compile(&self.cluster(), &Family::ALL.into())
    }

    /// Ports that the objects name, those next to them, and one that none names.
    #[must_use]
    pub fn ports(&self) -> BTreeSet<u16> {
        fn collect(value: &Value, ports: &mut BTreeSet<u16>) {
            match value {
                Value::Array(items) => items.iter().for_each(|it| collect(it, ports)),
                Value::Object(fields) => fields.values().for_each(|it| collect(it, ports)),
                _ => {
                    let port = value.as_u64().and_then(|port| u16::try_from(port).ok());
                    let near = |port: u16| [port.saturating_sub(1), port, port.saturating_add(1)];
                    ports.extend(port.into_iter().flat_map(near));
                }
            }
        }
        let mut ports = BTreeSet::from([8080]);
        let objects = self.objects.iter().filter(|object| object["kind"] != "Namespace");
        objects.for_each(|object| collect(&object["spec"], &mut ports));
        ports
    }

    /// The pod at a place of the node is one that nobody has described yet: there is no object, or that of another one.
    #[must_use]
    pub fn is_unknown(&self, slot: &Slot) -> bool {
        slot.local && self.pod(slot).map_or(!self.optional, |pod| pod["metadata"]["uid"] != slot.uid().as_str())
    }
}

/// An object a line.
impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { objects, optional, quarantined, allowed } = self;
        writeln!(f, "optional: {optional}, quarantined: {quarantined:?}, but with {allowed:?}")?;
        objects.iter().try_for_each(|object| writeln!(f, "{object}"))
    }
}

/// A connection, or its first packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Flow {
    /// Who began it.
    pub from: IpAddr,
    /// Who answers.
    pub to: IpAddr,
    /// IANA protocol number.
    pub protocol: u8,
    /// Port of who answers; of protocols without ports whatever connection tracking has in its place.
    pub port: u16,
}

/// Numbers of the protocols that policy knows, by their names in the API.
pub const PROTOCOLS: [(&str, u8); 3] = [("TCP", 6), ("UDP", 17), ("SCTP", 132)];
