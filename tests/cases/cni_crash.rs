//! The plugin killed at every single system call of ADD and of DEL, see [`husk_tests::syscalls`] for why that is every state it
//! can leave; and every way back from there. Each way starts from its own kill, so that none works on what another mended.
//!
//! The pool has fifteen addresses for pods: one that was lost at any of the hundreds of kills, and the end of the run would not
//! be reached.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use husk_tests::crash::{Points, Victim, bystander, requests, settled, tables};
use husk_tests::syscalls::{Call, Interference, Point, Traced};
use husk_tests::{Cluster, Host, Mode, Pod, Signal};
use serde_json::json;

/// A port of the host.
const HOST_PORT: Option<u16> = Some(8080);

/// Calls that change something that outlives the program: files, kernel parameters, the kernel's tables, what the daemon knows.
const CHANGES: [&str; 4] = ["write", "rename", "sendto", "exit_group"];

/// One host with two blocks of eight addresses per family, the first of which is the node's own; addresses need not rest.
fn one_host() -> Result<Cluster> {
    let cidrs = ["10.42.0.0/28".parse()?, "fd42::/124".parse()?];
    let cluster = Cluster::builder().mode(Mode::Direct).hosts(1).cluster_cidrs(cidrs).build()?;
    start(&cluster, json!({"ipv4": 29, "ipv6": 125}))?;
    Ok(cluster)
}

fn start(cluster: &Cluster, block_lengths: serde_json::Value) -> Result<()> {
    let host = cluster.host(1);
    host.configure(|config| {
        config["blockLengths"] = block_lengths;
        config["ipam"] = json!({"coolDown": 0});
    })?;
    host.start()?;
    host.wait_ready()
}

/// The calls of an undisturbed ADD and of the DEL after it.
fn undisturbed(host: &Host, host_port: Option<u16>) -> Result<(Vec<Call>, Vec<Call>)> {
    let mut pod = host.sandbox("undisturbed")?;
    pod.spec_mut().runtime_config = Some(requests(host_port));
    let (add, del) = (host.cni_traced("ADD", pod.spec(), None)?, host.cni_traced("DEL", pod.spec(), None)?);
    add.0.into_result()?;
    del.0.into_result()?;
    Ok((add.1.calls, del.1.calls))
}

/// Goes through the points of a command; `at` interrupts at a point as often as it likes and returns its last run.
fn everywhere(calls: &[Call], mut at: impl FnMut(Point) -> Result<Traced>) -> Result<()> {
    let mut points = Points::of(calls);
    let started = std::time::Instant::now();
    while let Some(point) = points.next() {
        let run = at(point).with_context(|| format!("killed at {point}"))?;
        let ended = run.hit.is_some() || run.output.status.success();
        ensure!(ended, "not killed at {point}, and yet it failed: {:?}", run.output);
        points.done(point, &run);
    }
    let missed = points.missed(calls);
    ensure!(missed.is_empty(), "never killed at {missed:?}");
    eprintln!("killed at {} points in {:?}", points.met(), started.elapsed());
    Ok(())
}

/// Runs `at` on a host with a bystander, and looks at the whole afterwards.
fn beside_a_bystander(work: impl FnOnce(&Host, &Pod) -> Result<()>) -> Result<()> {
    let cluster = one_host()?;
    let host = cluster.host(1);
    let bystander = bystander(host)?;
    let before = tables(host)?;
    work(host, &bystander)?;
    settled(host, &bystander, &before)?;
    ensure!(bystander.check()?.success(), "the bystander was touched");
    Ok(())
}

#[test]
fn an_add_killed_anywhere_is_deleted_and_added() -> Result<()> {
    beside_a_bystander(|host, bystander| {
        let mut victim = Victim::new(host, bystander, None)?;
        let mut other = host.sandbox("other")?;
        other.spec_mut().runtime_config = Some(requests(None));
        everywhere(&undisturbed(host, None)?.0, |point| {
            victim.interrupt("ADD", Interference::Kill(point))?;
            victim.consistent()?;
            victim.delete()?;
            victim.delete().context("repeated")?;
            victim.attach()?;
            victim.delete()?;
            // Another container comes first.
            let (_, run) = victim.interrupt("ADD", Interference::Kill(point))?;
            let held = victim.consistent()?.leased()?;
            other.spec_mut().prev_result = None;
            other.add()?.into_result().context("ADD of another container")?;
            let given: Vec<String> = other.addresses().iter().map(|address| address.to_string()).collect();
            ensure!(given.iter().all(|address| !held.contains(address)), "{given:?} given twice: {held:?}");
            ensure!(victim.pod.del()?.success(), "DEL beside another container");
            ensure!(other.check()?.success() && other.del()?.success(), "the other container was touched");
            victim.gone()?;
            Ok(run)
        })
    })
}

#[test]
fn an_add_killed_anywhere_is_added_again_or_collected() -> Result<()> {
    beside_a_bystander(|host, bystander| {
        let mut victim = Victim::new(host, bystander, None)?;
        everywhere(&undisturbed(host, None)?.0, |point| {
            victim.interrupt("ADD", Interference::Kill(point))?;
            victim.try_again()?;
            victim.delete()?;
            let (_, run) = victim.interrupt("ADD", Interference::Kill(point))?;
            victim.collect()?;
            Ok(run)
        })
    })
}

