//! Pod wiring: one veth pair per attachment, routed, without a bridge.
//!
//! ```text
//!  host                                              pod's network namespace
//!  10.42.0.5/32 dev husk3f…   route, protocol 72     10.42.0.5/32 on eth0
//!  10.42.0.5 → pod's MAC      permanent neighbour    default via 169.254.1.1 dev eth0 onlink
//!                             husk3f… ═══ eth0       169.254.1.1 → host end's MAC, permanent neighbour
//! ```
//!
//! The gateway addresses exist nowhere: as both ends know the other's Ethernet address, nobody asks for it, so that no
//! packet waits for ARP, neighbour discovery or duplicate address detection, and nothing can be claimed by answering.
//! IPv6 is wired alike, with `fe80::1` as gateway.
//!
//! The pod's end is created directly in the pod's namespace, with its final name, in the request that creates the pair:
//! moving an interface costs several times as much. Whatever fails, the host end is deleted, and with it the pod's end,
//! its addresses, routes and neighbours.

mod inspect;
mod request;
mod sysctl;
#[cfg(test)]
mod tests;

use std::thread;
use std::time::{Duration, Instant};

use husk_overlay::endpoint::Endpoint;
use husk_overlay::mac::MacAddress;
use husk_overlay::name::InterfaceName;
use husk_overlay::prefix::Family;
use husk_overlay::record::DualStack;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage, State};
use netlink_packet_route::route::RouteType;
use nix::errno::Errno;

use crate::error::{Error, Refusal};
use crate::netlink::{Protocol, Request, Socket};
use crate::netns::Netns;

/// Longest text an interface's alias can hold, in bytes: `dev_set_alias` (net/core/dev.c) wants less than `IFALIASZ` (256)
/// and counts the final zero of the attribute.
const ALIAS_LENGTH: usize = 254;

/// How long the kernel may take until the pod's end is ready, and how often to look. When much happens, it looks for new
/// carriers once a second (`linkwatch_schedule_work` in net/core/link_watch.c).
const READY_LIMIT: Duration = Duration::from_secs(3);
const READY_POLL: Duration = Duration::from_millis(1);

/// How a pod is wired.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodSpec {
    /// Name of the host end.
    pub host_interface: InterfaceName,
    /// Ethernet address of the host end.
    pub host_mac: MacAddress,
    /// Alias of the host end, for people and for garbage collection; cut to 254 bytes.
    pub alias: String,
    /// Name of the pod end.
    pub pod_interface: InterfaceName,
    /// Ethernet address of the pod end.
    pub pod_mac: MacAddress,
    /// The pod's addresses.
    pub addresses: DualStack,
    /// MTU of both ends in bytes.
    pub mtu: u32,
}

impl PodSpec {
    /// How an endpoint is wired. Plugin and daemon both go by it, so that neither takes the other's work for a deviation.
    #[must_use]
    pub fn of(endpoint: &Endpoint, mtu: u32) -> Self {
        Self {
            host_interface: endpoint.host_interface.clone(),
            host_mac: endpoint.id.host_mac(),
            alias: endpoint.id.to_string(),
            pod_interface: endpoint.id.ifname.clone(),
            pod_mac: endpoint.pod_mac,
            addresses: endpoint.addresses,
            mtu,
        }
    }

    fn families(&self) -> impl Iterator<Item = Family> + use<> {
        let addresses = self.addresses;
        Family::ALL.into_iter().filter(move |family| addresses.get(*family).is_some())
    }

    /// The alias, cut to what the kernel takes.
    fn alias(&self) -> String {
        let end = (0..=self.alias.len().min(ALIAS_LENGTH)).rev().find(|end| self.alias.is_char_boundary(*end));
        self.alias[..end.unwrap_or(0)].to_owned()
    }
}

/// The host end of a pod's veth pair, as found.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostInterface {
    /// Name.
    pub name: InterfaceName,
    /// Alias; empty if it has none.
    pub alias: String,
}

