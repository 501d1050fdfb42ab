//! Network policy: from what the source and the leases say to the table in the kernel, and who waits for it.
//!
//! A pod that is added waits until its policy is in the kernel. That takes no whole pass: [`Engine::enforce`] reads the leases,
//! compiles, and changes the policy table, which is what the pod waits for; everything else has time until the next pass.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use husk_dataplane::kernel::{Kernel, Table};
use husk_dataplane::reconcile::{Outcome, reconcile_policy};
use husk_overlay::config::SourceConfig;
use husk_overlay::endpoint::Endpoints;
use husk_overlay::issue::{Issue, IssueKind, Severity};
use husk_overlay::kernel::Desired;
use husk_overlay::kernel::policy::PolicyTable;
use husk_policy::cluster::{Cluster, Membership, Quarantine};
use husk_policy::compile::{closed, compile};
use husk_policy::object::{ObjectName, Objects};

use super::state::{self, Keeper};
use super::{Engine, Node};
use crate::files;
use crate::source::ClusterSource;

/// File in the state directory with the objects that the source delivered last.
const OBJECTS_FILE: &str = "policy.json";

/// File in the state directory with the pods that were put into quarantine by request.
const QUARANTINE_FILE: &str = "quarantine.json";

/// What the loop knows of policy.
pub(super) struct Policy {
    /// What the source delivered last; none while nothing is known.
    objects: Option<Arc<Objects>>,
    quarantine: Quarantine,
    quarantine_file: Option<PathBuf>,
    /// Why that file cannot be read, if it cannot: nobody is let out for that, and what is in the kernel stays.
    unreadable: Option<String>,
    keeper: Option<Keeper<Arc<Objects>>>,
    compiled: Option<Compiled>,
    /// The endpoints whose policy is in the kernel.
    enforced: Option<Arc<Endpoints>>,
    pub(super) programming: Programming,
}

/// How long it took to make and to program policy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Programming {
    /// Times that the table was changed.
    pub count: u64,
    /// Microseconds that the last compilation took.
    pub last_compile: u64,
    /// Microseconds that the last change of the table took, from reading it on.
    pub last_apply: u64,
    /// Microseconds that all of them took together.
    pub total: u64,
    /// Microseconds that the slowest took.
    pub slowest: u64,
}

/// The table, with what it was made from.
struct Compiled {
    objects: Arc<Objects>,
    endpoints: Arc<Endpoints>,
    quarantine: Quarantine,
    cluster: Arc<Cluster>,
    table: Arc<PolicyTable>,
}

impl Policy {
    /// What an earlier daemon knew.
    pub(super) fn load(state_file: Option<&std::path::Path>, allowed: BTreeSet<husk_overlay::prefix::Prefix>) -> Self {
        let beside = |name: &str| state_file.map(|file| file.with_file_name(name));
        let objects = beside(OBJECTS_FILE).as_deref().and_then(state::load::<Objects>).map(Arc::new);
        let quarantine_file = beside(QUARANTINE_FILE);
        let (pods, unreadable) = match quarantine_file.as_deref().map_or(Ok(Vec::new()), read_quarantine) {
            Ok(pods) => (pods, None),
            Err(error) => (Vec::new(), Some(format!("{error:#}"))),
        };
        Self {
            objects,
            quarantine: Quarantine { pods: pods.into_iter().collect(), allowed },
            quarantine_file,
            unreadable,
            keeper: beside(OBJECTS_FILE).and_then(Keeper::start_slowly),
            compiled: None,
            enforced: None,
            programming: Programming::default(),
        }
    }

    /// Waits until what is to be kept was written, or could not be.
    pub(super) fn flush(&self) {
        if let Some(keeper) = &self.keeper {
            keeper.flush();
        }
    }

    /// The cluster as the last table was made from it.
    pub(super) fn cluster(&self) -> Arc<Cluster> {
        self.compiled.as_ref().map(|compiled| Arc::clone(&compiled.cluster)).unwrap_or_default()
    }

    /// The last table.
    pub(super) fn table(&self) -> Option<Arc<PolicyTable>> {
        self.compiled.as_ref().map(|compiled| Arc::clone(&compiled.table))
    }

    /// What policy is made of is known, from the source or from an earlier daemon.
    pub(super) fn is_known(&self) -> bool {
        self.objects.is_some()
    }

    /// Pods that were put into quarantine by request.
    pub(super) fn requested_quarantine(&self) -> &BTreeSet<ObjectName> {
        &self.quarantine.pods
    }

    pub(super) fn enforced(&self) -> Option<Arc<Endpoints>> {
        self.enforced.clone()
    }

    /// Puts a pod of this node into quarantine, or takes it out again.
    ///
    /// # Errors
    /// When that cannot be written down; then it is not done.
    pub(super) fn set_quarantine(&mut self, pod: &ObjectName, on: bool) -> anyhow::Result<bool> {
        if let Some(reason) = &self.unreadable {
            anyhow::bail!("who is in quarantine is not known: {reason}");
        }
        let mut pods = self.quarantine.pods.clone();
        let changed = if on { pods.insert(pod.clone()) } else { pods.remove(pod) };
        if changed && let Some(file) = &self.quarantine_file {
            let list: Vec<&ObjectName> = pods.iter().collect();
            files::replace(file, &serde_json::to_vec(&list)?, 0o600)?;
        }
        self.quarantine.pods = pods;
        Ok(changed)
    }
}

