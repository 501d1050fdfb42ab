//! The model's world: time, the cluster source, packets under way, and what must hold at all times.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use husk_overlay::config::Config;
use husk_overlay::esp::Association;
use husk_overlay::kernel::XfrmStateKey;
use husk_overlay::record::NodeRecord;

use super::node::{Node, name};

/// Longest time a packet is under way, in milliseconds; the grace period has to be longer.
pub(crate) const LONGEST_DELAY: u64 = 1500;

/// What may happen. Numbers are taken modulo what there is.
#[derive(Debug, Clone)]
pub(crate) enum Event {
    /// A daemon does one step of a pass.
    Step(usize),
    /// A daemon makes a whole pass, or what is left of one.
    Pass(usize),
    /// A node learns the next record of another, or of its own.
    Deliver(usize, usize),
    /// A packet, with the time it takes in milliseconds.
    Send(usize, usize, u64),
    /// Time passes, in milliseconds.
    Wait(u64),
    /// Somebody asks for new keys.
    Request(usize),
    /// A daemon is killed; its kernel goes on.
    Kill(usize),
    /// A daemon is started.
    Start(usize),
    /// The kernel refuses to add anything the next time.
    Refuse(usize),
    /// Somebody removes all associations.
    Flush(usize),
    /// Somebody removes one association.
    Remove(usize, usize),
    /// A host starts anew, without what it kept in memory.
    Reboot(usize),
    /// A host gets another address.
    Move(usize),
}

impl Event {
    /// The node whose connections may break by this, if any.
    fn disturbed(&self) -> Option<usize> {
        match self {
            Self::Flush(node) | Self::Remove(node, _) | Self::Reboot(node) | Self::Move(node) => Some(*node),
            _ => None,
        }
    }
}

struct Packet {
    arrival: Duration,
    from: usize,
    key: XfrmStateKey,
    association: Association,
    /// The two were connected when it was sent: it must not be lost.
    counts: bool,
}

pub(crate) struct World {
    pub(crate) config: Config,
    pub(crate) nodes: Vec<Node>,
    pub(crate) delivered: u64,
    now: Duration,
    under_way: Vec<Packet>,
    /// Records on their way, by receiver and node.
    queues: BTreeMap<(usize, usize), VecDeque<NodeRecord>>,
    /// A packet has got from one to the other, and none may be lost from then on.
    connected: BTreeSet<(usize, usize)>,
    /// Nodes whose connections are not counted, until everything has come to rest.
    disturbed: BTreeSet<usize>,
    moves: u8,
}

impl World {
    pub(crate) fn new(config: Config, count: usize) -> Self {
        Self {
            config,
            nodes: (0..count).map(Node::new).collect(),
            delivered: 0,
            now: Duration::from_secs(100),
            under_way: Vec::new(),
            queues: BTreeMap::new(),
            connected: BTreeSet::new(),
            disturbed: BTreeSet::new(),
            moves: 0,
        }
    }

    pub(crate) fn apply(&mut self, event: &Event) {
        let count = self.nodes.len();
        if let Some(node) = event.disturbed() {
            self.disturbed.insert(node % count);
            self.connected.retain(|(from, to)| *from != node % count && *to != node % count);
            self.under_way.iter_mut().for_each(|packet| packet.counts = false);
        }
        match *event {
            Event::Step(node) => self.step(node % count),
            Event::Pass(node) => self.pass(node % count),
            Event::Deliver(node, of) => self.deliver(node % count, of % count),
            Event::Send(from, to, delay) => self.send(from % count, to % count, delay),
            Event::Wait(milliseconds) => self.wait(milliseconds),
            Event::Request(node) => self.nodes[node % count].requested = true,
            Event::Kill(node) => self.nodes[node % count].kill(),
            Event::Start(node) => self.nodes[node % count].start(),
            Event::Refuse(node) => self.nodes[node % count].refusing = true,
            Event::Flush(node) => self.nodes[node % count].flush(),
            Event::Remove(node, which) => {
                let states = &mut self.nodes[node % count].kernel.states;
                if let Some(key) = states.keys().nth(which % states.len().max(1)).copied() {
                    states.remove(&key);
                }
            }
            Event::Reboot(node) => self.nodes[node % count].reboot(self.now),
            Event::Move(node) => {
                self.moves = self.moves.wrapping_add(1);
                self.nodes[node % count].address = format!("198.51.100.{}", self.moves).parse().unwrap();
            }
        }
    }

    fn step(&mut self, node: usize) {
        let count = self.nodes.len();
        let published = self.nodes[node].step(&self.config, count, self.now);
        if let Some(record) = published {
            assert!(record.esp.as_ref().is_none_or(|esp| esp.epochs.len() <= 2), "more than two epochs published");
            for receiver in 0..count {
                let queue = self.queues.entry((receiver, node)).or_default();
                if queue.back() != Some(&record) {
                    queue.push_back(record.clone());
                }
            }
        }
    }

    /// Finishes the pass that was begun, or makes one.
    fn pass(&mut self, node: usize) {
        for _ in 0..6 {
            self.step(node);
        }
    }

