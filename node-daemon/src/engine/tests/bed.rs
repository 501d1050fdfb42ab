//! A node for tests: a fake kernel, a scripted cluster source, facts the test gives, files in a directory that goes with it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use husk_dataplane::Error;
use husk_dataplane::error::Refusal;
use husk_dataplane::fake::{FakeKernel, FakeState};
use husk_dataplane::links::ActualKind;
use husk_dataplane::nft::ForeignChain;
use husk_dataplane::policy::ActualSet;
use husk_dataplane::wireguard::KeyRing;
use husk_ipam::lease::{BootTime, Demand, Lease, LeaseStore, Supply};
use husk_overlay::config::Config;
use husk_overlay::endpoint::{AttachmentId, Endpoint, NetnsIdentity};
use husk_overlay::esp::{Aead, AssociationId};
use husk_overlay::facts::{EspFacts, Facts, OwnEpoch, RouteLimit, SpentAssociation, UnderlayRoute, WireguardSupport};
use husk_overlay::ipc::{LEASE_DIRECTORY, NODE_FILE, NodeFile, Request, Response};
use husk_overlay::issue::IssueKind;
use husk_overlay::kernel::policy::{PolicyElement, PolicyTable, PolicyValue};
use husk_overlay::kernel::{Desired, LinkKind, XfrmStateKey};
use husk_overlay::keys::PrivateKey;
use husk_overlay::marks;
use husk_overlay::mode::Mode;
use husk_overlay::name::{ContainerId, InstanceId, InterfaceName, NetworkName, NodeName};
use husk_overlay::plan::{router_addresses, vxlan_mac};
use husk_overlay::port_mapping::{PortMapping, TransportProtocol};
use husk_overlay::prefix::{Family, Prefix};
use husk_overlay::probe::{Limits, Path, Report, Target};
use husk_overlay::record::{DualStack, EspEpochRecord, EspRecord, NodeRecord, Snapshot, WireguardRecord};
use husk_policy::object::Objects;

use nix::errno::Errno;

use crate::engine::{Engine, Handle, Node, Parts, State, channel};
use crate::keys::KeyStore;
use crate::node_file::Writer;
use crate::source::{Claim, ClusterSource, SourceError};

pub(super) fn prefix(text: &str) -> Prefix {
    text.parse().unwrap()
}

pub(super) fn name(index: u16) -> NodeName {
    NodeName::new(&format!("host{index}")).unwrap()
}

pub(super) fn interface(text: &str) -> InterfaceName {
    InterfaceName::new(text).unwrap()
}

pub(super) fn key(seed: u16) -> PrivateKey {
    let mut bytes = [9; 32];
    bytes[1..3].copy_from_slice(&seed.to_be_bytes());
    PrivateKey::from_random(bytes).unwrap()
}

pub(super) fn public_key(seed: u16) -> husk_overlay::keys::PublicKey {
    key(seed).public()
}

pub(super) fn address(index: u16) -> DualStack {
    let [high, low] = index.to_be_bytes();
    let four = IpAddr::V4(Ipv4Addr::new(172, 16, high, low));
    let six = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 1, index));
    [four, six].into_iter().collect()
}

pub(super) fn config(mode: Mode) -> Config {
    let mut config = Config::new(vec![prefix("10.64.0.0/10"), prefix("fd42::/48")]);
    config.mode = mode;
    config
}

pub(super) fn blocks(index: u16) -> BTreeSet<Prefix> {
    let four = prefix("10.64.0.0/10").subnet(26, index.into()).unwrap();
    let six = prefix("fd42::/48").subnet(122, index.into()).unwrap();
    BTreeSet::from([four, six])
}

/// What node `host<index>` publishes for ESP: these epochs, with a key for each.
pub(super) fn esp_record(index: u16, epochs: &[u64]) -> EspRecord {
    let epoch = |epoch: &u64| {
        let seed = 1000 * u16::try_from(*epoch).unwrap() + index;
        EspEpochRecord { epoch: *epoch, public_key: public_key(seed), spi_salt: u64::from(seed) }
    };
    EspRecord { cipher: Aead::default(), udp_port: None, epochs: epochs.iter().map(epoch).collect() }
}

