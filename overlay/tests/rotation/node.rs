//! A node of the model: what its kernel holds, what its disk keeps, what its daemon does.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::time::Duration;

use husk_overlay::config::Config;
use husk_overlay::endpoint::Endpoints;
use husk_overlay::esp::{Association, AssociationId};
use husk_overlay::facts::{AssociationUse, EspFacts, Facts, OwnEpoch, RouteLimit, SpentAssociation, UnderlayRoute};
use husk_overlay::kernel::{XfrmAction, XfrmDirection, XfrmPolicy, XfrmPolicyKey, XfrmStateKey};
use husk_overlay::keys::PublicKey;
use husk_overlay::name::{InstanceId, InterfaceName, NodeName};
use husk_overlay::plan::{Plan, plan};
use husk_overlay::prefix::{Family, Prefix};
use husk_overlay::record::{NodeRecord, Snapshot};
use husk_overlay::rotation::KeyAction;

pub(crate) fn name(index: usize) -> NodeName {
    NodeName::new(&format!("node{index}")).unwrap()
}

pub(crate) fn block(index: usize) -> Prefix {
    format!("10.42.0.{}/26", index * 64).parse().unwrap()
}

fn first_address(index: usize) -> IpAddr {
    format!("192.0.2.{}", index + 1).parse().unwrap()
}

/// An association in a kernel.
pub(crate) struct Installed {
    pub(crate) association: Association,
    pub(crate) packets: u64,
}

#[derive(Default)]
pub(crate) struct Kernel {
    pub(crate) states: BTreeMap<XfrmStateKey, Installed>,
    pub(crate) policies: BTreeMap<XfrmPolicyKey, XfrmPolicy>,
}

/// The run directory: survives the daemon, not a reboot.
#[derive(Default)]
struct Disk {
    epochs: BTreeMap<u64, OwnEpoch>,
    published: BTreeMap<u64, Duration>,
    spent: BTreeMap<AssociationId, SpentAssociation>,
}

/// What a daemon has seen of an association.
#[derive(Clone, Copy)]
struct Watched {
    packets: u64,
    changed: Duration,
    first: Duration,
}

/// Where a pass is. Anything may happen between two steps.
enum Stage {
    Written(Box<Plan>),
    Added(Box<Plan>),
    Set(Box<Plan>),
    Removed(Box<Plan>),
    Published(Box<Plan>),
}

/// The daemon's memory.
#[derive(Default)]
struct Daemon {
    watched: BTreeMap<XfrmStateKey, Watched>,
    stage: Option<Stage>,
    /// The last pass changed something that only counts once it is read back.
    again: bool,
}

pub(crate) struct Node {
    pub(crate) index: usize,
    pub(crate) address: IpAddr,
    pub(crate) kernel: Kernel,
    /// Records this node knows of.
    pub(crate) view: BTreeMap<NodeName, NodeRecord>,
    pub(crate) requested: bool,
    /// The kernel will refuse what it is told to add.
    pub(crate) refusing: bool,
    /// The last plan that was carried out to its end.
    pub(crate) last: Option<Plan>,
    disk: Disk,
    daemon: Option<Daemon>,
    boot: Duration,
    keys: u64,
    /// Associations this machine ever had in its kernel, and whether a packet may have been protected by them.
    history: HashMap<Association, bool>,
}

impl Node {
    pub(crate) fn new(index: usize) -> Self {
        Self {
            index,
            address: first_address(index),
            kernel: Kernel::default(),
            view: BTreeMap::new(),
            requested: false,
            refusing: false,
            last: None,
            disk: Disk::default(),
            daemon: Some(Daemon::default()),
            boot: Duration::ZERO,
            keys: 0,
            history: HashMap::new(),
        }
    }

    pub(crate) fn kill(&mut self) {
        self.daemon = None;
    }

    pub(crate) fn start(&mut self) {
        self.daemon.get_or_insert_with(Daemon::default);
    }

    pub(crate) fn flush(&mut self) {
        self.kernel.states.clear();
    }

    pub(crate) fn reboot(&mut self, now: Duration) {
        self.kernel = Kernel::default();
        self.disk = Disk::default();
        self.daemon = Some(Daemon::default());
        self.boot = now;
        self.requested = false;
    }

    pub(crate) fn busy(&self) -> bool {
        self.daemon.as_ref().is_some_and(|daemon| daemon.again || daemon.stage.is_some())
    }

    pub(crate) fn epochs(&self) -> BTreeSet<u64> {
        self.disk.epochs.keys().copied().collect()
    }

