//! What is counted where it happens.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use husk_dataplane::kernel::Table;
use husk_dataplane::reconcile::Outcome;
use husk_overlay::ipc::Attaching;
use prometheus_client::encoding::EncodeMetric;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};

use super::catalogue::{self, Metric};
use super::sample::Sample;

/// Labels with their values.
pub(super) type Labels = Vec<(&'static str, String)>;

/// Least time between two samples: figures are made from them every few seconds.
const PACE: Duration = Duration::from_secs(1);

/// Error codes that the plugin has (CNI specification, section 5, and its own from 100 on). Anything else counts as `other`: who
/// can write to the socket must not make series at will.
const CODES: [u32; 16] = [1, 2, 3, 4, 5, 6, 7, 11, 50, 51, 100, 101, 102, 104, 105, 106];

/// Counters, histograms and the last sample. Clones are of the same.
#[derive(Debug, Clone)]
pub struct Live(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    passes: Family<Labels, Counter>,
    pass_duration: Histogram,
    changes: Family<Labels, Counter>,
    failures: Family<Labels, Counter>,
    table_duration: Family<Labels, Histogram, fn() -> Histogram>,
    policy_duration: Histogram,
    cni_duration: Family<Labels, Histogram, fn() -> Histogram>,
    cni_errors: Family<Labels, Counter>,
    admission_duration: Family<Labels, Histogram, fn() -> Histogram>,
    started: SystemTime,
    last: Mutex<Last>,
}

#[derive(Debug)]
struct Last {
    /// When the last pass ended; at first, when the daemon started.
    pass: Instant,
    passed: bool,
    sample: Arc<Sample>,
    sampled: Option<Instant>,
}

/// What a pass came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PassResult {
    Clean,
    Failures,
    GivenUp,
}

impl PassResult {
    pub(super) const ALL: [Self; 3] = [Self::Clean, Self::Failures, Self::GivenUp];

    fn name(self) -> &'static str {
        match self {
            Self::Clean => "clean",
            Self::Failures => "failures",
            Self::GivenUp => "given_up",
        }
    }
}

impl Default for Live {
    /// All counters stand at zero, and are told from the start: a rate is seen only where there was a value before.
    fn default() -> Self {
        let live = Self(Arc::new(Inner {
            passes: Family::default(),
            // 1 ms to 16 s: a pass takes milliseconds on a small cluster and up to seconds on one of 5,000 nodes.
            pass_duration: Histogram::new(exponential_buckets(0.001, 2.0, 15)),
            changes: Family::default(),
            failures: Family::default(),
            table_duration: Family::new_with_constructor(table_histogram),
            // 0.25 ms to 4 s.
            policy_duration: Histogram::new(exponential_buckets(0.000_25, 2.0, 15)),
            cni_duration: Family::new_with_constructor(plugin_histogram),
            cni_errors: Family::default(),
            admission_duration: Family::new_with_constructor(plugin_histogram),
            started: SystemTime::now(),
            last: Mutex::new(Last { pass: Instant::now(), passed: false, sample: Arc::default(), sampled: None }),
        }));
        for result in PassResult::ALL {
            drop(live.0.passes.get_or_create(&label("result", result.name())));
        }
        for table in Table::ALL {
            drop(live.0.changes.get_or_create(&of_table(table)));
            drop(live.0.failures.get_or_create(&of_table(table)));
            drop(live.0.table_duration.get_or_create(&of_table(table)));
        }
        for result in RESULTS {
            for command in [Attaching::Add, Attaching::Del] {
                drop(live.0.cni_duration.get_or_create(&of_command(command, "result", result)));
            }
            drop(live.0.admission_duration.get_or_create(&label("result", result)));
        }
        live
    }
}

/// 1 ms to 32 s: an ADD takes some milliseconds, and gives up after ten seconds of waiting for the daemon.
fn plugin_histogram() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 16))
}

/// 1 ms to 1 s in steps of four: there is one for each table, so that it is coarser than the others.
fn table_histogram() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 4.0, 6))
}

/// How something ended.
const RESULTS: [&str; 2] = ["success", "failure"];

fn result_name(succeeded: bool) -> &'static str {
    if succeeded { RESULTS[0] } else { RESULTS[1] }
}

fn label(name: &'static str, value: &str) -> Labels {
    vec![(name, value.to_owned())]
}

fn of_table(table: Table) -> Labels {
    vec![("table", table.to_string().replace(' ', "_"))]
}

fn of_command(command: Attaching, name: &'static str, value: &str) -> Labels {
    let command = match command {
        Attaching::Add => "ADD",
        Attaching::Del => "DEL",
    };
    vec![("command", command.to_owned()), (name, value.to_owned())]
}

