//! The node as it really is: its addresses, its routes to the peers, how WireGuard can be had, its private keys.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use husk_dataplane::netlink::{Protocol, Socket};
use husk_dataplane::netns::Netns;
use husk_dataplane::nft::ForeignChain;
use husk_dataplane::pod::{self, PodSpec};
use husk_dataplane::underlay::{self, HostAddress, Interface};
use husk_dataplane::wireguard::{KeyRing, Wireguard};
use husk_dataplane::{Error, napi, nft, sysctl};
use husk_overlay::config::{Config, WireguardChoice};
use husk_overlay::endpoint::Endpoint;
use husk_overlay::facts::{Facts, WireguardSupport};
use husk_overlay::kernel::Desired;
use husk_overlay::keys::PublicKey;
use husk_overlay::marks;
use husk_overlay::mode::Mode;
use husk_overlay::name::InterfaceName;
use husk_overlay::prefix::{Family, Prefix};
use husk_overlay::record::{DualStack, Snapshot};

use crate::engine::Node;
use crate::files;
use crate::identity::Identity;
use crate::keys::KeyStore;
use crate::report::Counter;
use crate::wireguard_userspace::Keeper;

/// The UDP port of the discard service (RFC 863): what matters is that a packet goes there, not what becomes of it.
const DISCARD: u16 = 9;

/// How long what is known of other firewalls counts: asking starts a program.
const FOREIGN_INTERVAL: Duration = Duration::from_secs(30);

/// The slot whose key carries the mesh.
const SLOT: u8 = 0;

/// The own node.
pub struct Host {
    config: Config,
    identity: Identity,
    socket: Socket,
    keys: KeyStore,
    sysctl_file: PathBuf,
    support: Option<WireguardSupport>,
    threaded_napi: bool,
    devices: Keeper,
    /// Firewalls of others, and when they were looked at.
    foreign: Option<(Instant, Vec<ForeignChain>)>,
    /// Underlay addresses in use, which are kept as long as the host has them.
    chosen: DualStack,
    /// Configured addresses that no interface has.
    missing: BTreeSet<IpAddr>,
}

impl Host {
    /// The node in whose network namespace the caller runs.
    ///
    /// # Errors
    /// When the kernel gives no netlink socket, or the folder for keys cannot be made.
    pub fn new(
        config: &Config,
        identity: Identity,
        run_directory: &Path,
        sysctl_file: PathBuf,
        runtime: tokio::runtime::Handle,
    ) -> Result<Self> {
        let socket = Socket::open(Protocol::Route).context("cannot talk to the kernel over netlink")?;
        Ok(Self {
            config: config.clone(),
            identity,
            socket,
            keys: KeyStore::open(run_directory)?,
            sysctl_file,
            support: None,
            threaded_napi: napi::supported(),
            devices: Keeper::new(run_directory, runtime),
            foreign: None,
            chosen: DualStack::default(),
            missing: BTreeSet::new(),
        })
    }

    /// How WireGuard can be had; asked once, a module that is loaded later is found by the next daemon.
    fn wireguard_support(&mut self) -> Result<WireguardSupport> {
        if let Some(support) = &self.support {
            return Ok(support.clone());
        }
        let sockets = Path::new(marks::WIREGUARD_SOCKET_DIRECTORY);
        let kernel = Wireguard::open(sockets).and_then(|mut wireguard| wireguard.kernel_support());
        let support = support_of(kernel, Path::new("/dev/net/tun").exists())
            .context("cannot find out whether the kernel has WireGuard")?;
        let chosen = match (self.config.wireguard.device, &support) {
            (WireguardChoice::Userspace, _) | (WireguardChoice::Auto, WireguardSupport::Userspace) => "userspace",
            (_, WireguardSupport::Kernel) => "kernel",
            _ => "none",
        };
        tracing::info!(device = chosen, configured = ?self.config.wireguard.device, "chose the WireGuard device");
        self.support = Some(support.clone());
        Ok(support)
    }

    /// The node's underlay address of a family: configured, else the one in use as long as it is there, else on the
    /// configured interface, else where the default route leaves, else the only one there is.
    fn choose_address(&mut self, family: Family, all: &[HostAddress]) -> Result<Option<IpAddr>> {
        if let Some(configured) = self.config.underlay.addresses.get(family) {
            return Ok(self.configured_address(configured, all));
        }
        let ours = |interface: &InterfaceName| interface.as_str().starts_with(marks::INTERFACE_PREFIX);
        let wanted = self.config.underlay.interface.as_ref();
        // Other nodes do not reach this one at an address of the cluster, which somebody put on a bridge or on loopback. Where
        // there is no other, one of the tunnels' family counts, so that the plan can tell what is wrong with it.
        let inside = |it: &&HostAddress| self.config.cluster_cidrs.iter().any(|cidr| cidr.contains(it.address));
        let (overlapping, mut usable): (Vec<&HostAddress>, Vec<_>) = all
            .iter()
            .filter(|it| it.lasting && Family::of(it.address) == family && !ours(&it.interface))
            .filter(|it| wanted.is_none_or(|wanted| it.interface == *wanted))
            .partition(inside);
        if usable.is_empty() && family == self.config.underlay.family {
            usable = overlapping;
        }
        if let Some(kept) = self.chosen.get(family).filter(|kept| usable.iter().any(|it| it.address == *kept)) {
            return Ok(Some(kept));
        }
        if let Some(route) = underlay::default_route(&mut self.socket, family)? {
            if usable.iter().any(|it| it.address == route.source) {
                return Ok(Some(route.source));
            }
            if let Some(there) = usable.iter().find(|it| it.interface == route.interface) {
                return Ok(Some(there.address));
            }
        }
        match usable.as_slice() {
            [only] => Ok(Some(only.address)),
            [first, ..] if wanted.is_some() => Ok(Some(first.address)),
            _ => Ok(None),
        }
    }

