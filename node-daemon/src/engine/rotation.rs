//! What a pass does about keys besides planning: it writes down what must be known before it is done, makes and destroys keys
//! as planned, and sends the packets by which peers confirm each other's new keys.
//!
//! While a rotation is under way the loop looks more often, since what it waits for are counters that make no events; and it
//! passes again at once as long as a pass gets the rotation on.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::Context as _;
use husk_dataplane::Error;
use husk_dataplane::kernel::{Actual, Change, Kernel, Table};
use husk_dataplane::reconcile::Outcome;
use husk_dataplane::xfrm::XfrmStateChange;
use husk_overlay::facts::{AssociationStage, AssociationUse, Facts, SessionUse};
use husk_overlay::issue::{Issue, IssueKind, Severity};
use husk_overlay::kernel::{XfrmAction, XfrmPolicy, XfrmStateKey, XfrmTemplate};
use husk_overlay::keys::PublicKey;
use husk_overlay::name::NodeName;
use husk_overlay::plan::Plan;
use husk_overlay::rotation::{Cause, KeyAction};

use super::usage::with_kind;
use super::{Engine, Node};
use crate::keys::Technology;
use crate::line_log::Event;
use crate::source::ClusterSource;

/// Passes made at once one after the other because each got on. A rotation takes three or four; more of them mean that what
/// one does another undoes, and the loop falls back to its usual pace.
const MOST_AT_ONCE: u32 = 12;

/// How long after its last progress a rotation is pushed on with every look. Later only passes do, for what does not come for
/// so long waits for a daemon or a cable.
const ATTENTION: Duration = Duration::from_secs(30);

/// How long a pass waits for the cluster's state to be on the disk.
const PATIENCE: Duration = Duration::from_secs(2);

/// Packets sent in one go to have keys confirmed; in a larger mesh the next look goes on with the others.
const PROBES: usize = 64;

/// What the engine remembers about keys from pass to pass. None of it decides about a key.
#[derive(Debug, Default)]
pub(super) struct Keeping {
    /// Somebody asked for new keys, and there are none yet.
    pub(super) requested: bool,
    /// The epoch begun last.
    pub(super) begun: Option<u64>,
    /// The last pass got a rotation on: the next one comes at once.
    advanced: bool,
    /// Passes that got on, in a row.
    in_a_row: u32,
    /// What the counters that decide looked like to the last pass.
    stage: Stage,
    /// When the stage last changed, as time since boot.
    moved: Duration,
    /// A rotation is under way.
    under_way: bool,
    /// The peer probed last.
    probed: Option<NodeName>,
}

impl Keeping {
    /// A key that nobody knows of yet is as good as one that is made for whoever asks.
    fn serve(&mut self, facts: &Facts) {
        let Some(esp) = facts.esp.as_ref().filter(|_| self.requested) else { return };
        let newest = esp.epochs.keys().next_back().filter(|newest| !esp.published.contains_key(newest));
        if let Some(newest) = newest {
            self.requested = false;
            self.begun = Some(*newest);
        }
    }

    /// A pass came to nothing: the next one has no reason to hurry.
    pub(super) fn stand_back(&mut self) {
        self.advanced = false;
        self.in_a_row = 0;
    }

    /// True if the next pass is to come at once.
    pub(super) fn hurries(&self) -> bool {
        self.advanced && self.in_a_row <= MOST_AT_ONCE
    }

    /// True while a rotation is not over.
    pub(super) fn is_under_way(&self) -> bool {
        self.under_way
    }

    /// True while the loop has something to wait for that makes no events.
    pub(super) fn is_attentive(&self, now: Duration) -> bool {
        self.under_way && now.saturating_sub(self.moved) < ATTENTION
    }
}

/// Counters as far as a plan depends on them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Stage {
    /// Sessions, whether they are handshaken and whether they have been quiet for the grace period.
    sessions: BTreeMap<PublicKey, (bool, bool)>,
    /// Associations, whether they were used and whether they have been quiet for the grace period.
    associations: BTreeMap<XfrmStateKey, (bool, bool)>,
}

