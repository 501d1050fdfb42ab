//! The demo: lays an underlay, starts the daemons, adds pods through the plugin, asks every question a person would ask,
//! and writes down the answers.
//!
//! [`run`] is the story from top to bottom. What pods reach is in `reach`, what the wire saw in `wire`, what a kept demo
//! offers in `keep`; `report` holds the answers and `text` shows them to people.

mod keep;
mod progress;
mod reach;
mod report;
mod speed;
mod text;
mod wire;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_overlay::mode::Mode;
use husk_overlay::prefix::Family;
use serde_json::Value;

use crate::capture::Capture;
use crate::{Cluster, Host, Pod, eventually};
use progress::Progress;

pub use report::Report;
pub use text::text;

/// Pods on each host.
const PODS_PER_HOST: u8 = 2;

/// How long the daemons may take to know each other once all are ready.
const MESH_LIMIT: Duration = Duration::from_secs(10);

/// What the demo should show.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// How pod packets travel.
    pub mode: Mode,
    /// Number of hosts.
    pub hosts: u8,
    /// Family of the underlay.
    pub underlay: Family,
    /// MTU of the underlay in bytes.
    pub mtu: usize,
    /// Leave everything up.
    pub keep: bool,
}

/// Runs the demo; what it made is gone when this returns, unless it is to be kept.
///
/// # Errors
/// When there is nothing to report on, for example since a daemon does not start. What does not hold as it should is no
/// error but in the report.
pub fn run(plan: &Plan) -> Result<Report> {
    let mut progress = Progress::start();
    let cluster = progress.phase(&format!("Laying an underlay for {} hosts", plan.hosts), |_| {
        Cluster::builder().mode(plan.mode).underlay(plan.underlay).hosts(plan.hosts).mtu(plan.mtu).build()
    })?;
    let capture = cluster.capture()?;
    let (mut report, pods) = match tour(plan, &cluster, capture, &mut progress) {
        Ok(done) => done,
        Err(error) => {
            return Err(match save_logs(&cluster) {
                Ok(logs) => error.context(format!("the demo ended early (logs in {})", logs.display())),
                Err(other) => error.context(format!("the demo ended early (its logs could not be saved: {other:#})")),
            });
        }
    };
    if !plan.keep {
        detach(&pods, &mut report, &mut progress)?;
    }
    report.passed = report.failures.is_empty();
    if !report.passed {
        report.logs = Some(save_logs(&cluster)?);
    }
    if plan.keep {
        report.kept = Some(keep::describe(&cluster, &pods)?);
        cluster.keep()?;
        std::mem::forget(pods);
    } else {
        progress.phase("Tearing down", |_| {
            drop(pods);
            drop(cluster);
            Ok(())
        })?;
    }
    report.phases = progress.finish();
    Ok(report)
}