/// Wires a pod. The calling thread's network namespace is the host's.
///
/// A host end that exists already is residue of an attachment that was not undone, as its name belongs to this attachment
/// alone: it is replaced, unless the pod's interface exists.
///
/// # Errors
/// [`Error::Refused`] with [`Errno::EEXIST`] when the namespace has an interface of that name; the other errors of
/// netlink, of the namespace and of kernel parameters. Nothing is left behind then.
pub fn attach(spec: &PodSpec, netns: &Netns) -> Result<(), Error> {
    let mut host = Socket::open(Protocol::Route)?;
    create(&mut host, spec, netns)?;
    let wired =
        wire_pod(spec, netns).and_then(|()| wire_host(&mut host, spec)).and_then(|()| wait_until_ready(spec, netns));
    if let Err(error) = wired {
        // The error that stopped us is the one to report. A host end that stays is found by its name: by DEL, which a
        // runtime sends after a failed ADD, and by garbage collection.
        if let Err(left) = delete(&mut host, &spec.host_interface) {
            tracing::warn!(error = %left, "a failed attachment could not be undone");
        }
        return Err(error);
    }
    Ok(())
}

/// Unwires a pod: deletes the host end, with which the pod end, its addresses, routes and neighbours go. True if there
/// was one. The pod's namespace is not needed.
///
/// # Errors
/// The errors of netlink.
pub fn detach(host_interface: &InterfaceName) -> Result<bool, Error> {
    delete(&mut Socket::open(Protocol::Route)?, host_interface)
}

/// Brings the MTU of both ends to what the specification says, without a restart of the pod.
///
/// # Errors
/// Those of netlink and of the namespace; the pod's end is tuned only when the host's was.
pub fn set_mtu(spec: &PodSpec, netns: &Netns) -> Result<(), Error> {
    let tune = |interface: &InterfaceName| {
        let mut socket = Socket::open(Protocol::Route)?;
        let index = index_of(&mut socket, interface)?;
        batch(&mut socket, vec![request::set_mtu(index, interface, spec.mtu)])
    };
    tune(&spec.host_interface)?;
    netns.run_in(|| tune(&spec.pod_interface))?
}

/// What deviates from how the pod was wired, one sentence per deviation; empty when all is well. Additional addresses
/// and routes are no deviation: plugins chained behind may have added them.
///
/// # Errors
/// Those of netlink and of the namespace; a missing interface is a deviation, not an error.
pub fn check(spec: &PodSpec, netns: &Netns) -> Result<Vec<String>, Error> {
    let mut deviations = inspect::host(spec)?;
    deviations.extend(netns.run_in(|| inspect::pod(spec))??);
    Ok(deviations)
}

/// True if a namespace has an interface of that name.
///
/// # Errors
/// Those of netlink and of the namespace.
pub fn interface_exists(netns: &Netns, name: &InterfaceName) -> Result<bool, Error> {
    Ok(netns.run_in(|| find(&mut Socket::open(Protocol::Route)?, name))??.is_some())
}

/// The host ends of pods in the calling thread's namespace, sorted.
///
/// # Errors
/// Those of netlink.
pub fn host_interfaces() -> Result<Vec<HostInterface>, Error> {
    let mut socket = Socket::open(Protocol::Route)?;
    let all = socket.dump_shared(Request {
        operation: "list",
        object: "interfaces".to_owned(),
        flags: 0,
        message: RouteNetlinkMessage::GetLink(LinkMessage::default()),
    })?;
    let mut found: Vec<HostInterface> = all.iter().filter_map(host_interface).collect();
    found.sort();
    Ok(found)
}

fn host_interface(message: &RouteNetlinkMessage) -> Option<HostInterface> {
    let RouteNetlinkMessage::NewLink(link) = message else { return None };
    let name = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    })?;
    let alias = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfAlias(alias) => Some(alias.clone()),
        _ => None,
    });
    let name = InterfaceName::new(name).ok().filter(|name| husk_overlay::marks::is_pod_interface(name.as_str()))?;
    Some(HostInterface { name, alias: alias.unwrap_or_default() })
}

fn create(host: &mut Socket, spec: &PodSpec, netns: &Netns) -> Result<(), Error> {
    let attempt = |host: &mut Socket| batch(host, vec![request::create_pair(spec, netns)]);
    let error = match attempt(host) {
        Err(error) if error.errno() == Some(Errno::EEXIST) => error,
        other => return other,
    };
    if interface_exists(netns, &spec.pod_interface)? {
        return Err(Error::Refused(Refusal {
            operation: "create",
            object: format!("{} in {}", spec.pod_interface, netns.path()),
            errno: Errno::EEXIST,
            explanation: Some("an interface of this name exists there already".to_owned()),
        }));
    }
    if delete(host, &spec.host_interface)? { attempt(host) } else { Err(error) }
}

