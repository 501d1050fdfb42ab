//! The associations between this node and one peer: which there could be, which there are, and which one carries what this
//! node sends.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use crate::esp::{Aead, Association, AssociationId, EspEnd, spi};
use crate::facts::{AssociationStage, AssociationUse, EspFacts, OwnEpoch};
use crate::kernel::XfrmStateKey;
use crate::name::NodeName;
use crate::record::{EspEpochRecord, EspRecord};
use crate::rotation::PeerKeys;

/// What became of an association in this node's kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// It is there.
    Installed(AssociationUse),
    /// It was never in use, and nothing in the kernel has its SPI.
    Free,
    /// It was in use and was removed: it never comes back.
    Gone,
    /// Another association has its SPI.
    Collision,
    /// Something that nobody knows carries our mark and has its SPI; it is swept, and then the SPI is free.
    Obstructed,
}

impl Standing {
    pub(super) fn usage(&self) -> Option<&AssociationUse> {
        match self {
            Self::Installed(usage) => Some(usage),
            _ => None,
        }
    }

    fn obtainable(self) -> bool {
        matches!(self, Self::Installed(_) | Self::Free)
    }
}

/// An association that two published or held epochs make possible.
#[derive(Debug, Clone)]
pub(super) struct Slot {
    /// This node's epoch.
    pub(super) own: u64,
    /// The peer's epoch.
    pub(super) peer: u64,
    pub(super) key: XfrmStateKey,
    pub(super) id: AssociationId,
    pub(super) association: Association,
    pub(super) standing: Standing,
    /// It belongs into the kernel.
    pub(super) desired: bool,
}

/// This node, as one end of all associations.
pub(super) struct Own<'a> {
    pub(super) node: &'a NodeName,
    pub(super) address: IpAddr,
    pub(super) cipher: Aead,
    pub(super) spi_bits: u8,
    pub(super) esp: &'a EspFacts,
    /// Which association has, or had last, a place in the kernel.
    pub(super) holders: HashMap<XfrmStateKey, AssociationId>,
}

impl<'a> Own<'a> {
    fn end(&self, number: u64, epoch: &OwnEpoch) -> EspEnd {
        EspEnd { node: self.node.clone(), epoch: number, address: self.address, public_key: epoch.public_key }
    }

    fn slot(&self, own: u64, peer: u64, association: Association, salt: u64) -> Slot {
        let key =
            XfrmStateKey { destination: association.receiver.address, spi: spi(&association, salt, self.spi_bits) };
        let id = association.id();
        let installed = self.esp.installed.get(&key);
        let standing = match (self.esp.spent.get(&id), installed) {
            // With another salt it has another SPI and the same key all the same.
            (Some(spent), _) if spent.key != key || spent.stage == AssociationStage::Ended => Standing::Gone,
            (Some(_), Some(usage)) if usage.source == association.sender.address => Standing::Installed(*usage),
            (Some(spent), None) if spent.stage == AssociationStage::Unused => Standing::Free,
            (Some(_), _) => Standing::Gone,
            (None, None) => Standing::Free,
            (None, Some(_)) if self.holders.contains_key(&key) => Standing::Collision,
            (None, Some(_)) => Standing::Obstructed,
        };
        Slot { own, peer, key, id, association, standing, desired: false }
    }
}

/// Associations with one peer, in both directions.
#[derive(Debug, Clone)]
pub(super) struct Pair {
    pub(super) name: NodeName,
    pub(super) address: IpAddr,
    /// Its UDP port, with UDP encapsulation.
    pub(super) udp_port: Option<u16>,
    /// Its published epochs, oldest first.
    pub(super) epochs: Vec<EspEpochRecord>,
    /// From the peer to each own epoch held, by own epoch and then by the peer's.
    pub(super) inbound: Vec<Slot>,
    /// To the peer, in the same order.
    pub(super) outbound: Vec<Slot>,
}

/// What carries packets to a peer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Choice {
    /// Index of the association that is to carry them.
    pub(super) target: Option<usize>,
    /// Index of the one that can: it is installed.
    pub(super) named: Option<usize>,
}

impl Pair {
    pub(super) fn new(own: &Own<'_>, name: &NodeName, address: IpAddr, record: &EspRecord) -> Self {
        let mut inbound = Vec::with_capacity(4);
        let mut outbound = Vec::with_capacity(4);
        for (number, held) in &own.esp.epochs {
            for published in &record.epochs {
                let here = own.end(*number, held);
                let there =
                    EspEnd { node: name.clone(), epoch: published.epoch, address, public_key: published.public_key };
                let forth = Association { sender: here.clone(), receiver: there.clone(), cipher: own.cipher };
                let back = Association { sender: there, receiver: here, cipher: own.cipher };
                outbound.push(own.slot(*number, published.epoch, forth, published.spi_salt));
                inbound.push(own.slot(*number, published.epoch, back, held.spi_salt));
            }
        }
        let epochs = record.epochs.clone();
        Self { name: name.clone(), address, udp_port: record.udp_port, epochs, inbound, outbound }
    }

    /// Something was installed for this peer, so that packets may be on their way from it.
    pub(super) fn connected(&self) -> bool {
        self.inbound.iter().chain(&self.outbound).any(|slot| slot.standing.usage().is_some())
    }

    /// Everything the peer could send to an own epoch arrives.
    pub(super) fn receivable(&self, own: u64) -> bool {
        self.inbound.iter().filter(|slot| slot.own == own).all(|slot| slot.standing.usage().is_some())
    }

