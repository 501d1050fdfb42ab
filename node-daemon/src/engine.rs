//! The reconcile loop: level-triggered, one thread, one pass at a time.
//!
//! A pass reads the cluster source, the leases and the node itself, plans, and brings the kernel to the plan. Wakes carry
//! no data, so that nothing is lost when many come at once, and what an outsider changed comes back by itself.

mod announce;
mod audit;
mod blocks;
mod capture;
mod devices;
mod endpoints;
mod failures;
mod forwarding;
mod handle;
mod inputs;
mod keys;
mod mismatch;
mod mtu_reports;
mod node;
mod observe;
mod offload;
mod pace;
mod pod_names;
mod pods;
mod policy;
mod policy_reports;
mod probes;
mod quiet;
mod reports;
mod rotation;
mod sessions;
mod shrinking;
mod state;
mod top;
mod trace;
mod traffic;
mod usage;
mod waker;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use husk_dataplane::Sweep;
use husk_dataplane::kernel::{Actual, Kernel, Table, diff_table};
use husk_dataplane::reconcile::{Outcome, reconcile};
use husk_ipam::lease::{LeaseStore, Leases};
use husk_overlay::config::Config;
use husk_overlay::facts::Facts;
use husk_overlay::issue::{Issue, IssueKind, Severity};
use husk_overlay::name::{InterfaceName, NodeName};
use husk_overlay::plan::{Plan, name_taken, plan};
use husk_overlay::prefix::Prefix;
use husk_overlay::record::{NodeRecord, Snapshot};

pub use handle::{Handle, channel};
pub use node::Node;
pub use policy::Programming;
pub(crate) use policy_reports::answer;
pub use state::State;
pub use waker::{Ask, Message, Waker};

use self::pace::{Cause, Pace};
use crate::metrics::Live;
use crate::node_file::Writer;
use crate::source::ClusterSource;

/// Time between two full passes when nothing wakes the loop.
const TICK: Duration = Duration::from_secs(5);

/// Least time from the end of a pass to the next one, so that a storm of events costs bounded work.
const GAP: Duration = Duration::from_millis(20);

/// How long the loop lets pass from an event to the pass that it causes. Events come in company, as those of a pod that is
/// being connected do: one pass does for all of them, and does not contend with their cause for the kernel's locks. Who waits
/// for a pass, though, gets it at once, whatever the time since the last one.
const SETTLE: Duration = Duration::from_millis(10);

/// What the engine is made of.
pub struct Parts<K, S, N> {
    /// Validated configuration.
    pub config: Config,
    /// Own name.
    pub node_name: NodeName,
    /// Kernel tables.
    pub kernel: K,
    /// Cluster source.
    pub source: S,
    /// The node.
    pub node: N,
    /// Lease store of the plugin.
    pub leases: LeaseStore,
    /// Writes `node.json` and the network configuration.
    pub writer: Writer,
    /// Where the last snapshot is kept; none for tests.
    pub state_file: Option<PathBuf>,
    /// Boot id for `node.json`.
    pub boot_id: String,
    /// Randomness: where the search for a free block starts.
    pub block_offset: u128,
}

/// The reconcile loop.
pub struct Engine<K, S, N> {
    parts: Parts<K, S, N>,
    snapshot: Snapshot,
    /// The source has delivered a full list since the daemon started: only then may state be swept.
    delivered: bool,
    source_issue: Option<Issue>,
    created: jiff::Timestamp,
    leases: Leases,
    /// The leases are those of this pass; without them, which pods there are is not known and nothing may be swept.
    leases_known: bool,
    /// Another host has published itself under this node's name.
    name_taken: bool,
    block_changes: blocks::BlockChanges,
    /// The node's blocks as far as it knows, those included that the source has forgotten.
    held: BTreeSet<Prefix>,
    /// Where devices were told that their peers are.
    told: endpoints::KnownEndpoints,
    /// Pods whose MTU could not be set, or only at one end.
    untuned: BTreeSet<InterfaceName>,
    /// Whether pods have to forget what they know of paths, and when they last had to.
    outgrown: pods::Outgrown,
    /// The smaller underlay MTU in bytes that the source did not take before the own devices were touched.
    untaken_mtu: Option<u32>,
    pace: Pace,
    /// What use was made of keys.
    counted: usage::Counted,
    keeping: rotation::Keeping,
    published: Option<NodeRecord>,
    last: Option<Pass>,
    passes: u64,
    state: tokio::sync::watch::Sender<State>,
    keeper: Option<state::Keeper<Snapshot>>,
    policy: policy::Policy,
    /// When the source last answered.
    source_answered: Option<Instant>,
    /// What is counted, and where samples are left.
    live: Live,
    audit: audit::Audit,
}