/// Configures the pod end, in the pod's namespace.
fn wire_pod(spec: &PodSpec, netns: &Netns) -> Result<(), Error> {
    netns.run_in(|| {
        let mut socket = Socket::open(Protocol::Route)?;
        let index = index_of(&mut socket, &spec.pod_interface)?;
        let loopback = InterfaceName::new("lo").expect("lo is a valid name");
        let loopback_index = index_of(&mut socket, &loopback)?;
        sysctl::tune_pod(spec, &loopback)?;
        let mut requests = vec![request::set_up(loopback_index, &loopback, None)];
        requests.extend(spec.addresses.iter().map(|address| request::add_address(index, &spec.pod_interface, address)));
        requests.push(request::set_up(index, &spec.pod_interface, None));
        for family in spec.families() {
            let gateway = request::gateway(family);
            requests.push(request::add_neighbour(index, &spec.pod_interface, gateway, spec.host_mac));
            requests.push(request::add_default_route(index, &spec.pod_interface, gateway));
        }
        batch(&mut socket, requests)
    })?
}

/// Configures the host end.
fn wire_host(socket: &mut Socket, spec: &PodSpec) -> Result<(), Error> {
    let index = index_of(socket, &spec.host_interface)?;
    sysctl::tune_host(spec)?;
    let mut requests = vec![request::set_up(index, &spec.host_interface, Some(spec.alias()))];
    for address in spec.addresses.iter() {
        requests.push(request::add_neighbour(index, &spec.host_interface, address, spec.pod_mac));
        requests.push(request::add_host_route(index, &spec.host_interface, address));
    }
    match batch(socket, requests) {
        // The daemon knows the lease since before the interface was there, and may have been faster: then what exists is
        // what we wanted. A route of somebody else's is not replaced.
        Err(error) if error.errno() == Some(Errno::EEXIST) => match inspect::host(spec)?.as_slice() {
            [] => Ok(()),
            _ => Err(error),
        },
        other => other,
    }
}

/// Waits until the pod's end sends and receives, which the kernel brings about in the background:
///
/// - The end was set up while the host's end was down. The kernel lets it send only after its link watch has seen the carrier
///   come (`linkwatch_do_dev` in net/core/link_watch.c), and drops all packets until then. The operational state tells; newer
///   kernels bring it up to date when they are asked for the interface (`rtnl_getlink`).
/// - An IPv6 address takes packets once it has its local route, which a work item adds, without duplicate address detection
///   too (`addrconf_dad_work` in net/ipv6/addrconf.c).
fn wait_until_ready(spec: &PodSpec, netns: &Netns) -> Result<(), Error> {
    let mut socket = Socket::open_in(Protocol::Route, netns)?;
    let deadline = Instant::now() + READY_LIMIT;
    while !is_ready(&mut socket, spec)? {
        if Instant::now() >= deadline {
            tracing::warn!(interface = %spec.pod_interface, "the pod's interface is not ready yet; its first packets may be lost");
            break;
        }
        thread::sleep(READY_POLL);
    }
    Ok(())
}

fn is_ready(socket: &mut Socket, spec: &PodSpec) -> Result<bool, Error> {
    let is_up = |attribute: &LinkAttribute| matches!(attribute, LinkAttribute::OperState(State::Up));
    if !find(socket, &spec.pod_interface)?.is_some_and(|link| link.attributes.iter().any(is_up)) {
        return Ok(false);
    }
    let Some(address) = spec.addresses.get(Family::Ipv6) else { return Ok(true) };
    let found = socket.get(request::look_up(address));
    Ok(matches!(found, Ok(RouteNetlinkMessage::NewRoute(route)) if route.header.kind == RouteType::Local))
}

fn batch(socket: &mut Socket, requests: Vec<Request<RouteNetlinkMessage>>) -> Result<(), Error> {
    socket.batch(requests).into_iter().collect()
}

fn delete(socket: &mut Socket, interface: &InterfaceName) -> Result<bool, Error> {
    match batch(socket, vec![request::delete(interface)]) {
        Ok(()) => Ok(true),
        Err(error) if error.errno() == Some(Errno::ENODEV) => Ok(false),
        Err(error) => Err(error),
    }
}

/// An interface of the socket's namespace; none if there is none of that name.
fn find(socket: &mut Socket, interface: &InterfaceName) -> Result<Option<LinkMessage>, Error> {
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

fn index_of(socket: &mut Socket, interface: &InterfaceName) -> Result<u32, Error> {
    match find(socket, interface)? {
        Some(link) => Ok(link.header.index),
        None => Err(Error::Refused(Refusal {
            operation: "find",
            object: interface.to_string(),
            errno: Errno::ENODEV,
            explanation: Some("it was deleted while it was being set up".to_owned()),
        })),
    }
}
