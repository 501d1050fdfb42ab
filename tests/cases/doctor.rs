//! `huskctl doctor`: every check is well first, finds what is broken for real and names it, and is well again after what it told to
//! do was done.

#[path = "doctor/cluster.rs"]
mod cluster;
#[path = "doctor/firewall.rs"]
mod firewall;
#[path = "doctor/host.rs"]
mod host;
#[path = "doctor/services.rs"]
mod services;

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::host::Host;
use husk_tests::process::{Output, binary};
use husk_tests::{Cluster, Mode, eventually};
use serde_json::Value;

/// What breaks a check, and what the doctor has to say to that.
struct Breakage {
    /// The check.
    check: &'static str,
    /// Words of which each is in some finding of the check while this runs, whatever the host is called.
    finds: &'static [&'static str],
    /// Breaks it for real, sees it found, mends it as the doctor says, and sees it well again.
    run: fn(&mut Bed) -> Result<()>,
}

/// A cluster to break things on, and all that is broken there.
struct Ground {
    /// Makes the cluster.
    bed: fn() -> Result<Bed>,
    /// What is broken on it, in this order.
    breakages: &'static [&'static [Breakage]],
}

/// All of them, each of which has its test. A check that none of them breaks fails [`every_check_is_broken_by_a_test`].
const GROUNDS: [&Ground; 6] =
    [&ONE_HOST, &cluster::TWO_HOSTS, &cluster::KEYS, &cluster::POOL, &cluster::IPSEC, &cluster::OFFLOAD];

/// What one host does to itself.
const ONE_HOST: Ground = Ground {
    bed: || Bed::with_root(Cluster::builder().mode(Mode::Vxlan).start()?),
    breakages: &[host::BREAKAGES, services::BREAKAGES, firewall::BREAKAGES],
};

impl Ground {
    fn breakages(&self) -> impl Iterator<Item = &'static Breakage> {
        self.breakages.iter().flat_map(|some| some.iter())
    }

    /// Breaks one thing after the other, all of them, and says which were not found or not mended.
    fn run(&self) -> Result<Bed> {
        let mut bed = (self.bed)()?;
        let mut failed = Vec::new();
        for Breakage { check, finds, run } in self.breakages() {
            bed.told.get_mut().clear();
            let told = |bed: &mut Bed| {
                let findings = bed.told.get_mut();
                let missing: Vec<_> =
                    finds.iter().filter(|it| !findings.iter().any(|(_, text)| text.contains(**it))).collect();
                let strange = findings.iter().any(|(id, _)| id == check);
                ensure!(strange && missing.is_empty(), "no finding of it has {missing:?}: {findings:?}");
                Ok(())
            };
            match run(&mut bed).and_then(|()| told(&mut bed)) {
                Ok(()) => eprintln!("{check}: well, found, mended"),
                Err(error) => failed.push(format!("{check}: {error:#}")),
            }
        }
        ensure!(failed.is_empty(), "{}", failed.join("\n\n"));
        Ok(bed)
    }
}

/// A cluster, and files that stand for those of its first host.
struct Bed {
    cluster: Cluster,
    /// Where those files are; without, the host's own are looked at.
    root: Option<PathBuf>,
    /// Number of the host that is looked at.
    patient: Cell<usize>,
    /// What was found since this was emptied: the check, and its finding as JSON.
    told: RefCell<Vec<(String, String)>>,
}

/// How long it may take until what was broken or mended between hosts shows.
const SHOWS: Duration = Duration::from_secs(30);

impl Bed {
    fn new(cluster: Cluster) -> Self {
        Self { cluster, root: None, patient: Cell::new(1), told: RefCell::default() }
    }

    fn with_root(cluster: Cluster) -> Result<Self> {
        let root = cluster.scope().directory().join("root-of-host1");
        fs::create_dir_all(&root)?;
        Ok(Self { root: Some(root), ..Self::new(cluster) })
    }

    /// The host that is looked at.
    fn host(&self) -> &Host {
        self.cluster.host(self.patient.get())
    }

    /// Looks at another host for a while.
    fn on<T>(&self, number: usize, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let before = self.patient.replace(number);
        let done = work();
        self.patient.set(before);
        done
    }

    fn root(&self) -> Result<&Path> {
        self.root.as_deref().context("the host's own files are looked at")
    }

