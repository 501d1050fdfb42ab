//! Many calls of the plugin at once: whatever their order, no address twice, none lost, nothing left behind.

#[path = "cni_concurrency/blocks.rs"]
mod blocks;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_tests::process::Process;
use husk_tests::{Cluster, CniOutcome, Host, Mode, Pod, Signal, eventually};
use serde_json::{Value, json};

/// How soon the daemon has followed what the plugin did.
const SOON: Duration = Duration::from_secs(8);

/// CNI error codes: an attachment that exists already; try again later.
const EXISTS: u64 = 101;
const LATER: u64 = 11;

fn one_host() -> Result<Cluster> {
    Cluster::builder().mode(Mode::Vxlan).hosts(1).start()
}

/// Does something with each item, all beginning at the same moment.
fn at_once<T: Send, R: Send>(items: &mut [T], work: impl Fn(&mut T) -> Result<R> + Sync) -> Result<Vec<R>> {
    let start = Barrier::new(items.len());
    thread::scope(|scope| {
        let (start, work) = (&start, &work);
        let begin = |item| {
            scope.spawn(move || {
                start.wait();
                work(item)
            })
        };
        let threads: Vec<_> = items.iter_mut().map(begin).collect();
        threads.into_iter().map(|thread| thread.join().expect("a panic is a failed test")).collect()
    })
}

/// Makes pods, a few at a time.
fn pods(host: &Host, count: usize, make: impl Fn(usize) -> Result<Pod> + Sync) -> Result<Vec<Pod>> {
    const WORKERS: usize = 4;
    let next = AtomicUsize::new(0);
    let made = Mutex::new(Vec::new());
    thread::scope(|scope| {
        let work = || -> Result<()> {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= count {
                    return Ok(());
                }
                let pod = make(number).with_context(|| format!("pod {number} on {}", host.name()))?;
                made.lock().expect("no worker panics").push(pod);
            }
        };
        let workers: Vec<_> = (0..WORKERS).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("a panic is a failed test"))
    })?;
    Ok(made.into_inner().expect("no worker panics"))
}

/// Nothing of pods is left, in the firewall and in the daemon's eyes neither.
fn assert_clean(host: &Host) -> Result<()> {
    assert_eq!(host.residue()?, Vec::<String>::new());
    let mut said = String::new();
    eventually("the daemon to have forgotten all pods", SOON, || {
        let shown = host.huskctl_json(["ipam", "show"])?;
        let checked = host.huskctl(["ipam", "check"])?;
        said = format!("{} {}", shown["leases"], checked.stdout);
        Ok(shown["leases"] == json!([]) && checked.status.code() == Some(0))
    })
    .context(said)
}

fn distinct_addresses<'a>(pods: impl IntoIterator<Item = &'a Pod>) -> Result<BTreeSet<IpAddr>> {
    let mut seen = BTreeSet::new();
    for pod in pods {
        ensure!(pod.addresses().len() == 2, "{} has {:?}", pod.name(), pod.addresses());
        for address in pod.addresses() {
            ensure!(seen.insert(address), "{address} has two pods, one of them {}", pod.name());
        }
    }
    Ok(seen)
}

