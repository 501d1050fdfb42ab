//! Blocks that come and go while pods do, on several hosts at once.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_tests::{Cluster, Host, Mode, Pod, PodSpec, Prefix, eventually};
use serde_json::json;

use crate::{LATER, assert_clean, distinct_addresses, pods};

/// What is true of all hosts at any moment: who has which address, as the runtimes know it.
#[derive(Default)]
struct Holders(Mutex<BTreeMap<IpAddr, String>>);

impl Holders {
    fn take(&self, addresses: &[IpAddr], pod: &str) -> Result<()> {
        let mut holders = self.0.lock().expect("no holder panics");
        addresses.iter().try_for_each(|address| {
            let other = holders.insert(*address, pod.to_owned());
            ensure!(other.is_none(), "{address} was given to {pod} while {} had it", other.unwrap_or_default());
            Ok(())
        })
    }

    /// Before the DEL, in the course of which the address becomes free.
    fn leave(&self, addresses: &[IpAddr]) {
        let mut holders = self.0.lock().expect("no holder panics");
        for address in addresses {
            holders.remove(address);
        }
    }
}

/// Looks at two hosts until told to stop: no block is served by both. A block that changes hands between two looks is seen
/// with its first owner once only. Returns the number of looks and the most blocks that were served.
fn watch_blocks(cluster: &Cluster, stop: &AtomicBool) -> Result<(usize, usize)> {
    let (mut looks, mut most) = (0, 0);
    while !stop.load(Ordering::Relaxed) {
        for one in cluster.hosts() {
            let before = one.blocks()?;
            for other in cluster.hosts().iter().filter(|other| other.name() != one.name()) {
                let theirs = other.blocks()?;
                let still: BTreeSet<Prefix> = one.blocks()?.intersection(&before).copied().collect();
                let both: Vec<&Prefix> = still.intersection(&theirs).collect();
                ensure!(both.is_empty(), "{both:?} are served by {} and {}", one.name(), other.name());
            }
        }
        let all: usize = cluster.hosts().iter().map(|host| host.blocks().map(|it| it.len()).unwrap_or(0)).sum();
        (looks, most) = (looks + 1, most.max(all));
        thread::sleep(Duration::from_millis(5));
    }
    Ok((looks, most))
}

/// Adds a pod, which may have to wait until another host has given a block back. Returns how often it was told to.
fn add_at_last(host: &Host, spec: &PodSpec) -> Result<(Vec<IpAddr>, usize)> {
    let mut refusals = 0;
    let mut addresses = Vec::new();
    eventually(&format!("an address for {}", spec.container_id), Duration::from_secs(20), || {
        let outcome = host.cni("ADD", spec)?;
        if !outcome.success() {
            ensure!(matches!(outcome.error_code(), Some(100 | LATER)), "{}{}", outcome.stdout, outcome.stderr);
            refusals += 1;
            return Ok(false);
        }
        let ips = outcome.json["ips"].as_array().into_iter().flatten();
        addresses = ips.filter_map(|ip| ip["address"].as_str()?.split('/').next()?.parse().ok()).collect();
        Ok(true)
    })?;
    Ok((addresses, refusals))
}

#[test]
fn blocks_come_and_go_under_load() -> Result<()> {
    const HOSTS: u8 = 3;
    const WORKERS: usize = 3;
    const PODS: usize = 7;
    const ROUNDS: usize = 5;
    // Sixteen blocks of eight addresses. At their fullest the hosts hold 63 of the 125 addresses for pods, in blocks none of
    // which another host may touch.
    let cidrs = ["10.42.0.0/25".parse()?, "fd42::/121".parse()?];
    let cluster = Cluster::builder().mode(Mode::Vxlan).hosts(HOSTS).cluster_cidrs(cidrs).build()?;
    for host in cluster.hosts() {
        host.configure(|config| {
            config["blockLengths"] = json!({"ipv4": 29, "ipv6": 125});
            config["ipam"] = json!({"coolDown": 1});
        })?;
        host.start()?;
    }
    cluster.wait_ready()?;
    let least: Vec<BTreeSet<Prefix>> = cluster.hosts().iter().map(Host::blocks).collect::<Result<_>>()?;

    let (holders, stop) = (Holders::default(), AtomicBool::new(false));
    let work = |host: &Host, worker: usize| -> Result<usize> {
        let sandboxes: Vec<Pod> =
            (0..PODS).map(|number| host.sandbox(&format!("w{worker}n{number}"))).collect::<Result<_>>()?;
        let mut refusals = 0;
        for round in 0..ROUNDS {
            // Hosts and workers grow and shrink at different times, by different numbers.
            let count = PODS - (round + worker) % 3;
            let mut live = Vec::new();
            for sandbox in &sandboxes[..count] {
                let mut spec = sandbox.spec().clone();
                spec.container_id = format!("{}-{round}", spec.container_id);
                let (addresses, refused) = add_at_last(host, &spec)?;
                holders.take(&addresses, &spec.container_id)?;
                refusals += refused;
                live.push((spec, addresses));
            }
            for (spec, addresses) in live {
                holders.leave(&addresses);
                host.cni("DEL", &spec)?.succeeded()?;
            }
        }
        Ok(refusals)
    };
    let started = Instant::now();
    let (refusals, (looks, most)) = thread::scope(|scope| -> Result<_> {
        let watcher = scope.spawn(|| watch_blocks(&cluster, &stop));
        let work = &work;
        let workers: Vec<_> = cluster
            .hosts()
            .iter()
            .flat_map(|host| (0..WORKERS).map(move |worker| (host, worker)))
            .map(|(host, worker)| scope.spawn(move || work(host, worker)))
            .collect();
        let ended: Vec<Result<usize>> =
            workers.into_iter().map(|worker| worker.join().expect("a panic is a failed test")).collect();
        stop.store(true, Ordering::Relaxed);
        let watched = watcher.join().expect("a panic is a failed test")?;
        Ok((ended.into_iter().sum::<Result<usize>>()?, watched))
    })?;
    eprintln!(
        "{} pods after {:?}, {refusals} refusals, {looks} looks at up to {most} blocks",
        ROUNDS * PODS * WORKERS * usize::from(HOSTS),
        started.elapsed()
    );
    let first: usize = least.iter().map(BTreeSet::len).sum();
    assert!(most >= 2 * first, "the load never needed more blocks: {most}");

    // The cool-down, the daemon's tick of five seconds, and a pass for the record after the blocks.
    for (host, least) in cluster.hosts().iter().zip(&least) {
        eventually(&format!("{} to give its blocks back", host.name()), Duration::from_secs(20), || {
            Ok(host.blocks()? == *least)
        })
        .with_context(|| format!("{:?}, first {least:?}", host.blocks()))?;
        assert_clean(host)?;
    }
    let files = fs::read_dir(cluster.manifests().join("blocks"))?.count();
    assert_eq!(files, first, "one file per block that is left, and no temporary ones");

    // None is lost: one host can have all that the others do not need.
    let host = cluster.host(1);
    let rest = 2 * 16 - (first - least[0].len());
    let pods = pods(host, rest / 2 * 8 - 1, |number| host.add_pod(&format!("all{number}")))?;
    distinct_addresses(&pods)?;
    let full = host.sandbox("full")?;
    let outcome = host.cni("ADD", full.spec())?;
    assert_eq!(outcome.error_code(), Some(100), "{}", outcome.stdout);
    Ok(())
}
