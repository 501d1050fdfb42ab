//! The decisions of a rotation: which generation carries traffic to a peer, which ones are published, what is begun and what
//! goes. The rules are told in [the module above](super).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::super::Context;
use super::offers::{LAST_GENERATION, Offer};
use crate::facts::SessionUse;
use crate::keys::PublicKey;
use crate::marks;
use crate::name::NodeName;
use crate::rotation::{Cause, KeyAction, PeerKeys, Rotation};

/// Shortest time after which a device counts as quiet, whatever is configured. A packet that waits for a handshake shows in
/// the counters once per initiation: every `REKEY_TIMEOUT`, 5 s, and a third of a second of jitter (WireGuard paper, section
/// 6.1).
const LEAST_GRACE: Duration = Duration::from_secs(6);

/// The own generations, seen together with what peers offer.
pub(super) struct Generations<'a> {
    context: &'a Context<'a>,
    offers: &'a BTreeMap<NodeName, Offer>,
    /// The older one of two, if it is withdrawn now or was before.
    withdrawn: Option<u64>,
}

/// How a peer is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reach {
    /// Generation whose device the routes lead into.
    pub(super) generation: u64,
    /// The handshake in it is done.
    pub(super) handshaken: bool,
}

impl<'a> Generations<'a> {
    pub(super) fn new(context: &'a Context<'a>, offers: &'a BTreeMap<NodeName, Offer>) -> Self {
        let mut this = Self { context, offers, withdrawn: None };
        this.withdrawn = this.older().filter(|old| this.was_withdrawn(*old) || this.may_withdraw(*old));
        this
    }

