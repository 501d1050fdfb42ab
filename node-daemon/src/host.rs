//! The node as it really is: its addresses, its routes to the peers, what its kernel can, its private keys.

mod addresses;
mod ears;
mod paths;
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use husk_dataplane::link_counters::LinkCounters;
use husk_dataplane::netlink::{Protocol, Socket};
use husk_dataplane::netns::Netns;
use husk_dataplane::nft::ForeignChain;
use husk_dataplane::pod::{self, PodMtu, PodSpec};
use husk_dataplane::underlay;
use husk_dataplane::way::{self, NeighbourStanding, Way};
use husk_dataplane::wireguard::KeyRing;
use husk_dataplane::{Error, link_counters, napi, nft, policy, sysctl, xfrm};
use husk_ipam::lease::since_boot;
use husk_overlay::config::Config;
use husk_overlay::endpoint::Endpoint;
use husk_overlay::esp::AssociationId;
use husk_overlay::facts::{EspFacts, Facts, SpentAssociation};
use husk_overlay::issue::Issue;
use husk_overlay::kernel::policy::{PolicyElement, PolicyValue};
use husk_overlay::kernel::{Desired, XfrmStateKey};
use husk_overlay::mode::Mode;
use husk_overlay::name::{InterfaceName, NodeName};
use husk_overlay::offload::Candidate;
use husk_overlay::prefix::Family;
use husk_overlay::record::{DualStack, Snapshot};
use husk_overlay::{marks, probe};
use tokio::sync::watch;

use self::addresses::{advertised, carrier_of, foreign_prefixes};
use self::ears::{Count, Ears};
use self::paths::Paths;
use self::support::Support;
use crate::companion::{Companions, Job, Keeper};
use crate::engine::Node;
use crate::files;
use crate::identity::Identity;
use crate::keys::KeyStore;
use crate::offload::OffloadTesting;
use crate::probing::Probing;
use crate::report::Counter;

/// The UDP port of the discard service (RFC 863): what matters is that a packet goes there, not what becomes of it.
const DISCARD: u16 = 9;

/// How long what is known of other firewalls counts: asking starts a program.
const FOREIGN_INTERVAL: Duration = Duration::from_secs(30);

/// The own node.
pub struct Host {
    config: Config,
    identity: Identity,
    socket: Socket,
    keys: KeyStore,
    sysctl_file: PathBuf,
    support: Support,
    threaded_napi: bool,
    companions: Keeper,
    /// Firewalls of others, and when they were looked at.
    foreign: Option<(Instant, Vec<ForeignChain>)>,
    /// What the kernel has learned of the paths to the peers.
    paths: Paths,
    /// Underlay addresses in use, which are kept as long as the host has them.
    chosen: DualStack,
    /// Configured addresses that no interface has.
    missing: BTreeSet<IpAddr>,
    /// Who probes the paths to the peers, if anybody does.
    probing: Option<Probing>,
    ears: Ears,
    /// Who tests the offload of the VXLAN device, if anybody does.
    offload: Option<OffloadTesting>,
    /// What other parts of the daemon may find wrong.
    noticed: Vec<watch::Receiver<Option<Issue>>>,
}

impl Host {
    /// The node in whose network namespace the caller runs.
    ///
    /// # Errors
    /// When the kernel gives no netlink socket, the folder for keys cannot be made, or the preshared key cannot be used.
    pub fn new(config: &Config, identity: Identity, companions: Companions, sysctl_file: PathBuf) -> Result<Self> {
        let socket = Socket::open(Protocol::Route).context("cannot talk to the kernel over netlink")?;
        Ok(Self {
            config: config.clone(),
            identity,
            socket,
            keys: KeyStore::open(&companions.run_directory, config)?,
            sysctl_file,
            support: Support::default(),
            threaded_napi: napi::supported(),
            companions: Keeper::new(companions),
            foreign: None,
            paths: Paths::new(config),
            chosen: DualStack::default(),
            missing: BTreeSet::new(),
            probing: None,
            ears: Ears::default(),
            offload: None,
            noticed: Vec::new(),
        })
    }

