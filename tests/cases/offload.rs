//! The offload of the VXLAN device: where it is broken Husk finds it and does without it, and where it works it stays.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_overlay::offload::FOUND_WITHIN;
use husk_tests::cluster::Fault;
use husk_tests::pod::Served;
use husk_tests::probe::{Echo, tcp};
use husk_tests::{Cluster, Family, Host, Mode, eventually};
use nix::sys::signal::Signal;

/// Bytes of a transfer between pods: a second's work at worst, if nothing is lost.
const BYTES: u64 = 1 << 20;

/// How long a transfer that stands still is waited for.
const STILL: Duration = Duration::from_secs(10);

/// Whether the device leaves checksums and segments to the device below.
fn has_offload(host: &Host, device: &str) -> Result<bool> {
    let features = host.netns().command("ethtool", ["-k", device])?;
    let on = |feature: &str| features.lines().any(|line| line.trim() == format!("{feature}: on"));
    let (checksums, segments) = (on("tx-checksum-ip-generic"), on("tx-udp-segmentation"));
    // Whoever turns the first on alone leaves the second off.
    Ok(checksums || segments)
}

/// The issue about the offload, if there is one.
fn issue(host: &Host) -> Result<Option<String>> {
    Ok(host.issues("BrokenOffload")?.first().map(ToString::to_string))
}

/// Waits until the self-test has had a result.
fn await_tested(host: &Host) -> Result<()> {
    eventually(&format!("{} to test its offload", host.name()), FOUND_WITHIN, || {
        Ok(host.daemon_log().contains("outcome=Passed"))
    })
}

/// Whether a transfer from one pod to the other and back ends within the time.
fn finishes(from: &Served, to: &Served, family: Family) -> Result<bool> {
    let (netns, at) = (from.pod.netns().handle()?, to.server.at(to.pod.address(family)?));
    let (ended, end) = mpsc::channel();
    thread::spawn(move || ended.send(tcp::transfer(&netns, at, BYTES).map(drop)));
    Ok(end.recv_timeout(STILL).is_ok_and(|ended| ended.is_ok()))
}

fn tested() -> Result<Cluster> {
    let cluster = Cluster::builder().mode(Mode::Vxlan).set("log.level", "debug").start()?;
    cluster.hosts().iter().try_for_each(await_tested)?;
    Ok(cluster)
}

#[test]
fn offload_that_works_stays() -> Result<()> {
    let cluster = tested()?;
    for host in cluster.hosts() {
        ensure!(has_offload(host, "husk-vx")?, "{}", host.name());
        ensure!(issue(host)?.is_none(), "{}", host.name());
    }
    // A node that is not there any more is no reason to do without, either.
    cluster.set_cable(2, false)?;
    cluster.host(1).restart_daemon(Signal::SIGKILL)?;
    eventually("a transfer to stand still", FOUND_WITHIN, || {
        Ok(cluster.host(1).daemon_log().matches("outcome=Stalled").count() >= 3)
    })?;
    eventually("the offload to be as before", FOUND_WITHIN, || has_offload(cluster.host(1), "husk-vx"))?;
    ensure!(issue(cluster.host(1))?.is_none());
    is_missed(cluster.host(1), "host2")
}

/// That a peer is not there any more is told by the status of the node and by nothing else of it: it takes pods. The doctor, who
/// finds out why, tells it once.
fn is_missed(host: &Host, peer: &str) -> Result<()> {
    let mut told = Vec::new();
    eventually("the peer to be missed", FOUND_WITHIN, || {
        told = host.issues("PeerSilent")?;
        Ok(!told.is_empty())
    })?;
    let [issue] = &told[..] else { anyhow::bail!("one issue for all: {told:?}") };
    let message = issue["message"].to_string();
    ensure!(message.contains(&format!("1 of 1 do not answer through the tunnel: {peer}")), "{message}");
    let status = host.huskctl(["status"])?;
    ensure!(status.status.code() == Some(1) && status.stdout.contains("ERROR PeerSilent peers: "), "{status:?}");
    eprintln!("{}", status.stdout);
    ensure!(host.cni_status()?.success(), "pods are served all the same");
    let doctor = host.huskctl(["doctor", "--only", "peers", "--only", "issues"])?;
    let told = doctor.stdout.contains("ERROR    peers") && !doctor.stdout.contains("PeerSilent");
    ensure!(told && doctor.status.code() == Some(1), "{doctor:?}");
    eprintln!("{}", doctor.stdout);
    Ok(())
}

#[test]
fn a_card_that_loses_what_it_should_cut_is_found() -> Result<()> {
    found(Fault::Segments)
}

#[test]
fn a_card_that_does_not_fill_in_inner_checksums_is_found() -> Result<()> {
    found(Fault::Checksums)
}

fn found(fault: Fault) -> Result<()> {
    let cluster = tested()?;
    let (a, b) = (Served::start(cluster.host(1), "a")?, Served::start(cluster.host(2), "b")?);
    for family in Family::ALL {
        ensure!(finishes(&a, &b, family)?, "{family}: nothing is broken yet");
    }

    // The test has had its result for the day, so that nothing is done about it.
    let host = cluster.host(1);
    let card = cluster.break_card(1, fault)?;
    for family in Family::ALL {
        let ping = Echo::to(b.pod.address(family)?).run(a.pod.netns())?;
        ensure!(ping.arrived(), "{family}: {fault:?}: a small packet: {ping:?}");
        ensure!(!finishes(&a, &b, family)?, "{family}: {fault:?}: does no harm");
    }
    ensure!(has_offload(host, "husk-vx")? && issue(host)?.is_none());

    host.restart_daemon(Signal::SIGTERM)?;
    let since = Instant::now();
    let mut told = None;
    eventually("the broken offload to be found", FOUND_WITHIN, || {
        told = issue(host)?;
        Ok(told.is_some())
    })
    .with_context(|| host.daemon_log())?;
    eprintln!("{fault:?}: found after {:.1} s: {}", since.elapsed().as_secs_f64(), told.unwrap_or_default());
    eventually("the offload to be off", FOUND_WITHIN, || Ok(!has_offload(host, "husk-vx")?))?;
    for family in Family::ALL {
        let started = Instant::now();
        ensure!(finishes(&a, &b, family)?, "{family}: {fault:?}: still broken");
        eprintln!("{fault:?}: {BYTES} bytes there and back over {family} in {:?}", started.elapsed());
    }
    // On that device of that host only.
    let eth0 = host.netns().command("ethtool", ["-k", "eth0"])?;
    ensure!(eth0.contains("tx-checksum-ip-generic: on"), "{eth0}");
    ensure!(has_offload(cluster.host(2), "husk-vx")? && issue(cluster.host(2))?.is_none());

    // An outsider does not turn it on again, and a daemon that starts anew does not begin with stalls.
    host.netns().command("ethtool", ["-K", "husk-vx", "tx-checksum-ip-generic", "on"])?;
    eventually("what an outsider did to be undone", FOUND_WITHIN, || Ok(!has_offload(host, "husk-vx")?))?;
    host.restart_daemon(Signal::SIGKILL)?;
    host.wait_ready()?;
    ensure!(!has_offload(host, "husk-vx")? && issue(host)?.is_some());
    drop(card);
    Ok(())
}