/// Everything between the underlay and the teardown.
fn tour(
    plan: &Plan,
    cluster: &Cluster,
    capture: Capture,
    progress: &mut Progress,
) -> Result<(Report, Vec<(usize, Pod)>)> {
    let hosts = cluster.hosts();
    progress.phase(&format!("Starting {} daemons", hosts.len()), |step| {
        for host in hosts {
            step.show(host.name());
            host.start()?;
        }
        step.show("waiting until all are ready");
        cluster.wait_ready()?;
        step.show("waiting until every host has a route to every other");
        hosts.iter().try_for_each(wait_for_peers)
    })?;
    let mut pods = Vec::new();
    let mut plugin_times = Vec::new();
    progress.phase(&format!("Adding {PODS_PER_HOST} pods per host through the CNI plugin"), |step| {
        for (number, host) in (1..).zip(hosts) {
            for letter in (b'a'..).take(PODS_PER_HOST.into()).map(char::from) {
                let name = format!("{number}{letter}");
                step.show(&name);
                let mut pod = host.sandbox(&name)?;
                let outcome = pod.add()?;
                plugin_times.push(outcome.elapsed.as_secs_f64() * 1000.0);
                outcome.into_result().with_context(|| format!("adding pod {name} on {}", host.name()))?;
                pods.push((number, pod));
            }
        }
        Ok(())
    })?;
    let mut report = Report::new(plan, cluster, &pods)?;
    report.plugin_milliseconds = plugin_times;
    report.own_host = status(&hosts[0])?;
    report.check_mtu();
    let members = reach::members(cluster, &pods)?;
    report.pairs = progress.phase("Asking every pod for every other", |step| Ok(reach::pairs(&members, step)))?;
    report.beyond =
        progress.phase("Asking hosts and the outside", |step| reach::beyond(plan.mode, cluster, &members, step))?;
    report.check_reach();
    report.wire = progress.phase("Reading the capture", |_| {
        let trace = capture.stop()?;
        if plan.keep {
            trace.write_pcap(&keep::pcap_path(cluster))?;
        }
        Ok(wire::summary(&trace, cluster, plan.mode))
    })?;
    report.check_wire();
    drop(members);
    // Where pods do not reach each other there is nothing to measure.
    if report.failures.is_empty() {
        match progress.phase("Measuring throughput", |step| speed::measure(plan, cluster, &pods, step)) {
            Ok(throughput) => report.throughput = Some(throughput),
            Err(error) => report.fail("throughput", "a TCP connection that never stands still", format!("{error:#}")),
        }
    }
    // Once more: what peers say is worth reading only after there was traffic.
    report.own_host = status(&hosts[0])?;
    for host in hosts {
        report.check_status(host.name(), &host.huskctl_json(["status"])?);
    }
    Ok((report, pods))
}

/// Waits until the daemon says that it has a route to every peer.
fn wait_for_peers(host: &Host) -> Result<()> {
    let mut last = Value::Null;
    let waited = eventually("a route to every peer", MESH_LIMIT, || {
        last = host.huskctl_json(["status"])?;
        Ok(last["peers"][0] == last["peers"][1] && last["peers"][1].as_u64() > Some(0))
    });
    waited.with_context(|| format!("{}: `huskctl status` says {last}", host.name()))
}

/// What `huskctl` of a host says, for people and for scripts.
fn status(host: &Host) -> Result<report::OwnHost> {
    let text = |command| -> Result<String> {
        let output = host.huskctl([command])?;
        ensure!(!output.stdout.is_empty(), "`huskctl {command}` on {} said: {}", host.name(), output.stderr);
        Ok(output.stdout)
    };
    Ok(report::OwnHost {
        name: host.name().to_owned(),
        status: host.huskctl_json(["status"])?,
        peers: host.huskctl_json(["peers"])?,
        mtu: host.huskctl_json(["mtu"])?,
        status_text: text("status")?,
        peers_text: text("peers")?,
    })
}

/// Detaches the pods as a runtime would; the plugin has to succeed.
fn detach(pods: &[(usize, Pod)], report: &mut Report, progress: &mut Progress) -> Result<()> {
    progress.phase("Deleting the pods through the CNI plugin", |step| {
        for (_, pod) in pods {
            step.show(pod.name());
            let outcome = pod.del()?;
            if !outcome.success() {
                let said = format!("{} {}", outcome.stdout.trim(), outcome.stderr.trim());
                report.fail(format!("DEL of pod {}", pod.name()), "success", said);
            }
        }
        Ok(())
    })
}

/// Copies the daemons' logs to where the teardown does not reach.
fn save_logs(cluster: &Cluster) -> Result<PathBuf> {
    let directory = std::env::temp_dir().join(format!("husk-demo-logs-{}", std::process::id()));
    std::fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
    for host in cluster.hosts() {
        let path = directory.join(format!("{}.log", host.name()));
        std::fs::write(&path, host.daemon_log()).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(directory)
}