    fn deliver(&mut self, node: usize, of: usize) {
        if let Some(record) = self.queues.get_mut(&(node, of)).and_then(VecDeque::pop_front) {
            self.nodes[node].view.insert(record.name.clone(), record);
        }
    }

    fn counts(&self, from: usize, to: usize) -> bool {
        self.connected.contains(&(from, to))
    }

    fn send(&mut self, from: usize, to: usize, delay: u64) {
        if from == to {
            return;
        }
        let counts = self.counts(from, to);
        let named = self.nodes[from].named(&self.config, &self.nodes[to]);
        let Some(key) = named else {
            assert!(!counts, "node{from} has no policy for packets to node{to} any more");
            return;
        };
        let Some(installed) = self.nodes[from].kernel.states.get_mut(&key) else {
            assert!(!counts, "node{from} has no association for packets to node{to} any more");
            assert!(
                self.disturbed.contains(&from),
                "node{from} has a policy for packets to node{to} that names an association it lacks"
            );
            return;
        };
        installed.packets += 1;
        let association = installed.association.clone();
        let arrival = self.now + Duration::from_millis(delay % LONGEST_DELAY);
        self.under_way.push(Packet { arrival, from, key, association, counts });
    }

    pub(crate) fn wait(&mut self, milliseconds: u64) {
        let end = self.now + Duration::from_millis(milliseconds);
        self.under_way.sort_by_key(|packet| packet.arrival);
        let due = self.under_way.iter().filter(|packet| packet.arrival <= end).count();
        for packet in self.under_way.drain(..due).collect::<Vec<_>>() {
            self.now = self.now.max(packet.arrival);
            self.arrive(&packet);
        }
        self.now = end;
    }

    fn arrive(&mut self, packet: &Packet) {
        let to = self.nodes.iter().position(|node| node.address == packet.key.destination);
        let received = to.is_some_and(|to| {
            let config = &self.config;
            let lets_in = self.nodes[to].lets_in(config, &packet.association, packet.from);
            let found = self.nodes[to].kernel.states.get_mut(&packet.key);
            let found = found.filter(|state| state.association == packet.association);
            found.is_some_and(|state| {
                state.packets += 1;
                lets_in
            })
        });
        let from = packet.from;
        assert!(received || !packet.counts, "a packet of node{from} is lost: {:?}", packet.association);
        if let (true, Some(to)) = (received, to) {
            self.delivered += 1;
            if !self.disturbed.contains(&from) && !self.disturbed.contains(&to) {
                self.connected.insert((from, to));
            }
        }
    }

    /// All daemons live, everything gets through: how it all ends. False if it does not end by itself.
    pub(crate) fn settle(&mut self, rounds: usize) -> bool {
        let count = self.nodes.len();
        for _ in 0..rounds {
            self.pass_all();
            for node in 0..count {
                for of in 0..count {
                    while self.queues.get(&(node, of)).is_some_and(|queue| !queue.is_empty()) {
                        self.deliver(node, of);
                    }
                }
            }
            for from in 0..count {
                for to in 0..count {
                    self.send(from, to, 10);
                }
            }
            self.wait(500);
            if self.settled() {
                return true;
            }
        }
        false
    }

    /// Every daemon lives and passes until nothing is left to do.
    fn pass_all(&mut self) {
        for node in 0..self.nodes.len() {
            self.nodes[node].start();
            self.pass(node);
            while self.nodes[node].busy() {
                self.step(node);
            }
        }
    }

    fn settled(&self) -> bool {
        let quiet = |node: &Node| {
            let Some(last) = &node.last else { return false };
            node.epochs().len() == 1
                && !node.requested
                && last.rotation.published == node.epochs()
                && last.rotation.unconfirmed.is_empty()
                && last.rotation.actions.is_empty()
                && last.record.as_ref().is_some_and(|record| self.known_everywhere(record))
                && last.peers.len() == self.nodes.len() - 1
                && last.peers.values().all(|peer| peer.keys.own.is_some() && peer.refused.is_none())
        };
        self.nodes.iter().all(quiet)
    }

    fn known_everywhere(&self, record: &NodeRecord) -> bool {
        self.nodes.iter().all(|node| node.view.get(&record.name) == Some(record))
    }

    /// From now on every packet counts again that is sent between nodes that are connected.
    pub(crate) fn forgive(&mut self) {
        self.disturbed.clear();
    }

    /// Every node reaches every other, and each has one association per peer and direction.
    pub(crate) fn check_rest(&mut self) {
        let count = self.nodes.len();
        self.wait(LONGEST_DELAY);
        self.pass_all();
        let before = self.delivered;
        for from in 0..count {
            for to in 0..count {
                self.send(from, to, 0);
            }
        }
        self.wait(1);
        assert_eq!(self.delivered - before, (count * (count - 1)) as u64, "everybody reaches everybody");
        for node in &self.nodes {
            assert_eq!(node.kernel.states.len(), 2 * (count - 1), "{} holds too much", name(node.index));
        }
    }

    /// Nothing counts until everything has come to rest.
    pub(crate) fn disturb_all(&mut self) {
        self.connected.clear();
        self.disturbed = (0..self.nodes.len()).collect();
        self.under_way.iter_mut().for_each(|packet| packet.counts = false);
    }
}
