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

mod bandwidth;
mod by_source;
mod find;
mod inspect;
mod paths;
mod request;
mod sysctl;
#[cfg(test)]
mod tests;
mod vacate;

use std::collections::BTreeSet;
use std::thread;
use std::time::{Duration, Instant};

use husk_overlay::bandwidth::{Bandwidth, Limit};
use husk_overlay::endpoint::Endpoint;
use husk_overlay::mac::MacAddress;
use husk_overlay::name::InterfaceName;
use husk_overlay::plan::loopback_parameter;
use husk_overlay::prefix::Family;
use husk_overlay::record::DualStack;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage, State};
use netlink_packet_route::route::RouteType;
use nix::errno::Errno;

pub use inspect::PodMtu;
pub use paths::forget_paths;
pub use vacate::{detach_index, vacate};

use self::find::{Ends, deleted, ends, existing, find, index_of};
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

/// Index of the loopback interface in every network namespace (`LOOPBACK_IFINDEX` in include/net/flow.h; the kernel stops if
/// it is not, net/core/dev.c).
const LOOPBACK_INDEX: u32 = 1;

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
    /// How much the pod may receive and send.
    pub bandwidth: Option<Bandwidth>,
    /// The host reaches a port of the pod through a loopback address of its own.
    pub loopback: bool,
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
            bandwidth: endpoint.bandwidth,
            loopback: loopback_parameter(endpoint).is_some(),
        }
    }

    /// Limit of what the host end sends.
    fn ingress(&self) -> Option<Limit> {
        self.bandwidth.and_then(|bandwidth| bandwidth.ingress)
    }

    /// Limit of what the pod end sends.
    fn egress(&self) -> Option<Limit> {
        self.bandwidth.and_then(|bandwidth| bandwidth.egress)
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
    /// Index, which no other interface gets.
    pub index: u32,
}