/// The record of node `host<index>`, complete for every mode but for its ESP epochs.
pub(super) fn record(index: u16) -> NodeRecord {
    NodeRecord {
        name: name(index),
        instance: InstanceId::new(&format!("{index:032x}")).unwrap(),
        created: jiff::Timestamp::from_second(1_800_000_000 + i64::from(index)).unwrap(),
        addresses: address(index),
        underlay_mtu: 1500,
        blocks: blocks(index),
        router: router_addresses(&blocks(index)),
        vxlan_mac: Some(vxlan_mac(&name(index))),
        wireguard: vec![WireguardRecord { slot: 0, generation: 0, port: 51820, public_key: public_key(index) }],
        esp: None,
    }
}

pub(super) fn id(pod: &str) -> AttachmentId {
    AttachmentId {
        network: NetworkName::new("husk").unwrap(),
        container_id: ContainerId::new(pod).unwrap(),
        ifname: interface("eth0"),
    }
}

/// What was asked of the source, and how things stood when it was.
#[derive(Debug, Clone)]
pub(super) enum Asked {
    Publish { record: NodeRecord, kernel: Box<FakeState> },
    Claim(Prefix),
    Release { block: Prefix, node_file: Option<NodeFile>, record: Option<NodeRecord> },
}

#[derive(Default)]
pub(super) struct Cluster {
    /// The truth.
    pub(super) snapshot: Snapshot,
    /// What policy is made of.
    pub(super) objects: Arc<Objects>,
    /// Those of policy cannot be read, though the rest can.
    pub(super) objects_down: bool,
    /// What the source lists instead, while it lags behind.
    pub(super) stale: Option<Snapshot>,
    /// Nothing can be read or written.
    pub(super) down: bool,
    /// Nothing can be written.
    pub(super) read_only: bool,
    /// Blocks another node gets just before they are claimed.
    pub(super) lost: BTreeSet<Prefix>,
    /// Run when a block is released, before it is.
    pub(super) log: Vec<Asked>,
    pub(super) snapshots: u64,
}

/// A cluster source in memory.
#[derive(Clone)]
pub(super) struct Scripted {
    cluster: Arc<Mutex<Cluster>>,
    kernel: FakeKernel,
    node_file: PathBuf,
}

impl Scripted {
    pub(super) fn state(&self) -> MutexGuard<'_, Cluster> {
        self.cluster.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn writable(&self) -> Result<MutexGuard<'_, Cluster>, SourceError> {
        let cluster = self.state();
        if cluster.down || cluster.read_only { Err(unavailable()) } else { Ok(cluster) }
    }
}

fn unavailable() -> SourceError {
    SourceError::Unavailable { subject: "scripted".into(), reason: "the test says so".into() }
}

impl ClusterSource for Scripted {
    fn snapshot(&mut self) -> Result<Snapshot, SourceError> {
        let mut cluster = self.state();
        cluster.snapshots += 1;
        if cluster.down {
            return Err(unavailable());
        }
        Ok(cluster.stale.as_ref().unwrap_or(&cluster.snapshot).clone())
    }

    fn policy_objects(&mut self) -> Result<Arc<Objects>, SourceError> {
        let cluster = self.state();
        if cluster.down || cluster.objects_down { Err(unavailable()) } else { Ok(Arc::clone(&cluster.objects)) }
    }

    fn publish(&mut self, record: &NodeRecord) -> Result<(), SourceError> {
        let kernel = Box::new(self.kernel.state().clone());
        let mut cluster = self.writable()?;
        cluster.log.push(Asked::Publish { record: record.clone(), kernel });
        cluster.snapshot.nodes.insert(record.name.clone(), record.clone());
        Ok(())
    }

    fn claim(&mut self, block: Prefix, node: &NodeName) -> Result<Claim, SourceError> {
        let mut cluster = self.writable()?;
        cluster.log.push(Asked::Claim(block));
        if cluster.lost.remove(&block) {
            cluster.snapshot.blocks.insert(block, name(999));
        }
        if cluster.snapshot.blocks.contains_key(&block) {
            return Ok(Claim::Taken);
        }
        cluster.snapshot.blocks.insert(block, node.clone());
        Ok(Claim::Granted)
    }

