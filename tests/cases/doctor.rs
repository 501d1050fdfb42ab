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

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use husk_tests::host::Host;
use husk_tests::process::{Output, binary};
use husk_tests::{Cluster, Mode};
use serde_json::Value;

/// What breaks a check, and mends it.
struct Breakage {
    /// The check.
    check: &'static str,
    /// From well to well.
    run: fn(&Bed) -> Result<()>,
}

/// A cluster, and files that stand for those of its first host.
struct Bed {
    cluster: Cluster,
    root: PathBuf,
}

impl Bed {
    fn new(mode: Mode) -> Result<Self> {
        let cluster = Cluster::builder().mode(mode).start()?;
        let root = cluster.scope().directory().join("root-of-host1");
        fs::create_dir_all(&root)?;
        Ok(Self { cluster, root })
    }

    fn host(&self) -> &Host {
        self.cluster.host(1)
    }

    /// Writes a file of the host's.
    fn write(&self, path: &str, contents: &str) -> Result<()> {
        let path = self.root.join(path.trim_start_matches('/'));
        fs::create_dir_all(path.parent().context("a file is in a directory")?)?;
        fs::write(&path, contents).with_context(|| format!("writing {}", path.display()))
    }

    /// A file of the host's, if there is one.
    fn read(&self, path: &str) -> Option<String> {
        fs::read_to_string(self.root.join(path.trim_start_matches('/'))).ok()
    }

    fn doctor(&self, arguments: &[&str]) -> Result<Output> {
        let root = self.root.to_str().context("a path of letters")?;
        self.host().huskctl(["doctor", "--host-root", root].iter().chain(arguments).copied())
    }

    /// The whole report about one check.
    fn report(&self, check: &str, more: &[&str]) -> Result<Value> {
        let output = self.doctor(&[&["--only", check, "-o", "json"], more].concat())?;
        let report: Value =
            serde_json::from_str(&output.stdout).with_context(|| format!("{check}: no JSON: {output:?}"))?;
        let found = report["checks"][0]["outcome"] == "found";
        ensure!(output.status.code() == Some(i32::from(found)), "{check}: exit status of {output:?}");
        Ok(report)
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
        let told = format!("{} {}", findings[0]["cause"], findings[0]["evidence"]);
        for name in names {
            ensure!(
                told.contains(&serde_json::to_string(name)?.trim_matches('"')[..]),
                "{check}: {name} is not in {outcome:#}"
            );
        }
        Ok(findings[0].clone())
    }

    /// `--fix` does away with what the check found; returns what is left to do on the host.
    fn fixed(&self, check: &str) -> Result<Value> {
        let report = self.report(check, &["--fix", "--yes"])?;
        let repairs = report["repairs"].as_array().map(Vec::as_slice).unwrap_or_default();
        let gone = !repairs.is_empty() && repairs.iter().all(|repair| repair["result"] == "gone");
        ensure!(gone, "{check}: --fix should have helped: {report:#}");
        self.well(check)?;
        Ok(repairs[0]["left"].clone())
    }

    /// Does what a finding tells, in a shell on the host, as somebody who pastes it.
    fn obey(&self, finding: &Value) -> Result<()> {
        let commands = finding["fix"]["commands"].as_array().context("a fix has commands")?;
        ensure!(!commands.is_empty(), "no commands: {finding:#}");
        for command in commands.iter().filter_map(Value::as_str) {
            self.host().program("sh").args(["-c", command]).check()?;
        }
        Ok(())
    }
}

/// All breakages of one host.
fn breakages() -> impl Iterator<Item = &'static Breakage> {
    [host::BREAKAGES, services::BREAKAGES, firewall::BREAKAGES].into_iter().flatten()
}

/// Runs breakages one after the other, all of them, and says which failed.
fn run(bed: &Bed, breakages: &[&Breakage]) -> Result<()> {
    let mut failed = Vec::new();
    for Breakage { check, run } in breakages {
        match run(bed) {
            Ok(()) => eprintln!("{check}: well, found, mended"),
            Err(error) => failed.push(format!("{check}: {error:#}")),
        }
    }
    ensure!(failed.is_empty(), "{}", failed.join("\n\n"));
    Ok(())
}

#[test]
fn what_is_broken_on_a_host_is_found_and_mended() -> Result<()> {
    let bed = Bed::new(Mode::Vxlan)?;
    let all: Vec<&Breakage> = breakages().collect();
    run(&bed, &all)?;
    // Nothing of all that is left. What lies between the nodes needs its time to recover, and is not looked at here.
    // Nor the runtime's directory: that of the host itself is not below the root.
    let here = breakages().filter(|breakage| breakage.check != "cni-config-order");
    let only: Vec<&str> = here.flat_map(|breakage| ["--only", breakage.check]).collect();
    let whole = bed.doctor(&only)?;
    ensure!(whole.status.code() == Some(0) && whole.stdout.contains("nothing is wrong"), "{whole:?}");
    Ok(())
}

#[test]
fn nothing_is_fixed_that_nobody_agreed_to() -> Result<()> {
    let bed = Bed::new(Mode::Direct)?;
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
        let root = bed.root.to_str().context("a path of letters")?;
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
        breakages().map(|breakage| breakage.check).chain(cluster::BREAKS.iter().copied()).collect();
    ensure!(checks == broken, "without a test: {:?}; without a check: {:?}", &checks - &broken, &broken - &checks);
    Ok(())
}
