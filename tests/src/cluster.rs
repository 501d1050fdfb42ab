//! Several hosts on one underlay: a bridge in a namespace of its own, and a world outside behind a router.
//!
//! ```text
//!  host1 eth0 ──┐
//!  host2 eth0 ──┤ switch (bridge) ├── outside eth0   192.0.2.254 / 2001:db8::fe, the hosts' default gateway
//!  host3 eth0 ──┘                             lo     198.51.100.1 / 2001:db8:ffff::1
//! ```
//!
//! The outside has no route to the cluster's addresses: it can answer only what was masqueraded, and a pod's packet
//! that leaks through a default route shows on the underlay.
//!
//! Or a [`Router`] is in the switch's place, each host alone on its link to it ([`ClusterBuilder::routed`]); the addresses are
//! the same, the gateway's is the router's, and the outside is behind it.

mod builder;
mod card;
mod router;

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_overlay::manifest::{self, Manifest};
use husk_overlay::mode::Mode;
use husk_overlay::prefix::{Family, Prefix};
use husk_overlay::record::NodeRecord;
use serde_json::{Value, json};

pub use self::builder::ClusterBuilder;
use self::builder::MANIFESTS;
pub use self::card::{Card, Fault};
pub use self::router::Router;
use crate::capture::Capture;
use crate::eventually;
use crate::host::{Host, Place, UNDERLAY_INTERFACE, lock};
use crate::inject;
use crate::netns::Netns;
use crate::pod::Pod;
use crate::scope::Scope;

/// The last byte of the gateway's underlay addresses.
const GATEWAY: u8 = 254;

/// The last byte of the outside's underlay addresses where the gateway is a router.
const BEHIND_ROUTER: u8 = 253;

/// How long a record may take to become routes on every other host.
const MESH_LIMIT: Duration = Duration::from_secs(10);

/// The modes that any kernel can run; the others need ESP.
pub const MODES: [Mode; 3] = [Mode::Wireguard, Mode::Vxlan, Mode::Direct];

/// The modes that need ESP in the kernel, see [`crate::kernel`].
pub const ESP_MODES: [Mode; 2] = [Mode::Ipsec, Mode::VxlanIpsec];

/// Hosts, switch and outside. Everything goes when it is dropped.
#[derive(Debug)]
pub struct Cluster {
    hosts: Vec<Host>,
    outside: Netns,
    switch: Netns,
    builder: ClusterBuilder,
    // Last: the directory goes after everything that lives in it.
    scope: Arc<Scope>,
}

impl Cluster {
    /// An address beyond the underlay, reached through the hosts' default route.
    pub const OUTSIDE_V4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