#[test]
fn a_hundred_at_once_and_two_hundred_and_fifty_on_a_node() -> Result<()> {
    const BEFORE: usize = 150;
    const AT_ONCE: usize = 100;
    let cluster = one_host()?;
    let host = cluster.host(1);
    let started = Instant::now();
    let first = pods(host, BEFORE, |number| host.add_pod(&format!("a{number}")))?;
    eprintln!("{BEFORE} pods, four at a time, after {:?}", started.elapsed());

    let mut burst = pods(host, AT_ONCE, |number| host.sandbox(&format!("b{number}")))?;
    let started = Instant::now();
    let outcomes = at_once(&mut burst, Pod::add)?;
    eprintln!("{AT_ONCE} ADDs at once took {:?}", started.elapsed());
    outcomes.iter().try_for_each(CniOutcome::succeeded).with_context(|| host.daemon_log())?;
    assert_eq!(distinct_addresses(first.iter().chain(&burst))?.len(), 2 * (BEFORE + AT_ONCE));
    assert_eq!(host.leases()?.len(), BEFORE + AT_ONCE);
    for pod in burst.iter().step_by(10).chain(first.iter().step_by(15)) {
        pod.check()?.succeeded().with_context(|| format!("CHECK of {}", pod.name()))?;
    }
    eventually("no contradictions", SOON, || Ok(host.huskctl(["ipam", "check"])?.status.code() == Some(0)))?;
    first[0].await_answer_of(&burst[AT_ONCE - 1], SOON)?;
    burst[0].await_answer_of(&first[BEFORE - 1], SOON)?;

    let started = Instant::now();
    at_once(&mut burst, |pod| pod.del())?.iter().try_for_each(CniOutcome::succeeded)?;
    eprintln!("{AT_ONCE} DELs at once took {:?}", started.elapsed());
    assert_eq!(host.leases()?.len(), BEFORE);
    assert_eq!(host.pod_interfaces()?.len(), BEFORE);
    for pod in first.iter().step_by(15) {
        pod.check()?.succeeded().with_context(|| format!("CHECK of {}", pod.name()))?;
    }
    // DEL again, and of the others, and some of both at once.
    let mut all: Vec<Pod> = first.into_iter().chain(burst.drain(..20)).collect();
    at_once(&mut all, |pod| pod.del())?.iter().try_for_each(CniOutcome::succeeded)?;
    assert_clean(host)
}

/// What of an attachment exists: its lease, its host interface, its pod interface.
fn parts(host: &Host, pod: &Pod) -> Result<[bool; 3]> {
    let inside = pod.netns().ip_json(["link", "show"])?;
    let inside = inside.as_array().into_iter().flatten().any(|link| link["ifname"] == "eth0");
    Ok([!host.leases()?.is_empty(), !host.pod_interfaces()?.is_empty(), inside])
}

/// The outcomes of ADDs of one attachment: one of them won, and the attachment is whole, or none did, and there is nothing.
fn assert_one_won(host: &Host, pod: &Pod, outcomes: &[CniOutcome]) -> Result<()> {
    let won: Vec<&CniOutcome> = outcomes.iter().filter(|outcome| outcome.success()).collect();
    let said = || outcomes.iter().map(|it| it.stdout.clone()).collect::<String>();
    ensure!(won.len() <= 1, "more than one ADD won: {}", said());
    for lost in outcomes.iter().filter(|outcome| !outcome.success()) {
        ensure!(matches!(lost.error_code(), Some(EXISTS | LATER)), "{}{}", lost.stdout, lost.stderr);
    }
    let whole = !won.is_empty();
    ensure!(parts(host, pod)? == [whole; 3], "{:?} of lease and interfaces after {}", parts(host, pod)?, said());
    if let Some(won) = won.first() {
        let mut spec = pod.spec().clone();
        spec.prev_result = Some(won.json.clone());
        host.cni("CHECK", &spec)?.succeeded()?;
    }
    Ok(())
}

#[test]
fn one_container_added_by_several_at_once() -> Result<()> {
    const ROUNDS: usize = 25;
    let cluster = one_host()?;
    let host = cluster.host(1);
    let pod = host.sandbox("twin")?;
    let mut winners = 0;
    for round in 0..2 * ROUNDS {
        if round % 2 == 1 {
            // What an ADD leaves that was killed before it made an interface.
            host.cni("ADD", pod.spec())?.succeeded()?;
            let lease = host.leases()?.remove(0);
            let content = fs::read(&lease)?;
            pod.del()?.succeeded()?;
            fs::write(&lease, content)?;
        }
        let outcomes = at_once(&mut [(); 3], |()| host.cni("ADD", pod.spec()))?;
        assert_one_won(host, &pod, &outcomes).with_context(|| format!("round {round}"))?;
        winners += usize::from(outcomes.iter().any(CniOutcome::success));
        let dels = at_once(&mut [(); 2], |()| pod.del())?;
        dels.iter().try_for_each(CniOutcome::succeeded)?;
        assert_eq!(host.residue()?, Vec::<String>::new(), "round {round}");
    }
    eprintln!("one of three won in {winners} of {} rounds", 2 * ROUNDS);
    assert!(winners > ROUNDS, "an ADD wins nearly always: {winners}");
    assert_clean(host)
}

