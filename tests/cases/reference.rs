//! What is said of the commands is true: JSON is as its schemas say, on a real cluster and by another program's judgement; the
//! completion scripts load in real shells; the manual pages are well formed.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::process::{self, Output, Program};
use husk_tests::scope::Scope;
use husk_tests::{Cluster, Family, Host, Mode, Signal, eventually};

/// How long a command, a shell or a linter may take.
const LIMIT: Duration = Duration::from_secs(60);

/// How long what a daemon does by itself may take.
const SOON: Duration = Duration::from_secs(15);

/// Of Debian's python3-jsonschema: there may be others of that name on PATH, for other versions of Python.
const VALIDATOR: &str = "/usr/bin/jsonschema";

/// Judges documents by the schemas that huskctl prints.
struct Schemas<'a> {
    scope: &'a Scope,
    judged: BTreeSet<String>,
}

impl Schemas<'_> {
    fn judge(&self, name: &str, document: &str) -> Result<Output> {
        let [schema, instance] = ["schema.json", "instance.json"].map(|file| self.scope.directory().join(file));
        fs::write(&schema, Program::new(process::binary("huskctl")?).args(["schema", name]).check()?)?;
        fs::write(&instance, document)?;
        Program::new(VALIDATOR).args([Path::new("-i"), &instance, &schema]).limit(LIMIT).run()
    }

    fn check(&mut self, name: &str, document: &str) -> Result<()> {
        let output = self.judge(name, document)?;
        ensure!(output.status.success(), "{name}: {}\n{}\n{document}", output.stdout, output.stderr);
        self.judged.insert(name.to_owned());
        Ok(())
    }
}

/// What a command prints with `-o json`; its exit status may say that something was found.
fn json(host: &Host, words: &[&str]) -> Result<String> {
    let huskctl = host.program(process::binary("huskctl")?);
    let output = huskctl.args(words.iter().copied().chain(["-o", "json"])).limit(LIMIT).run()?;
    let status = output.status.code();
    ensure!(matches!(status, Some(0 | 1)), "huskctl {}: {status:?} {}", words.join(" "), output.stderr);
    Ok(output.stdout)
}