    /// A configured address counts only where an interface has it: nobody else would get an answer from it.
    fn configured_address(&mut self, configured: IpAddr, all: &[HostAddress]) -> Option<IpAddr> {
        if all.iter().any(|it| it.address == configured) {
            self.missing.remove(&configured);
            return Some(configured);
        }
        if self.missing.insert(configured) {
            tracing::error!(
                address = %configured,
                "no interface has the address that underlay.addresses names; give it to one, or correct the configuration"
            );
        }
        None
    }

    fn wireguard_keys(&mut self) -> Result<BTreeMap<u8, PublicKey>> {
        if self.config.mode != Mode::Wireguard {
            return Ok(BTreeMap::new());
        }
        Ok(BTreeMap::from([(SLOT, self.keys.wireguard(SLOT)?.public())]))
    }
}

impl Node for Host {
    fn facts(&mut self, snapshot: &Snapshot, created: jiff::Timestamp) -> Result<Facts> {
        let interfaces = underlay::interfaces(&mut self.socket).context("cannot list interfaces")?;
        let all = underlay::addresses(&mut self.socket).context("cannot list addresses")?;
        let mut addresses = DualStack::default();
        for family in Family::ALL {
            if let Some(address) = self.choose_address(family, &all)? {
                addresses.set(address);
            }
        }
        self.chosen = addresses;
        let family = self.config.underlay.family;
        let carrier = addresses.get(family).and_then(|address| carrier_of(address, &all, &interfaces));
        let peers = snapshot.nodes.values().filter(|record| record.name != self.identity.name);
        let destinations: BTreeSet<IpAddr> = peers.flat_map(|record| record.addresses.iter()).collect();
        let routes = underlay::routes(&mut self.socket, destinations).context("cannot look up routes to the peers")?;
        let wireguard = if self.config.mode == Mode::Wireguard { Some(self.wireguard_support()?) } else { None };
        Ok(Facts {
            node: self.identity.name.clone(),
            instance: self.identity.instance.clone(),
            created,
            addresses,
            underlay_mtu: carrier.map_or(0, |interface| interface.mtu_for(family)),
            foreign_prefixes: foreign_prefixes(&all, &interfaces),
            routes,
            wireguard,
            wireguard_keys: self.wireguard_keys()?,
            pod_interfaces: interfaces
                .iter()
                .filter(|interface| marks::is_pod_interface(interface.name.as_str()))
                .map(|interface| interface.name.clone())
                .collect(),
            threaded_napi: self.threaded_napi,
            ipv6: Path::new("/proc/sys/net/ipv6").exists(),
            router_advertisements: advertised(&interfaces),
            underlay_interface: carrier.map(|interface| interface.name.clone()),
        })
    }

    fn ensure_userspace_device(&mut self, interface: &InterfaceName) -> Result<()> {
        self.devices.ensure(interface)
    }

    fn stop_userspace_device(&mut self, interface: &InterfaceName) -> Result<()> {
        if self.devices.stop(interface)? {
            tracing::info!(%interface, "stopped the userspace WireGuard device, which the configuration has no place for");
        }
        Ok(())
    }

    fn pod_interfaces(&mut self) -> Result<BTreeMap<InterfaceName, u32>> {
        let interfaces = underlay::interfaces(&mut self.socket).context("cannot list interfaces")?;
        let pods = interfaces.into_iter().filter(|interface| marks::is_pod_interface(interface.name.as_str()));
        Ok(pods.map(|interface| (interface.name, interface.mtu)).collect())
    }

    fn set_pod_mtu(&mut self, endpoint: &Endpoint, mtu: u32) -> Result<(), Error> {
        let netns = Netns::open(&endpoint.netns.path)?;
        let found = netns.identity()?;
        if (found.device, found.inode) != (endpoint.netns.device, endpoint.netns.inode) {
            return Err(Error::Namespace {
                operation: "use",
                path: endpoint.netns.path.clone(),
                source: io::Error::other("it is another one than the pod was connected in"),
            });
        }
        pod::set_mtu(&PodSpec::of(endpoint, mtu), &netns)
    }