    /// Its IPv6 counterpart.
    pub const OUTSIDE_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 1);

    /// A cluster of two hosts in WireGuard mode over IPv4, to be changed as needed.
    #[must_use]
    pub fn builder() -> ClusterBuilder {
        ClusterBuilder::new()
    }

    /// What owns the names and the directory of this cluster.
    #[must_use]
    pub fn scope(&self) -> &Scope {
        &self.scope
    }

    /// The hosts in order.
    #[must_use]
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// The host called `host<number>`, counted from 1.
    #[must_use]
    pub fn host(&self, number: usize) -> &Host {
        &self.hosts[number - 1]
    }

    /// The world behind the hosts' default gateway.
    #[must_use]
    pub fn outside(&self) -> &Netns {
        &self.outside
    }

    /// An address of the outside that is not on the underlay's subnet.
    #[must_use]
    pub fn outside_address(family: Family) -> IpAddr {
        match family {
            Family::Ipv4 => Self::OUTSIDE_V4.into(),
            Family::Ipv6 => Self::OUTSIDE_V6.into(),
        }
    }

    /// The underlay address of the outside, which is the hosts' default gateway: what it sends to a host comes from there.
    #[must_use]
    pub fn gateway(family: Family) -> IpAddr {
        underlay_address(family, GATEWAY)
    }

    /// The router that joins the hosts, if it is not a switch.
    #[must_use]
    pub fn router(&self) -> Option<Router<'_>> {
        self.builder.routed.then(|| Router::new(&self.switch))
    }

    /// The families of the underlay.
    #[must_use]
    pub fn families(&self) -> Vec<Family> {
        self.builder.families()
    }

    /// The mode of every host.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.builder.mode
    }

    /// The pods' address space.
    #[must_use]
    pub fn cluster_cidrs(&self) -> &[Prefix] {
        &self.builder.cluster_cidrs
    }

    /// The directory of manifests that the hosts share.
    #[must_use]
    pub fn manifests(&self) -> PathBuf {
        self.builder.disk.as_deref().unwrap_or(self.scope.directory()).join(MANIFESTS)
    }

    /// What a host has published of itself.
    ///
    /// # Errors
    /// When it has published nothing.
    pub fn record(&self, number: usize) -> Result<NodeRecord> {
        read_record(&self.record_path(number))
    }

    /// The file in which a host publishes itself.
    #[must_use]
    pub fn record_path(&self, number: usize) -> PathBuf {
        self.manifests().join(format!("nodes/{}.yaml", self.host(number).name()))
    }

    /// Sends a frame from a host's underlay interface.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn inject(&self, number: usize, frame: &[u8]) -> Result<()> {
        inject::send_frame(self.host(number).netns(), UNDERLAY_INTERFACE, frame)
    }

    /// Sends a frame to a host, as if another had sent it. Captures of the underlay do not see it.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn deliver(&self, number: usize, frame: &[u8]) -> Result<()> {
        inject::send_frame(&self.switch, self.host(number).name(), frame)
    }

    /// Adds one more host to the underlay; its daemon is not started. Returns its number.
    ///
    /// # Errors
    /// When the kernel refuses a part.
    pub fn add_host(&mut self) -> Result<usize> {
        let number = self.plug_in_host()?;
        self.wait_for_ports()?;
        Ok(number)
    }

    /// A host loses its power and comes back: its processes, its namespace with all that the kernel had in it and its run
    /// directories are gone, and the boot is another. Its disk and its addresses are as they were; its daemon is not started. A
    /// pod of its may not outlive it.
    ///
    /// # Errors
    /// When there is a pod of the host still, or the kernel refuses a part.
    pub fn reboot(&mut self, number: usize) -> Result<()> {
        let name = self.host(number).name().to_owned();
        ensure!(
            Arc::strong_count(&self.host(number).place) == 1,
            "{name} has pods, which end with it: drop them first"
        );
        drop(self.hosts.remove(number - 1));
        // The kernel takes its time to remove a namespace, and this end of the cable with it: it may be gone or not.
        let removed = self.switch.program("ip").args(["link", "del", &name]).run()?;
        ensure!(
            removed.status.success() || removed.stderr.contains("Cannot find device"),
            "ip link del {name}: {removed:?}"
        );
        Place::forget_memory(&self.scope, &name)?;
        let host = self.make_host(u8::try_from(number).context("too many hosts")?)?;
        let boot = fs::read_to_string("/proc/sys/kernel/random/uuid").context("asking for a name of the boot")?;
        host.place.pretend_boot(boot.trim())?;
        self.hosts.insert(number - 1, host);
        self.wait_for_ports()
    }

    fn plug_in_host(&mut self) -> Result<usize> {
        let number = u8::try_from(self.hosts.len() + 1).context("too many hosts")?;
        ensure!(number < BEHIND_ROUTER, "an underlay has room for {} hosts", BEHIND_ROUTER - 1);
        let host = self.make_host(number)?;
        self.hosts.push(host);
        Ok(self.hosts.len())
    }

    fn make_host(&self, number: u8) -> Result<Host> {
        let name = format!("host{number}");
        let place = Place::create(&self.scope, &name, self.builder.disk.as_deref())?;
        let addresses = self.connect(&place.netns, &name, number)?;
        let host = Host::new(place, addresses, self.builder.config(&name, &self.manifests()));
        fs::create_dir_all(host.file("/etc/cni/net.d")).context("making the CNI configuration directory")?;
        fs::create_dir_all(host.file("/opt/cni/bin")).context("making the CNI binary directory")?;
        host.configure(|_| ())?;
        Ok(host)
    }

    /// Installs plugin and daemon on every host and waits until all are ready and know each other.
    ///
    /// # Errors
    /// When a daemon does not start, or does not become ready.
    pub fn start(&self) -> Result<()> {
        self.hosts.iter().try_for_each(Host::start)?;
        self.wait_ready()?;
        self.wait_meshed()
    }

    /// A pod of this name on every host, in the hosts' order.
    ///
    /// # Errors
    /// When one cannot be added.
    pub fn add_pods(&self, name: &str) -> Result<Vec<Pod>> {
        self.hosts.iter().map(|host| host.add_pod(name)).collect()
    }

    /// Waits until the daemon of every host is ready.
    ///
    /// # Errors
    /// When one is not.
    pub fn wait_ready(&self) -> Result<()> {
        self.hosts.iter().try_for_each(Host::wait_ready)
    }

    /// Waits until every daemon has routes to all other hosts. One that is ready may not have heard yet of those that became
    /// ready after it.
    ///
    /// # Errors
    /// When one has not in time, or does not run.
    pub fn wait_meshed(&self) -> Result<()> {
        let others = self.hosts.len() - 1;
        self.hosts.iter().try_for_each(|host| {
            let what = format!("{} to have routes to {others} peers", host.name());
            eventually(&what, MESH_LIMIT, || Ok(host.huskctl_json(["status"])?["peers"] == json!([others, others])))
        })
    }

    /// Every host is settled, see [`Host::ensure_settled`].
    ///
    /// # Errors
    /// The first that is not.
    pub fn ensure_settled(&self) -> Result<()> {
        self.hosts.iter().try_for_each(Host::ensure_settled)
    }

    /// Gives a host other underlay addresses, which end in `byte`.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn readdress(&self, number: usize, byte: u8) -> Result<()> {
        let host = self.host(number);
        let flush = format!("addr flush dev {UNDERLAY_INTERFACE} scope global\n");
        *lock(&host.addresses) = self.address(host.netns(), host.name(), byte, &flush)?;
        Ok(())
    }

    /// Changes the MTU of the whole underlay.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set_underlay_mtu(&self, mtu: usize) -> Result<()> {
        let ports = self.hosts.iter().map(Host::name).chain(["outside"]);
        let commands: Vec<_> = ports.map(|port| format!("link set {port} mtu {mtu}")).collect();
        self.switch.ip_batch(&commands.join("\n"))?;
        self.outside.command("ip", ["link", "set", UNDERLAY_INTERFACE, "mtu", &mtu.to_string()])?;
        self.hosts.iter().try_for_each(|host| host.set_underlay_mtu(mtu))
    }

    /// Lets the hosts hand many segments at once to the underlay, as a network card does, or one packet at a time, as from
    /// the start. A capture sees what a wire would only without.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set_offload(&self, on: bool) -> Result<()> {
        // The kernel's own limit (`GSO_MAX_SEGS`, include/linux/netdevice.h).
        let segments = if on { "65535" } else { "1" };
        let ports = self.hosts.iter().map(Host::name).chain(["outside"]);
        let commands: Vec<_> = ports.map(|port| format!("link set {port} gso_max_segs {segments}")).collect();
        self.switch.ip_batch(&commands.join("\n"))?;
        let ends = self.hosts.iter().map(Host::netns).chain([&self.outside]);
        ends.into_iter().try_for_each(|netns| {
            netns.command("ip", ["link", "set", UNDERLAY_INTERFACE, "gso_max_segs", segments]).map(drop)
        })
    }

    /// Pulls or plugs a host's cable.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set_cable(&self, number: usize, plugged: bool) -> Result<()> {
        let state = if plugged { "up" } else { "down" };
        self.switch.command("ip", ["link", "set", self.host(number).name(), state])?;
        self.wait_for_ports()
    }

    /// Captures every packet of the underlay, each once: as it enters the switch, or the router.
    ///
    /// # Errors
    /// When the capture cannot be started.
    pub fn capture(&self) -> Result<Capture> {
        let bridge: &[&str] = if self.builder.routed { &[] } else { &["br0"] };
        Capture::arrivals(&self.switch, bridge)
    }

    /// Leaves everything in place, for people to look at; [`crate::scope::sweep_kept`] removes it from a later process.
    /// Pods have to be kept by their owner (`std::mem::forget`).
    ///
    /// # Errors
    /// When the mark cannot be written; everything is removed then.
    pub fn keep(self) -> Result<()> {
        self.scope.keep()?;
        std::mem::forget(self);
        Ok(())
    }

    /// The kernel reports a carrier to the bridge at most once a second when much happens, and a port discards what
    /// arrives before.
    fn wait_for_ports(&self) -> Result<()> {
        if self.builder.routed {
            return Ok(());
        }
        eventually("the switch to forward on every port", Duration::from_secs(10), || {
            let ports = self.switch.ip_json(["link", "show", "master", "br0"])?;
            let is_up = |port: &&Value| port["flags"].as_array().is_some_and(|flags| flags.iter().any(|it| it == "UP"));
            let mut plugged = ports.as_array().into_iter().flatten().filter(is_up);
            Ok(plugged.all(|port| port["linkinfo"]["info_slave_data"]["state"] == "forwarding"))
        })
    }

    /// Plugs a namespace into the switch, at the port `port`, and gives it addresses that end in `byte`.
    fn connect(&self, netns: &Netns, port: &str, byte: u8) -> Result<Vec<IpAddr>> {
        let (mtu, name, eth) = (self.builder.mtu, netns.name(), UNDERLAY_INTERFACE);
        // With one segment per packet the underlay carries, and a capture sees, what a wire would: no offloads.
        self.switch.ip_batch(&format!(
            "link add {port} mtu {mtu} gso_max_segs 1 type veth peer name {eth} mtu {mtu} gso_max_segs 1 netns {name}\n\
             link set {port} {} up\n",
            if self.builder.routed { "" } else { "master br0" }
        ))?;
        // Nor in pieces: a packet of several buffers shares them with its captures, and a receiver in this same kernel that
        // decrypts in place would put plaintext into a capture of what was ciphertext on the wire.
        netns.command("ethtool", ["-K", eth, "sg", "off"])?;
        self.address(netns, port, byte, &format!("link set {eth} up\n"))
    }

    fn address(&self, netns: &Netns, port: &str, byte: u8, before: &str) -> Result<Vec<IpAddr>> {
        if let Some(router) = self.router() {
            return router.address(netns, port, byte, before, &self.families());
        }
        let mut commands = before.to_owned();
        let mut addresses = Vec::new();
        for family in self.families() {
            let (address, gateway) = (underlay_address(family, byte), underlay_address(family, GATEWAY));
            let (length, option) = if family == Family::Ipv4 { (24, "") } else { (64, "nodad") };
            commands += &format!("addr add {address}/{length} dev {UNDERLAY_INTERFACE} {option}\n");
            if byte != GATEWAY {
                commands += &format!("route replace default via {gateway} dev {UNDERLAY_INTERFACE}\n");
            }
            addresses.push(address);
        }
        netns.ip_batch(&commands)?;
        Ok(addresses)
    }
}

/// Reads a node's record; whoever writes one replaces the file as a whole.
fn read_record(path: &Path) -> Result<NodeRecord> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let manifest::Parsed { manifests, issues, .. } = manifest::parse_all("record", &text);
    let node = manifests.into_iter().find_map(|manifest| match manifest {
        Manifest::Node(record) => Some(record),
        _ => None,
    });
    node.with_context(|| format!("{} holds no node: {issues:?}", path.display()))
}

fn underlay_address(family: Family, byte: u8) -> IpAddr {
    match family {
        Family::Ipv4 => Ipv4Addr::new(192, 0, 2, byte).into(),
        Family::Ipv6 => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, byte.into()).into(),
    }
}