    /// Writes a file of the host's.
    fn write(&self, path: &str, contents: &str) -> Result<()> {
        let path = self.root()?.join(path.trim_start_matches('/'));
        fs::create_dir_all(path.parent().context("a file is in a directory")?)?;
        fs::write(&path, contents).with_context(|| format!("writing {}", path.display()))
    }

    /// A file of the host's, if there is one.
    fn read(&self, path: &str) -> Option<String> {
        fs::read_to_string(self.root.as_ref()?.join(path.trim_start_matches('/'))).ok()
    }

    /// Removes a directory of the host's.
    fn remove(&self, path: &str) -> Result<()> {
        fs::remove_dir_all(self.root()?.join(path)).with_context(|| format!("removing {path}"))
    }

    fn doctor(&self, arguments: &[&str]) -> Result<Output> {
        let root = self.root.as_deref().map(|root| root.to_str().context("a path of letters")).transpose()?;
        let root = root.into_iter().flat_map(|root| ["--host-root", root]);
        self.host().huskctl(["doctor"].into_iter().chain(root).chain(arguments.iter().copied()))
    }

    /// The whole report about one check.
    fn report(&self, check: &str, more: &[&str]) -> Result<Value> {
        let output = self.doctor(&[&["--only", check, "-o", "json"], more].concat())?;
        let report: Value =
            serde_json::from_str(&output.stdout).with_context(|| format!("{check}: no JSON: {output:?}"))?;
        let pending = report["repairs"].as_array().into_iter().flatten().any(|repair| repair["result"] == "pending");
        ensure!(
            output.status.code() == Some(i32::from(hurts(&report["checks"][0]) || pending)),
            "{check}: exit status of {output:?}"
        );
        self.note(check, &report["checks"][0]);
        Ok(report)
    }

    /// Remembers what a check has found.
    fn note(&self, check: &str, outcome: &Value) {
        let findings = outcome["findings"].as_array().into_iter().flatten();
        self.told.borrow_mut().extend(findings.map(|finding| (check.to_owned(), finding.to_string())));
    }

    fn look(&self, check: &str) -> Result<Value> {
        Ok(self.report(check, &[])?["checks"][0].clone())
    }

    /// The check finds nothing.
    fn well(&self, check: &str) -> Result<()> {
        let outcome = self.look(check)?;
        ensure!(outcome["outcome"] == "well", "{check} should be well: {outcome:#}");
        Ok(())
    }

    /// The check finds something, once, whose cause and evidence name all these.
    fn found(&self, check: &str, names: &[&str]) -> Result<Value> {
        let outcome = self.look(check)?;
        let findings = outcome["findings"].as_array().map(Vec::as_slice).unwrap_or_default();
        ensure!(findings.len() == 1, "{check} should find one thing: {outcome:#}");
        let texts = findings[0]["evidence"].as_array().into_iter().flatten().chain([&findings[0]["cause"]]);
        let told = texts.filter_map(Value::as_str).collect::<Vec<_>>().join("\n");
        for name in names {
            ensure!(told.contains(name), "{check}: {name} is not in {outcome:#}");
        }
        Ok(findings[0].clone())
    }

    /// Waits until the check finds nothing.
    fn await_well(&self, check: &str) -> Result<()> {
        let mut last = Value::Null;
        let awaited = eventually(&format!("the check {check} to be well"), SHOWS, || {
            last = self.look(check)?;
            Ok(last["outcome"] == "well")
        });
        awaited.with_context(|| format!("{}: {last:#}", self.host().name()))
    }

    /// Waits for a finding that has all of these parts, the fix included.
    fn await_found(&self, check: &str, parts: &[&str]) -> Result<Value> {
        let (mut last, mut found) = (Value::Null, None);
        let awaited = eventually(&format!("the check {check} to find it"), SHOWS, || {
            last = self.look(check)?;
            let has_all = |finding: &&Value| parts.iter().all(|part| finding.to_string().contains(part));
            found = last["findings"].as_array().into_iter().flatten().find(has_all).cloned();
            Ok(found.is_some())
        });
        awaited.with_context(|| format!("{}: no finding with {parts:?}: {last:#}", self.host().name()))?;
        // As people see it, with its exit status.
        let told = self.doctor(&["--only", check])?;
        ensure!(told.status.code() == Some(i32::from(hurts(&last))), "{told:?}");
        eprintln!("{}", told.stdout);
        found.context("it was found")
    }

    /// `--fix` does away with what the check found; returns what is left to do on the host.
    fn fixed(&self, check: &str) -> Result<Value> {
        self.repaired(check, "gone")
    }