#[test]
fn what_commands_print_is_what_their_schemas_say() -> Result<()> {
    let builder = Cluster::builder().mode(Mode::Wireguard).set("keys.grace", 1);
    let logs = ["/var/lib/husk/flows.jsonl", "/var/lib/husk/audit.jsonl"];
    let cluster = builder.set("logs.flows", logs[0]).set("logs.audit", logs[1]).start()?;
    let pods = cluster.add_pods("p")?;
    let [a, b] = [&pods[0], &pods[1]];
    a.await_answer_of(b, SOON)?;
    let host = cluster.host(1);
    let [a, b] = [a, b].map(|pod| pod.address(Family::Ipv4).map(|address| address.to_string()));
    let (a, b) = (a?, b?);
    let mut schemas = Schemas { scope: cluster.scope(), judged: BTreeSet::new() };

    let broken = schemas.judge("status", r#"{"node": "host1", "ready": "yes"}"#)?;
    ensure!(!broken.status.success(), "the validator takes everything");

    // Of a pod that is cut off, flows are denied.
    schemas.check("quarantine", &json(host, &["quarantine", &a])?)?;
    eventually("a flow to be denied", SOON, || {
        // It has no answer, which is the point.
        let _ = pods[0].netns().command("ping", ["-c", "1", "-W", "1", &b]);
        Ok(!json(host, &["flows", "--denied"])?.is_empty())
    })?;
    for (name, words) in [
        ("status", &["status"][..]),
        ("peers", &["peers"]),
        ("mtu", &["mtu"]),
        ("mtu-what-if", &["mtu", "--what-if", "mode=vxlan-ipsec,underlay=1330"]),
        ("mtu-probe", &["mtu", "probe", "host2"]),
        ("diff", &["diff"]),
        ("ipam", &["ipam", "show"]),
        ("ipam-check", &["ipam", "check"]),
        ("keys", &["keys", "status", "--verbose"]),
        ("policy", &["policy", "list"]),
        ("pod-policy", &["policy", "show", &a]),
        ("trace", &["trace", &a, &b, "--port", "80"]),
        ("quarantined", &["quarantine", "--list"]),
        ("top", &["top", "--once"]),
        ("ui", &["ui"]),
        ("doctor", &["doctor"]),
        ("doctor-checks", &["doctor", "--list"]),
        ("encrypted", &["capture", "host2", "--verify-encrypted"]),
        ("support-bundle", &["support-bundle", "--file", "/var/lib/husk/bundle.tar.gz"]),
        ("rotation", &["keys", "rotate"]),
        ("keys", &["keys", "rotate", "--wait"]),
    ] {
        let printed = json(host, words)?;
        schemas.check(name, &printed).with_context(|| format!("huskctl {}", words.join(" ")))?;
    }
    // Nodes probe each other, so that there are packets.
    for line in json(host, &["capture", "host2", "--count", "3", "--duration", "45"])?.lines() {
        schemas.check("captured", line)?;
    }
    for line in json(host, &["flows"])?.lines().take(20) {
        schemas.check("flow", line)?;
    }
    for log in logs {
        eventually("a line in the log", SOON, || {
            Ok(fs::read_to_string(host.file(log)).is_ok_and(|text| !text.is_empty()))
        })?;
        for line in fs::read_to_string(host.file(log))?.lines().take(20) {
            schemas.check("log", line)?;
        }
    }
    // A pod that is gone without a word, on a host whose daemon cannot take notice.
    let gone = host.add_pod("gone")?;
    let address = gone.address(Family::Ipv4)?.to_string();
    let interface = host.interface_of(&address)?;
    host.stop_daemon(Signal::SIGTERM)?;
    host.ip(["link", "del", &interface])?;
    host.forget_namespace(&gone)?;
    schemas.check("ipam-release", &json(host, &["ipam", "release", &address])?)?;

    let all = Program::new(process::binary("huskctl")?).args(["schema"]).check()?;
    let all: BTreeSet<String> = all.lines().map(str::to_owned).collect();
    ensure!(schemas.judged == all, "only {:?} of {all:?} were judged", schemas.judged);
    Ok(())
}

/// A program whose path is known to the script it runs as `$1`.
fn shell(program: &str, options: &[&str], script: &str, binary: &Path) -> Result<String> {
    let program = Program::new(program).args(options.iter().copied().chain(["-c", script]));
    let variable = ("PROGRAM".to_owned(), binary.as_os_str().to_owned());
    program.environment([variable]).limit(LIMIT).check()
}

#[test]
fn shells_complete_commands() -> Result<()> {
    for (name, begun, completed) in [("huskctl", "pe", "peers"), ("huskd", "chec", "check-config")] {
        let binary = process::binary(name)?;
        let bash = format!(
            "eval \"$($PROGRAM completion bash)\"; complete -p {name} >/dev/null || exit 1
             COMP_WORDS=({name} {begun}); COMP_CWORD=1; COMP_LINE='{name} {begun}'; COMP_POINT=${{#COMP_LINE}}
             _{name} {name} {begun} {name}; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        );
        let said = shell("bash", &["--norc", "--noprofile"], &bash, &binary)?;
        ensure!(said.lines().any(|line| line == completed), "bash: {said}");

        let fish = format!("$PROGRAM completion fish | source; complete -C '{name} {begun}'");
        let said = shell("fish", &["--no-config"], &fish, &binary)?;
        ensure!(said.lines().any(|line| line.split('\t').next() == Some(completed)), "fish: {said}");

        // zsh completes only where somebody types: on a terminal that a second one has.
        let zsh = format!(
            "zmodload zsh/zpty; zpty z 'TERM=dumb zsh -f -i'
             zpty -w z 'PS1=; autoload -Uz compinit; compinit -D -u; eval \"$($PROGRAM completion zsh)\"; print LOA''DED'
             zpty -r z said '*LOADED*' || exit 1
             zpty -w -n z $'{name} {begun}\\t'
             zpty -r z said '*{completed}*' || exit 1
             print -r -- $said; zpty -d z"
        );
        let said = shell("zsh", &["-f"], &zsh, &binary)?;
        ensure!(said.contains(completed), "zsh: {said}");
    }
    Ok(())
}

#[test]
fn manual_pages_are_well_formed() -> Result<()> {
    let scope = Scope::new()?;
    for (name, page) in [("huskctl", "huskctl-mtu-probe.1"), ("huskd", "huskd-check-config.8")] {
        let directory = scope.directory().join(name);
        let folder = directory.display().to_string();
        Program::new(process::binary(name)?).args(["man", &folder]).check()?;
        let mut pages = Vec::new();
        for entry in fs::read_dir(&directory)? {
            pages.push(entry?.path());
        }
        ensure!(pages.contains(&directory.join(page)), "{pages:?}");
        let linted = Program::new("mandoc").args(["-T", "lint", "-W", "warning"]).args(&pages).limit(LIMIT).run()?;
        ensure!(linted.status.success(), "{}{}", linted.stdout, linted.stderr);
        for page in &pages {
            let shown = Program::new("mandoc").args(["-T", "utf8"]).args([page]).limit(LIMIT).check()?;
            for heading in ["NAME", "SYNOPSIS", "EXIT STATUS"] {
                // Bold is a letter, a backspace, and the letter again.
                let bold: String =
                    heading.chars().map(|it| if it == ' ' { " ".into() } else { format!("{it}\u{8}{it}") }).collect();
                ensure!(shown.contains(&bold) || shown.contains(heading), "{} lacks {heading}", page.display());
            }
        }
    }
    Ok(())
}
