//! Nothing is waited for without end, and whoever was waited for in vain is named: the lock of the lease store, a daemon that
//! hangs, a runtime that does not close its end.

use std::collections::BTreeMap;
use std::fs::File;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::host::LEASE_DIRECTORY;
use husk_tests::runtime::{Attachment, Refusal, refusal};
use husk_tests::{Family, patience};

use crate::bed::{Bed, Stopped};

/// The longest a command may take: the deadline of ADD and GC, and undoing.
const LONGEST: Duration = Duration::from_secs(35);

/// What needs nobody does not wait for anybody.
const AT_ONCE: Duration = Duration::from_secs(4);

fn refused_in_time(refused: &Refusal, code: u64, said: &[&str]) -> Result<()> {
    ensure!(refused.outcome.error_code() == Some(code), "{refused}");
    ensure!(refused.outcome.elapsed < patience(LONGEST), "{:?}: {refused}", refused.outcome.elapsed);
    ensure!(said.iter().all(|it| refused.to_string().contains(it)), "not all of {said:?} in {refused}");
    Ok(())
}

/// All at once, as each of them waits.
fn together<'a>(calls: Vec<Box<dyn FnOnce() -> Result<()> + Send + 'a>>) -> Result<()> {
    std::thread::scope(|scope| {
        let running: Vec<_> = calls.into_iter().map(|call| scope.spawn(call)).collect();
        running.into_iter().try_for_each(|it| it.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

#[test]
fn a_lock_that_is_held() -> Result<()> {
    let bed = Bed::start(&[Family::Ipv4])?;
    let network = &bed.network("1.1.0")?;
    let (_pod, mut there) = bed.sandbox()?;
    network.add(&mut there)?;
    let (_leaving_pod, mut leaving) = bed.sandbox()?;
    network.add(&mut leaving)?;
    let (new_pod, new) = bed.sandbox()?;

    let path = bed.run_file("leases/lock");
    let lock = File::options().write(true).open(&path).with_context(|| format!("opening {}", path.display()))?;
    lock.lock()?;
    let holder = format!("process {}", std::process::id());
    let said = [LEASE_DIRECTORY, "stayed locked", holder.as_str()];
    together(vec![
        Box::new(|| refused_in_time(&refusal(network.add(&mut new.clone()))?, 11, &said)),
        Box::new(|| refused_in_time(&refusal(network.del(&leaving))?, 11, &said)),
        Box::new(|| refused_in_time(&refusal(network.gc(&[&there]))?, 11, &said)),
        // These only look.
        Box::new(|| network.check(&there)),
        Box::new(|| network.status()),
    ])?;
    crate::add::lacks(&new_pod, "eth0")?;
    drop(lock);
    network.del(&leaving)?;
    network.del(&new)?;
    network.check(&there)?;
    network.del(&there)?;
    bed.ensure_empty()
}

#[test]
fn a_daemon_that_hangs() -> Result<()> {
    let bed = Bed::start(&[Family::Ipv4])?;
    let network = &bed.network("1.1.0")?;
    let (_pod, mut there) = bed.sandbox()?;
    network.add(&mut there).with_context(|| bed.host().daemon_log())?;
    let (_lost_pod, mut lost) = bed.sandbox()?;
    network.add(&mut lost)?;
    let (new_pod, new) = bed.sandbox()?;

    let hung = Stopped::daemon(&bed)?;
    let timed = |call: &dyn Fn() -> Result<()>| -> Result<()> {
        let started = std::time::Instant::now();
        call()?;
        ensure!(started.elapsed() < patience(AT_ONCE), "it took {:?}", started.elapsed());
        Ok(())
    };
    timed(&|| network.check(&there)).context("CHECK")?;
    timed(&|| network.gc(&[&there])).context("GC")?;
    timed(&|| network.del(&there)).context("DEL")?;
    let said = ["huskd", "did not answer within"];
    together(vec![
        Box::new(|| refused_in_time(&refusal(network.add(&mut new.clone()))?, 11, &said)),
        Box::new(|| refused_in_time(&refusal(network.status())?, 50, &said)),
    ])?;
    crate::add::lacks(&new_pod, "eth0")?;
    bed.ensure_empty()?;
    drop(hung);
    bed.host().wait_ready()?;
    let mut new = new;
    network.add(&mut new).with_context(|| bed.host().daemon_log())?;
    network.del(&new)?;
    bed.ensure_empty()
}

#[test]
fn a_runtime_that_does_not_close_its_end() -> Result<()> {
    let bed = Bed::start(&[Family::Ipv4])?;
    // A pipe that the reader itself holds open for writing has no end.
    let script = "mkfifo /run/husk/open && exec 3<>/run/husk/open && printf '{' >&3 && exec /opt/cni/bin/husk <&3";
    let variables = BTreeMap::from([("CNI_COMMAND", "STATUS"), ("PATH", "/usr/bin:/bin")]);
    let variables = variables.into_iter().map(|(name, value)| (name.to_owned(), value.into()));
    let program = bed.host().program("/bin/sh").args(["-c", script]).environment(variables);
    let output = program.limit(patience(LONGEST)).run()?;
    let said: serde_json::Value = serde_json::from_str(&output.stdout).with_context(|| format!("{output:?}"))?;
    ensure!(said["code"] == 5, "{said}");
    ensure!(said["msg"].as_str().is_some_and(|it| it.contains("did not close it")), "{said}");
    let attachment = Attachment { netns: String::new(), ..bed.sandbox()?.1 };
    bed.network("1.1.0")?.del(&attachment)
}

/// The deadline of a command begins with the process: what the runtime takes to say what it wants is gone for the rest. Of the ten
/// seconds of a DEL, three are left here, where the lock alone would be waited for longer.
#[test]
fn the_time_that_the_runtime_takes_counts() -> Result<()> {
    let bed = Bed::start(&[Family::Ipv4])?;
    let network = &bed.network("1.1.0")?;
    let (_pod, mut attachment) = bed.sandbox()?;
    network.add(&mut attachment)?;
    std::fs::write(bed.run_file("config"), network.husk_config(&attachment).to_string())?;
    let lock = File::options().write(true).open(bed.run_file("leases/lock"))?;
    lock.lock()?;
    let mut variables = attachment.environment();
    variables.insert("CNI_COMMAND", "DEL".to_owned());
    variables.insert("PATH", "/usr/bin:/bin".to_owned());
    let environment = variables.iter().map(|(name, value)| ((*name).to_owned(), value.into()));
    let script = "(sleep 7; cat /run/husk/config) | /opt/cni/bin/husk";
    let program = bed.host().program("/bin/sh").args(["-c", script]).environment(environment);
    let output = program.limit(patience(LONGEST)).run()?;
    let said: serde_json::Value = serde_json::from_str(&output.stdout).with_context(|| format!("{output:?}"))?;
    let message = said["msg"].as_str().unwrap_or_default();
    let waited =
        message.split_once("stayed locked for ").and_then(|(_, rest)| rest.split(' ').next()?.parse::<u64>().ok());
    ensure!(said["code"] == 11 && waited.is_some_and(|waited| waited < 4000), "{said}");
    drop(lock);
    network.del(&attachment)?;
    bed.ensure_empty()
}