/// A finished pass.
struct Pass {
    facts: Facts,
    plan: Plan,
    outcome: Outcome,
    /// Problems found after planning.
    issues: Vec<Issue>,
    took: Duration,
}

/// When the pass comes that an event at `now` causes, if the last one leaves room for another from `earliest` on.
fn soonest(now: Instant, earliest: Instant, urgent: bool) -> Instant {
    if urgent { now } else { earliest.max(now + SETTLE) }
}

impl<K: Kernel, S: ClusterSource, N: Node> Engine<K, S, N> {
    /// Makes an engine that knows the last snapshot of an earlier daemon, if there is one.
    pub fn new(parts: Parts<K, S, N>, state: tokio::sync::watch::Sender<State>, now: jiff::Timestamp) -> Self {
        let snapshot = parts.state_file.as_deref().and_then(state::load::<Snapshot>).unwrap_or_default();
        let keeper = parts.state_file.clone().and_then(state::Keeper::start);
        let allowed = parts.config.policy.quarantine_allowed.clone();
        let policy = policy::Policy::load(parts.state_file.as_deref(), allowed);
        let created = snapshot.nodes.get(&parts.node_name).map_or(now, |own| own.created);
        let own = snapshot.blocks.iter().filter(|(_, owner)| **owner == parts.node_name);
        let held = own.map(|(block, _)| *block).collect();
        Self {
            parts,
            snapshot,
            delivered: false,
            source_issue: None,
            created,
            leases: Leases::default(),
            leases_known: false,
            name_taken: false,
            block_changes: blocks::BlockChanges::default(),
            held,
            told: endpoints::KnownEndpoints::new(),
            untuned: BTreeSet::new(),
            outgrown: pods::Outgrown::default(),
            untaken_mtu: None,
            pace: Pace::default(),
            counted: usage::Counted::default(),
            keeping: rotation::Keeping::default(),
            published: None,
            last: None,
            passes: 0,
            state,
            keeper,
            policy,
            source_answered: None,
            live: Live::default(),
            audit: audit::Audit::default(),
        }
    }