    /// Newest own epoch under which something came from the peer, according to the counters of what is installed.
    fn heard(&self) -> Option<u64> {
        let used = |slot: &&Slot| slot.standing.usage().is_some_and(|usage| usage.packets > 0);
        self.inbound.iter().filter(used).map(|slot| slot.own).max()
    }

    /// Own epochs the peer is known to send to. An association to it under one of them was only made because it did, and
    /// tells so when the counters that told it are gone with the peer's own old epoch.
    fn confirmed(&self) -> BTreeSet<u64> {
        let sending = self.outbound.iter().filter(|slot| slot.standing.usage().is_some()).map(|slot| slot.own);
        sending.chain(self.heard()).collect()
    }

    /// The newest own epoch the peer is known to send to, for people.
    pub(super) fn confirmed_epoch(&self, oldest_published: Option<u64>) -> Option<u64> {
        // The first association to a peer is made before anything is known.
        let newest = self.confirmed().last().copied().filter(|epoch| Some(*epoch) > oldest_published);
        newest.max(self.heard())
    }

    /// The peer's epochs that may be used to send to it: whatever it then sends under them arrives. One that was used once
    /// stays good; and going back to an older one is never right, since the peer may have destroyed it.
    fn usable(&self, published: &BTreeSet<u64>) -> Vec<u64> {
        let used = |epoch: u64| self.outbound.iter().any(|slot| slot.peer == epoch && slot.standing.usage().is_some());
        // The peer never goes back to an own epoch older than one it has used.
        let least = self.heard();
        let receivable = |epoch: u64| {
            let relevant = |slot: &&Slot| {
                slot.peer == epoch && published.contains(&slot.own) && least.is_none_or(|least| slot.own >= least)
            };
            !published.is_empty() && self.inbound.iter().filter(relevant).all(|slot| slot.standing.usage().is_some())
        };
        let mut usable = Vec::with_capacity(2);
        for epoch in self.epochs.iter().rev().map(|record| record.epoch) {
            let current = used(epoch);
            if current || receivable(epoch) {
                usable.push(epoch);
            }
            if current {
                break;
            }
        }
        usable
    }

    /// What carries packets to the peer, given the own epochs that are published.
    pub(super) fn choose(&self, published: &BTreeSet<u64>) -> Choice {
        let usable = self.usable(published);
        let confirmed = self.confirmed();
        let newest_first = |own: Vec<u64>| -> Vec<usize> {
            let position = |own: u64, peer: u64| self.outbound.iter().position(|it| it.own == own && it.peer == peer);
            let pairs = usable.iter().flat_map(|peer| own.iter().map(move |own| (*own, *peer)));
            pairs.filter_map(|(own, peer)| position(own, peer)).collect()
        };
        let known: Vec<u64> = published.iter().rev().copied().filter(|own| confirmed.contains(own)).collect();
        // Nothing is known of the others: the oldest is the one the peer most likely has seen.
        let unknown: Vec<u64> = published.iter().copied().filter(|own| !confirmed.contains(own)).collect();
        let mut candidates = newest_first(known);
        let certain = candidates.len();
        candidates.extend(unknown.into_iter().flat_map(|own| newest_first(vec![own])));
        let obtainable = |index: &&usize| self.outbound[**index].standing.obtainable();
        let installed = |index: &&usize| self.outbound[**index].standing.usage().is_some();
        let target = candidates[..certain].iter().find(obtainable).or_else(|| candidates.iter().find(obtainable));
        let named = target.filter(installed).or_else(|| candidates.iter().find(installed));
        Choice { target: target.copied(), named: named.copied() }
    }

    /// The keys in use, for people.
    pub(super) fn keys(&self, choice: Choice, published: &BTreeSet<u64>) -> PeerKeys {
        let named = choice.named.map(|index| &self.outbound[index]);
        PeerKeys {
            own: named.map(|slot| slot.own),
            peer: named.map(|slot| slot.peer),
            confirmed: self.confirmed_epoch(published.first().copied()),
        }
    }
}

/// Decides which associations towards this node belong into the kernel. Of two with one SPI the installed one has it, else
/// the one of the older own epoch, then of the lower name, then of the older epoch of the peer.
///
/// A peer uses the newest own epoch it sees. An older one that works, while the newest published one cannot, would give it
/// a connection that breaks when it sees the newest: it gets neither, until an epoch comes that works.
pub(super) fn claim(pairs: &mut [Pair], epochs: &[u64], published: &BTreeSet<u64>) {
    let mut taken: HashMap<XfrmStateKey, AssociationId> = HashMap::new();
    for own in epochs {
        for slot in pairs.iter_mut().flat_map(|pair| &mut pair.inbound).filter(|slot| slot.own == *own) {
            if slot.standing == Standing::Free && *taken.entry(slot.key).or_insert(slot.id) != slot.id {
                slot.standing = Standing::Collision;
            }
        }
    }
    for pair in pairs {
        let mut broken: BTreeSet<u64> = BTreeSet::new();
        for slot in pair.inbound.iter_mut().rev() {
            let obtainable = slot.standing.obtainable();
            slot.desired = obtainable && (slot.standing.usage().is_some() || !broken.contains(&slot.peer));
            if !obtainable && published.contains(&slot.own) {
                broken.insert(slot.peer);
            }
        }
    }
}