    /// Has an issue told that another part of the daemon may have.
    pub fn notice(&mut self, issue: watch::Receiver<Option<Issue>>) {
        self.noticed.push(issue);
    }

    /// Has the paths to the peers probed.
    pub fn probe_with(&mut self, probing: Probing) {
        self.probing = Some(probing);
    }

    /// Has the offload of the VXLAN device tested.
    pub fn test_offload_with(&mut self, offload: OffloadTesting) {
        self.offload = Some(offload);
    }

    /// A userspace device that ended takes its key with it. The kernel's device could not go on with it for half a minute:
    /// the two count handshake times from epochs that lie 27 s apart (TAI64 as gotatun has it, and `TAI64_EPOCH` in
    /// drivers/net/wireguard/noise.c), and peers refuse a handshake that is older than the last.
    fn retire_keys_of(&mut self, interface: &InterfaceName) -> Result<()> {
        let now = since_boot();
        let held: Vec<u64> = self.keys.epochs(now)?.into_keys().collect();
        let theirs = held.into_iter().filter(|generation| marks::wireguard_interface(*generation) == *interface);
        theirs.filter(|_| self.config.mode.uses_wireguard()).try_for_each(|generation| self.keys.retire(generation))
    }

    fn esp(&mut self, now: Duration) -> Result<EspFacts> {
        Ok(EspFacts {
            unavailable: self.support.esp_unavailable(&self.config)?,
            epochs: self.keys.epochs(now)?,
            published: self.keys.published(),
            installed: BTreeMap::new(),
            spent: self.keys.spent(),
        })
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
        // Tunnels send from the node's own address; without one, what is sent is the pods'.
        let sources = if self.config.mode == Mode::Direct { DualStack::default() } else { addresses };
        let mut routes =
            underlay::routes(&mut self.socket, sources, destinations).context("cannot look up routes to the peers")?;
        self.paths.lower(&mut self.socket, &mut routes);
        let mode = self.config.mode;
        let uptime = since_boot();
        let wireguard = if mode.uses_wireguard() { Some(self.support.wireguard(&self.config)?) } else { None };
        let wireguard_epochs = if mode.uses_wireguard() { self.keys.epochs(uptime)? } else { BTreeMap::new() };
        let esp = if mode.uses_esp() { Some(self.esp(uptime)?) } else { None };
        Ok(Facts {
            node: self.identity.name.clone(),
            instance: self.identity.instance.clone(),
            created,
            addresses,
            underlay_mtu: carrier.map_or(0, |interface| interface.mtu_for(family)),
            foreign_prefixes: foreign_prefixes(&all, &interfaces),
            routes,
            wireguard,
            probed: self.probing.as_ref().map(Probing::limits).unwrap_or_default(),
            silent: self.probing.as_ref().map(Probing::silent).unwrap_or_default(),
            offload: self.offload.as_ref().map(OffloadTesting::offload).unwrap_or_default(),
            wireguard_epochs,
            sessions: BTreeMap::new(),
            esp,
            uptime,
            rotation_requested: false,
            pod_interfaces: interfaces
                .iter()
                .filter(|interface| marks::is_pod_interface(interface.name.as_str()))
                .map(|interface| (interface.name.clone(), interface.index))
                .collect(),
            threaded_napi: self.threaded_napi,
            ipv6: Path::new("/proc/sys/net/ipv6").exists(),
            router_advertisements: advertised(&interfaces),
            underlay_interface: carrier.map(|interface| interface.name.clone()),
        })
    }

    fn ensure_userspace_device(&mut self, interface: &InterfaceName) -> Result<()> {
        self.companions.ensure(&Job::WireguardUserspace { interface: interface.clone() })
    }

    fn stop_userspace_device(&mut self, interface: &InterfaceName) -> Result<()> {
        if self.companions.stop(&Job::WireguardUserspace { interface: interface.clone() })? {
            tracing::info!(%interface, "stopped the userspace WireGuard device, which nothing needs any more");
            self.retire_keys_of(interface)?;
        }
        Ok(())
    }

    fn ensure_udp_encapsulation(&mut self, port: u16) -> Result<()> {
        self.companions.ensure(&Job::UdpEncapsulation { port, family: self.config.underlay.family })
    }

