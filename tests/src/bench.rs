//! How long ADD and DEL take, beside the reference plugins and beside what the kernel alone takes.
//!
//! One host, whose daemon runs, in whose network namespace every plugin works; in each round every contender adds and deletes
//! one pod, so that whatever else the machine does hits all of them. What is timed is what a runtime sees: the plugin's
//! process, or those of a whole chain, from its start to its end. The floor is the netlink requests alone, from a process
//! that runs already.
//!
//! Reading order: `contender` says who competes, `floor` what cannot be undercut, `relay` listens to what the plugin
//! asks the daemon, [`report`] is what comes of it.

mod contender;
mod floor;
pub mod mtu;
pub mod policy;
mod relay;
pub mod report;

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use husk_overlay::mode::Mode;
use husk_overlay::prefix::{Family, Prefix};

use self::contender::{Contender, Outcome, Pod};
use self::floor::Floor;
use self::relay::Relay;
use self::report::{Burst, Comparison, DaemonShare, Memory, Report, Times};
use crate::{Cluster, Host};

/// Pause before each measured call: what the kernel does after an answer, such as waiting out an RCU period, is not to be
/// taken for a part of the next call.
const SETTLE: Duration = Duration::from_millis(40);

/// Rounds before those that count: files are read into memory, bridges made.
const WARM_UP: usize = 2;

/// Rounds of many pods at once.
const BURST_ROUNDS: usize = 3;

/// What is to be measured.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Encapsulation of the daemon that runs meanwhile.
    pub mode: Mode,
    /// Both families, instead of IPv4 alone.
    pub dual_stack: bool,
    /// Rounds that count.
    pub rounds: usize,
    /// Pods at once.
    pub at_once: usize,
}

/// Measures; `progress` is told what goes on.
///
/// # Errors
/// When the host cannot be made, a tool is missing, or Husk fails. A reference plugin that this kernel cannot serve is left out,
/// with the reason in the report.
pub fn run(plan: &Plan, progress: impl Fn(&str) + Sync) -> Result<Report> {
    progress("making a host and starting its daemon");
    let cluster = cluster(plan)?;
    let host = cluster.host(1);
    fs::create_dir_all(cluster.scope().directory().join("host-local")).context("making the directory of host-local")?;
    let contenders = contender::all(plan.dual_stack, &cluster.scope().directory().join("host-local"), host)?;
    let rounds = compare(plan, host, &contenders, &progress)?;
    progress(&format!("{} pods at once", plan.at_once));
    let bursts = [contender::HUSK, contender::BRIDGE]
        .into_iter()
        .filter_map(|name| contenders.iter().find(|it| it.name == name))
        .map(|contender| burst(plan, host, contender))
        .collect::<Result<Vec<_>>>()?;
    progress("what the daemon takes of it");
    let daemon = daemon_share(plan, host)?;
    progress("memory");
    let memory = memory(host, &contenders)?;
    let report = Report::new(plan, rounds, bursts, daemon, memory)?;
    host.stop_daemon(crate::Signal::SIGTERM)?;
    Ok(report)
}

/// What the rounds came to.
struct Rounds {
    comparisons: Vec<Comparison>,
    /// A process of Husk's plugin that does nothing, from its start to its end.
    start: Vec<Duration>,
}

fn cluster(plan: &Plan) -> Result<Cluster> {
    let builder = Cluster::builder().hosts(1).mode(plan.mode).set("blockLengths.ipv4", 24);
    let ipv4 = Prefix::containing("10.42.0.0".parse()?, 16)?;
    if plan.dual_stack { builder.start() } else { builder.cluster_cidrs([ipv4]).start() }
}

/// Adds and deletes one pod per contender and round, in turns.
fn compare(plan: &Plan, host: &Host, contenders: &[Contender], progress: &(impl Fn(&str) + Sync)) -> Result<Rounds> {
    let sandbox = host.sandbox("bench")?;
    let netns = sandbox.netns().path();
    let families = if plan.dual_stack { &Family::ALL[..] } else { &[Family::Ipv4] };
    host.run(|| -> Result<Rounds> {
        let mut floor = Floor::new(&netns, families)?;
        let (mut floor_times, mut start) = (Times::default(), Vec::new());
        let mut times: Vec<Result<Times, String>> = contenders.iter().map(|_| Ok(Times::default())).collect();
        for round in 0..WARM_UP + plan.rounds {
            progress(&format!("round {} of {}", round + 1, WARM_UP + plan.rounds));
            let counts = round >= WARM_UP;
            for (contender, times) in contenders.iter().zip(&mut times) {
                let Ok(so_far) = times else { continue };
                let pod = Pod { container_id: format!("bench-{round}"), netns: netns.clone() };
                match measure(contender, &pod) {
                    Ok((add, del)) if counts => so_far.push(add, del),
                    Ok(_) => {}
                    Err(error) if contender.name.starts_with(contender::HUSK) => return Err(error),
                    Err(error) => *times = Err(format!("{error:#}")),
                }
            }
            thread::sleep(SETTLE);
            let idle = contenders[0].idle()?;
            if counts {
                start.push(idle);
            }
            thread::sleep(SETTLE);
            let add = floor.add()?;
            thread::sleep(SETTLE);
            let del = floor.delete()?;
            if counts {
                floor_times.push(add, del);
            }
        }
        let mut comparisons: Vec<_> = contenders
            .iter()
            .zip(times)
            .map(|(contender, times)| Comparison {
                name: contender.name.to_owned(),
                processes: contender.chain.len(),
                times,
            })
            .collect();
        comparisons.push(Comparison { name: report::FLOOR.to_owned(), processes: 0, times: Ok(floor_times) });
        Ok(Rounds { comparisons, start })
    })?
}