/// Wires a pod. The calling thread's network namespace is the host's.
///
/// A host end that exists already is residue of an attachment that was not undone, as its name belongs to this attachment
/// alone: it is replaced, unless the pod's interface exists.
///
/// Returns the families whose default route in the pod leads here. Where the pod had a default route before, of another
/// network, that one stays, and only what the pod sends from the new addresses goes here.
///
/// # Errors
/// [`Error::Refused`] with [`Errno::EEXIST`] when the namespace has an interface of that name; the other errors of
/// netlink, of the namespace and of kernel parameters. Nothing is left behind then.
pub fn attach(spec: &PodSpec, netns: &Netns) -> Result<BTreeSet<Family>, Error> {
    let mut host = Socket::open(Protocol::Route)?;
    create(&mut host, spec, netns)?;
    let Ends { index, peer } = ends(&mut host, &spec.host_interface)?;
    let wired = wire_pod(spec, netns, peer).and_then(|(mut pod, defaults)| {
        wire_host(&mut host, index, spec)?;
        wait_until_ready(&mut pod, spec, peer)?;
        Ok(defaults)
    });
    if wired.is_err() {
        // The error that stopped us is the one to report. A host end that stays is found by its name: by DEL, which a
        // runtime sends after a failed ADD, and by garbage collection. One of the name that was made since is not ours.
        if let Err(left) = detach_index(&spec.host_interface, index) {
            tracing::warn!(error = %left, "a failed attachment could not be undone");
        }
    }
    wired
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
pub fn check(spec: &PodSpec, netns: &Netns, pod_mtu: &PodMtu) -> Result<Vec<String>, Error> {
    // Where any is right inside, it is not known which one is.
    let host_mtu = if *pod_mtu == PodMtu::Any { PodMtu::Any } else { PodMtu::OneOf(vec![spec.mtu]) };
    let mut deviations = inspect::host(spec, &host_mtu)?;
    deviations.extend(netns.run_in(|| inspect::pod(spec, pod_mtu))??);
    Ok(deviations)
}

/// True if a namespace has an interface of that name.
///
/// # Errors
/// Those of netlink and of the namespace.
pub fn interface_exists(netns: &Netns, name: &InterfaceName) -> Result<bool, Error> {
    Ok(netns.run_in(|| find(&mut Socket::open(Protocol::Route)?, name))??.is_some())
}

/// Index of an interface in the calling thread's namespace; none if there is none of that name.
///
/// # Errors
/// Those of netlink.
pub fn host_interface_index(name: &InterfaceName) -> Result<Option<u32>, Error> {
    Ok(find(&mut Socket::open(Protocol::Route)?, name)?.map(|link| link.header.index))
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
    Some(HostInterface { name, alias: alias.unwrap_or_default(), index: link.header.index })
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

/// Configures the pod end, and returns a socket in the pod's namespace and the families whose default route leads there.
fn wire_pod(spec: &PodSpec, netns: &Netns, index: u32) -> Result<(Socket, BTreeSet<Family>), Error> {
    netns.run_in(|| {
        let mut socket = Socket::open(Protocol::Route)?;
        let loopback = InterfaceName::new("lo").expect("lo is a valid name");
        sysctl::tune_pod(spec, &loopback)?;
        let mut requests = vec![request::set_up(LOOPBACK_INDEX, &loopback, None)];
        if let Some(limit) = spec.egress() {
            requests.push(bandwidth::add(index, &spec.pod_interface, limit)?);
        }
        requests.extend(spec.addresses.iter().map(|address| request::add_address(index, &spec.pod_interface, address)));
        requests.push(request::set_up(index, &spec.pod_interface, None));
        let gateways = || spec.families().map(request::gateway);
        requests.extend(gateways().map(|it| request::add_neighbour(index, &spec.pod_interface, it, spec.host_mac)));
        requests.extend(gateways().map(|it| request::add_default_route(index, &spec.pod_interface, it)));
        let mut results = socket.batch(requests);
        let default_routes = results.split_off(results.len().saturating_sub(spec.families().count()));
        results.into_iter().collect::<Result<(), Error>>()?;
        let mut defaults = BTreeSet::new();
        for (address, added) in spec.addresses.iter().zip(default_routes) {
            match added {
                Ok(()) => {
                    defaults.insert(Family::of(address));
                }
                Err(error) if error.errno() == Some(Errno::EEXIST) => {
                    by_source::route(&mut socket, index, &spec.pod_interface, address)?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok((socket, defaults))
    })?
}

/// Configures the host end.
fn wire_host(socket: &mut Socket, index: u32, spec: &PodSpec) -> Result<(), Error> {
    sysctl::tune_host(spec)?;
    let mut requests = Vec::new();
    if let Some(limit) = spec.ingress() {
        requests.push(bandwidth::add(index, &spec.host_interface, limit)?);
    }
    requests.push(request::set_up(index, &spec.host_interface, Some(spec.alias())));
    for address in spec.addresses.iter() {
        requests.push(request::add_neighbour(index, &spec.host_interface, address, spec.pod_mac));
        requests.push(request::add_host_route(index, &spec.host_interface, address));
    }
    let errors = socket.batch(requests).into_iter().filter_map(Result::err);
    let (existing, mut others): (Vec<Error>, Vec<Error>) =
        errors.partition(|error| error.errno() == Some(Errno::EEXIST));
    if !others.is_empty() {
        return Err(others.swap_remove(0));
    }
    match existing.into_iter().next() {
        None => Ok(()),
        // The daemon knows the lease since before the interface was there, and may have been faster: then what exists is
        // what we wanted. A route of somebody else's is not replaced. The daemon's word on the MTU may be newer than ours.
        Some(error) => match inspect::host(spec, &PodMtu::Any)?.as_slice() {
            [] => Ok(()),
            _ => Err(error),
        },
    }
}

/// Waits until the pod's end sends and receives, which the kernel brings about in the background:
///
/// - The end was set up while the host's end was down. The kernel lets it send only after its link watch has seen the carrier
///   come (`linkwatch_do_dev` in net/core/link_watch.c), and drops all packets until then. The operational state tells; newer
///   kernels bring it up to date when they are asked for the interface (`rtnl_getlink`).
/// - An IPv6 address takes packets once it has its local route, which a work item adds, without duplicate address detection
///   too (`addrconf_dad_work` in net/ipv6/addrconf.c).
fn wait_until_ready(socket: &mut Socket, spec: &PodSpec, index: u32) -> Result<(), Error> {
    let deadline = Instant::now() + READY_LIMIT;
    while !is_ready(socket, spec, index)? {
        if Instant::now() >= deadline {
            tracing::warn!(interface = %spec.pod_interface, "the pod's interface is not ready yet; its first packets may be lost");
            break;
        }
        thread::sleep(READY_POLL);
    }
    Ok(())
}

fn is_ready(socket: &mut Socket, spec: &PodSpec, index: u32) -> Result<bool, Error> {
    let is_up = |attribute: &LinkAttribute| matches!(attribute, LinkAttribute::OperState(State::Up));
    // One that somebody deleted meanwhile will never be, which is an error; one of its name that was made since is not it.
    let link = existing(socket, &spec.pod_interface)?;
    if link.header.index != index {
        return Err(deleted(&spec.pod_interface));
    }
    if !link.attributes.iter().any(is_up) {
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