/// How long an ADD takes here and now.
fn time_of_an_add(host: &Host, pod: &Pod) -> Result<Duration> {
    let mut times = Vec::new();
    for _ in 0..5 {
        let outcome = host.cni("ADD", pod.spec())?;
        outcome.succeeded()?;
        times.push(outcome.elapsed);
        pod.del()?.succeeded()?;
    }
    times.sort();
    Ok(times[2])
}

/// An ADD, and another call of the plugin some time after the ADD began. Both answers, and when each began and ended.
fn overlapped<R: Send>(
    offset: Duration,
    add: impl FnOnce() -> Result<CniOutcome> + Send,
    other: impl FnOnce() -> Result<R> + Send,
) -> Result<(CniOutcome, Instant, R, Instant)> {
    let started = Instant::now();
    let (added, other) = thread::scope(|scope| {
        let added = scope.spawn(|| (add(), Instant::now()));
        while started.elapsed() < offset {
            std::hint::spin_loop();
        }
        let began = Instant::now();
        let other = (other(), began);
        (added.join().expect("a panic is a failed test"), other)
    });
    Ok((added.0?, added.1, other.0?, other.1))
}

#[test]
fn a_del_races_the_add_of_the_same_attachment() -> Result<()> {
    const OFFSETS: u32 = 120;
    let cluster = one_host()?;
    let host = cluster.host(1);
    let pod = host.sandbox("raced")?;
    let span = time_of_an_add(host, &pod)? * 5 / 4;
    let mut seen: BTreeMap<(bool, [bool; 3]), usize> = BTreeMap::new();
    let mut slowest = Duration::ZERO;
    for step in 0..OFFSETS {
        let offset = span * step / OFFSETS;
        let (added, _, deleted, _) = overlapped(offset, || host.cni("ADD", pod.spec()), || pod.del())?;
        deleted.succeeded()?;
        slowest = slowest.max(added.elapsed).max(deleted.elapsed);
        let parts = parts(host, &pod)?;
        let whole = parts == [true; 3];
        assert!(whole || parts == [false; 3], "offset {offset:?}: {parts:?} is left after {}", added.stdout);
        assert!(added.success() || !whole, "offset {offset:?}: an ADD that failed left the attachment");
        if !added.success() {
            // It lost its lease, or the kernel refused to work on an interface that was gone.
            assert!(matches!(added.error_code(), Some(LATER | 5 | 102)), "offset {offset:?}: {}", added.stdout);
        }
        *seen.entry((added.success(), parts)).or_default() += 1;
        pod.del()?.succeeded()?;
        assert_eq!(host.residue()?, Vec::<String>::new(), "offset {offset:?}");
    }
    eprintln!("ADD succeeded, and what was left: {seen:?}; the slowest call took {slowest:?}");
    assert_clean(host)
}

/// GC with nothing valid.
fn collect(host: &Host) -> Result<CniOutcome> {
    host.cni_gc(&[])
}

#[test]
fn a_gc_races_the_add_of_a_container_that_its_list_does_not_have() -> Result<()> {
    const OFFSETS: u32 = 60;
    let cluster = one_host()?;
    let host = cluster.host(1);
    let (stale, pod) = (host.sandbox("stale")?, host.sandbox("fresh")?);
    let span = time_of_an_add(host, &pod)? * 5 / 4;
    let (mut during, mut survived) = (0, 0);
    for step in 0..OFFSETS {
        host.cni("ADD", stale.spec())?.succeeded()?;
        let offset = span * step / OFFSETS;
        let (added, ended, collected, began) =
            overlapped(offset, || host.cni("ADD", pod.spec()), || collect(host).map(|it| (it, Instant::now())))?;
        added.succeeded().with_context(|| format!("offset {offset:?}"))?;
        collected.0.succeeded()?;
        let inside = |pod: &Pod| Ok::<_, anyhow::Error>(pod.netns().ip_json(["link"])?.to_string().contains("eth0"));
        assert!(!inside(&stale)?, "offset {offset:?}: what is not valid has to go");
        let kept = host.leases()?.len();
        assert_eq!((kept, host.pod_interfaces()?.len(), inside(&pod)?), (kept, kept, kept == 1), "offset {offset:?}");
        if ended > collected.1 {
            // Under way all the time.
            during += 1;
            assert_eq!(kept, 1, "offset {offset:?}: GC removed the attachment of an ADD under way");
        } else if ended < began {
            // A runtime that takes its list before an ADD ends, and calls GC after it, lies: that is as stale as any other.
            assert_eq!(kept, 0, "offset {offset:?}");
        }
        survived += kept;
        pod.del()?.succeeded()?;
    }
    eprintln!("{survived} of {OFFSETS} survived, {during} were under way during all of the GC");
    assert_clean(host)
}

