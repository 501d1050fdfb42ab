//! Interfaces by name, and the two ends of a pair.

use husk_overlay::name::InterfaceName;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use nix::errno::Errno;

use super::request;
use crate::error::{Error, Refusal};
use crate::netlink::Socket;

/// An interface of the socket's namespace; none if there is none of that name.
pub(super) fn find(socket: &mut Socket, interface: &InterfaceName) -> Result<Option<LinkMessage>, Error> {
    match socket.get(request::get(interface)) {
        Ok(RouteNetlinkMessage::NewLink(link)) => Ok(Some(link)),
        Ok(_) => Err(Error::Malformed {
            operation: "find",
            object: interface.to_string(),
            reason: "the kernel answered with something else than a link".to_owned(),
        }),
        Err(error) if error.errno() == Some(Errno::ENODEV) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The two ends of a veth pair. What is done to them later goes by these numbers, which no other interface gets: a name may
/// belong to another attachment by then, when this one was deleted and added again meanwhile.
pub(super) struct Ends {
    /// Index of the host end.
    pub(super) index: u32,
    /// Index of the pod end in its namespace.
    pub(super) peer: u32,
}

pub(super) fn ends(socket: &mut Socket, interface: &InterfaceName) -> Result<Ends, Error> {
    let link = existing(socket, interface)?;
    let peer = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Link(peer) => Some(*peer),
        _ => None,
    });
    // Kernels before 5.12 leave it out when it is the same number (`nla_put_iflink` in net/core/rtnetlink.c).
    Ok(Ends { index: link.header.index, peer: peer.unwrap_or(link.header.index) })
}

pub(super) fn index_of(socket: &mut Socket, interface: &InterfaceName) -> Result<u32, Error> {
    Ok(existing(socket, interface)?.header.index)
}

/// An interface of the socket's namespace that was made before.
pub(super) fn existing(socket: &mut Socket, interface: &InterfaceName) -> Result<LinkMessage, Error> {
    find(socket, interface)?.ok_or_else(|| deleted(interface))
}

pub(super) fn deleted(interface: &InterfaceName) -> Error {
    Error::Refused(Refusal {
        operation: "find",
        object: interface.to_string(),
        errno: Errno::ENODEV,
        explanation: Some("it was deleted while it was being set up".to_owned()),
    })
}