    fn release(&mut self, block: Prefix, node: &NodeName) -> Result<(), SourceError> {
        let node_file = read_node_file(&self.node_file);
        let mut cluster = self.writable()?;
        let record = cluster.snapshot.nodes.get(node).cloned();
        cluster.log.push(Asked::Release { block, node_file, record });
        if cluster.snapshot.blocks.get(&block) == Some(node) {
            cluster.snapshot.blocks.remove(&block);
        }
        Ok(())
    }

    fn withdraw(&mut self, node: &NodeName) -> Result<(), SourceError> {
        self.writable()?.snapshot.nodes.remove(node);
        Ok(())
    }
}

fn read_node_file(path: &std::path::Path) -> Option<NodeFile> {
    std::fs::read(path).ok().map(|text| serde_json::from_slice(&text).unwrap())
}

/// What the node says of itself.
pub(super) struct NodeState {
    pub(super) addresses: DualStack,
    pub(super) underlay_mtu: u32,
    pub(super) wireguard: WireguardSupport,
    pub(super) key: u16,
    pub(super) blind: Option<&'static str>,
    pub(super) keyless: bool,
    pub(super) device_fails: bool,
    /// Pod interfaces that appear only after the node was looked at.
    pub(super) not_seen_yet: BTreeSet<InterfaceName>,
    /// Leases of pods of which somebody looked at the node after it was made.
    pub(super) started_devices: u32,
    /// MTU of host interfaces of pods; one that is not named has the largest there is.
    pub(super) pod_mtus: BTreeMap<InterfaceName, u32>,
    /// Pods that were given an MTU, with the MTU their tunnel had at that time.
    pub(super) tuned: Vec<(InterfaceName, u32, Option<u32>)>,
    /// Why no pod can be given an MTU.
    pub(super) untunable: Option<Errno>,
    pub(super) foreign_chains: Vec<ForeignChain>,
    /// Time since boot.
    pub(super) uptime: Duration,
    /// WireGuard generations: the seed of the key, if it is not `key`, and when it was made.
    pub(super) generations: BTreeMap<u64, (Option<u16>, Duration)>,
    /// Keys of ESP epochs, in files as on a real node.
    pub(super) keys: KeyStore,
    /// Those of WireGuard generations are in files too, instead of known from the start.
    pub(super) generations_in_files: bool,
    pub(super) mode: Mode,
    pub(super) esp_unavailable: Option<String>,
    /// No key can be made or destroyed.
    pub(super) keys_fail: bool,
    /// Nothing can be written down before it is done.
    pub(super) notes_fail: bool,
    /// Times somebody tried to make or destroy a key.
    pub(super) key_actions: u32,
    /// Router addresses a packet was sent to.
    pub(super) greeted: Vec<(IpAddr, Duration)>,
    pub(super) xfrm_errors: BTreeMap<String, u64>,
    /// Port of the process that takes ESP in UDP, while it runs.
    pub(super) udp_port: Option<u16>,
    /// Why that process does not start.
    pub(super) udp_fails: Option<&'static str>,
    /// What there is to be probed.
    pub(super) targets: BTreeMap<Path, Target>,
    /// What was found.
    pub(super) probes: BTreeMap<Path, Report>,
    /// Probes of others are dropped by a firewall.
    pub(super) deaf: bool,
    /// Threads that have ended.
    pub(super) ended: Vec<&'static str>,
    pub(super) probed: Limits,
    /// Paths on which nothing is answered.
    pub(super) silent: BTreeSet<Path>,
    /// What will be known when the plan is carried out, if that is something else.
    pub(super) foreseen: Option<Limits>,
    /// Peers that somebody wants to be probed at once.
    pub(super) demanded: Vec<NodeName>,
}

impl NodeState {
    fn keys_in_files(&self) -> bool {
        self.mode.uses_esp() || self.generations_in_files
    }

