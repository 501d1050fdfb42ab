//! The places of a cluster as network namespaces around one that forwards: what a kernel does with packets by its rules.
//!
//! ```text
//!  one  two  three  four        namespaces without addresses; a packet socket in each sends and hears frames
//!   |    |     |     |          veth pairs, their other ends named as those of pods
//!  +-------- node ---------+    routes and permanent neighbours for all addresses; the rules under test
//!               |               a veth pair of another name
//!            outside            pods of other nodes, and whoever is no pod
//! ```
//!
//! Whether a packet was dropped is known without waiting. All packets are sent by one thread on one processor, on which the kernel
//! queues them one behind the other for their next hop (`netif_rx`, net/core/dev.c). When a frame that was sent last, beside all
//! rules, has arrived at every end, the packets before it have passed the node, and when a second one has, they have arrived.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_overlay::mac::MacAddress;
use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CpuSet, sched_getcpu, sched_setaffinity};
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, recvfrom, sendto, setsockopt, socket, sockopt,
};
use nix::unistd::Pid;
use serde_json::Value;

use super::frame::{Heard, Probe, read, sentinel};
use super::{EXTERNALS, SLOTS, endpoints};
use crate::netns::{Netns, enter};
use crate::scope::Scope;
use crate::{eventually, patience};

/// How long a frame may be under way.
const LIMIT: Duration = Duration::from_secs(10);

/// Seconds that connection tracking remembers a connection of one packet: enough for its answer, and few for its table.
const REMEMBERED: &str = "5";

/// Time-outs of connection tracking that concern connections of one packet.
const TIMEOUTS: [&str; 8] = [
    "generic_timeout",
    "icmp_timeout",
    "icmpv6_timeout",
    "udp_timeout",
    "tcp_timeout_syn_sent",
    "tcp_timeout_syn_recv",
    "sctp_timeout_cookie_wait",
    "sctp_timeout_cookie_echoed",
];

/// A packet socket with the interface that it sends through.
#[derive(Debug)]
struct Port {
    socket: OwnedFd,
    through: LinkAddr,
}

/// An end: a place of the node, or all that is outside.
#[derive(Debug)]
struct End {
    /// In its namespace.
    own: Port,
    own_mac: MacAddress,
    /// In the node's.
    node: Port,
    node_mac: MacAddress,
    netns: Netns,
}

/// The namespaces. Gone when this is dropped.
#[derive(Debug)]
pub struct Wire {
    // Before the scope, whose names they bear.
    ends: Vec<End>,
    node: Netns,
    by_address: BTreeMap<IpAddr, usize>,
    sentinels: u32,
    scope: Scope,
}

impl Port {
    /// One that only sends hears no protocol.
    fn open(netns: &Netns, interface: &str, hears: Option<SockProtocol>) -> Result<Self> {
        let open = || -> Result<Self> {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let socket = socket(AddressFamily::Packet, SockType::Raw, flags, hears)?;
            setsockopt(&socket, sockopt::RcvBufForce, &(16 << 20)).context("enlarging the queue")?;
            let mut all = getifaddrs()?.filter(|it| it.interface_name == interface);
            let through = all.find_map(|it| it.address?.as_link_addr().copied());
            Ok(Self { socket, through: through.context("it has no such interface")? })
        };
        netns.run(open)?.with_context(|| format!("a packet socket on {interface} in {}", netns.name()))
    }

    fn send(&self, frame: &[u8]) -> Result<()> {
        sendto(self.socket.as_raw_fd(), frame, &self.through, MsgFlags::empty()).context("sending a frame")?;
        Ok(())
    }

    fn receive(&self, deadline: Instant) -> Result<Heard> {
        let mut buffer = [0; 2048];
        loop {
            match recvfrom::<LinkAddr>(self.socket.as_raw_fd(), &mut buffer) {
                // What this end sends is heard, too.
                Ok((_, Some(from))) if from.pkttype() == libc::PACKET_OUTGOING => {}
                Ok((length, _)) => {
                    if let Some(heard) = read(&buffer[..length]) {
                        return Ok(heard);
                    }
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    ensure!(!left.is_zero(), "a frame that nothing can stop did not arrive");
                    let mut waiting = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
                    poll(&mut waiting, PollTimeout::try_from(left)?)?;
                }
                Err(error) => return Err(error).context("hearing frames"),
            }
        }
    }
}

impl Wire {
    /// Makes the namespaces.
    ///
    /// # Errors
    /// When they cannot be made.
    pub fn start() -> Result<Self> {
        let scope = Scope::new()?;
        let node = Netns::create(&scope.name("node"))?;
        node.sysctl("net/ipv4/ip_forward", "1")?;
        node.sysctl("net/ipv4/conf/all/send_redirects", "0")?;
        node.sysctl("net/ipv4/conf/default/send_redirects", "0")?;
        node.sysctl("net/ipv6/conf/all/forwarding", "1")?;
        let mut wire = Self { ends: Vec::new(), node, by_address: BTreeMap::new(), sentinels: 0, scope };
        for slot in SLOTS.iter().filter(|slot| slot.local) {
            let endpoints = endpoints();
            let endpoint = endpoints.values().find(|it| it.pod_name.as_deref() == Some(slot.name));
            let interface = endpoint.map(|it| it.host_interface.to_string()).context("a place without a pod")?;
            wire.add_end(slot.name, &interface, &slot.addresses)?;
        }
        let remote = SLOTS.iter().filter(|slot| !slot.local).flat_map(|slot| slot.addresses);
        let outside: Vec<IpAddr> = remote.chain(EXTERNALS.iter().flatten().copied()).collect();
        wire.add_end("outside", "out0", &outside)?;
        wire.await_links()?;
        Ok(wire)
    }