    /// What the peer offers; nothing for one that is refused.
    pub(super) fn offer(&self, peer: &NodeName) -> Option<&'a Offer> {
        self.offers.get(peer)
    }

    /// Generations held, oldest first.
    pub(super) fn held(&self) -> impl DoubleEndedIterator<Item = u64> + use<'a> {
        self.context.facts.wireguard_epochs.keys().copied()
    }

    fn newest(&self) -> Option<u64> {
        self.held().next_back()
    }

    /// The other one, while two are held.
    fn older(&self) -> Option<u64> {
        self.held().rev().nth(1)
    }

    /// Generations that packets to the peer may be sent in, oldest first.
    pub(super) fn common(&self, offer: &'a Offer) -> impl DoubleEndedIterator<Item = u64> + use<'_, 'a> {
        self.held().filter(|it| Some(*it) != self.withdrawn && offer.contains_key(it))
    }

    /// The generation that carries the traffic to a peer: the newest whose handshake is done. Where none is, the oldest: if
    /// there was traffic before, it was there.
    pub(super) fn reach(&self, offer: &'a Offer) -> Option<Reach> {
        let done = self.common(offer).rev().find(|it| self.handshaken(offer, *it));
        let done = done.map(|generation| Reach { generation, handshaken: true });
        done.or_else(|| self.common(offer).next().map(|generation| Reach { generation, handshaken: false }))
    }

    /// The keys in use between the node and a peer, for people.
    pub(super) fn peer_keys(&self, offer: &'a Offer) -> PeerKeys {
        let reach = self.reach(offer);
        let used = reach.map(|it| it.generation);
        PeerKeys { own: used, peer: used, confirmed: used.filter(|_| reach.is_some_and(|it| it.handshaken)) }
    }

    fn session(&self, key: &PublicKey) -> SessionUse {
        self.context.facts.sessions.get(key).copied().unwrap_or_default()
    }

    fn handshaken(&self, offer: &Offer, generation: u64) -> bool {
        offer.get(&generation).is_some_and(|published| self.session(&published.public_key).handshaken)
    }

    /// Keys in the devices that no peer publishes any more, and that were in use until a moment ago: of peers that have
    /// withdrawn a generation before this node did, above all. Nothing is sent to them, but what was may not have arrived.
    fn departing(&self) -> BTreeSet<PublicKey> {
        let offered = self.offers.values().flat_map(BTreeMap::values).map(|published| published.public_key);
        let offered: BTreeSet<PublicKey> = offered.collect();
        let sessions = self.context.facts.sessions.iter();
        let departing = sessions.filter(|(key, session)| session.quiet < self.grace() && !offered.contains(key));
        departing.map(|(key, _)| *key).collect()
    }

    /// The keys that stay in a generation's device without any address, so that their counters tell when they are quiet.
    pub(super) fn lingering(&self, generation: u64) -> BTreeSet<PublicKey> {
        let leaving = self.withdrawn.is_none() && self.older() == Some(generation);
        if leaving { self.departing() } else { BTreeSet::new() }
    }

    /// The node's record, as others have it, has this generation with the key that is held.
    fn announced(&self, generation: u64) -> bool {
        let facts = self.context.facts;
        let (Some(own), Some(key)) =
            (self.context.snapshot.nodes.get(&facts.node), facts.wireguard_epochs.get(&generation))
        else {
            return false;
        };
        own.wireguard.iter().any(|it| it.generation == generation && it.public_key == key.public_key)
    }

    /// Others have read that this generation is not to be used any more.
    fn was_withdrawn(&self, old: u64) -> bool {
        !self.announced(old) && self.newest().is_some_and(|newest| self.announced(newest))
    }

    /// For how long there has been the newest generation: nobody should be in an older one for longer.
    fn superseded_for(&self) -> Duration {
        let newest = self.context.facts.wireguard_epochs.values().next_back();
        newest.map_or(Duration::ZERO, |newest| self.context.facts.uptime.saturating_sub(newest.created))
    }

    fn grace(&self) -> Duration {
        Duration::from_secs(self.context.config.rotation.grace.into()).max(LEAST_GRACE)
    }

    fn hard_lifetime(&self) -> Duration {
        Duration::from_secs(self.context.config.rotation.hard_lifetime.into())
    }

    /// Rule 3. Peers that do not offer the old generation do not send in it. What was sent to them has to have arrived: they
    /// stop listening when they know that this node has withdrawn as well.
    fn may_withdraw(&self, old: u64) -> bool {
        let Some(newest) = self.newest().filter(|newest| self.announced(*newest)) else { return false };
        let done = |offer: &Offer| {
            let quiet = offer.get(&old).is_none_or(|it| self.session(&it.public_key).quiet >= self.grace());
            self.handshaken(offer, newest) && quiet
        };
        let mut users = self.offers.values().filter(|offer| offer.contains_key(&old));
        self.superseded_for() >= self.hard_lifetime() || (users.all(done) && self.departing().is_empty())
    }

    /// Rule 4.
    fn may_retire(&self, old: u64) -> bool {
        self.was_withdrawn(old) && (self.is_overdue() || self.offered_by(old).next().is_none())
    }

    /// Peers that publish what was before the newest generation are not waited for any more.
    fn is_overdue(&self) -> bool {
        self.superseded_for() >= self.hard_lifetime().saturating_add(self.grace())
    }

    fn offered_by(&self, generation: u64) -> impl Iterator<Item = &'a NodeName> + use<'a> {
        self.offers.iter().filter(move |(_, offer)| offer.contains_key(&generation)).map(|(name, _)| name)
    }

    /// What to do with the keys, and how far a rotation is.
    pub(super) fn rotation(&self) -> Rotation {
        let mut rotation = Rotation {
            published: self.held().filter(|it| Some(*it) != self.withdrawn).collect(),
            ..Rotation::default()
        };
        let target = self.offers.values().filter_map(|offer| offer.keys().next_back()).max().copied();
        let Some(newest) = self.newest() else {
            rotation.actions.push(KeyAction::Begin { epoch: target.unwrap_or(0), cause: Cause::First });
            return rotation;
        };
        if let Some(old) = self.older() {
            if self.may_retire(old) {
                rotation.actions.push(KeyAction::Retire { epoch: old });
            }
            let unconfirmed = self.unconfirmed(old, newest);
            if !unconfirmed.is_empty() {
                rotation.unconfirmed.insert(newest, unconfirmed);
            }
        }
        match target.filter(|target| *target > newest) {
            Some(target) => self.follow(target, &mut rotation),
            None => self.begin(newest, &mut rotation),
        }
        rotation
    }

    /// Peers that share a generation with the node but are not reached in the newest.
    fn unconfirmed(&self, old: u64, newest: u64) -> BTreeSet<NodeName> {
        let sharing = |offer: &Offer| offer.contains_key(&old) || offer.contains_key(&newest);
        let missing = self.offers.iter().filter(|(_, offer)| sharing(offer) && !self.handshaken(offer, newest));
        missing.map(|(name, _)| name.clone()).collect()
    }

    /// Others are ahead. The generation's slot may still be taken.
    fn follow(&self, target: u64, rotation: &mut Rotation) {
        let retired = |it: &u64| rotation.actions.contains(&KeyAction::Retire { epoch: *it });
        let staying: Vec<u64> = self.held().filter(|it| !retired(it)).collect();
        let occupant = staying.iter().find(|it| marks::wireguard_slot(**it) == marks::wireguard_slot(target)).copied();
        let epoch = match occupant {
            None => target,
            // Nobody else is in it, so that nobody misses it.
            Some(occupant) if self.offered_by(occupant).next().is_none() => {
                rotation.actions.push(KeyAction::Retire { epoch: occupant });
                target
            }
            // The node was left behind together with others it still speaks with: all meet in the slot that is idle.
            Some(_) if staying.len() == 1 && target < LAST_GENERATION => target + 1,
            Some(_) => return,
        };
        rotation.actions.push(KeyAction::Begin { epoch, cause: Cause::Cluster });
    }

    /// Nobody is ahead: the node begins a generation of its own accord, if it has a reason and nothing is unfinished.
    fn begin(&self, newest: u64, rotation: &mut Rotation) {
        let cause = if self.context.facts.rotation_requested {
            Cause::Request
        } else if self.is_old(newest) {
            Cause::Age
        } else {
            return;
        };
        rotation.waiting = self.unfinished(newest);
        if rotation.waiting.is_none() {
            rotation.actions.push(KeyAction::Begin { epoch: newest + 1, cause });
        }
    }

    /// Why the next generation cannot begin yet.
    fn unfinished(&self, newest: u64) -> Option<String> {
        if newest >= LAST_GENERATION {
            return Some(format!(
                "generation {newest} is the last one; remove the WireGuard keys on all nodes to start over"
            ));
        }
        if !self.announced(newest) {
            return Some(format!("generation {newest} is not published yet"));
        }
        // A daemon that died after it had begun does not withdraw the old generation ever.
        let patient = !self.is_overdue();
        let elsewhere = |offer: &Offer| patient && offer.contains_key(&newest) && offer.len() > 1;
        let behind = self.older().map(|old| self.offered_by(old).collect::<Vec<_>>());
        let others: Vec<&NodeName> = match behind {
            Some(behind) => behind,
            None => self.offers.iter().filter(|(_, offer)| elsewhere(offer)).map(|(name, _)| name).collect(),
        };
        match (self.older(), others.as_slice()) {
            (None, []) => None,
            (Some(old), []) => Some(format!("generation {old} is about to be retired")),
            (_, [first]) => Some(format!("{first} still uses the generation before {newest}")),
            (_, [first, second]) => Some(format!("{first} and {second} still use the generation before {newest}")),
            (_, [first, second, rest @ ..]) => {
                Some(format!("{first}, {second} and {} more still use the generation before {newest}", rest.len()))
            }
        }
    }

    /// True once the key has reached its age: between half the interval and all of it, another for each node and generation,
    /// so that one node is the first and the others follow.
    fn is_old(&self, newest: u64) -> bool {
        let (Some(interval), Some(key)) =
            (self.context.config.rotation.interval, self.context.facts.wireguard_epochs.get(&newest))
        else {
            return false;
        };
        let age = self.context.facts.uptime.saturating_sub(key.created);
        age >= lifetime(Duration::from_secs(interval.into()), &self.context.facts.node, newest)
    }
}

/// How old a key gets before it is replaced, for a node and a generation.
fn lifetime(interval: Duration, node: &NodeName, generation: u64) -> Duration {
    let digest = crate::digest::sha256(&["wireguard-lifetime", node.as_str(), &generation.to_string()]);
    let random = u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]]);
    interval.mul_f64(0.5 + 0.5 * f64::from(random) / f64::from(u32::MAX))
}
