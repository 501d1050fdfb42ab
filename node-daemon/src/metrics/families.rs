//! The value of each metric, from what was gathered: no look-up, no clock.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use husk_overlay::config::{BlockOrigin, Config, SourceConfig};
use husk_overlay::issue::{Issue, Severity};
use husk_overlay::mode::Mode;
use husk_overlay::name::NodeName;
use husk_overlay::prefix::Family;
use husk_policy::compile::{PASSED, STATELESS, UNKNOWN_POD, denied_counter};
use husk_policy::object::Direction;

use super::catalogue::{self as names, Metric};
use super::distribution::Distribution;
use super::live::{Labels, Live};
use super::process::Process;
use super::sample::{PathSample, STANDINGS, STATES, Sample, standing_name, state_name};
use crate::flows::{FlowKind, Totals};
use crate::report::Counter;

/// Pools that have series of their own; the rest is one.
const POOLS: usize = 100;

/// What does not change while the daemon runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fixed {
    /// Own name.
    pub node: NodeName,
    /// Mode.
    pub mode: Mode,
    /// `kubernetes` or `directory`.
    pub source: &'static str,
    /// `pools` or `node-cidrs`.
    pub blocks: &'static str,
    /// Age at which a key is replaced at the latest; none where that is done on demand only, and in modes without keys.
    pub key_interval: Option<Duration>,
    /// Policy is enforced.
    pub policy: bool,
    /// Series for each peer, too.
    pub per_peer: bool,
}

impl Fixed {
    /// What a configuration says of it.
    #[must_use]
    pub fn of(config: &Config, node: &NodeName) -> Self {
        let interval = config.rotation.interval.filter(|_| config.mode.encrypted());
        Self {
            node: node.clone(),
            mode: config.mode,
            source: match &config.source {
                SourceConfig::Directory { .. } => "directory",
                SourceConfig::Kubernetes { .. } => "kubernetes",
            },
            blocks: match config.ipam.blocks {
                BlockOrigin::Pools => "pools",
                BlockOrigin::NodeCidrs => "node-cidrs",
            },
            key_interval: interval.map(|seconds| Duration::from_secs(seconds.into())),
            policy: config.policy.enabled,
            per_peer: config.metrics.per_peer,
        }
    }
}

/// All that the exposition is made of.
#[derive(Debug)]
pub struct Inputs {
    /// What does not change.
    pub fixed: Arc<Fixed>,
    /// What is counted where it happens.
    pub live: Live,
    /// Pods can be added.
    pub ready: bool,
    /// What is wrong.
    pub issues: Vec<Issue>,
    /// How things stood.
    pub sample: Arc<Sample>,
    /// Since then.
    pub sample_age: Duration,
    /// Flows that were recorded and lost.
    pub flows: Totals,
    /// Packets dropped by the node's own rules.
    pub guard: BTreeMap<String, Counter>,
    /// Packets that policy denied or passed.
    pub policy: BTreeMap<String, Counter>,
    /// Packets that IPsec did not let through.
    pub xfrm: BTreeMap<String, u64>,
    /// The process.
    pub process: Process,
    /// Time since the Unix epoch.
    pub now: Duration,
}

/// The series of one metric: its labels, in their order, and the value.
pub(super) type Series = Vec<(Labels, f64)>;

/// The series of a metric, those apart that [`Live`] counts.
pub(super) fn series(metric: &Metric, inputs: &Inputs) -> Series {
    let (sample, fixed) = (&*inputs.sample, &*inputs.fixed);
    match *metric {
        names::BUILD => info(metric, &[env!("CARGO_PKG_VERSION")]),
        names::NODE => {
            let encrypted = if fixed.mode.encrypted() { "true" } else { "false" };
            let device = if sample.device.is_empty() { "none" } else { sample.device };
            info(metric, &[fixed.node.as_str(), fixed.mode.as_str(), encrypted, fixed.source, fixed.blocks, device])
        }
        names::READY => one(Some(flag(inputs.ready))),
        names::ISSUES => issues(metric, &inputs.issues),
        names::LAST_PASS => one(inputs.live.last_pass().map(|age| before(inputs.now, age))),
        names::SOURCE_UP => one(Some(flag(sample.source.up))),
        names::SOURCE_LAST => one(sample.source.age.map(|age| before(inputs.now, age + inputs.sample_age))),
        names::ENDPOINTS => one(Some(number(sample.endpoints as u64))),
        names::KEY_AGE => one(sample.keys.and_then(|keys| keys.age).map(|age| (age + inputs.sample_age).as_secs_f64())),
        names::KEY_INTERVAL => one(fixed.key_interval.map(|interval| interval.as_secs_f64())),
        names::KEYS_HELD => one(sample.keys.map(|keys| number(keys.held as u64))),
        names::KEY_ROTATING => one(sample.keys.map(|keys| flag(keys.rotating))),
        names::UNDERLAY_MTU => one(sample.underlay_mtu.map(f64::from)),
        names::POD_MTU => one(sample.pod_mtu.map(f64::from)),
        names::GUARD_PACKETS => by_label(metric, inputs.guard.iter().map(|(name, counter)| (name, counter.packets))),
        names::GUARD_BYTES => by_label(metric, inputs.guard.iter().map(|(name, counter)| (name, counter.bytes))),
        names::POLICY_PACKETS => verdicts(metric, &inputs.policy),
        names::FLOWS => flows(metric, inputs.flows.recorded),
        names::FLOWS_LOST => flows(metric, inputs.flows.lost),
        names::XFRM_ERRORS => by_label(metric, inputs.xfrm.iter().map(|(name, packets)| (name, *packets))),
        _ => peers(metric, inputs)
            .or_else(|| addresses(metric, sample))
            .or_else(|| process(metric, inputs))
            .unwrap_or_default(),
    }
}