impl Stage {
    fn of(
        sessions: &BTreeMap<PublicKey, SessionUse>,
        associations: &BTreeMap<XfrmStateKey, AssociationUse>,
        grace: Duration,
    ) -> Self {
        let session = |(key, session): (&PublicKey, &SessionUse)| (*key, (session.handshaken, session.quiet >= grace));
        let association =
            |(key, used): (&XfrmStateKey, &AssociationUse)| (*key, (used.packets > 0, used.quiet >= grace));
        Self {
            sessions: sessions.iter().map(session).collect(),
            associations: associations.iter().map(association).collect(),
        }
    }
}

impl<K: Kernel, S: ClusterSource, N: Node> Engine<K, S, N> {
    /// Facts about the node, with what the kernel counts.
    pub(super) fn facts(&mut self) -> anyhow::Result<Facts> {
        let mut facts = self.parts.node.facts(&self.snapshot, self.created)?;
        self.keeping.serve(&facts);
        facts.rotation_requested = self.keeping.requested;
        // Who hears no answers knows nothing of those who do not answer; that is an issue of its own.
        if !facts.silent.is_empty() && self.parts.node.is_deaf() {
            facts.silent.clear();
        }
        let known = self.last.as_ref().map(|last| &last.facts);
        self.counted.fill(&mut self.parts.kernel, &self.parts.config, &mut facts, known)?;
        Ok(facts)
    }

    /// Writes down what must be known before the plan is carried out: the associations it installs or comes to use, the
    /// epochs it publishes, and the cluster it was made for, so that a daemon that restarts never knows less than this one
    /// did.
    ///
    /// # Errors
    /// When something could not be written down: then nothing that depends on it may be carried out ([`Self::hold_back`]).
    pub(super) fn write_ahead(&mut self, facts: &Facts, plan: &Plan) -> anyhow::Result<()> {
        if facts.esp.is_none() {
            return Ok(());
        }
        let node = &mut self.parts.node;
        node.spend(&plan.rotation.spend).context("associations cannot be written down before they are installed")?;
        let own = self.snapshot.nodes.get(&self.parts.node_name).and_then(|record| record.esp.as_ref());
        let recorded: BTreeSet<u64> = own.into_iter().flat_map(|esp| &esp.epochs).map(|epoch| epoch.epoch).collect();
        node.note_published(&(&plan.rotation.published - &recorded))
            .context("epochs cannot be written down before they are published")?;
        let kept = self.keeper.as_ref().is_none_or(|keeper| keeper.flush_within(PATIENCE));
        anyhow::ensure!(kept, "the cluster's state is not on the disk yet, which takes unusually long");
        Ok(())
    }

    /// Takes out of a plan what was to be written down and could not be. Nothing is removed meanwhile either: the policy
    /// that a new one was to replace stays.
    pub(super) fn hold_back(plan: &mut Plan) {
        let spend = &plan.rotation.spend;
        let desired = &mut plan.desired;
        desired.xfrm_states.retain(|_, state| !(state.fresh && spend.contains_key(&state.association.id())));
        let used = spend.values().filter(|spent| spent.stage == AssociationStage::Used);
        let used: BTreeSet<XfrmStateKey> = used.map(|spent| spent.key).collect();
        let names = |template: &XfrmTemplate| {
            let key = |spi| XfrmStateKey { destination: template.destination, spi };
            template.spi.is_some_and(|spi| used.contains(&key(spi)))
        };
        let unwritten = |policy: &XfrmPolicy| matches!(&policy.action, XfrmAction::Protect(it) if names(it));
        desired.xfrm_policies.retain(|_, policy| !unwritten(policy));
    }

