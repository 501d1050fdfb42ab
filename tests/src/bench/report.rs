//! What a benchmark came to, for people and for programs.

use std::fmt;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde_json::{Value, json};

use super::{Plan, Rounds, contender};

/// What the kernel alone takes.
pub(super) const FLOOR: &str = "floor: the kernel alone";

/// What is aimed at: ratios of the medians to those of `bridge`, and to the floor.
const AIM_OF_BRIDGE: f64 = 0.3;
const AIM_OF_FLOOR: f64 = 1.5;

/// Times of ADD and of DEL, one of each per round.
#[derive(Debug, Clone, Default)]
pub struct Times {
    add: Vec<Duration>,
    del: Vec<Duration>,
}

/// One contender.
#[derive(Debug, Clone)]
pub struct Comparison {
    /// Its name.
    pub name: String,
    /// Plugins in its chain, each at least one process.
    pub processes: usize,
    /// Its times, or why there are none.
    pub times: Result<Times, String>,
}

/// Many pods at once: a time per round until all were done, and one per pod.
#[derive(Debug, Clone, Default)]
pub struct Burst {
    pub(super) name: String,
    pub(super) pods: usize,
    pub(super) add: Vec<Duration>,
    pub(super) del: Vec<Duration>,
    pub(super) each_add: Vec<Duration>,
    pub(super) each_del: Vec<Duration>,
}

/// What the plugin waited for the daemon.
#[derive(Debug, Clone)]
pub struct DaemonShare {
    pub(super) times: Times,
    pub(super) admit: Vec<Duration>,
    pub(super) detach: Vec<Duration>,
}

/// Resident sets in KiB.
#[derive(Debug, Clone)]
pub struct Memory {
    /// Largest of ADD and of DEL, by contender.
    pub(super) plugins: Vec<(String, u64, u64)>,
    /// The daemon's now, and the largest it had.
    pub(super) daemon: u64,
    pub(super) daemon_peak: u64,
}

/// Everything.
#[derive(Debug, Clone)]
pub struct Report {
    mode: String,
    families: &'static str,
    rounds: usize,
    machine: String,
    comparisons: Vec<Comparison>,
    /// A process of the plugin that does nothing.
    start: Vec<Duration>,
    bursts: Vec<Burst>,
    daemon: DaemonShare,
    memory: Memory,
}

impl Times {
    pub(super) fn push(&mut self, add: Duration, del: Duration) {
        self.add.push(add);
        self.del.push(del);
    }
}

impl Report {
    pub(super) fn new(
        plan: &Plan,
        rounds: Rounds,
        bursts: Vec<Burst>,
        daemon: DaemonShare,
        memory: Memory,
    ) -> Result<Self> {
        let Rounds { comparisons, start } = rounds;
        let read = |path: &str| fs::read_to_string(path).with_context(|| format!("reading {path}"));
        let cores = std::thread::available_parallelism()?;
        let load = read("/proc/loadavg")?;
        let load = load.split(' ').next().unwrap_or_default();
        Ok(Self {
            mode: plan.mode.to_string(),
            families: if plan.dual_stack { "IPv4 and IPv6" } else { "IPv4" },
            rounds: plan.rounds,
            machine: format!(
                "Linux {}, {cores} cores, load {load} at the end",
                read("/proc/sys/kernel/osrelease")?.trim()
            ),
            comparisons,
            start,
            bursts,
            daemon,
            memory,
        })
    }

    fn median_of(&self, name: &str) -> Option<(f64, f64)> {
        let found = self.comparisons.iter().find(|it| it.name == name)?.times.as_ref().ok()?;
        Some((median(&found.add), median(&found.del)))
    }

    /// The report for programs; times in milliseconds, memory in KiB.
    #[must_use]
    pub fn json(&self) -> Value {
        let statistics =
            |all: &[Duration]| json!({"median": median(all), "p95": percentile(all, 95), "all": milliseconds(all)});
        let bridge = self.median_of(contender::BRIDGE);
        let comparison = |it: &Comparison| match &it.times {
            Ok(times) => json!({
                "name": it.name,
                "plugins": it.processes,
                "add": statistics(&times.add),
                "del": statistics(&times.del),
                "ratioToBridge": bridge.map(|(add, del)| json!({"add": median(&times.add) / add, "del": median(&times.del) / del})),
            }),
            Err(reason) => json!({"name": it.name, "plugins": it.processes, "unavailable": reason}),
        };
        let burst = |it: &Burst| {
            json!({
                "name": it.name, "pods": it.pods, "add": statistics(&it.add), "del": statistics(&it.del),
                "eachAdd": statistics(&it.each_add), "eachDel": statistics(&it.each_del),
            })
        };
        let memory = |(name, add, del): &(String, u64, u64)| json!({"name": name, "add": add, "del": del});
        json!({
            "machine": self.machine,
            "mode": self.mode,
            "families": self.families,
            "rounds": self.rounds,
            "comparisons": self.comparisons.iter().map(comparison).collect::<Vec<_>>(),
            "start": statistics(&self.start),
            "atOnce": self.bursts.iter().map(burst).collect::<Vec<_>>(),
            "daemon": {
                "add": statistics(&self.daemon.times.add), "admit": statistics(&self.daemon.admit),
                "del": statistics(&self.daemon.times.del), "detach": statistics(&self.daemon.detach),
            },
            "memory": {
                "plugins": self.memory.plugins.iter().map(memory).collect::<Vec<_>>(),
                "daemon": self.memory.daemon, "daemonPeak": self.memory.daemon_peak,
            },
            "aims": self.aims().iter().map(|aim| json!({
                "what": aim.what, "aim": aim.limit, "reached": aim.ratio, "met": aim.ratio <= aim.limit,
            })).collect::<Vec<_>>(),
        })
    }