    /// Until the kernel has noticed that both ends of a veth pair are up, which it does by and by, it drops what they send
    /// (`linkwatch_do_dev`, net/core/link_watch.c).
    fn await_links(&self) -> Result<()> {
        for netns in self.ends.iter().map(|end| &end.netns).chain([&self.node]) {
            eventually(&format!("the links of {} to be up", netns.name()), LIMIT, || {
                let links = netns.ip_json(["link", "show", "type", "veth"])?;
                let ready = |link: &Value| link["operstate"] == "UP" && link["qdisc"] != "noop";
                Ok(links.as_array().is_some_and(|all| !all.is_empty() && all.iter().all(ready)))
            })?;
        }
        Ok(())
    }

    fn add_end(&mut self, name: &str, interface: &str, addresses: &[IpAddr]) -> Result<()> {
        let netns = Netns::create(&self.scope.name(name))?;
        let [own_mac, node_mac] = ["own", "node"].map(|side| MacAddress::derived(&["policy", side, name]));
        netns.sysctl("net/ipv6/conf/default/disable_ipv6", "1")?;
        let mut commands = format!(
            "link add {interface} address {node_mac} type veth peer name eth0 address {own_mac} netns {}\n\
             link set {interface} up\n",
            netns.name()
        );
        for address in addresses {
            let length = if address.is_ipv4() { 32 } else { 128 };
            commands += &format!("route add {address}/{length} dev {interface}\n");
            commands += &format!("neigh add {address} lladdr {own_mac} dev {interface} nud permanent\n");
            self.by_address.insert(*address, self.ends.len());
        }
        self.node.ip_batch(&commands)?;
        netns.ip_batch("link set eth0 up\n")?;
        let (own, node) =
            (Port::open(&netns, "eth0", Some(SockProtocol::EthAll))?, Port::open(&self.node, interface, None)?);
        self.ends.push(End { own, own_mac, node, node_mac, netns });
        Ok(())
    }

    /// Runs `work` on a thread inside the node, from where alone packets are to be sent.
    ///
    /// # Errors
    /// As [`Netns::run`].
    pub fn run<T: Send>(&mut self, work: impl FnOnce(&mut Self) -> T + Send) -> Result<T> {
        let node = self.node.file().try_clone()?;
        enter(&node, None, || {
            let mut here = CpuSet::new();
            here.set(sched_getcpu()?)?;
            sched_setaffinity(Pid::from_raw(0), &here)?;
            Ok(work(self))
        })?
    }

    /// Time-outs exist once connection tracking is used in the namespace.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn forget_soon(&self) -> Result<()> {
        TIMEOUTS.iter().try_for_each(|name| self.node.sysctl(&format!("net/netfilter/nf_conntrack_{name}"), REMEMBERED))
    }

    fn end(&self, address: IpAddr) -> Result<(usize, &End)> {
        let index = *self.by_address.get(&address).with_context(|| format!("nobody has {address}"))?;
        Ok((index, &self.ends[index]))
    }

    /// Sends packets, and tells of each whether it arrived where it belongs.
    ///
    /// # Errors
    /// When frames get lost, or arrive elsewhere.
    pub fn arrivals(&mut self, probes: &[Probe]) -> Result<Vec<bool>> {
        let places: BTreeMap<u32, usize> =
            probes.iter().enumerate().map(|(index, probe)| (probe.number, index)).collect();
        for probe in probes {
            let (_, end) = self.end(probe.addresses().0)?;
            end.own.send(&probe.frame(end.own_mac, end.node_mac))?;
        }
        let mut arrived = vec![false; probes.len()];
        for _ in 0..2 {
            self.sentinels += 1;
            for end in &self.ends {
                end.node.send(&sentinel(end.node_mac, end.own_mac, self.sentinels))?;
            }
            for (index, end) in self.ends.iter().enumerate() {
                let deadline = Instant::now() + patience(LIMIT);
                loop {
                    match end.own.receive(deadline)? {
                        Heard::Sentinel(number) if number == self.sentinels => break,
                        Heard::Sentinel(_) => {}
                        Heard::Packet(source, destination, number) => {
                            let Some(place) = places.get(&number).copied() else { continue };
                            let probe = &probes[place];
                            if probe.addresses() == (source, destination) {
                                ensure!(
                                    self.end(destination)?.0 == index,
                                    "{probe:?} arrived where it does not belong"
                                );
                                arrived[place] = true;
                            }
                        }
                    }
                }
            }
        }
        Ok(arrived)
    }
}