    /// Takes back what was written down of associations that the kernel refused: they were never used, and may be tried again
    /// under the same key. Where there was no clear answer they stay spent.
    pub(super) fn take_back(&mut self, outcome: &Outcome) {
        let refused = outcome.failures.iter().filter_map(|failure| match (&failure.change, &failure.error) {
            (
                Some(Change::XfrmState(XfrmStateChange::Add { key, .. })),
                Error::Refused(_) | Error::NoAssociationKey { .. },
            ) => Some(*key),
            _ => None,
        });
        let refused: BTreeSet<XfrmStateKey> = refused.collect();
        if refused.is_empty() {
            return;
        }
        if let Err(error) = self.parts.node.take_back(&refused) {
            tracing::warn!(
                error = format!("{error:#}"),
                "associations that were refused count as used; they get a new key"
            );
        }
    }

    /// Makes and destroys keys as planned; after what is desired was installed and published. One that fails is tried again
    /// by the next pass, which nothing hurries.
    pub(super) fn turn_keys(&mut self, facts: &Facts, plan: &Plan, outcome: &Outcome, issues: &mut Vec<Issue>) {
        let known = |epoch| facts.esp.as_ref().is_none_or(|esp| esp.published.contains_key(epoch));
        let published_first = plan.rotation.published.iter().any(|epoch| !known(epoch));
        let mut advanced = outcome.applied.contains_key(&Table::XfrmStates) || published_first;
        // What nobody can be told of would be in vain, and what only an old list says is no reason to destroy anything.
        let delivered = self.delivered;
        for action in plan.rotation.actions.iter().filter(|action| delivered && !is_first(action)) {
            advanced |= self.turn_key(*action, Severity::Error, issues);
        }
        let keeping = &mut self.keeping;
        keeping.in_a_row = if advanced { keeping.in_a_row.saturating_add(1) } else { 0 };
        keeping.advanced = advanced;
        let unconfirmed = plan.rotation.unconfirmed.values().any(|peers| !peers.is_empty());
        keeping.under_way = epochs(facts) > 1 || unconfirmed || keeping.requested || !plan.rotation.actions.is_empty();
        let stage = self.stage(facts);
        if advanced || stage != self.keeping.stage {
            self.keeping.moved = facts.uptime;
        }
        self.keeping.stage = stage;
    }

    /// Makes the first key, which takes nothing away from anybody: the same pass goes on with it. True if there is one now.
    /// Its number depends on the node's record and on other nodes', one of which has to be known.
    pub(super) fn make_first_key(&mut self, plan: &Plan, issues: &mut Vec<Issue>) -> bool {
        if !self.delivered && !self.snapshot.nodes.contains_key(&self.parts.node_name) {
            return false;
        }
        let first = plan.rotation.actions.iter().find(|action| is_first(action));
        first.is_some_and(|action| self.turn_key(*action, Severity::Blocking, issues))
    }

    /// Carries out an action; true if it succeeded, else there is an issue.
    fn turn_key(&mut self, action: KeyAction, severity: Severity, issues: &mut Vec<Issue>) -> bool {
        let (result, verb, epoch) = match action {
            KeyAction::Begin { epoch, .. } => (self.parts.node.begin_epoch(epoch), "made", epoch),
            KeyAction::Retire { epoch } => (self.parts.node.retire_epoch(epoch), "destroyed", epoch),
        };
        if let Err(error) = result {
            issues.push(Issue {
                severity,
                kind: IssueKind::EncapsulationUnavailable,
                subject: format!("key of epoch {epoch}"),
                message: format!("it could not be {verb}: {error:#}"),
                remedy: "make the run directory writable, and see that its file system is not full".into(),
            });
            return false;
        }
        if let Some(technology) = Technology::of(self.parts.config.mode) {
            self.audit.logs.decision(|| match action {
                KeyAction::Begin { epoch, cause } => Event::KeyMade { technology, epoch, cause },
                KeyAction::Retire { epoch } => Event::KeyDestroyed { technology, epoch },
            });
        }
        match action {
            KeyAction::Begin { cause, .. } => {
                tracing::info!(epoch, %cause, "made a new key");
                // Whatever it was made for: it is younger than the question.
                self.keeping.requested = false;
                self.keeping.begun = Some(epoch);
            }
            KeyAction::Retire { .. } => tracing::info!(epoch, "destroyed the key of an epoch that is over"),
        }
        true
    }