    fn foreign_chains(&mut self) -> Vec<ForeignChain> {
        if let Some((at, chains)) = &self.foreign
            && at.elapsed() < FOREIGN_INTERVAL
        {
            return chains.clone();
        }
        let before = self.foreign.take().map(|(_, chains)| chains).unwrap_or_default();
        let chains = nft::foreign_forward_drops().unwrap_or_else(|error| {
            tracing::debug!(%error, "firewalls of others cannot be looked at");
            before.clone()
        });
        for chain in chains.iter().filter(|chain| !before.contains(chain)) {
            tracing::info!("a firewall that may keep packets of pods from being forwarded: {chain}");
        }
        self.foreign.insert((Instant::now(), chains)).1.clone()
    }

    fn key_ring(&mut self) -> Result<KeyRing> {
        let mut ring = KeyRing::default();
        if self.config.mode == Mode::Wireguard {
            ring.insert(self.keys.wireguard(SLOT)?);
        }
        Ok(ring)
    }

    fn counters(&mut self) -> BTreeMap<String, Counter> {
        match nft::read_counters() {
            Ok(counters) => counters
                .into_iter()
                .map(|(name, value)| (name, Counter { packets: value.packets, bytes: value.bytes }))
                .collect(),
            Err(error) => {
                tracing::warn!(%error, "drop counters cannot be read");
                BTreeMap::new()
            }
        }
    }

    fn greet(&mut self, routers: &[IpAddr]) {
        for router in routers {
            let from: IpAddr = match router {
                IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
            };
            if let Err(error) = UdpSocket::bind((from, 0)).and_then(|socket| socket.send_to(&[], (*router, DISCARD))) {
                tracing::debug!(%router, %error, "the session with this peer starts with its first packet");
            }
        }
    }

    fn remember(&mut self, desired: &Desired) {
        let known = load_sysctls(&self.sysctl_file);
        let new: Vec<&String> = desired.sysctls.keys().filter(|path| !known.contains_key(*path)).collect();
        if new.is_empty() {
            return;
        }
        let mut all = known.clone();
        match sysctl::read(new) {
            Ok(found) => all.extend(found),
            Err(error) => {
                tracing::warn!(%error, "kernel parameters as found cannot be read; cleanup will not bring them back");
                return;
            }
        }
        let text = serde_json::to_vec_pretty(&all).unwrap_or_default();
        if let Err(error) = files::replace(&self.sysctl_file, &text, 0o600) {
            tracing::warn!(%error, "kernel parameters as found cannot be kept; cleanup will not bring them back");
        }
    }
}

/// Only a kernel that says so has no WireGuard; one that gave no answer is asked again, by the next pass.
fn support_of(kernel: Result<(), Error>, tun: bool) -> Result<WireguardSupport, Error> {
    match kernel {
        Ok(()) => Ok(WireguardSupport::Kernel),
        Err(Error::Unsupported { .. }) if tun => Ok(WireguardSupport::Userspace),
        Err(error @ Error::Unsupported { .. }) => {
            Ok(WireguardSupport::Unavailable { reason: format!("{error}; and /dev/net/tun does not exist") })
        }
        Err(error) => Err(error),
    }
}

/// Kernel parameters as they were before Husk changed them; empty when nothing was kept.
#[must_use]
pub fn load_sysctls(path: &Path) -> BTreeMap<String, String> {
    let text = files::read_text(path, 1 << 20).ok().flatten().unwrap_or_default();
    serde_json::from_str(&text).unwrap_or_default()
}

fn carrier_of<'a>(address: IpAddr, all: &[HostAddress], interfaces: &'a [Interface]) -> Option<&'a Interface> {
    let name = &all.iter().find(|it| it.address == address)?.interface;
    interfaces.iter().find(|interface| interface.name == *name)
}

/// Networks on the host's own interfaces.
fn foreign_prefixes(all: &[HostAddress], interfaces: &[Interface]) -> BTreeSet<Prefix> {
    let counts = |name: &InterfaceName| {
        interfaces.iter().any(|interface| interface.name == *name && !interface.loopback && !interface.is_husk())
    };
    all.iter()
        .filter(|it| it.lasting && counts(&it.interface))
        .filter_map(|it| Prefix::containing(it.address, it.length).ok())
        .collect()
}

/// Interfaces of the host whose `accept_ra` is 1 or was made 2 by Husk: 1 stops working once the host forwards
/// (Documentation/networking/ip-sysctl.rst), and their default routes would go.
fn advertised(interfaces: &[Interface]) -> BTreeSet<InterfaceName> {
    let foreign = interfaces.iter().filter(|interface| !interface.loopback && !interface.is_husk());
    let accepts = |interface: &&Interface| {
        let path = format!("net/ipv6/conf/{}/accept_ra", interface.name);
        let found = sysctl::read([&path]).unwrap_or_default();
        found.get(&path).is_some_and(|value| value == "1" || value == "2")
    };
    foreign.filter(accepts).map(|interface| interface.name.clone()).collect()
}

#[cfg(test)]
mod tests;