    fn wireguard_epochs(&mut self) -> anyhow::Result<BTreeMap<u64, OwnEpoch>> {
        if !self.mode.uses_wireguard() {
            return Ok(BTreeMap::new());
        }
        if self.generations_in_files {
            return self.keys.epochs(self.uptime);
        }
        let own = |(generation, (seed, created)): (&u64, &(Option<u16>, Duration))| {
            let public_key = public_key(seed.unwrap_or(self.key));
            (*generation, OwnEpoch { public_key, spi_salt: 0, created: *created })
        };
        Ok(self.generations.iter().map(own).collect())
    }

    fn esp(&mut self) -> anyhow::Result<EspFacts> {
        Ok(EspFacts {
            unavailable: self.esp_unavailable.clone(),
            epochs: self.keys.epochs(self.uptime)?,
            published: self.keys.published(),
            installed: BTreeMap::new(),
            spent: self.keys.spent(),
        })
    }
}

#[derive(Clone)]
pub(super) struct FakeNode {
    state: Arc<Mutex<NodeState>>,
    kernel: FakeKernel,
}

impl FakeNode {
    pub(super) fn state(&self) -> MutexGuard<'_, NodeState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Node for FakeNode {
    fn facts(&mut self, snapshot: &Snapshot, created: jiff::Timestamp) -> anyhow::Result<Facts> {
        let mut state = self.state();
        if let Some(reason) = state.blind {
            anyhow::bail!("{reason}");
        }
        let route = || UnderlayRoute {
            interface: interface("eth0"),
            mtu: 1500,
            limited_by: RouteLimit::Interface,
            on_link: true,
        };
        let others = snapshot.nodes.values().filter(|record| record.name != name(0));
        let interfaces = self.kernel.state().interfaces.clone();
        let esp = if state.mode.uses_esp() { Some(state.esp()?) } else { None };
        let wireguard_epochs = state.wireguard_epochs()?;
        let is_pod = |it: &InterfaceName| marks::is_pod_interface(it.as_str()) && !state.not_seen_yet.contains(it);
        Ok(Facts {
            node: name(0),
            instance: record(0).instance,
            created,
            addresses: state.addresses,
            underlay_mtu: state.underlay_mtu,
            underlay_interface: Some(interface("eth0")),
            foreign_prefixes: BTreeSet::new(),
            routes: others.flat_map(|record| record.addresses.iter()).map(|to| (to, route())).collect(),
            wireguard: Some(state.wireguard.clone()),
            probed: state.probed.clone(),
            silent: state.silent.clone(),
            offload: husk_overlay::offload::Offload::default(),
            wireguard_epochs,
            sessions: BTreeMap::new(),
            esp,
            uptime: state.uptime,
            rotation_requested: false,
            pod_interfaces: interfaces.into_iter().filter(is_pod).map(|it| (it, 7)).collect(),
            threaded_napi: true,
            ipv6: true,
            router_advertisements: BTreeSet::new(),
        })
    }

    fn ensure_userspace_device(&mut self, interface: &InterfaceName) -> anyhow::Result<()> {
        let mut state = self.state();
        if state.device_fails {
            anyhow::bail!("no /dev/net/tun");
        }
        if !self.kernel.state().own.links.contains_key(interface) {
            state.started_devices += 1;
            self.kernel.create_userspace_device(interface, 1420);
        }
        Ok(())
    }

    fn stop_userspace_device(&mut self, interface: &InterfaceName) -> anyhow::Result<()> {
        if self.state().device_fails {
            anyhow::bail!("it ignores every signal");
        }
        let mut kernel = self.kernel.state();
        let kind = kernel.own.links.get(interface).map(|link| link.kind.clone());
        if kind == Some(ActualKind::Known(LinkKind::WireguardUserspace)) {
            kernel.remove_link(interface);
        }
        Ok(())
    }

    fn pod_interfaces(&mut self) -> anyhow::Result<BTreeMap<InterfaceName, u32>> {
        let state = self.state();
        let interfaces = self.kernel.state().interfaces.clone();
        let pods = interfaces.into_iter().filter(|it| marks::is_pod_interface(it.as_str()));
        Ok(pods.map(|it| (it.clone(), *state.pod_mtus.get(&it).unwrap_or(&65_535))).collect())
    }