    /// Packets to peers that are now sent to with other keys, and to those that have yet to confirm one: they show the peer
    /// that the keys work, and are answered.
    pub(super) fn probe_changed(&mut self, plan: &Plan) {
        let complete = |name: &NodeName, plan: &Plan| {
            plan.peers
                .get(name)
                .map(|peer| (peer.keys.own, peer.keys.peer))
                .filter(|(own, peer)| own.is_some() && peer.is_some())
        };
        let before = |name| self.last.as_ref().and_then(|last| complete(name, &last.plan));
        let changed =
            plan.peers.keys().filter(|name| complete(name, plan).is_some_and(|now| before(name) != Some(now)));
        let changed: Vec<&NodeName> = changed.collect();
        self.greet(plan, changed);
        self.probe_unconfirmed(plan);
    }

    fn probe_unconfirmed(&mut self, plan: &Plan) {
        let waiting: BTreeSet<&NodeName> = plan.rotation.unconfirmed.values().flatten().collect();
        let last = self.keeping.probed.take();
        let behind = waiting.iter().filter(|name| last.as_ref().is_some_and(|last| **name > last));
        let before = waiting.iter().filter(|name| last.as_ref().is_none_or(|last| **name <= last));
        let next: Vec<&NodeName> = behind.chain(before).take(PROBES).copied().collect();
        self.keeping.probed = next.last().map(|name| (*name).clone());
        self.greet(plan, next);
    }

    /// Whether counters that a rotation waits for say something new. Probes those it waits for.
    pub(super) fn rotation_moved(&mut self, wireguard: Option<&Actual>) -> bool {
        let now = self.parts.node.uptime();
        if !self.keeping.is_attentive(now) {
            return false;
        }
        let Some(last) = self.last.take() else { return true };
        let sessions = match wireguard {
            Some(actual) => self.counted.sessions(now, with_kind(&last.plan.desired, actual)),
            None => last.facts.sessions.clone(),
        };
        let mut actual = Actual::default();
        let read = match &last.facts.esp {
            Some(_) => self.parts.kernel.read(Table::XfrmStates, &last.plan.desired, &mut actual),
            None => Ok(()),
        };
        let associations = self.counted.associations(now, &actual.xfrm_states);
        let stage = Stage::of(&sessions, &associations, self.grace());
        let moved = read.is_err() || stage != self.keeping.stage;
        if !moved {
            self.probe_unconfirmed(&last.plan);
        }
        self.last = Some(last);
        moved
    }

    fn stage(&self, facts: &Facts) -> Stage {
        let none = BTreeMap::new();
        let associations = facts.esp.as_ref().map_or(&none, |esp| &esp.installed);
        Stage::of(&facts.sessions, associations, self.grace())
    }

    fn grace(&self) -> Duration {
        Duration::from_secs(self.parts.config.rotation.grace.into())
    }
}

/// What could not be written down keeps the node from serving: what it has goes on, and what protects is kept up.
pub(super) fn unwritten(error: &anyhow::Error) -> Issue {
    Issue {
        severity: Severity::Blocking,
        kind: IssueKind::EncapsulationUnavailable,
        subject: "keys".into(),
        message: format!("no association is made: {error:#}"),
        remedy: "make the run and state directories writable, and see that their file systems are not full".into(),
    }
}

/// True if it makes the key of a node that has none.
fn is_first(action: &KeyAction) -> bool {
    matches!(action, KeyAction::Begin { cause: Cause::First, .. })
}

/// Epochs whose keys the node holds.
fn epochs(facts: &Facts) -> usize {
    facts.wireguard_epochs.len() + facts.esp.as_ref().map_or(0, |esp| esp.epochs.len())
}