impl Live {
    fn last(&self) -> MutexGuard<'_, Last> {
        self.0.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A pass came to its end.
    pub(crate) fn passed(&self, outcome: &Outcome, took: Duration) {
        self.count(outcome);
        let result = if outcome.is_clean() { PassResult::Clean } else { PassResult::Failures };
        self.0.pass_duration.observe(took.as_secs_f64());
        self.ended(result);
    }

    /// A pass was given up.
    pub(crate) fn gave_up(&self) {
        self.ended(PassResult::GivenUp);
    }

    fn ended(&self, result: PassResult) {
        self.0.passes.get_or_create(&label("result", result.name())).inc();
        let mut last = self.last();
        last.pass = Instant::now();
        last.passed = true;
    }

    /// Policy alone was enforced.
    pub(crate) fn enforced(&self, outcome: &Outcome) {
        self.count(outcome);
    }

    fn count(&self, outcome: &Outcome) {
        for (table, changes) in &outcome.applied {
            self.0.changes.get_or_create(&of_table(*table)).inc_by(*changes as u64);
        }
        for failure in &outcome.failures {
            self.0.failures.get_or_create(&of_table(failure.table)).inc();
        }
        for (table, took) in &outcome.took {
            self.0.table_duration.get_or_create(&of_table(*table)).observe(took.as_secs_f64());
        }
        if let (true, Some(took)) = (outcome.applied.contains_key(&Table::Policy), outcome.took.get(&Table::Policy)) {
            self.0.policy_duration.observe(took.as_secs_f64());
        }
    }

    /// An ADD or DEL of the plugin is over.
    pub(crate) fn plugin_ended(&self, command: Attaching, took: Duration, error: Option<u32>) {
        let result = of_command(command, "result", result_name(error.is_none()));
        self.0.cni_duration.get_or_create(&result).observe(took.as_secs_f64());
        if let Some(code) = error {
            let code = if CODES.contains(&code) { code.to_string() } else { "other".to_owned() };
            self.0.cni_errors.get_or_create(&of_command(command, "code", &code)).inc();
        }
    }

    /// A pod was admitted, or turned away.
    pub(crate) fn admitted(&self, succeeded: bool, took: Duration) {
        let labels = label("result", result_name(succeeded));
        self.0.admission_duration.get_or_create(&labels).observe(took.as_secs_f64());
    }

    /// It is time for another sample.
    pub(crate) fn wants_sample(&self) -> bool {
        self.last().sampled.is_none_or(|at| at.elapsed() >= PACE)
    }

    /// Takes a sample.
    pub(crate) fn set_sample(&self, sample: Sample) {
        let mut last = self.last();
        last.sampled = Some(Instant::now());
        last.sample = Arc::new(sample);
    }

    /// The last sample, and its age.
    #[must_use]
    pub fn sample(&self) -> (Arc<Sample>, Duration) {
        let last = self.last();
        (Arc::clone(&last.sample), last.sampled.map(|at| at.elapsed()).unwrap_or_default())
    }

    /// As if the last pass had ended that much earlier.
    #[cfg(test)]
    pub(crate) fn set_back(&self, by: Duration) {
        let mut last = self.last();
        last.pass = last.pass.checked_sub(by).expect("the machine has run for longer");
    }

    /// Time since a pass ended; before the first one, since the daemon started.
    #[must_use]
    pub fn since_pass(&self) -> Duration {
        self.last().pass.elapsed()
    }

    /// Time since a pass ended; none before the first one.
    pub(super) fn last_pass(&self) -> Option<Duration> {
        let last = self.last();
        last.passed.then(|| last.pass.elapsed())
    }

    /// When the daemon started, as time since the Unix epoch.
    pub(super) fn started(&self) -> Duration {
        self.0.started.duration_since(UNIX_EPOCH).unwrap_or_default()
    }

    /// What is counted here of a metric; none for those that are not.
    pub(super) fn metric(&self, metric: &Metric) -> Option<&dyn EncodeMetric> {
        let inner = &*self.0;
        Some(match *metric {
            catalogue::PASSES => &inner.passes,
            catalogue::PASS_DURATION => &inner.pass_duration,
            catalogue::CHANGES => &inner.changes,
            catalogue::FAILURES => &inner.failures,
            catalogue::TABLE_DURATION => &inner.table_duration,
            catalogue::POLICY_DURATION => &inner.policy_duration,
            catalogue::CNI_DURATION => &inner.cni_duration,
            catalogue::CNI_ERRORS => &inner.cni_errors,
            catalogue::ADMISSION_DURATION => &inner.admission_duration,
            _ => return None,
        })
    }
}