impl<K: Kernel, S: ClusterSource, N: Node> Engine<K, S, N> {
    /// Takes the objects that policy is made of; what was known stays in force when the source does not answer.
    pub(super) fn read_policy_objects(&mut self, issues: &mut Vec<Issue>) {
        if !self.parts.config.policy.enabled {
            return;
        }
        match self.parts.source.policy_objects() {
            Ok(objects) => {
                if self.policy.objects.as_ref().is_none_or(|known| !Arc::ptr_eq(known, &objects)) {
                    if self.policy.objects.as_ref() != Some(&objects)
                        && let Some(keeper) = &self.policy.keeper
                    {
                        keeper.keep(Arc::clone(&objects));
                    }
                    self.policy.objects = Some(objects);
                }
            }
            // The source says it of the snapshot, too.
            Err(_) if self.source_issue.is_some() => {}
            Err(error) => issues.push(Issue {
                severity: if self.policy.objects.is_none() { Severity::Blocking } else { Severity::Error },
                kind: IssueKind::SourceUnavailable,
                subject: "network policy".into(),
                message: error.to_string(),
                remedy: "make pods, namespaces and policies readable for the daemon; nothing has to be restarted"
                    .into(),
            }),
        }
        issues.extend(self.policy.unreadable.iter().map(|reason| Issue {
            severity: Severity::Blocking,
            kind: IssueKind::BadPolicy,
            subject: "quarantine".into(),
            message: format!("who is in quarantine is not known, and policy stays as it is: {reason}"),
            remedy: "correct the file, or remove it to let everybody out; then restart the daemon".into(),
        }));
        issues.extend(self.policy.objects.iter().flat_map(|objects| objects.issues.iter().cloned()));
    }

    /// Puts the policy table into what is desired, made from the objects and leases as they are known now.
    pub(super) fn compile_policy(&mut self, desired: &mut Desired) {
        if !self.parts.config.policy.enabled {
            return;
        }
        let families = self.parts.config.families().collect();
        let Some(objects) = self.policy.objects.clone() else {
            // What an earlier daemon has left in the kernel is better than nothing.
            desired.policy = Some(Arc::new(closed(&families)));
            desired.policy_is_unknown = true;
            return;
        };
        let current = self.policy.compiled.as_ref().is_some_and(|compiled| {
            Arc::ptr_eq(&compiled.objects, &objects)
                && *compiled.endpoints == self.leases.endpoints
                && compiled.quarantine == self.policy.quarantine
        });
        if !current {
            let started = Instant::now();
            let membership = match self.parts.config.source {
                SourceConfig::Kubernetes { .. } => Membership::Objects,
                SourceConfig::Directory { .. } => Membership::Optional,
            };
            let endpoints = Arc::new(self.leases.endpoints.clone());
            let quarantine = self.policy.quarantine.clone();
            let cluster = Arc::new(Cluster::new(Arc::clone(&objects), &endpoints, membership, &quarantine));
            let table = Arc::new(compile(&cluster, &families));
            self.policy.compiled = Some(Compiled { objects, endpoints, quarantine, cluster, table });
            self.policy.programming.last_compile = microseconds(started.elapsed());
        }
        desired.policy = self.policy.table();
        // Which pods there are, is not known without their leases.
        desired.policy_is_unknown = !self.leases_known || self.policy.unreadable.is_some();
    }

    /// Takes note of what a pass, or a part of one, has made of the policy table.
    pub(super) fn note_policy(&mut self, desired: &Desired, outcome: &Outcome) {
        if outcome.applied.contains_key(&Table::Policy) {
            self.policy.programming.note(outcome.took.get(&Table::Policy).copied().unwrap_or_default());
        }
        if outcome.failures.iter().any(|failure| failure.table == Table::Policy) || desired.policy_is_unknown {
            // What was in force is as it was, since the table changes as a whole or not at all.
            return;
        }
        let Some(compiled) = self.policy.compiled.as_ref().filter(|_| desired.policy.is_some()) else {
            self.policy.enforced = None;
            return;
        };
        let unknown = compiled.cluster.unknown();
        let mut enforced = compiled.endpoints.as_ref().clone();
        enforced.retain(|id, _| !unknown.contains_key(id));
        self.policy.enforced = Some(Arc::new(enforced));
    }

    /// Brings the policy of pods that have just come into the kernel, without a whole pass.
    pub(super) fn enforce(&mut self) {
        // The first pass brings everything.
        let Some(mut last) = self.last.take() else { return };
        let mut issues = Vec::new();
        self.read_leases(&mut issues);
        self.read_policy_objects(&mut issues);
        self.compile_policy(&mut last.plan.desired);
        let outcome = reconcile_policy(&mut self.parts.kernel, &last.plan.desired);
        self.note_policy(&last.plan.desired, &outcome);
        self.live.enforced(&outcome);
        for failure in &outcome.failures {
            tracing::error!(%failure, "the policy of a new pod is not in the kernel yet");
        }
        self.last = Some(last);
        let (enforced, cluster) = (self.policy.enforced(), self.policy.cluster());
        self.state.send_modify(|state| {
            state.enforced = enforced;
            state.cluster = cluster;
        });
    }
}

impl Programming {
    fn note(&mut self, took: Duration) {
        self.count += 1;
        self.last_apply = microseconds(took);
        let whole = self.last_apply.saturating_add(self.last_compile);
        self.total = self.total.saturating_add(whole);
        self.slowest = self.slowest.max(whole);
    }
}

/// The pods that were put into quarantine by request.
fn read_quarantine(file: &std::path::Path) -> anyhow::Result<Vec<ObjectName>> {
    match files::read_text(file, 1 << 20)? {
        Some(text) => serde_json::from_str(&text).with_context(|| format!("{} is damaged", file.display())),
        None => Ok(Vec::new()),
    }
}

fn microseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