#[test]
fn a_del_killed_anywhere_is_repeated_or_followed_by_anything() -> Result<()> {
    beside_a_bystander(|host, bystander| {
        let mut victim = Victim::new(host, bystander, None)?;
        let calls = undisturbed(host, None)?.1;
        victim.attach()?;
        everywhere(&calls, |point| {
            victim.interrupt("DEL", Interference::Kill(point))?;
            victim.consistent()?;
            victim.delete()?;
            victim.attach()?;
            victim.interrupt("DEL", Interference::Kill(point))?;
            if !victim.try_again()? {
                victim.delete()?;
                victim.attach()?;
            }
            let (_, run) = victim.interrupt("DEL", Interference::Kill(point))?;
            victim.collect()?;
            victim.attach()?;
            Ok(run)
        })?;
        victim.delete()
    })
}

/// With a port of the host an ADD waits for a pass of the daemon, which would take minutes at every call: it is killed where
/// something is written, renamed, sent or answered. Every call of an ADD without a port has its kill above.
#[test]
fn the_port_of_an_add_killed_at_any_change_can_be_had_again() -> Result<()> {
    beside_a_bystander(|host, bystander| {
        let mut victim = Victim::new(host, bystander, HOST_PORT)?;
        let mut heir = host.sandbox("heir")?;
        heir.spec_mut().runtime_config = Some(requests(HOST_PORT));
        let changes: Vec<Point> = undisturbed(host, HOST_PORT)?.0.into_iter().map(|call| call.point).collect();
        let changes = changes.iter().filter(|point| CHANGES.contains(&point.name().as_str()));
        let mut met = BTreeSet::new();
        for (number, point) in changes.enumerate() {
            let (_, run) = victim.interrupt("ADD", Interference::Kill(*point))?;
            if run.hit.is_some() {
                met.insert(*point);
            } else {
                // A run that had to wait less looks less often, and the calls it made have all had their kill.
                ensure!(point.name() == "sendto", "not killed at {point}");
                let made = run.calls.iter().map(|call| call.point).filter(|call| call.number == point.number);
                let missed: Vec<Point> = made.filter(|call| !met.contains(call)).collect();
                ensure!(missed.is_empty(), "never killed at {missed:?}");
            }
            let recovered = if number % 2 == 0 { victim.delete() } else { victim.collect() };
            recovered.with_context(|| format!("killed at {point}"))?;
            heir.spec_mut().prev_result = None;
            heir.add()?.into_result().with_context(|| format!("ADD of another pod after {point}"))?;
            ensure!(heir.check()?.success() && heir.del()?.success(), "the other pod was touched");
        }
        for name in CHANGES {
            ensure!(met.iter().any(|point| point.name() == name), "never killed at any {name}");
        }
        Ok(())
    })
}

/// Kills at every point, each time another pod's ADD, or the DEL after it; then the pods' namespaces go, without DEL, as when
/// the runtime lost its state, and only the daemon is left to clean up.
fn left_to_the_daemon(command: &str, bring: impl Fn(&Host) -> Result<()>) -> Result<()> {
    let cluster = Cluster::builder().mode(Mode::Direct).hosts(1).build()?;
    start(&cluster, json!({"ipv4": 22, "ipv6": 118}))?;
    let host = cluster.host(1);
    let bystander = bystander(host)?;
    let before = tables(host)?;
    let calls = undisturbed(host, None)?;
    let calls = if command == "ADD" { calls.0 } else { calls.1 };
    let mut pods = Vec::new();
    everywhere(&calls, |point| {
        let mut pod = host.sandbox(&format!("p{}", pods.len()))?;
        pod.spec_mut().runtime_config = Some(requests(None));
        if command == "DEL" {
            pod.add()?.into_result()?;
        }
        let (_, run) = host.cni_traced(command, pod.spec(), Some(Interference::Kill(point)))?;
        pods.push(pod);
        Ok(run)
    })?;
    drop(pods);
    bring(host)?;
    settled(host, &bystander, &before)?;
    let left: BTreeSet<_> = std::fs::read_dir(host.lease_directory())?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    ensure!(!left.contains("new"), "a half-written lease stays: {left:?}");
    Ok(())
}

#[test]
fn an_add_killed_anywhere_is_cleaned_up_by_a_starting_daemon() -> Result<()> {
    left_to_the_daemon("ADD", |host| host.restart_daemon(Signal::SIGKILL))
}

#[test]
fn an_add_killed_anywhere_is_cleaned_up_by_a_running_daemon() -> Result<()> {
    left_to_the_daemon("ADD", |_| Ok(()))
}

#[test]
fn a_del_killed_anywhere_is_cleaned_up_by_a_starting_daemon() -> Result<()> {
    left_to_the_daemon("DEL", |host| host.restart_daemon(Signal::SIGKILL))
}

#[test]
fn a_del_killed_anywhere_is_cleaned_up_by_a_running_daemon() -> Result<()> {
    left_to_the_daemon("DEL", |_| Ok(()))
}