    fn facts(&mut self, count: usize, now: Duration) -> Facts {
        let daemon = self.daemon.as_mut().expect("only a daemon that lives makes passes");
        daemon.watched.retain(|key, _| self.kernel.states.contains_key(key));
        let mut installed = BTreeMap::new();
        for (key, state) in &self.kernel.states {
            let watched =
                daemon.watched.entry(*key).or_insert(Watched { packets: state.packets, changed: now, first: now });
            if watched.packets != state.packets {
                (watched.packets, watched.changed) = (state.packets, now);
            }
            let usage = AssociationUse {
                source: state.association.sender.address,
                packets: state.packets,
                bytes: state.packets * 100,
                undecryptable: 0,
                quiet: now - watched.changed,
                age: now - watched.first,
            };
            installed.insert(*key, usage);
        }
        let route = UnderlayRoute {
            interface: InterfaceName::new("eth0").unwrap(),
            mtu: 1500,
            limited_by: RouteLimit::Interface,
            on_link: true,
        };
        let addresses = self.view.values().flat_map(|record| record.addresses.iter());
        let addresses = addresses.chain((0..count).map(first_address));
        Facts {
            node: name(self.index),
            instance: InstanceId::new(&format!("{:032x}", self.index)).unwrap(),
            created: created(self.index),
            addresses: [self.address].into_iter().collect(),
            underlay_mtu: 1500,
            underlay_interface: None,
            foreign_prefixes: BTreeSet::new(),
            routes: addresses.map(|address| (address, route.clone())).collect(),
            wireguard: None,
            probed: BTreeMap::new(),
            silent: BTreeSet::new(),
            offload: husk_overlay::offload::Offload::default(),
            wireguard_epochs: BTreeMap::new(),
            sessions: BTreeMap::new(),
            esp: Some(EspFacts {
                unavailable: None,
                epochs: self.disk.epochs.clone(),
                published: self.disk.published.clone(),
                installed,
                spent: self.disk.spent.clone(),
            }),
            uptime: now - self.boot,
            rotation_requested: self.requested,
            pod_interfaces: BTreeMap::new(),
            threaded_napi: false,
            ipv6: true,
            router_advertisements: BTreeSet::new(),
        }
    }

    /// Does the next step of a pass, or begins one. Returns the record when it is published.
    pub(crate) fn step(&mut self, config: &Config, count: usize, now: Duration) -> Option<NodeRecord> {
        let stage = self.daemon.as_mut()?.stage.take();
        let mut published = None;
        let next = match stage {
            None => Some(Stage::Written(self.begin(config, count, now))),
            Some(Stage::Written(plan)) => {
                self.add(&plan);
                Some(Stage::Added(plan))
            }
            Some(Stage::Added(plan)) => {
                self.set(&plan);
                Some(Stage::Set(plan))
            }
            Some(Stage::Set(plan)) => {
                self.kernel.policies.retain(|key, _| plan.desired.xfrm_policies.contains_key(key));
                self.kernel.states.retain(|key, _| plan.desired.xfrm_states.contains_key(key));
                self.check_combinations();
                Some(Stage::Removed(plan))
            }
            Some(Stage::Removed(plan)) => {
                published.clone_from(&plan.record);
                Some(Stage::Published(plan))
            }
            Some(Stage::Published(plan)) => {
                self.act(&plan, now);
                self.last = Some(*plan);
                None
            }
        };
        if let Some(daemon) = &mut self.daemon {
            daemon.stage = next;
        }
        published
    }

    fn check_combinations(&self) {
        let mut pairs: BTreeMap<(&NodeName, &NodeName), usize> = BTreeMap::new();
        for installed in self.kernel.states.values() {
            let (sender, receiver) = (&installed.association.sender.node, &installed.association.receiver.node);
            *pairs.entry((sender, receiver)).or_default() += 1;
        }
        assert!(pairs.values().all(|count| *count <= 4), "{pairs:?}");
    }

    fn begin(&mut self, config: &Config, count: usize, now: Duration) -> Box<Plan> {
        let facts = self.facts(count, now);
        let mut snapshot = Snapshot { nodes: self.view.clone(), ..Snapshot::default() };
        snapshot.blocks = (0..count).map(|index| (block(index), name(index))).collect();
        let plan = plan(config, &snapshot, &facts, &Endpoints::new());
        self.disk.spent.extend(&plan.rotation.spend);
        let fresh = plan.rotation.published.iter().filter(|epoch| !self.disk.published.contains_key(epoch)).count();
        for epoch in &plan.rotation.published {
            self.disk.published.entry(*epoch).or_insert(facts.uptime);
        }
        if let Some(daemon) = &mut self.daemon {
            daemon.again = fresh > 0;
        }
        Box::new(plan)
    }