    fn stop_udp_encapsulation(&mut self) -> Result<()> {
        // There is one such process, whatever its port and family.
        if self.companions.stop(&Job::UdpEncapsulation { port: 0, family: self.config.underlay.family })? {
            tracing::info!("stopped the process that takes ESP in UDP, which nothing needs any more");
        }
        Ok(())
    }

    fn paths_changed(&mut self) -> bool {
        self.paths.changed(&mut self.socket)
    }

    fn pod_interfaces(&mut self) -> Result<BTreeMap<InterfaceName, u32>> {
        let interfaces = underlay::interfaces(&mut self.socket).context("cannot list interfaces")?;
        let pods = interfaces.into_iter().filter(|interface| marks::is_pod_interface(interface.name.as_str()));
        Ok(pods.map(|interface| (interface.name, interface.mtu)).collect())
    }

    fn set_pod_mtu(&mut self, endpoint: &Endpoint, mtu: u32) -> Result<(), Error> {
        pod::set_mtu(&PodSpec::of(endpoint, mtu), &netns_of(endpoint)?)
    }

    fn forget_paths(&mut self, endpoint: &Endpoint) -> Result<(), Error> {
        // Whatever its MTU is.
        pod::forget_paths(&PodSpec::of(endpoint, 0), &netns_of(endpoint)?)
    }

    fn way(&mut self, packet: &way::Packet) -> Result<Way> {
        Ok(way::of(&mut self.socket, packet)?)
    }

    fn neighbour(&mut self, interface: &InterfaceName, address: IpAddr) -> Option<NeighbourStanding> {
        way::neighbour(&mut self.socket, interface, address).ok()
    }

    fn deviations(&mut self, endpoint: &Endpoint, mtu: Option<u32>) -> Result<Vec<String>> {
        Ok(deviations(endpoint, mtu)?)
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

    fn uptime(&mut self) -> Duration {
        since_boot()
    }

    fn key_ring(&mut self) -> Result<KeyRing> {
        self.keys.ring(since_boot())
    }

    fn begin_epoch(&mut self, epoch: u64) -> Result<()> {
        self.keys.begin(epoch, since_boot())
    }

    fn retire_epoch(&mut self, epoch: u64) -> Result<()> {
        self.keys.retire(epoch)
    }

    fn spend(&mut self, associations: &BTreeMap<AssociationId, SpentAssociation>) -> Result<()> {
        self.keys.spend(associations)
    }

    fn take_back(&mut self, associations: &BTreeSet<XfrmStateKey>) -> Result<()> {
        self.keys.take_back(associations)
    }

    fn note_published(&mut self, epochs: &BTreeSet<u64>) -> Result<()> {
        self.keys.note_published(epochs, since_boot())
    }

    fn noticed(&mut self) -> Vec<Issue> {
        self.noticed.iter().filter_map(|issue| issue.borrow().clone()).collect()
    }

    fn xfrm_errors(&mut self) -> BTreeMap<String, u64> {
        xfrm::statistics()
    }

    fn counters(&mut self) -> BTreeMap<String, Counter> {
        support::counters(nft::read_counters(), "drop counters")
    }

    fn policy_counters(&mut self) -> BTreeMap<String, Counter> {
        support::counters(policy::read_counters(), "counters of policy")
    }

    fn link_counters(&mut self) -> BTreeMap<InterfaceName, LinkCounters> {
        link_counters::read()
            .inspect_err(|error| tracing::warn!(%error, "counters of interfaces cannot be read"))
            .unwrap_or_default()
    }

    fn policy_element(&mut self, set: &str, key: &PolicyElement) -> Result<Option<PolicyValue>> {
        Ok(policy::lookup(set, key)?.map(|(_, value)| value))
    }

    fn greet(&mut self, routers: &[IpAddr], after: Duration) {
        if routers.is_empty() {
            return;
        }
        if after.is_zero() {
            return send_greetings(routers);
        }
        let routers = routers.to_vec();
        let later = move || {
            std::thread::sleep(after);
            send_greetings(&routers);
        };
        if let Err(error) = std::thread::Builder::new().name("greeting".into()).spawn(later) {
            tracing::debug!(%error, "sessions with some peers start with their first packets");
        }
    }

    fn test_offload(&mut self, candidates: BTreeMap<NodeName, Candidate>) {
        if let Some(offload) = &self.offload {
            offload.set_candidates(candidates);
        }
    }

    fn probe(&mut self, targets: &BTreeMap<probe::Path, probe::Target>) {
        self.paths.carried_out();
        if let Some(probing) = &self.probing {
            probing.set_targets(targets);
        }
    }

    fn limits_under(&mut self, targets: &BTreeMap<probe::Path, probe::Target>) -> Option<probe::Limits> {
        self.probing.as_ref().map(|probing| probing.limits_under(targets))
    }

    fn probes(&mut self) -> BTreeMap<probe::Path, probe::Report> {
        self.probing.as_ref().map(Probing::reports).unwrap_or_default()
    }

    fn probes_of(&mut self, peer: &NodeName) -> BTreeMap<probe::Path, probe::Report> {
        self.probing.as_ref().map(|probing| probing.reports_of(peer)).unwrap_or_default()
    }

    fn is_deaf(&mut self) -> bool {
        let silent = self.probing.as_ref().filter(|probing| probing.is_silent());
        // Asked in this order: what has arrived may not have been heard yet.
        let count = silent.and_then(|probing| {
            let heard = probing.received();
            let arrived = nft::arrived_probes().ok().flatten()?;
            Some(Count { arrived, heard })
        });
        self.ears.are_stopped(count)
    }

    fn ended(&mut self) -> Vec<&'static str> {
        let probing = self.probing.as_ref().filter(|probing| probing.is_over()).map(|_| "husk-probe");
        let offload = self.offload.as_ref().filter(|offload| offload.is_over()).map(|_| "husk-offload");
        probing.into_iter().chain(offload).collect()
    }

