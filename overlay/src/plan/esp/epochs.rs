//! The own epochs: when one is published, when one goes, when a new one begins. [`crate::rotation`] tells the protocol.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::pair::{Choice, Pair, Standing};
use crate::config::{Config, IpsecConfig, RotationConfig};
use crate::digest;
use crate::facts::{EspFacts, Facts};
use crate::name::NodeName;
use crate::rotation::{Cause, KeyAction};

/// Shortest time between two epochs that were not asked for: what keeps an association out of the kernel may be there again.
const RESPITE: Duration = Duration::from_secs(5);

/// Most peers that a message names.
const NAMED: usize = 5;

/// Epochs that are in the record, or go there with this plan.
///
/// What was published once stays published as long as it is held. Another epoch is, if the node can receive under it from
/// every peer it has anything with; and the first, since the associations under it are made before the record goes out.
pub(super) fn published(esp: &EspFacts, pairs: &[Pair]) -> BTreeSet<u64> {
    let mut published: BTreeSet<u64> =
        esp.epochs.keys().copied().filter(|epoch| esp.published.contains_key(epoch)).collect();
    let Some(newest) = esp.epochs.keys().next_back().copied() else { return published };
    let receivable = || pairs.iter().filter(|pair| pair.connected()).all(|pair| pair.receivable(newest));
    if published.is_empty() || (published.last() < Some(&newest) && receivable()) {
        published.insert(newest);
    }
    published
}

/// What there is to decide on.
pub(super) struct Epochs<'a> {
    pub(super) config: &'a Config,
    pub(super) facts: &'a Facts,
    pub(super) esp: &'a EspFacts,
    /// Highest number in the own record as the source has it, which may be of an earlier boot.
    pub(super) recorded: Option<u64>,
    pub(super) published: &'a BTreeSet<u64>,
    pub(super) pairs: &'a [Pair],
    pub(super) choices: &'a [Choice],
}

/// What was decided.
#[derive(Debug, Default)]
pub(super) struct Decision {
    pub(super) actions: Vec<KeyAction>,
    pub(super) unconfirmed: BTreeMap<u64, BTreeSet<NodeName>>,
    pub(super) waiting: Option<String>,
}

