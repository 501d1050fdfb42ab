//! Interfaces by index and name: every other rtnetlink table speaks of indices, people and `Desired` of names.

use std::collections::BTreeMap;

use husk_overlay::marks;
use husk_overlay::name::InterfaceName;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkExtentMask, LinkMessage};
use nix::errno::Errno;

use crate::error::{Error, Refusal};
use crate::netlink::{Request, Socket};

/// Starts the stand-in for the name of an interface that was made after links were last read.
pub(crate) const UNKNOWN: char = '?';

/// Which interfaces there were when links were last read. An index is never given to a second interface of a namespace
/// while it runs (net/core/dev.c `dev_index_reserve` counts upwards), so that an outdated table finds nothing rather than
/// something else.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Interfaces {
    names: BTreeMap<u32, InterfaceName>,
    indices: BTreeMap<InterfaceName, u32>,
}

impl Interfaces {
    /// Takes names and indices out of a dump of links.
    pub(crate) fn of(links: &[LinkMessage]) -> Self {
        let mut interfaces = Self::default();
        for link in links {
            // A name that is none by our rules belongs to nothing that Husk refers to.
            if let Some(name) = name_of(link).and_then(|name| InterfaceName::new(name).ok()) {
                interfaces.names.insert(link.header.index, name.clone());
                interfaces.indices.insert(name, link.header.index);
            }
        }
        interfaces
    }

    /// Name of an index, or [`UNKNOWN`] and the number when no such interface is known: a valid name that no interface of Husk has,
    /// so that whatever refers to it counts as different from what is desired.
    pub(crate) fn name(&self, index: u32) -> InterfaceName {
        let unknown = || InterfaceName::new(&format!("{UNKNOWN}{index}")).expect("at most 11 printable characters");
        self.names.get(&index).cloned().unwrap_or_else(unknown)
    }

    /// The same, but interfaces of pods that were made anew under the name of an older one have no name: what hangs on them is
    /// not what hung on the older one.
    pub(crate) fn without_successors(mut self, known: &BTreeMap<InterfaceName, u32>) -> Self {
        self.names.retain(|index, name| known.get(name).is_none_or(|known| known == index));
        self
    }

    /// The name of an interface of ours, none for all others.
    pub(crate) fn own(&self, index: u32) -> Option<&InterfaceName> {
        self.names
            .get(&index)
            .filter(|name| marks::is_tunnel_interface(name.as_str()) || marks::is_pod_interface(name.as_str()))
    }

    /// The name of a tunnel device of ours, none for all others.
    pub(crate) fn tunnel(&self, index: u32) -> Option<&InterfaceName> {
        self.names.get(&index).filter(|name| marks::is_tunnel_interface(name.as_str()))
    }

    /// The index of a name, if there is such an interface.
    pub(crate) fn find(&self, name: &InterfaceName) -> Option<u32> {
        self.indices.get(name).copied()
    }

    /// The index of a name, or the error that the kernel would give.
    pub(crate) fn index(&self, name: &InterfaceName, operation: &'static str, object: &str) -> Result<u32, Error> {
        self.find(name).ok_or_else(|| {
            Error::Refused(Refusal {
                operation,
                object: object.to_owned(),
                errno: Errno::ENODEV,
                explanation: Some(format!("there is no interface {name}")),
            })
        })
    }
}

/// All links of the namespace, without their statistics.
pub(crate) fn dump_links(socket: &mut Socket) -> Result<Vec<LinkMessage>, Error> {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    let request = Request {
        operation: "read",
        object: "links".to_owned(),
        flags: 0,
        message: RouteNetlinkMessage::GetLink(message),
    };
    let links = socket.dump_shared(request)?.into_iter().filter_map(|message| match message {
        RouteNetlinkMessage::NewLink(link) => Some(link),
        _ => None,
    });
    Ok(links.collect())
}

/// The name in a link message.
pub(crate) fn name_of(link: &LinkMessage) -> Option<&str> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    })
}
