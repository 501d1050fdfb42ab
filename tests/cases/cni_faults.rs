//! Every system call of ADD and of DEL that concerns files or the network, failing one at a time, with each error the kernel may
//! give: the plugin says so in an orderly way or copes, never half of it, and the attachment can be deleted and added after.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use husk_tests::crash::{Points, Victim, bystander, explains, likely_errors, settled, succeeded, tables, valid_error};
use husk_tests::syscalls::{Call, Interference, Traced};
use husk_tests::{Cluster, CniOutcome, Host, Mode, Pod};
use serde_json::json;

/// Codes a failed call may lead to: I/O, try again later, the kernel refused, something is left of what GC collects.
const FITTING: [u64; 4] = [5, 11, 102, 104];

/// What the plugin was made to fail with, and what it said.
type Said = BTreeMap<u64, usize>;

/// Fails each call in turn with each of its errors, and has each netlink request refused in turn.
fn each_failure(calls: &[Call], mut at: impl FnMut(Interference) -> Result<Traced>) -> Result<()> {
    let (mut points, mut failures, mut refusals, started) = (Points::of(calls), 0, 0, Instant::now());
    let mut interfere = |interference: Interference| {
        let run = at(interference).with_context(|| interference.to_string())?;
        ensure!(run.hit.is_some() || run.output.status.success(), "no {interference}, and yet {:?}", run.output);
        Ok(run)
    };
    while let Some(point) = points.next() {
        let mut met = false;
        for errno in likely_errors(point) {
            let run = interfere(Interference::Fail(point, *errno))?;
            met |= run.hit.is_some();
            failures += usize::from(run.hit.is_some());
            points.learn(&run.calls);
        }
        if met { points.meet(point) } else { points.end(point.number) }
    }
    let sends = calls.iter().filter(|call| call.point.name() == "sendto").map(|call| call.point);
    for point in sends {
        for index in 0.. {
            if interfere(Interference::Refuse(point, index))?.hit.is_none() {
                break;
            }
            refusals += 1;
        }
    }
    ensure!(refusals > 0, "no netlink request was found");
    eprintln!("{failures} failures and {refusals} refusals in {:?}", started.elapsed());
    Ok(())
}

/// The write that tells the runtime what came of it: where it fails there is nobody to tell.
fn tells_the_runtime(run: &Traced) -> bool {
    run.hit.as_ref().is_some_and(|call| call.point.name() == "write" && call.object.starts_with("pipe:"))
}

fn beside_a_bystander(work: impl FnOnce(&Host, &Pod, &mut Said) -> Result<()>) -> Result<()> {
    let cidrs = ["10.42.0.0/28".parse()?, "fd42::/124".parse()?];
    let cluster = Cluster::builder().mode(Mode::Direct).hosts(1).cluster_cidrs(cidrs).build()?;
    let host = cluster.host(1);
    host.configure(|config| {
        config["blockLengths"] = json!({"ipv4": 29, "ipv6": 125});
        config["ipam"] = json!({"coolDown": 0});
    })?;
    host.start()?;
    host.wait_ready()?;
    let bystander = bystander(host)?;
    let before = tables(host)?;
    let mut said = Said::new();
    work(host, &bystander, &mut said)?;
    eprintln!("codes and how often: {said:?}");
    settled(host, &bystander, &before)?;
    ensure!(bystander.check()?.success(), "the bystander was touched");
    Ok(())
}

/// A failure that is in order; counts its code.
fn orderly(command: &str, outcome: &CniOutcome, what: (Interference, &Traced), said: &mut Said) -> Result<()> {
    valid_error(command, outcome)?;
    let code = outcome.error_code().unwrap_or_default();
    let (interference, run) = what;
    explains(outcome, interference, run.hit.as_ref().context("it failed by itself")?)?;
    ensure!(FITTING.contains(&code), "{command} gave code {code}: {}", outcome.stdout);
    *said.entry(code).or_default() += 1;
    Ok(())
}

#[test]
fn an_add_that_meets_any_failure_is_whole_or_undone() -> Result<()> {
    beside_a_bystander(|host, bystander, said| {
        let mut victim = Victim::new(host, bystander, None)?;
        let calls = victim.undisturbed("ADD")?;
        victim.delete()?;
        each_failure(&calls, |interference| {
            let (outcome, run) = victim.interrupt("ADD", interference)?;
            if outcome.success() {
                // What failed did not matter.
                victim.attached_as(&outcome)?;
            } else if tells_the_runtime(&run) {
                ensure!(outcome.status == Some(1), "ADD ended with {:?} {}", outcome.status, outcome.stderr);
            } else {
                orderly("ADD", &outcome, (interference, &run), said)?;
                // What failed fails once: nothing keeps the plugin from undoing what it did.
                victim.gone().with_context(|| outcome.stdout.clone())?;
            }
            victim.delete()?;
            victim.attach()?;
            victim.delete()?;
            Ok(run)
        })
    })
}

/// A command that removes an attachment either has, whatever fails meanwhile, or leaves something consistent, of which `repeat`
/// then makes an end.
fn succeeds_when_repeated(command: &str, repeat: impl Fn(&mut Victim<'_>) -> Result<()>) -> Result<()> {
    beside_a_bystander(|host, bystander, said| {
        let mut victim = Victim::new(host, bystander, None)?;
        victim.attach()?;
        let calls = victim.undisturbed(command)?;
        each_failure(&calls, |interference| {
            victim.attach()?;
            let (outcome, run) = victim.interrupt(command, interference)?;
            if outcome.success() {
                victim.gone().with_context(|| format!("after a {command} that succeeded"))?;
            } else {
                orderly(command, &outcome, (interference, &run), said)?;
                victim.consistent()?;
            }
            repeat(&mut victim)?;
            Ok(run)
        })
    })
}

#[test]
fn a_del_that_meets_any_failure_succeeds_when_repeated() -> Result<()> {
    succeeds_when_repeated("DEL", |victim| victim.delete())
}

#[test]
fn a_gc_that_meets_any_failure_succeeds_when_repeated() -> Result<()> {
    succeeds_when_repeated("GC", |victim| {
        victim.collect()?;
        succeeded("DEL", &victim.pod.del()?)
    })
}