    fn set_pod_mtu(&mut self, endpoint: &Endpoint, mtu: u32) -> Result<(), Error> {
        let mut state = self.state();
        let pod = &endpoint.host_interface;
        // The host's end takes it in any case.
        state.pod_mtus.insert(pod.clone(), mtu);
        if let Some(errno) = state.untunable {
            let refusal = Refusal { operation: "set MTU", object: pod.to_string(), errno, explanation: None };
            return Err(Error::Refused(refusal));
        }
        let tunnel = self.kernel.state().own.links.get(&interface("husk-wg0")).map(|link| link.mtu);
        state.tuned.push((pod.clone(), mtu, tunnel));
        Ok(())
    }

    fn foreign_chains(&mut self) -> Vec<ForeignChain> {
        self.state().foreign_chains.clone()
    }

    fn ensure_udp_encapsulation(&mut self, port: u16) -> anyhow::Result<()> {
        let mut state = self.state();
        if let Some(reason) = state.udp_fails {
            anyhow::bail!("{reason}");
        }
        state.udp_port = Some(port);
        Ok(())
    }

    fn stop_udp_encapsulation(&mut self) -> anyhow::Result<()> {
        self.state().udp_port = None;
        Ok(())
    }

    fn uptime(&mut self) -> Duration {
        self.state().uptime
    }

    fn begin_epoch(&mut self, epoch: u64) -> anyhow::Result<()> {
        let mut state = self.state();
        state.key_actions += 1;
        anyhow::ensure!(!state.keys_fail, "the disk is full");
        let now = state.uptime;
        if state.keys_in_files() {
            return state.keys.begin(epoch, now);
        }
        let seed = 30_000 + u16::try_from(epoch).unwrap();
        anyhow::ensure!(state.generations.insert(epoch, (Some(seed), now)).is_none(), "it is there already");
        Ok(())
    }

    fn retire_epoch(&mut self, epoch: u64) -> anyhow::Result<()> {
        let mut state = self.state();
        state.key_actions += 1;
        anyhow::ensure!(!state.keys_fail, "the disk is full");
        state.generations.remove(&epoch);
        state.keys.retire(epoch)
    }

    fn spend(&mut self, associations: &BTreeMap<AssociationId, SpentAssociation>) -> anyhow::Result<()> {
        let mut state = self.state();
        anyhow::ensure!(!state.notes_fail, "no space left");
        state.keys.spend(associations)
    }

    fn take_back(&mut self, associations: &BTreeSet<XfrmStateKey>) -> anyhow::Result<()> {
        self.state().keys.take_back(associations)
    }

    fn note_published(&mut self, epochs: &BTreeSet<u64>) -> anyhow::Result<()> {
        let mut state = self.state();
        anyhow::ensure!(!state.notes_fail, "no space left");
        let now = state.uptime;
        state.keys.note_published(epochs, now)
    }

    fn xfrm_errors(&mut self) -> BTreeMap<String, u64> {
        self.state().xfrm_errors.clone()
    }

    fn greet(&mut self, routers: &[IpAddr], after: Duration) {
        self.state().greeted.extend(routers.iter().map(|router| (*router, after)));
    }

    fn key_ring(&mut self) -> anyhow::Result<KeyRing> {
        let mut state = self.state();
        if state.keyless {
            anyhow::bail!("the key file is on fire");
        }
        if state.keys_in_files() {
            let now = state.uptime;
            return state.keys.ring(now);
        }
        Ok(state.generations.values().map(|(seed, _)| key(seed.unwrap_or(state.key))).collect())
    }

    fn counters(&mut self) -> BTreeMap<String, crate::report::Counter> {
        BTreeMap::new()
    }

    fn policy_counters(&mut self) -> BTreeMap<String, crate::report::Counter> {
        [("denied_ingress".to_owned(), crate::report::Counter { packets: 3, bytes: 180 })].into()
    }