fn measure(contender: &Contender, pod: &Pod) -> Result<(Duration, Duration)> {
    thread::sleep(SETTLE);
    let added = contender.add(pod);
    thread::sleep(SETTLE);
    // Also what is left of an ADD that failed goes.
    let result = added.as_ref().ok().map(|it| it.result.clone());
    let deleted = contender.del(pod, result.as_ref());
    Ok((added?.elapsed, deleted?.elapsed))
}

/// Many pods at once: how long until all are there, and until all are gone.
fn burst(plan: &Plan, host: &Host, contender: &Contender) -> Result<Burst> {
    let sandboxes =
        (0..plan.at_once).map(|number| host.sandbox(&format!("burst{number}"))).collect::<Result<Vec<_>>>()?;
    let mut burst = Burst { name: contender.name.to_owned(), pods: plan.at_once, ..Burst::default() };
    for round in 0..BURST_ROUNDS {
        let pods: Vec<Pod> = sandboxes
            .iter()
            .enumerate()
            .map(|(number, sandbox)| Pod {
                container_id: format!("burst-{round}-{number}"),
                netns: sandbox.netns().path(),
            })
            .collect();
        thread::sleep(SETTLE);
        let (added, took) = host.run(|| at_once(&pods, |pod| contender.add(pod)))??;
        burst.add.push(took);
        burst.each_add.extend(added.iter().map(|it| it.elapsed));
        thread::sleep(SETTLE);
        let results: Vec<_> = pods.iter().zip(&added).collect();
        let (deleted, took) =
            host.run(|| at_once(&results, |(pod, added)| contender.del(pod, Some(&added.result))))??;
        burst.del.push(took);
        burst.each_del.extend(deleted.iter().map(|it| it.elapsed));
    }
    Ok(burst)
}

fn at_once<T: Sync>(all: &[T], call: impl Fn(&T) -> Result<Outcome> + Sync) -> Result<(Vec<Outcome>, Duration)> {
    let started = Instant::now();
    let outcomes = thread::scope(|scope| {
        let threads: Vec<_> = all.iter().map(|it| scope.spawn(|| call(it))).collect();
        threads.into_iter().map(|it| it.join().map_err(|_| anyhow!("a thread panicked"))?).collect::<Result<Vec<_>>>()
    })?;
    Ok((outcomes, started.elapsed()))
}

/// What of an ADD and of a DEL the plugin waits for the daemon.
fn daemon_share(plan: &Plan, host: &Host) -> Result<DaemonShare> {
    let sandbox = host.sandbox("share")?;
    let relay = Relay::start(host)?;
    let contender = contender::husk(host, Some(relay.run_directory()))?;
    let mut times = Times::default();
    for round in 0..WARM_UP + plan.rounds {
        let pod = Pod { container_id: format!("share-{round}"), netns: sandbox.netns().path() };
        let (add, del) = host.run(|| measure(&contender, &pod))??;
        if round < WARM_UP {
            relay.forget();
        } else {
            times.push(add, del);
        }
    }
    Ok(DaemonShare { times, admit: relay.answers("admit"), detach: relay.answers("detach") })
}

/// Peak memory of every plugin's process, as GNU time tells it, and the daemon's.
fn memory(host: &Host, contenders: &[Contender]) -> Result<Memory> {
    let sandbox = host.sandbox("memory")?;
    let pod = Pod { container_id: "memory".to_owned(), netns: sandbox.netns().path() };
    let mut plugins = Vec::new();
    for contender in contenders {
        let measured = host.run(|| contender.peak_memory(&pod))?;
        match measured {
            Ok((add, del)) => plugins.push((contender.name.to_owned(), add, del)),
            Err(error) => ensure!(!contender.name.starts_with(contender::HUSK), "{error:#}"),
        }
    }
    let daemon = host.processes().into_iter().find(|it| it.command.contains("huskd run")).context("no daemon runs")?;
    let status = fs::read_to_string(Path::new("/proc").join(daemon.pid.to_string()).join("status"))?;
    let kilobytes = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key)).with_context(|| format!("no {key}"))?;
        line.trim().trim_end_matches(" kB").parse::<u64>().with_context(|| format!("{key} is {line}"))
    };
    Ok(Memory { plugins, daemon: kilobytes("VmRSS:")?, daemon_peak: kilobytes("VmHWM:")? })
}
