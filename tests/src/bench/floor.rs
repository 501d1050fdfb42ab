//! What cannot be undercut: the netlink requests that a routed pod takes, and no more, in a process that runs already and has
//! its sockets open. No lease, no process, no daemon, no kernel parameters, no look whether the pod's end is ready.

use std::net::IpAddr;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use husk_dataplane::netlink::{Protocol, Request, Socket};
use husk_dataplane::netns::Netns;
use husk_overlay::prefix::Family;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteProtocol, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

/// Names of the ends.
const HOST_END: &str = "benchfloor";
const POD_END: &str = "eth0";

/// Ethernet addresses of the ends.
const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 250, 1];
const POD_MAC: [u8; 6] = [2, 0, 0, 0, 250, 2];

/// The kernel's operations on sockets that are open already.
pub(super) struct Floor {
    host: Socket,
    pod: Socket,
    netns: Netns,
    addresses: Vec<IpAddr>,
}

impl Floor {
    /// Opens the sockets; the calling thread is on the host.
    pub(super) fn new(netns: &Path, families: &[Family]) -> Result<Self> {
        let netns = Netns::open(netns)?;
        let addresses = families.iter().map(|family| match family {
            Family::Ipv4 => "10.250.250.2".parse(),
            Family::Ipv6 => "fd50:250::2".parse(),
        });
        Ok(Self {
            host: Socket::open(Protocol::Route)?,
            pod: Socket::open_in(Protocol::Route, &netns)?,
            netns,
            addresses: addresses.collect::<Result<_, _>>()?,
        })
    }

    /// Makes a pod; returns how long it took.
    pub(super) fn add(&mut self) -> Result<Duration> {
        let started = Instant::now();
        let mut peer = named(POD_END);
        peer.attributes.push(LinkAttribute::Address(POD_MAC.to_vec()));
        peer.attributes.push(LinkAttribute::NetNsFd(self.netns.as_fd().as_raw_fd()));
        let mut pair = named(HOST_END);
        pair.attributes.push(LinkAttribute::Address(HOST_MAC.to_vec()));
        let veth = LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer)));
        pair.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Veth), veth]));
        send(&mut self.host, vec![create(RouteNetlinkMessage::NewLink(pair))])?;
        let (host, pod) = (index(&mut self.host, HOST_END)?, index(&mut self.pod, POD_END)?);
        let mut requests: Vec<_> = self.addresses.iter().map(|it| create(address(pod, *it))).collect();
        requests.push(change(up(pod)));
        for address in &self.addresses {
            let gateway = gateway(*address);
            requests.push(create(neighbour(pod, gateway, HOST_MAC)));
            requests.push(create(route(pod, *address, Some(gateway))));
        }
        send(&mut self.pod, requests)?;
        let mut requests = vec![change(up(host))];
        for address in &self.addresses {
            requests.push(create(neighbour(host, *address, POD_MAC)));
            requests.push(create(route(host, *address, None)));
        }
        send(&mut self.host, requests)?;
        Ok(started.elapsed())
    }

    /// Removes it; returns how long it took.
    pub(super) fn delete(&mut self) -> Result<Duration> {
        let started = Instant::now();
        send(&mut self.host, vec![change(RouteNetlinkMessage::DelLink(named(HOST_END)))])?;
        Ok(started.elapsed())
    }
}

fn send(socket: &mut Socket, requests: Vec<Request<RouteNetlinkMessage>>) -> Result<()> {
    Ok(socket.batch(requests).into_iter().collect::<Result<(), _>>()?)
}

fn change(message: RouteNetlinkMessage) -> Request<RouteNetlinkMessage> {
    Request { operation: "measure", object: "the floor".to_owned(), flags: 0, message }
}

fn create(message: RouteNetlinkMessage) -> Request<RouteNetlinkMessage> {
    Request { flags: NLM_F_CREATE | NLM_F_EXCL, ..change(message) }
}

fn index(socket: &mut Socket, name: &str) -> Result<u32> {
    match socket.get(change(RouteNetlinkMessage::GetLink(named(name))))? {
        RouteNetlinkMessage::NewLink(link) => Ok(link.header.index),
        other => bail!("the kernel answered with {other:?} instead of {name}"),
    }
}

fn named(name: &str) -> LinkMessage {
    let mut link = LinkMessage::default();
    link.attributes.push(LinkAttribute::IfName(name.to_owned()));
    link
}

fn up(index: u32) -> RouteNetlinkMessage {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    RouteNetlinkMessage::SetLink(link)
}

fn address(index: u32, address: IpAddr) -> RouteNetlinkMessage {
    let mut message = AddressMessage::default();
    (message.header.family, message.header.prefix_len) = family(address);
    message.header.index = index;
    message.attributes = vec![AddressAttribute::Local(address), AddressAttribute::Address(address)];
    if address.is_ipv6() {
        message.header.flags = AddressHeaderFlags::Nodad;
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    RouteNetlinkMessage::NewAddress(message)
}

fn neighbour(index: u32, address: IpAddr, mac: [u8; 6]) -> RouteNetlinkMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(address).0;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    let destination = match address {
        IpAddr::V4(it) => NeighbourAddress::Inet(it),
        IpAddr::V6(it) => NeighbourAddress::Inet6(it),
    };
    message.attributes =
        vec![NeighbourAttribute::Destination(destination), NeighbourAttribute::LinkLayerAddress(mac.to_vec())];
    RouteNetlinkMessage::NewNeighbour(message)
}

/// The route to a pod's address, or its default route through a gateway.
fn route(index: u32, pod: IpAddr, gateway: Option<IpAddr>) -> RouteNetlinkMessage {
    let mut message = RouteMessage::default();
    let (family, length) = family(pod);
    message.header.address_family = family;
    message.header.table = 254;
    message.header.protocol = RouteProtocol::Static;
    message.header.kind = RouteType::Unicast;
    message.attributes = vec![RouteAttribute::Oif(index)];
    let destination = |address| match address {
        IpAddr::V4(it) => RouteAddress::Inet(it),
        IpAddr::V6(it) => RouteAddress::Inet6(it),
    };
    if let Some(gateway) = gateway {
        message.header.flags = RouteFlags::Onlink;
        message.attributes.push(RouteAttribute::Gateway(destination(gateway)));
    } else {
        message.header.destination_prefix_length = length;
        message.attributes.push(RouteAttribute::Destination(destination(pod)));
        if pod.is_ipv4() {
            message.header.scope = netlink_packet_route::route::RouteScope::Link;
        }
    }
    RouteNetlinkMessage::NewRoute(message)
}

fn family(address: IpAddr) -> (AddressFamily, u8) {
    if address.is_ipv4() { (AddressFamily::Inet, 32) } else { (AddressFamily::Inet6, 128) }
}

fn gateway(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => husk_overlay::marks::POD_GATEWAY_V4.into(),
        IpAddr::V6(_) => husk_overlay::marks::POD_GATEWAY_V6.into(),
    }
}