    fn policy_element(&mut self, set: &str, key: &PolicyElement) -> anyhow::Result<Option<PolicyValue>> {
        let kernel = self.kernel.state();
        let Some(actual) = &kernel.own.policy else { return Ok(None) };
        let sets = actual.sets.iter().filter_map(|(name, set)| match set {
            ActualSet::Ours(set) => Some((name.clone(), Arc::clone(set))),
            _ => None,
        });
        let table = PolicyTable { sets: sets.collect(), ..PolicyTable::default() };
        Ok(husk_policy::compile::path::look_up(&table, set, *key))
    }

    fn remember(&mut self, _: &Desired) {}

    fn probe(&mut self, targets: &BTreeMap<Path, Target>) {
        self.state().targets.clone_from(targets);
    }

    fn limits_under(&mut self, _: &BTreeMap<Path, Target>) -> Option<Limits> {
        self.state().foreseen.clone()
    }

    fn probes(&mut self) -> BTreeMap<Path, Report> {
        self.state().probes.clone()
    }

    fn is_deaf(&mut self) -> bool {
        self.state().deaf
    }

    fn ended(&mut self) -> Vec<&'static str> {
        self.state().ended.clone()
    }

    fn demand_probe(&mut self, peer: &NodeName) -> Option<Duration> {
        let mut state = self.state();
        state.demanded.push(peer.clone());
        Some(state.uptime)
    }
}

pub(super) struct Bed {
    pub(super) directory: tempfile::TempDir,
    pub(super) config: Config,
    pub(super) kernel: FakeKernel,
    pub(super) source: Scripted,
    pub(super) node: FakeNode,
    pub(super) engine: Engine<FakeKernel, Scripted, FakeNode>,
    pub(super) state: tokio::sync::watch::Receiver<State>,
}

impl Bed {
    /// Node `host0` of a cluster of so many, all blocks allocated, the own record not published yet.
    pub(super) fn new(mode: Mode, nodes: u16) -> Self {
        let bed = Self::of(config(mode));
        for index in 0..nodes {
            bed.allocate(index);
            if index > 0 {
                bed.join(index);
            }
        }
        bed
    }