    /// Runs until the last handle is gone or one says stop.
    pub fn run(&mut self, inbox: &Receiver<Message>, waker: &Waker) {
        let mut next_pass = Instant::now();
        let mut earliest = next_pass;
        let mut next_tick = next_pass;
        let mut next_look = next_pass + self.look_interval();
        // When policy is enforced for what changed, without a pass; and from when on it may be.
        let mut next_policy: Option<Instant> = None;
        let mut policy_earliest = next_pass;
        let mut cause = Cause::OwnAccord;
        loop {
            let now = Instant::now();
            if now >= next_pass {
                waker.clear();
                waker.clear_policy();
                next_policy = None;
                if now >= next_tick {
                    self.reclaim_leases();
                    next_tick = now + TICK;
                }
                self.pace.begin(std::mem::replace(&mut cause, Cause::OwnAccord));
                self.pass();
                let end = Instant::now();
                earliest = end + GAP.max(end - now);
                next_pass = if self.keeping.hurries() { earliest } else { end + TICK };
                next_look = end + self.look_interval();
            } else if next_policy.is_some_and(|due| now >= due) {
                waker.clear_policy();
                next_policy = None;
                self.enforce();
                let end = Instant::now();
                policy_earliest = end + GAP.max(end - now);
            } else if now >= next_look {
                if self.silent_tables_changed() {
                    next_pass = now;
                    continue;
                }
                let end = Instant::now();
                self.pace.all_is_well(end - now);
                next_look = end + self.look_interval();
            }
            let due = next_policy.map_or(next_pass, |due| due.min(next_pass)).min(next_look);
            let wait = due.saturating_duration_since(Instant::now());
            match inbox.recv_timeout(wait) {
                Ok(Message::Wake) => {
                    next_pass = next_pass.min(soonest(Instant::now(), earliest, waker.is_urgent()));
                    cause = Cause::Event;
                }
                Ok(Message::Enforce) => next_policy = Some(Instant::now()),
                Ok(Message::Policy) => {
                    let soon = soonest(Instant::now(), policy_earliest, false);
                    next_policy = Some(next_policy.map_or(soon, |due| due.min(soon)));
                }
                Ok(Message::Ask(ask)) => {
                    self.answer(ask);
                    if self.keeping.hurries() {
                        next_pass = next_pass.min(earliest);
                    }
                }
                Ok(Message::Stop) | Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
        if let Some(keeper) = &self.keeper {
            keeper.flush();
        }
        self.policy.flush();
    }

    /// One pass. Never fails: what goes wrong is an issue of the state it leaves.
    pub fn pass(&mut self) {
        if let Err(error) = self.try_pass() {
            self.fail(&error);
        }
    }

    /// One pass, given up where the node cannot be looked at or its keys cannot be read.
    fn try_pass(&mut self) -> anyhow::Result<()> {
        let started = Instant::now();
        let mut issues = Vec::new();
        self.read_source();
        self.read_policy_objects(&mut issues);
        let mut facts = self.facts()?;
        self.name_taken = name_taken(&self.snapshot, &facts);
        // After the interfaces: the plugin makes the lease first, so that an interface without a lease is one too many.
        self.read_leases(&mut issues);
        self.ensure_blocks(&mut issues);
        self.retire_blocks();
        let mut plan = self.plan(&facts);
        if self.make_first_key(&plan, &mut issues) {
            // The interfaces stay those from before the leases were read.
            facts = Facts { pod_interfaces: facts.pod_interfaces, ..self.facts()? };
            plan = self.plan(&facts);
        }
        self.promise_no_more_than_passes(&mut facts, &mut plan);
        let unwritten = self.write_ahead(&facts, &plan).err();
        if let Some(error) = &unwritten {
            issues.push(rotation::unwritten(error));
            Self::hold_back(&mut plan);
        }
        self.compile_policy(&mut plan.desired);
        self.ensure_devices(&plan, &mut issues);
        self.parts.node.remember(&plan.desired);
        let keys = self.parts.node.key_ring()?;
        let sweep = if unwritten.is_some() { Sweep::Withheld } else { self.sweep() };
        self.tell_of_shrinking(&plan, &issues);
        let (shrinking, growing) = self.mistuned_pods(&plan);
        self.tune_pods(&shrinking, &mut issues);
        self.follow_peers(&plan, &keys, &mut issues);
        let outcome = reconcile(&mut self.parts.kernel, &plan.desired, &keys, sweep);
        self.note_policy(&plan.desired, &outcome);
        self.take_back(&outcome);
        self.tune_pods(&growing, &mut issues);
        self.forget_paths(&plan, !growing.is_empty());
        failures::report(&outcome, &mut issues);
        issues.extend(self.parts.node.foreign_chains().iter().filter_map(forwarding::issue));
        issues.extend(self.parts.node.noticed());
        issues.extend(mismatch::issues(&self.parts.config.ipsec, &facts, &plan));
        issues.extend(self.probing_issues());
        self.start_sessions(&plan, &outcome);
        let published = self.publish(&plan, &mut issues);
        if unwritten.is_some() {
            self.keeping.stand_back();
        } else {
            self.turn_keys(&facts, &plan, &outcome, &mut issues);
        }
        self.probe_changed(&plan);
        self.probe_paths(&plan);
        self.test_offload(&facts, &plan);
        self.passes += 1;
        let took = started.elapsed();
        let repeated = self.pace.ended(failures::digest(&outcome), !outcome.is_clean());
        log_pass(&outcome, took, repeated);
        self.live.passed(&outcome, took);
        self.last = Some(Pass { facts, plan, outcome, issues, took });
        let announced = self.announce();
        self.leave_sample();
        if published && announced {
            self.release_blocks();
        }
        Ok(())
    }

    fn plan(&self, facts: &Facts) -> Plan {
        plan(&self.parts.config, &self.snapshot, facts, &self.leases.endpoints)
    }

    /// A pass that could not even look at the node: the data plane stays as it is, and pods wait.
    fn fail(&mut self, error: &anyhow::Error) {
        self.keeping.stand_back();
        let reason = format!("{error:#}");
        if self.pace.ended(failures::digest_of_reason(&reason), true) {
            tracing::debug!(error = reason, "the pass was given up again");
        } else {
            tracing::error!(error = reason, "the pass was given up; the data plane stays as it is");
        }
        self.passes += 1;
        self.live.gave_up();
        if let Err(error) = self.parts.writer.not_ready() {
            tracing::error!(%error, "pods that are added now are refused by the daemon");
        }
        let (issues, passes) = (self.all_issues(), self.passes);
        self.state.send_modify(|state| {
            *state = State { reason: Some(reason), issues, passes, ..State::default() };
        });
    }

    /// Tells the others what this node can receive; only after the kernel can. True if the source has the record.
    fn publish(&mut self, plan: &Plan, issues: &mut Vec<Issue>) -> bool {
        let Some(record) = &plan.record else { return false };
        if self.snapshot.nodes.get(&self.parts.node_name) == Some(record) {
            return true;
        }
        if !self.may_publish(plan, issues) {
            return false;
        }
        match self.parts.source.publish(record) {
            Ok(()) => {
                if self.published.as_ref() != Some(record) {
                    tracing::info!(addresses = ?record.addresses, blocks = ?record.blocks, "published the node's record");
                }
                self.note_published(record.clone());
                true
            }
            Err(error) => {
                issues.push(Issue {
                    severity: Severity::Error,
                    kind: IssueKind::SourceUnavailable,
                    subject: "own record".into(),
                    message: error.to_string(),
                    remedy: "make the source writable for this node".into(),
                });
                false
            }
        }
    }

    /// Whether this node can receive what others would send it, and the source answers.
    fn may_publish(&self, plan: &Plan, issues: &[Issue]) -> bool {
        // Without a block of a family the node cannot serve pods, but it can receive. So it can where its MTU is too small for a
        // family, and who does not know of that would send it what is too large. With any other it cannot.
        let receives = [IssueKind::PoolExhausted, IssueKind::NoNodeCidr, IssueKind::MtuTooSmall];
        let cannot_receive = |issue: &Issue| issue.severity == Severity::Blocking && !receives.contains(&issue.kind);
        // A source that does not answer reads is not made to wait for either.
        self.delivered && self.source_issue.is_none() && !plan.blocking().chain(issues).any(cannot_receive)
    }

    fn note_published(&mut self, record: NodeRecord) {
        self.snapshot.nodes.insert(self.parts.node_name.clone(), record.clone());
        self.published = Some(record);
        self.keep_snapshot();
    }

    /// WireGuard devices send no events when somebody changes their peers, counters never do, and packet-too-big does not either.
    fn silent_tables_changed(&mut self) -> bool {
        let Some(last) = &self.last else { return true };
        if self.parts.node.paths_changed() {
            return true;
        }
        if last.plan.desired.wireguard.is_empty() {
            return self.rotation_moved(None);
        }
        let mut actual = Actual::default();
        let read = self.parts.kernel.read(Table::Wireguard, &last.plan.desired, &mut actual);
        let differs = || !diff_table(Table::Wireguard, &last.plan.desired, &actual, self.sweep()).is_empty();
        read.is_err() || differs() || self.rotation_moved(Some(&actual))
    }

    fn look_interval(&mut self) -> Duration {
        let now = self.parts.node.uptime();
        self.pace.interval(self.keeping.is_attentive(now))
    }

    fn sweep(&self) -> Sweep {
        if self.delivered && self.leases_known { Sweep::Allowed } else { Sweep::Withheld }
    }
}

/// `repeated`: the same as in the pass before, though nothing had happened.
fn log_pass(outcome: &Outcome, took: Duration, repeated: bool) {
    let (changes, failures) = (outcome.changes(), outcome.failures.len());
    if changes > 0 && !repeated {
        tracing::info!(changes, failures, ?took, "reconciled");
    } else {
        tracing::debug!(changes, failures, ?took, "reconciled");
    }
}

#[cfg(test)]
mod tests;