impl Epochs<'_> {
    pub(super) fn decide(&self) -> Decision {
        let mut actions = Vec::new();
        let cause = self.cause();
        let mut held: BTreeSet<u64> = self.esp.epochs.keys().copied().collect();
        for epoch in self.retired(cause) {
            held.remove(&epoch);
            actions.push(KeyAction::Retire { epoch });
        }
        let mut waiting = None;
        if let Some(cause) = cause {
            let urgent = matches!(cause, Cause::First | Cause::Lost | Cause::Collision);
            match self.next().filter(|_| held.len() < 2 && (urgent || self.recorded >= self.newest())) {
                Some(epoch) => actions.push(KeyAction::Begin { epoch, cause }),
                None => waiting = Some(self.obstacle()),
            }
        }
        Decision { actions, unconfirmed: self.unconfirmed(), waiting }
    }

    fn newest(&self) -> Option<u64> {
        self.esp.epochs.keys().next_back().copied()
    }

    fn age(&self, epoch: u64) -> Duration {
        let created = self.esp.epochs.get(&epoch).map_or(Duration::ZERO, |own| own.created);
        self.facts.uptime.saturating_sub(created)
    }

    /// Why there should be a new epoch, whether or not there can be one now.
    fn cause(&self) -> Option<Cause> {
        let Some(newest) = self.newest() else { return Some(Cause::First) };
        let respite = self.age(newest) < RESPITE;
        let under = |standing: Standing| self.under(newest).any(|found| found == standing);
        if !respite && (under(Standing::Gone) || self.outbound_gone(newest)) {
            Some(Cause::Lost)
        } else if !respite && under(Standing::Collision) {
            Some(Cause::Collision)
        } else if !self.published.contains(&newest) {
            // It is new already; a request is served by it.
            None
        } else if self.facts.rotation_requested {
            Some(Cause::Request)
        } else if self.due(newest) {
            Some(Cause::Age)
        } else {
            self.exhausted(newest).then_some(Cause::Volume)
        }
    }

    fn under(&self, own: u64) -> impl Iterator<Item = Standing> {
        let slots = self.pairs.iter().flat_map(|pair| &pair.inbound).filter(move |slot| slot.own == own);
        slots.map(|slot| slot.standing)
    }

    fn outbound_gone(&self, own: u64) -> bool {
        let mut slots = self.pairs.iter().flat_map(|pair| &pair.outbound).filter(|slot| slot.own == own);
        slots.any(|slot| matches!(slot.standing, Standing::Gone | Standing::Collision))
    }

    /// The key has come to its age, which is another for every node and epoch, so that not all of them begin at once.
    fn due(&self, epoch: u64) -> bool {
        let RotationConfig { interval: Some(interval), .. } = self.config.rotation else { return false };
        self.age(epoch) >= lifetime(&self.facts.node, epoch, interval)
    }

    /// An association has carried as much as one key should.
    fn exhausted(&self, own: u64) -> bool {
        let IpsecConfig { max_packets, max_bytes, .. } = self.config.ipsec;
        let slots = self.pairs.iter().flat_map(|pair| &pair.outbound).filter(|slot| slot.own == own);
        slots.filter_map(|slot| slot.standing.usage()).any(|it| it.packets >= max_packets || it.bytes >= max_bytes)
    }

    /// Epochs whose time is over, oldest first.
    fn retired(&self, cause: Option<Cause>) -> Vec<u64> {
        let Some(newest) = self.newest() else { return Vec::new() };
        let broken = matches!(cause, Some(Cause::Lost | Cause::Collision));
        let mut older = self.esp.epochs.keys().copied().filter(|epoch| *epoch < newest).rev();
        let previous = older.next();
        // Never more than two; more can only come from a folder that somebody has put files into.
        let mut retired: Vec<u64> = older.collect();
        retired.reverse();
        let Some(previous) = previous else { return retired };
        if !self.published.contains(&newest) {
            // Nobody knows it; the one before it stays.
            if broken {
                retired.push(newest);
            }
        } else if !self.published.contains(&previous)
            || self.outlived(newest)
            || (cause == Some(Cause::Lost) && self.severed(newest))
            || self.disused(previous)
        {
            retired.push(previous);
        }
        retired
    }

    /// The epoch before this one has been waiting for too long, for peers that could have taken notice: the record is out.
    fn outlived(&self, newest: u64) -> bool {
        if self.recorded < Some(newest) {
            return false;
        }
        let since = self.esp.published.get(&newest);
        let waited = since.map(|since| self.facts.uptime.saturating_sub(*since));
        waited.is_some_and(|waited| waited >= seconds(self.config.rotation.hard_lifetime))
    }

    /// Packets are being lost because of what is gone under this epoch: another one is worth more than peers that are late.
    fn severed(&self, newest: u64) -> bool {
        self.pairs.iter().zip(self.choices).filter(|(pair, _)| pair.connected()).any(|(pair, choice)| {
            let named = choice.named.map(|index| pair.outbound[index].peer);
            let inbound = |slot: &super::pair::Slot| {
                slot.own == newest && Some(slot.peer) == named && slot.standing == Standing::Gone
            };
            named.is_none() && pair.outbound.iter().any(|slot| slot.standing == Standing::Gone)
                || pair.inbound.iter().any(inbound)
        })
    }

    /// Nobody uses this epoch any more, nor will: for the grace period this node has sent nothing under it and could have
    /// sent under a newer one, which it can since the peer has; and nothing has come.
    fn disused(&self, previous: u64) -> bool {
        let grace = seconds(self.config.rotation.grace);
        self.pairs.iter().zip(self.choices).all(|(pair, choice)| {
            let mut slots = pair.inbound.iter().chain(&pair.outbound).filter(|slot| slot.own == previous).peekable();
            let quiet = slots.clone().all(|slot| slot.standing.usage().is_none_or(|usage| usage.quiet >= grace));
            let concerned = slots.any(|slot| slot.desired || slot.standing.usage().is_some());
            let newer = |slot: &super::pair::Slot| {
                slot.own > previous && slot.standing.usage().is_some_and(|usage| usage.age >= grace)
            };
            let moved = choice.named.is_some_and(|index| pair.outbound[index].own > previous)
                && pair.outbound.iter().any(newer);
            !concerned || (quiet && moved)
        })
    }

    fn next(&self) -> Option<u64> {
        let held = self.newest();
        let after = |epoch: Option<u64>| epoch.map_or(Some(1), |epoch| epoch.checked_add(1));
        // A record that somebody spoiled must not be the end of all rotation.
        after(held.max(self.recorded)).or_else(|| after(held))
    }

    fn unconfirmed(&self) -> BTreeMap<u64, BTreeSet<NodeName>> {
        let oldest = self.published.first().copied();
        let mut unconfirmed = BTreeMap::new();
        for epoch in self.published {
            let late = self.pairs.iter().filter(|pair| pair.confirmed_epoch(oldest) < Some(*epoch));
            let late: BTreeSet<NodeName> = late.map(|pair| pair.name.clone()).collect();
            if !late.is_empty() {
                unconfirmed.insert(*epoch, late);
            }
        }
        unconfirmed
    }

    /// Why there cannot be a new epoch now.
    fn obstacle(&self) -> String {
        let Some(newest) = self.newest() else { return "there is no number left for an epoch".into() };
        let oldest = self.published.first().copied();
        if self.published.contains(&newest) && self.recorded < Some(newest) {
            return format!("epoch {newest} could not be published yet");
        }
        if !self.published.contains(&newest) {
            let missing = self.pairs.iter().filter(|pair| pair.connected() && !pair.receivable(newest));
            return format!("epoch {newest} cannot be received yet from {}", names(missing));
        }
        let mut late = self.pairs.iter().filter(|pair| pair.confirmed_epoch(oldest) < Some(newest)).peekable();
        match (late.peek().is_some(), oldest) {
            (true, _) => format!("epoch {newest} is not in use yet by {}", names(late)),
            (false, Some(oldest)) if oldest < newest => format!("epoch {oldest} was in use until a moment ago"),
            (false, _) => "there is no number left for an epoch".into(),
        }
    }
}

fn names<'a>(pairs: impl Iterator<Item = &'a Pair>) -> String {
    let all: Vec<&str> = pairs.map(|pair| pair.name.as_str()).collect();
    let shown = all[..all.len().min(NAMED)].join(", ");
    if all.len() > NAMED { format!("{shown} and {} more", all.len() - NAMED) } else { shown }
}

fn seconds(number: u32) -> Duration {
    Duration::from_secs(number.into())
}

/// How long an epoch of a node is the newest: between half of the interval and all of it.
pub(super) fn lifetime(node: &NodeName, epoch: u64, interval: u32) -> Duration {
    let digest = digest::sha256(&["rotation", node.as_str(), &epoch.to_string()]);
    let part = u64::from(u16::from_be_bytes([digest[0], digest[1]]));
    let milliseconds = u64::from(interval) * 1000;
    Duration::from_millis(milliseconds / 2 + milliseconds / 2 * part / u64::from(u16::MAX))
}