/// Waits until a call of the plugin runs on the host, `of` calls in all, and sleeps.
fn await_plugin(host: &Host, calls: usize) -> Result<()> {
    let asleep = |pid: i32| fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") S "));
    eventually(&format!("{calls} calls of the plugin that wait"), SOON, || {
        let processes = host.processes();
        let plugins = processes.iter().filter(|it| it.command.trim() == "/opt/cni/bin/husk");
        Ok(plugins.filter(|it| asleep(it.pid.as_raw())).count() == calls)
    })
}

#[test]
fn a_gc_spares_an_add_that_ends_while_it_runs() -> Result<()> {
    let cluster = one_host()?;
    let host = cluster.host(1);
    let (stale, pod) = (host.add_pod("stale")?, host.sandbox("fresh")?);
    let daemon = daemon(host)?;
    // The runtime's word comes late, so that the order is certain: GC begins while the ADD waits for the daemon, and looks
    // at the leases when the ADD has ended.
    let mut config: Value = serde_json::from_str(&fs::read_to_string(host.conflist_path())?)?;
    let mut config = config["plugins"][0].take();
    config["cniVersion"] = json!("1.1.0");
    config["name"] = json!("husk");
    config["cni.dev/valid-attachments"] = json!([]);
    let (late, written) = (host.file("/run/husk/late"), host.file("/run/husk/written"));
    fs::write(&written, config.to_string())?;
    let wait = "until [ -e /run/husk/late ]; do sleep 0.02; done; cat /run/husk/late";
    let script = format!("({wait}) | CNI_COMMAND=GC CNI_PATH=/opt/cni/bin /opt/cni/bin/husk");

    daemon.signal(Signal::SIGSTOP)?;
    let (added, collected) = thread::scope(|scope| -> Result<_> {
        let adding = scope.spawn(|| host.cni("ADD", pod.spec()));
        await_plugin(host, 1)?;
        eventually("the ADD to have its lease", SOON, || Ok(host.leases()?.len() == 2))?;
        let collecting = scope.spawn(|| host.program("/bin/sh").args(["-c", &script]).run());
        await_plugin(host, 2)?;
        daemon.signal(Signal::SIGCONT)?;
        let added = adding.join().expect("a panic is a failed test")?;
        fs::rename(&written, &late)?;
        Ok((added, collecting.join().expect("a panic is a failed test")?))
    })?;
    added.succeeded()?;
    assert!(collected.status.success(), "{}{}", collected.stdout, collected.stderr);
    assert_eq!(parts(host, &pod)?, [true; 3], "GC removed the attachment of an ADD that was under way when it began");
    assert_eq!(host.leases()?.len(), 1, "and what is stale has to go");
    // The next one begins after that ADD has ended.
    collect(host)?.succeeded()?;
    drop(stale);
    assert_clean(host)
}

fn daemon(host: &Host) -> Result<Process> {
    host.processes().into_iter().find(|it| it.command.contains("huskd")).context("huskd does not run")
}

/// Waits until an attachment is there and its ADD waits for a daemon that does not answer; `calls` of the plugin wait in all.
fn await_wired(host: &Host, pod: &Pod, calls: usize) -> Result<()> {
    eventually(&format!("{} to be wired", pod.name()), SOON, || Ok(parts(host, pod)? == [true; 3]))?;
    await_plugin(host, calls)
}