    /// A node that is alone and has no blocks.
    pub(super) fn of(config: Config) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let kernel = FakeKernel::with_interfaces(["eth0"]);
        let source =
            Scripted { cluster: Arc::default(), kernel: kernel.clone(), node_file: directory.path().join(NODE_FILE) };
        let state = NodeState {
            addresses: address(0),
            underlay_mtu: 1500,
            wireguard: WireguardSupport::Kernel,
            key: 0,
            blind: None,
            keyless: false,
            device_fails: false,
            not_seen_yet: BTreeSet::new(),
            started_devices: 0,
            pod_mtus: BTreeMap::new(),
            tuned: Vec::new(),
            untunable: None,
            foreign_chains: Vec::new(),
            uptime: Duration::from_secs(1000),
            generations: BTreeMap::from([(0, (None, Duration::ZERO))]),
            keys: KeyStore::open(directory.path(), &config).unwrap(),
            generations_in_files: false,
            mode: config.mode,
            esp_unavailable: None,
            keys_fail: false,
            notes_fail: false,
            key_actions: 0,
            greeted: Vec::new(),
            xfrm_errors: BTreeMap::new(),
            udp_port: None,
            udp_fails: None,
            targets: BTreeMap::new(),
            probes: BTreeMap::new(),
            probed: Limits::new(),
            silent: BTreeSet::new(),
            foreseen: None,
            deaf: false,
            ended: Vec::new(),
            demanded: Vec::new(),
        };
        let node = FakeNode { state: Arc::new(Mutex::new(state)), kernel: kernel.clone() };
        let mut config = config;
        config.cni.config_directory = directory.path().join("net.d");
        let (engine, state) = engine(&directory, &config, &kernel, &source, &node);
        Self { directory, config, kernel, source, node, engine, state }
    }

    /// The daemon ends and another one starts: all it knew is gone, kernel, files and cluster are as they were.
    pub(super) fn restart(&mut self) {
        self.flush();
        let keys = KeyStore::open(self.directory.path(), &self.config).unwrap();
        {
            let mut state = self.node.state();
            (state.keys, state.mode) = (keys, self.config.mode);
        }
        (self.engine, self.state) = engine(&self.directory, &self.config, &self.kernel, &self.source, &self.node);
    }

    pub(super) fn pass(&mut self) {
        self.engine.pass();
        self.flush();
    }

    /// Waits until the last snapshot is on disk, as a daemon that stops does.
    fn flush(&self) {
        self.engine.keeper.as_ref().unwrap().flush();
    }

    /// Waits until the objects of policy are on disk.
    pub(super) fn flush_policy(&self) {
        self.engine.policy.flush();
    }

    /// Changes asked of the kernel by one pass.
    pub(super) fn changes_of_a_pass(&mut self) -> u64 {
        let before = self.kernel.state().counters.changes;
        self.pass();
        self.kernel.state().counters.changes - before
    }

    pub(super) fn allocate(&self, index: u16) {
        self.source.state().snapshot.blocks.extend(blocks(index).into_iter().map(|block| (block, name(index))));
    }

    pub(super) fn join(&self, index: u16) {
        let esp = self.config.mode.uses_esp().then(|| esp_record(index, &[1]));
        self.source.state().snapshot.nodes.insert(name(index), NodeRecord { esp, ..record(index) });
    }

    pub(super) fn leave(&self, index: u16) {
        self.source.state().snapshot.nodes.remove(&name(index));
    }

    pub(super) fn published(&self) -> Vec<NodeRecord> {
        let log = self.source.state().log.clone();
        log.into_iter()
            .filter_map(|it| if let Asked::Publish { record, .. } = it { Some(record) } else { None })
            .collect()
    }

    pub(super) fn claims(&self) -> Vec<Prefix> {
        let log = self.source.state().log.clone();
        log.into_iter().filter_map(|it| if let Asked::Claim(block) = it { Some(block) } else { None }).collect()
    }

    pub(super) fn releases(&self) -> Vec<(Prefix, Option<NodeFile>, Option<NodeRecord>)> {
        let release = |it| match it {
            Asked::Release { block, node_file, record } => Some((block, node_file, record)),
            _ => None,
        };
        self.source.state().log.clone().into_iter().filter_map(release).collect()
    }

    /// The own record as the cluster has it.
    pub(super) fn own_record(&self) -> Option<NodeRecord> {
        self.source.state().snapshot.nodes.get(&name(0)).cloned()
    }

    pub(super) fn owned(&self) -> Vec<Prefix> {
        let cluster = self.source.state();
        cluster.snapshot.blocks.iter().filter(|(_, owner)| **owner == name(0)).map(|(block, _)| *block).collect()
    }

    pub(super) fn node_file(&self) -> Option<NodeFile> {
        read_node_file(&self.directory.path().join(NODE_FILE))
    }

    pub(super) fn conflist(&self) -> PathBuf {
        self.directory.path().join("net.d").join(marks::CNI_CONFLIST)
    }

    pub(super) fn issues(&self) -> BTreeSet<IssueKind> {
        self.state.borrow().issues.iter().map(|issue| issue.kind).collect()
    }

    pub(super) fn leases(&self) -> LeaseStore {
        leases(&self.directory)
    }

    /// Leases what `node.json` offers, as the plugin does; for addresses that are asked for, from the given blocks.
    pub(super) fn lease_from(
        &self,
        pod: &str,
        blocks: &[Prefix],
        addresses: Vec<IpAddr>,
    ) -> Result<DualStack, husk_ipam::Error> {
        let netns = NetnsIdentity { path: format!("/run/netns/{pod}"), device: 4, inode: 7 };
        Ok(self.make_lease(pod, blocks, addresses, netns)?.endpoint.addresses)
    }

    fn make_lease(
        &self,
        pod: &str,
        blocks: &[Prefix],
        addresses: Vec<IpAddr>,
        netns: NetnsIdentity,
    ) -> Result<Lease, husk_ipam::Error> {
        self.grant(blocks, &Self::demand(pod, addresses, netns))
    }

    fn demand(pod: &str, addresses: Vec<IpAddr>, netns: NetnsIdentity) -> Demand {
        Demand { addresses, ..Demand::plain(id(pod), netns) }
    }

    fn grant(&self, blocks: &[Prefix], demand: &Demand) -> Result<Lease, husk_ipam::Error> {
        let families: BTreeSet<Family> = self.config.families().collect();
        let reserved = router_addresses(&self.owned().into_iter().collect());
        let supply = Supply { blocks, families: &families, reserved, cool_down: Duration::from_secs(0) };
        self.leases().lock().unwrap().allocate(&supply, demand, BootTime::now())
    }

    /// A lease whose ADD is under way as long as the value lives.
    pub(super) fn lease_being_wired(&self, pod: &str) -> Lease {
        let netns = NetnsIdentity { path: format!("/run/netns/{pod}"), device: 4, inode: 7 };
        self.make_lease(pod, &self.node_file().unwrap().blocks, Vec::new(), netns).unwrap()
    }

    /// A lease of a pod whose namespace is this file.
    pub(super) fn lease_in(&self, pod: &str, namespace: &std::path::Path) {
        use std::os::unix::fs::MetadataExt as _;
        let found = namespace.metadata().unwrap();
        let path = namespace.display().to_string();
        let netns = NetnsIdentity { path, device: found.dev(), inode: found.ino() };
        self.make_lease(pod, &self.node_file().unwrap().blocks, Vec::new(), netns).unwrap();
    }

    pub(super) fn lease(&self, pod: &str) -> Result<DualStack, husk_ipam::Error> {
        let blocks = self.node_file().expect("the node is ready").blocks;
        self.lease_from(pod, &blocks, Vec::new())
    }

    /// A lease of a pod that wants a port of the host.
    pub(super) fn lease_with_port(&self, pod: &str, port: u16) {
        let netns = NetnsIdentity { path: format!("/run/netns/{pod}"), device: 4, inode: 7 };
        let port = NonZeroU16::new(port).unwrap();
        let protocol = TransportProtocol::Tcp;
        let port_mappings = vec![PortMapping { protocol, host_port: port, host_ip: None, container_port: port }];
        let demand = Demand { port_mappings, ..Self::demand(pod, Vec::new(), netns) };
        self.grant(&self.node_file().unwrap().blocks, &demand).unwrap();
    }

    pub(super) fn release(&self, pod: &str) {
        self.leases().release(&id(pod), BootTime::now()).unwrap();
    }

    /// The plugin's part: interface, host routes and neighbours of a pod that has a lease.
    pub(super) fn plug(&self, pod: &str) {
        self.kernel.state().interfaces.insert(id(pod).host_interface());
    }

    pub(super) fn unplug(&self, pod: &str) {
        self.kernel.state().remove_link(&id(pod).host_interface());
    }

    pub(super) fn handle(&self) -> Handle {
        channel(self.state.clone(), self.leases()).0
    }

    pub(super) fn ask(&self, request: Request) -> Response {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(self.handle().answer(request))
    }
}

fn leases(directory: &tempfile::TempDir) -> LeaseStore {
    LeaseStore::new(directory.path().join(LEASE_DIRECTORY), Duration::from_secs(5))
}

fn engine(
    directory: &tempfile::TempDir,
    config: &Config,
    kernel: &FakeKernel,
    source: &Scripted,
    node: &FakeNode,
) -> (Engine<FakeKernel, Scripted, FakeNode>, tokio::sync::watch::Receiver<State>) {
    let (sender, state) = tokio::sync::watch::channel(State::default());
    let parts = Parts {
        config: config.clone(),
        node_name: name(0),
        kernel: kernel.clone(),
        source: source.clone(),
        node: node.clone(),
        leases: leases(directory),
        writer: Writer::new(config, directory.path()),
        state_file: Some(directory.path().join("snapshot.json")),
        boot_id: "this-boot".into(),
        block_offset: 0,
    };
    (Engine::new(parts, sender, record(0).created), state)
}