/// What there is of peers and paths.
fn peers(metric: &Metric, inputs: &Inputs) -> Option<Series> {
    let peers = &inputs.sample.peers;
    let heard = |age: Duration| (age + inputs.sample_age).as_secs_f64();
    let rtt = |path: &PathSample| path.rtt.map(|rtt| rtt.as_secs_f64());
    let mtu = |path: &PathSample| path.passes.map(f64::from);
    let each = inputs.fixed.per_peer;
    Some(match *metric {
        names::PEERS => {
            let count = |state: &str| peers.iter().filter(|peer| state_name(peer.state) == state).count();
            STATES.into_iter().map(|state| (labels(metric, &[state]), number(count(state) as u64))).collect()
        }
        names::PEERS_HANDSHAKE => {
            figures(metric, None, Distribution::of(peers.iter().filter_map(|peer| peer.heard).map(heard)))
        }
        names::PATHS => standings(metric, inputs),
        names::PATHS_RTT => over_paths(metric, inputs, rtt),
        names::PATHS_LOSS => over_paths(metric, inputs, PathSample::loss),
        names::PATHS_MTU => over_paths(metric, inputs, mtu),
        names::PEER_STATE if each => {
            peers.iter().map(|peer| (labels(metric, &[peer.node.as_str(), state_name(peer.state)]), 1.0)).collect()
        }
        names::PEER_HANDSHAKE if each => {
            let aged =
                peers.iter().filter_map(|peer| Some((labels(metric, &[peer.node.as_str()]), heard(peer.heard?))));
            aged.collect()
        }
        names::PEER_RTT if each => of_each_path(metric, inputs, rtt),
        names::PEER_LOSS if each => of_each_path(metric, inputs, PathSample::loss),
        names::PEER_MTU if each => of_each_path(metric, inputs, mtu),
        _ => return None,
    })
}

fn addresses(metric: &Metric, sample: &Sample) -> Option<Series> {
    let of_family = |value: fn(&super::AddressSample) -> u64| {
        let families = sample.addresses.iter();
        families.map(|(family, it)| (labels(metric, &[family_name(*family)]), number(value(it)))).collect()
    };
    let of_pool = |value: fn(&super::PoolSample) -> u64| {
        let (named, others) = sample.pools.split_at(sample.pools.len().min(POOLS));
        let rest = others.iter().map(value).fold(0, u64::saturating_add);
        let named = named.iter().map(|pool| (labels(metric, &[&pool.name]), number(value(pool))));
        let rest = (!others.is_empty()).then(|| (labels(metric, &["(others)"]), number(rest)));
        named.chain(rest).collect()
    };
    Some(match *metric {
        names::POOL_BLOCKS => of_pool(|pool| pool.blocks),
        names::POOL_USED => of_pool(|pool| pool.used),
        names::BLOCKS => of_family(|it| it.blocks),
        names::ADDRESSES => of_family(|it| it.total),
        names::LEASED => of_family(|it| it.leased),
        _ => return None,
    })
}

fn process(metric: &Metric, inputs: &Inputs) -> Option<Series> {
    let process = &inputs.process;
    Some(match *metric {
        names::PROCESS_CPU => one(process.cpu.map(|cpu| cpu.as_secs_f64())),
        names::PROCESS_RESIDENT => one(process.resident.map(number)),
        names::PROCESS_VIRTUAL => one(process.virtual_size.map(number)),
        names::PROCESS_FDS => one(process.open_fds.map(number)),
        names::PROCESS_MAX_FDS => one(process.max_fds.map(number)),
        names::PROCESS_THREADS => one(process.threads.map(number)),
        names::PROCESS_START => one(Some(inputs.live.started().as_secs_f64())),
        _ => return None,
    })
}

fn labels(metric: &Metric, values: &[&str]) -> Labels {
    metric.labels.iter().zip(values).map(|(name, value)| (*name, (*value).to_owned())).collect()
}