    /// `--fix` writes the files that do away with what the check found; returns what is left to do until they are in force.
    fn pending(&self, check: &str) -> Result<Value> {
        self.repaired(check, "pending")
    }

    fn repaired(&self, check: &str, result: &str) -> Result<Value> {
        let report = self.report(check, &["--fix", "--yes"])?;
        let repairs = report["repairs"].as_array().map(Vec::as_slice).unwrap_or_default();
        let so = !repairs.is_empty() && repairs.iter().all(|repair| repair["result"] == result);
        ensure!(so, "{check}: the result of --fix should be {result}: {report:#}");
        self.well(check)?;
        Ok(repairs[0]["left"].clone())
    }

    /// Does what a finding tells, in a shell on the host, as somebody who pastes it.
    fn obey(&self, finding: &Value) -> Result<()> {
        let commands = finding["fix"]["commands"].as_array().context("a fix has commands")?;
        ensure!(!commands.is_empty(), "no commands: {finding:#}");
        for command in commands.iter().filter_map(Value::as_str) {
            let pasted = self.host().program("/bin/sh").args(["-ec", command]);
            let said = pasted.check().with_context(|| command.to_owned())?;
            eprintln!("$ {command}\n{said}");
        }
        Ok(())
    }
}

/// Something was found that is more than a warning.
fn hurts(outcome: &Value) -> bool {
    outcome["findings"].as_array().into_iter().flatten().any(|finding| finding["severity"] != "warning")
}

#[test]
fn what_is_broken_on_a_host_is_found_and_mended() -> Result<()> {
    let bed = ONE_HOST.run()?;
    // Nothing of all that is left. What lies between the nodes needs its time to recover, and is not looked at here.
    // Nor the runtime's directory: that of the host itself is not below the root.
    let here = ONE_HOST.breakages().filter(|breakage| breakage.check != "cni-config-order");
    let only: Vec<&str> = here.flat_map(|breakage| ["--only", breakage.check]).collect();
    let whole = bed.doctor(&only)?;
    ensure!(whole.status.code() == Some(0) && whole.stdout.contains("nothing is wrong"), "{whole:?}");
    Ok(())
}

#[test]
fn nothing_is_fixed_that_nobody_agreed_to() -> Result<()> {
    let bed = Bed::with_root(Cluster::builder().mode(Mode::Direct).start()?)?;
    let parameter = "net/ipv4/conf/eth0/forwarding";
    bed.host().netns().sysctl(parameter, "0")?;
    // Neither without --fix nor where nobody can be asked.
    bed.found("forwarding", &[parameter])?;
    let refused = bed.doctor(&["--only", "forwarding", "--fix"])?;
    ensure!(refused.status.code() == Some(3) && refused.stderr.contains("--yes"), "{refused:?}");
    bed.found("forwarding", &[parameter])?;
    let unknown = bed.doctor(&["--only", "no-such-check"])?;
    ensure!(unknown.status.code() == Some(2), "{unknown:?}");
    // Somebody at a terminal says no, and then yes.
    for (answer, code, left) in [("n", "1", "left"), ("y", "0", "fixed")] {
        let root = bed.root()?.display();
        let huskctl = binary("huskctl")?;
        let command =
            format!("{} doctor --host-root {root} --only forwarding --fix; echo status $?", huskctl.display());
        let output = bed
            .host()
            .program("script")
            .args(["-q", "-e", "-c", &command, "/dev/null"])
            .stdin(format!("{answer}\n"))
            .run()?;
        let told = [&format!("status {code}"), "Apply? [y/N]", left].iter().all(|it| output.stdout.contains(it));
        ensure!(told, "{answer}: {output:?}");
    }
    bed.well("forwarding")
}

#[test]
fn every_check_is_broken_by_a_test() -> Result<()> {
    let listed =
        husk_tests::process::Program::new(binary("huskctl")?).args(["doctor", "--list", "-o", "json"]).check()?;
    let listed: Value = serde_json::from_str(&listed)?;
    let checks = listed.as_array().context("a list")?;
    let checks: BTreeSet<&str> = checks.iter().filter_map(|check| check["id"].as_str()).collect();
    let broken: BTreeSet<&str> =
        GROUNDS.iter().flat_map(|ground| ground.breakages()).map(|breakage| breakage.check).collect();
    ensure!(checks == broken, "without a test: {:?}; without a check: {:?}", &checks - &broken, &broken - &checks);
    Ok(())
}