    fn add(&mut self, plan: &Plan) {
        for (key, state) in &plan.desired.xfrm_states {
            if !state.fresh || self.kernel.states.contains_key(key) {
                continue;
            }
            if self.refusing {
                // It was never installed.
                self.disk.spent.remove(&state.association.id());
                continue;
            }
            let association = state.association.clone();
            assert_ne!(
                self.history.get(&association),
                Some(&true),
                "node{} uses a key again: {association:?}",
                self.index
            );
            assert!(self.disk.spent.contains_key(&state.association.id()), "written down before it is installed");
            self.history.insert(association.clone(), association.receiver.node == name(self.index));
            self.kernel.states.insert(*key, Installed { association, packets: 0 });
            if let Some(daemon) = &mut self.daemon {
                daemon.again = true;
            }
        }
        self.refusing = false;
    }

    fn set(&mut self, plan: &Plan) {
        for (key, policy) in &plan.desired.xfrm_policies {
            if let (XfrmDirection::Out, XfrmAction::Protect(template)) = (key.direction, &policy.action) {
                let spi = template.spi.expect("a policy names the one association that is used");
                let named = self.kernel.states.get(&XfrmStateKey { destination: template.destination, spi });
                if let Some(installed) = named {
                    self.history.insert(installed.association.clone(), true);
                }
            }
            self.kernel.policies.insert(*key, policy.clone());
        }
    }

    fn act(&mut self, plan: &Plan, now: Duration) {
        for action in &plan.rotation.actions {
            match action {
                KeyAction::Begin { epoch, .. } => {
                    self.keys += 1;
                    let mut bytes = [u8::try_from(self.index).unwrap() + 1; 32];
                    bytes[..8].copy_from_slice(&self.keys.to_be_bytes());
                    let public_key = PublicKey::from_bytes(bytes).unwrap();
                    let spi_salt = self.keys * 1000 + self.index as u64;
                    let own = OwnEpoch { public_key, spi_salt, created: now - self.boot };
                    assert!(self.disk.epochs.insert(*epoch, own).is_none(), "a number is used twice");
                    self.requested = false;
                }
                KeyAction::Retire { epoch } => {
                    self.disk.epochs.remove(epoch);
                    self.disk.published.remove(epoch);
                    self.disk.spent.retain(|_, spent| spent.epoch != *epoch);
                }
            }
            assert!(self.disk.epochs.len() <= 2, "node{} holds more than two epochs", self.index);
        }
        if let Some(daemon) = &mut self.daemon {
            daemon.again |= !plan.rotation.actions.is_empty();
        }
    }

    /// For who has to find out why a run does not end.
    pub(crate) fn describe(&self) -> String {
        let ends = |it: &Installed| {
            let (sender, receiver) = (&it.association.sender, &it.association.receiver);
            format!("{}:{}>{}:{} {}", sender.node, sender.epoch, receiver.node, receiver.epoch, it.packets)
        };
        let states: BTreeSet<String> = self.kernel.states.values().map(ends).collect();
        let plan = self.last.as_ref().map(|plan| {
            let keys = plan.peers.iter().map(|(name, peer)| (name.as_str(), peer.keys, &peer.refused));
            (&plan.rotation.actions, &plan.rotation.waiting, keys.collect::<Vec<_>>())
        });
        format!("node{} {:?} {} {plan:?} {states:?}", self.index, self.epochs(), self.requested)
    }

    /// The association a policy names for packets to a node, if one does.
    pub(crate) fn named(&self, config: &Config, to: &Self) -> Option<XfrmStateKey> {
        let destination = if config.mode.uses_vxlan() { Prefix::host(to.address) } else { block(to.index) };
        let found = self.kernel.policies.iter().find(|(key, policy)| {
            key.direction == XfrmDirection::Out
                && key.destination == destination
                && matches!(policy.action, XfrmAction::Protect(_))
        });
        match &found?.1.action {
            XfrmAction::Protect(template) => {
                Some(XfrmStateKey { destination: template.destination, spi: template.spi? })
            }
            XfrmAction::Block => None,
        }
    }

    /// A policy lets in what came from there.
    pub(crate) fn lets_in(&self, config: &Config, association: &Association, from: usize) -> bool {
        let peer = association.sender.address;
        let source = if config.mode.uses_vxlan() { Prefix::host(peer) } else { block(from) };
        self.kernel.policies.iter().any(|(key, policy)| {
            key.direction == XfrmDirection::In
                && key.source == source
                && matches!(&policy.action, XfrmAction::Protect(template) if template.source == peer)
        })
    }
}

pub(crate) fn created(index: usize) -> jiff::Timestamp {
    jiff::Timestamp::from_second(1_800_000_000 + i64::try_from(index).unwrap()).unwrap()
}

pub(crate) fn family() -> Family {
    Family::Ipv4
}