    fn demand_probe(&mut self, peer: &NodeName) -> Option<Duration> {
        self.probing.as_ref().map(|probing| probing.demand(peer))
    }

    fn remember(&mut self, desired: &Desired) {
        let known = load_sysctls(&self.sysctl_file);
        // Those of pods go with the pods.
        let lasting = desired.sysctls.keys().filter(|path| !marks::is_pod_parameter(path));
        let new: Vec<&String> = lasting.filter(|path| !known.contains_key(*path)).collect();
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

/// How a pod with this MTU in bytes deviates from what was wired, on the host and inside.
///
/// # Errors
/// When its network namespace is not to be had, or is another by now; those of netlink.
pub(crate) fn deviations(endpoint: &Endpoint, mtu: Option<u32>) -> Result<Vec<String>, Error> {
    // A plugin chained behind may have given the pod less.
    let allowed = mtu.map_or(PodMtu::Any, PodMtu::AtMost);
    pod::check(&PodSpec::of(endpoint, mtu.unwrap_or_default()), &netns_of(endpoint)?, &allowed)
}

/// The network namespace of a pod, if it is still the one that the pod was connected in.
fn netns_of(endpoint: &Endpoint) -> Result<Netns, Error> {
    let netns = Netns::open(&endpoint.netns.path)?;
    let found = netns.identity()?;
    if (found.device, found.inode) != (endpoint.netns.device, endpoint.netns.inode) {
        return Err(Error::Namespace {
            operation: "use",
            path: endpoint.netns.path.clone(),
            source: io::Error::other("it is another one than the pod was connected in"),
        });
    }
    Ok(netns)
}

fn send_greetings(routers: &[IpAddr]) {
    for router in routers {
        let from = Family::of(*router).unspecified();
        if let Err(error) = UdpSocket::bind((from, 0)).and_then(|socket| socket.send_to(&[], (*router, DISCARD))) {
            tracing::debug!(%router, %error, "the session with this peer starts with its first packet");
        }
    }
}

/// Kernel parameters as they were before Husk changed them; empty when nothing was kept.
#[must_use]
pub fn load_sysctls(path: &Path) -> BTreeMap<String, String> {
    let text = files::read_text(path, 1 << 20).ok().flatten().unwrap_or_default();
    serde_json::from_str(&text).unwrap_or_default()
}

#[cfg(test)]
mod tests;