fn info(metric: &Metric, values: &[&str]) -> Series {
    vec![(labels(metric, values), 1.0)]
}

fn one(value: Option<f64>) -> Series {
    value.map(|value| (Vec::new(), value)).into_iter().collect()
}

fn by_label<'a>(metric: &Metric, values: impl Iterator<Item = (&'a String, u64)>) -> Series {
    values.map(|(name, value)| (labels(metric, &[name]), number(value))).collect()
}

fn flows(metric: &Metric, counts: [u64; 2]) -> Series {
    FlowKind::ALL
        .into_iter()
        .zip(counts)
        .map(|(kind, count)| (labels(metric, &[kind.as_str()]), number(count)))
        .collect()
}

fn flag(value: bool) -> f64 {
    f64::from(u8::from(value))
}

/// Numbers beyond 2^53 lose their last digits in Prometheus, whatever is done here.
#[allow(clippy::cast_precision_loss, reason = "samples of Prometheus are floating-point numbers")]
fn number(value: u64) -> f64 {
    value as f64
}

/// The moment so long before now.
fn before(now: Duration, age: Duration) -> f64 {
    now.saturating_sub(age).as_secs_f64()
}

fn family_name(family: Family) -> &'static str {
    match family {
        Family::Ipv4 => "ipv4",
        Family::Ipv6 => "ipv6",
    }
}

fn issues(metric: &Metric, issues: &[Issue]) -> Series {
    let mut counts = BTreeMap::<(String, &str), u64>::new();
    for issue in issues {
        let severity = match issue.severity {
            Severity::Warning => "warning",
            Severity::Error => "error",
            Severity::Blocking => "blocking",
        };
        *counts.entry((format!("{:?}", issue.kind), severity)).or_default() += 1;
    }
    counts.into_iter().map(|((kind, severity), count)| (labels(metric, &[&kind, severity]), number(count))).collect()
}

/// The counters of the policy table, by what they mean.
fn verdicts(metric: &Metric, counters: &BTreeMap<String, Counter>) -> Series {
    let meaning = |name: &str| {
        let denied = |direction: &Direction| denied_counter(*direction) == name;
        if let Some(direction) = Direction::ALL.iter().find(|direction| denied(direction)) {
            return Some(["denied".to_owned(), direction.to_string(), "policy".to_owned()]);
        }
        let any = |verdict: &str, reason: &str| Some([verdict.to_owned(), "any".to_owned(), reason.to_owned()]);
        match name {
            PASSED => any("accepted", "policy"),
            UNKNOWN_POD | STATELESS => any("denied", name),
            _ => None,
        }
    };
    let known = counters.iter().filter_map(|(name, counter)| Some((meaning(name)?, counter.packets)));
    known.map(|(words, packets)| (labels(metric, &words.each_ref().map(String::as_str)), number(packets))).collect()
}

fn figures(metric: &Metric, family: Option<Family>, distribution: Option<Distribution>) -> Series {
    let figures = distribution.iter().flat_map(Distribution::figures);
    let of = |stat| match family {
        Some(family) => labels(metric, &[family_name(family), stat]),
        None => labels(metric, &[stat]),
    };
    figures.map(|(stat, value)| (of(stat), value)).collect()
}

fn paths_of(inputs: &Inputs, family: Family) -> impl Iterator<Item = &PathSample> {
    inputs.sample.peers.iter().flat_map(|peer| &peer.paths).filter(move |path| path.family == family)
}

fn over_paths(metric: &Metric, inputs: &Inputs, value: impl Fn(&PathSample) -> Option<f64>) -> Series {
    let of = |family| figures(metric, Some(family), Distribution::of(paths_of(inputs, family).filter_map(&value)));
    Family::ALL.into_iter().flat_map(of).collect()
}

fn of_each_path(metric: &Metric, inputs: &Inputs, value: impl Fn(&PathSample) -> Option<f64>) -> Series {
    let paths = inputs.sample.peers.iter().flat_map(|peer| peer.paths.iter().map(move |path| (peer, path)));
    let of = |(peer, path): (&super::PeerSample, &PathSample)| {
        Some((labels(metric, &[peer.node.as_str(), family_name(path.family)]), value(path)?))
    };
    paths.filter_map(of).collect()
}

fn standings(metric: &Metric, inputs: &Inputs) -> Series {
    // A cluster of one family has no paths of the other.
    let families = Family::ALL.into_iter().filter(|family| paths_of(inputs, *family).next().is_some());
    let of = |family| {
        let count = move |standing: &str| {
            paths_of(inputs, family).filter(|path| standing_name(path.standing) == standing).count()
        };
        STANDINGS.map(|standing| (labels(metric, &[family_name(family), standing]), number(count(standing) as u64)))
    };
    families.flat_map(of).collect()
}