    fn aims(&self) -> Vec<Aim> {
        let (Some(husk), Some(bridge), Some(floor)) =
            (self.median_of(contender::HUSK), self.median_of(contender::BRIDGE), self.median_of(FLOOR))
        else {
            return Vec::new();
        };
        vec![
            Aim { what: "ADD to that of bridge", ratio: husk.0 / bridge.0, limit: AIM_OF_BRIDGE },
            Aim { what: "DEL to that of bridge", ratio: husk.1 / bridge.1, limit: AIM_OF_BRIDGE },
            Aim { what: "ADD to the floor", ratio: husk.0 / floor.0, limit: AIM_OF_FLOOR },
        ]
    }
}

struct Aim {
    what: &'static str,
    ratio: f64,
    limit: f64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} rounds in turns, {}, mode {}; {}", self.rounds, self.families, self.mode, self.machine)?;
        let bridge = self.median_of(contender::BRIDGE).unwrap_or((f64::NAN, f64::NAN));
        let mut table = table(["ms", "plugins", "ADD median", "p95", "of bridge", "DEL median", "p95", "of bridge"]);
        for it in &self.comparisons {
            let mut row = vec![it.name.clone(), it.processes.to_string()];
            match &it.times {
                Ok(times) => {
                    for (all, bridge) in [(&times.add, bridge.0), (&times.del, bridge.1)] {
                        let median = median(all);
                        row.extend([number(median), number(percentile(all, 95)), format!("{:.2}×", median / bridge)]);
                    }
                }
                Err(reason) => row.push(shortened(reason)),
            }
            table.add_row(row);
        }
        writeln!(f, "{table}\n")?;
        let mut table = self::table(["pods at once, ms", "all added", "each", "p95", "all deleted", "each", "p95"]);
        for it in &self.bursts {
            let mut row = vec![format!("{}, {} pods", it.name, it.pods)];
            for (all, each) in [(&it.add, &it.each_add), (&it.del, &it.each_del)] {
                row.extend([number(median(all)), number(median(each)), number(percentile(each, 95))]);
            }
            table.add_row(row);
        }
        writeln!(f, "{table}\n")?;
        writeln!(f, "A process of husk that does nothing (VERSION): {} ms", number(median(&self.start)))?;
        let DaemonShare { times, admit, detach } = &self.daemon;
        writeln!(
            f,
            "Of that the daemon, through a relay: {} of {} ms of an ADD (admission), {} of {} ms of a DEL (deletion of the interface)\n",
            number(median(admit)),
            number(median(&times.add)),
            number(median(detach)),
            number(median(&times.del))
        )?;
        let mut table = self::table(["peak memory, MiB", "ADD", "DEL"]);
        let mebibytes = |kibibytes: u64| format!("{:.1}", kibibytes as f64 / 1024.0);
        for (name, add, del) in &self.memory.plugins {
            table.add_row([name.clone(), mebibytes(*add), mebibytes(*del)]);
        }
        let (now, peak) = (mebibytes(self.memory.daemon), mebibytes(self.memory.daemon_peak));
        writeln!(f, "{table}\nThe daemon: {now} MiB, {peak} MiB at most\n")?;
        for Aim { what, ratio, limit } in self.aims() {
            writeln!(f, "{} {what}: {ratio:.2}, aim {limit}", if ratio <= limit { "✓" } else { "✗" })?;
        }
        Ok(())
    }
}

pub(super) fn table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_content_arrangement(ContentArrangement::Disabled).set_header(header);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn number(milliseconds: f64) -> String {
    format!("{milliseconds:.2}")
}

/// The first line of a reason, as far as it fits into a table.
fn shortened(reason: &str) -> String {
    let line = reason.lines().next().unwrap_or_default();
    if line.chars().count() > 60 { line.chars().take(59).chain(['…']).collect() } else { line.to_owned() }
}

fn milliseconds(all: &[Duration]) -> Vec<f64> {
    all.iter().map(|it| it.as_secs_f64() * 1000.0).collect()
}

fn median(all: &[Duration]) -> f64 {
    let mut sorted = milliseconds(all);
    sorted.sort_by(f64::total_cmp);
    match (sorted.len() / 2, sorted.len() % 2) {
        (0, 0) => f64::NAN,
        (middle, 0) => f64::midpoint(sorted[middle - 1], sorted[middle]),
        (middle, _) => sorted[middle],
    }
}

/// The value that this many per cent of all do not exceed (nearest rank).
fn percentile(all: &[Duration], percent: usize) -> f64 {
    let mut sorted = milliseconds(all);
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_percentiles() {
        let all: Vec<Duration> = (1..=20).rev().map(Duration::from_millis).collect();
        assert!((median(&all) - 10.5).abs() < 1e-9);
        assert!((percentile(&all, 95) - 19.0).abs() < 1e-9);
        assert!((percentile(&all[..1], 95) - 20.0).abs() < 1e-9);
        assert!(median(&[]).is_nan() && percentile(&[], 95).is_nan());
    }
}