/// The runtime loses patience with an ADD that waits for the daemon, deletes the container and adds it again: when the daemon
/// answers, the first ADD finds another lease than its own, and leaves what is there to the second.
#[test]
fn an_add_whose_attachment_was_made_anew_meanwhile_leaves_it_alone() -> Result<()> {
    let cluster = one_host()?;
    let host = cluster.host(1);
    let mut pod = host.sandbox("anew")?;
    let daemon = daemon(host)?;
    daemon.signal(Signal::SIGSTOP)?;
    let (first, second) = thread::scope(|scope| -> Result<_> {
        let spec = pod.spec();
        let first = scope.spawn(|| host.cni("ADD", spec));
        await_wired(host, &pod, 1)?;
        let before = host.leases()?;
        pod.del()?.succeeded()?;
        let second = scope.spawn(|| host.cni("ADD", spec));
        await_wired(host, &pod, 2)?;
        ensure!(host.leases()? != before, "the second ADD got other addresses: the first ones rest");
        daemon.signal(Signal::SIGCONT)?;
        Ok((first.join().expect("a panic is a failed test")?, second.join().expect("a panic is a failed test")?))
    })?;
    assert_eq!(first.error_code(), Some(LATER), "{}", first.stdout);
    assert!(first.stdout.contains("was deleted") && !first.stdout.contains("could not be undone"), "{}", first.stdout);
    second.succeeded()?;
    assert_eq!((host.leases()?.len(), host.pod_interfaces()?.len()), (1, 1));
    let ips = second.json["ips"].as_array().into_iter().flatten();
    let given: BTreeSet<IpAddr> =
        ips.filter_map(|ip| ip["address"].as_str()?.split('/').next()?.parse().ok()).collect();
    pod.spec_mut().prev_result = Some(second.json);
    pod.check()?.succeeded()?;
    let inside = pod.netns().ip_json(["address", "show", "dev", "eth0"])?;
    let global = inside[0]["addr_info"].as_array().into_iter().flatten().filter(|it| it["scope"] == "global");
    let found: BTreeSet<IpAddr> = global.filter_map(|it| it["local"].as_str()?.parse().ok()).collect();
    assert_eq!((found.len(), &found), (2, &given), "no address of the first one is there");
    let other = host.add_pod("other")?;
    for address in given {
        other.await_answer_at(address, SOON)?;
    }
    pod.await_answer_of(&other, SOON)?;
    pod.del()?.succeeded()?;
    other.del()?.succeeded()?;
    assert_clean(host)
}

/// Killed while a plugin waits for its answer: an ADD is undone and works with the next daemon, a DEL does not need it.
#[test]
fn a_daemon_that_dies_while_a_plugin_waits_for_it() -> Result<()> {
    let cluster = one_host()?;
    let host = cluster.host(1);
    let mut pod = host.sandbox("orphan")?;
    for port in [None, Some(8080)] {
        let mapping = |port| json!({"portMappings": [{"hostPort": port, "containerPort": 80}]});
        pod.spec_mut().runtime_config = port.map(mapping);
        daemon(host)?.signal(Signal::SIGSTOP)?;
        let added = thread::scope(|scope| -> Result<_> {
            let adding = scope.spawn(|| host.cni("ADD", pod.spec()));
            await_wired(host, &pod, 1)?;
            host.stop_daemon(Signal::SIGKILL)?;
            adding.join().expect("a panic is a failed test")
        })?;
        assert_eq!(added.error_code(), Some(LATER), "{}", added.stdout);
        assert!(added.stdout.contains("huskd"), "{}", added.stdout);
        assert_eq!(host.residue()?, Vec::<String>::new());
        host.start_daemon()?;
        host.wait_ready()?;
        host.cni("ADD", pod.spec())?.succeeded()?;

        daemon(host)?.signal(Signal::SIGSTOP)?;
        let deleted = thread::scope(|scope| -> Result<_> {
            let deleting = scope.spawn(|| pod.del());
            host.stop_daemon(Signal::SIGKILL)?;
            deleting.join().expect("a panic is a failed test")
        })?;
        deleted.succeeded()?;
        assert_eq!(host.residue()?, Vec::<String>::new());
        host.start_daemon()?;
        host.wait_ready()?;
    }
    assert_clean(host)
}
