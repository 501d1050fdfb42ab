//! `--fix`: asks, does what a fix says, and looks again.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use husk_dataplane::sysctl;
use husk_overlay::marks;

use super::{Action, Check, Evidence, Finding, Fix, HostFiles, Outcome, Places};
use crate::programs::{self, Keep, Limits, Ran};
use crate::report::{CheckReport, RepairReport, RepairResult};
use crate::{files, leases};

/// How long a fix may take to show: a daemon that was started reads its cluster first.
const TAKES_EFFECT: Duration = Duration::from_secs(10);

/// Limits of a program that mends something: systemd gives a unit 90 seconds to stop (systemd-system.conf(5),
/// `DefaultTimeoutStopSec`).
const LIMITS: Limits = Limits { time: Duration::from_secs(120), bytes: 4 << 10 };

/// Pause between two looks.
const PAUSE: Duration = Duration::from_millis(200);

/// What somebody answered who was asked about a fix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Do it.
    Yes,
    /// Leave it.
    No,
}

/// Mends what a check has found as far as that is safe and `ask` agrees; what the check says then takes the place of what it
/// said before.
///
/// # Errors
/// When nobody can be asked.
pub fn repair(
    check: &Check,
    report: &mut CheckReport,
    places: &Places,
    ask: &mut impl FnMut(&Finding) -> Result<Answer>,
) -> Result<Vec<RepairReport>> {
    let Outcome::Found { findings } = &report.outcome else { return Ok(Vec::new()) };
    let host = HostFiles::new(&places.host_root);
    let mut repairs = Vec::new();
    for finding in findings.clone() {
        let result = mend(check, report, &finding, &host, places, ask)?;
        repairs.push(RepairReport { id: check.id.to_owned(), cause: finding.cause, result });
    }
    Ok(repairs)
}

fn mend(
    check: &Check,
    report: &mut CheckReport,
    finding: &Finding,
    host: &HostFiles,
    places: &Places,
    ask: &mut impl FnMut(&Finding) -> Result<Answer>,
) -> Result<RepairResult> {
    if !findings_of(report).iter().any(|it| it.cause == finding.cause) {
        // What mended another has mended it, too.
        return Ok(RepairResult::Gone { left: Vec::new() });
    }
    if !finding.fix.is_safe() {
        let because = finding.fix.by_hand.clone().unwrap_or_else(|| "there is no command for it".into());
        return Ok(RepairResult::ByHand { because });
    }
    if ask(finding)? == Answer::No {
        return Ok(RepairResult::Declined);
    }
    // Somebody may have thought about the answer for an hour, and much may have changed. Its words may have another number now.
    *report = check.report(&Evidence::new(places.clone()));
    if !findings_of(report).iter().any(|it| it.fix.actions == finding.fix.actions) {
        return Ok(RepairResult::Gone { left: Vec::new() });
    }
    let before = findings_of(report).len();
    let applied = apply(&finding.fix, host);
    // A step that failed may come after those that counted.
    let deadline = Instant::now() + if applied.is_ok() { TAKES_EFFECT } else { Duration::ZERO };
    let gone = loop {
        *report = check.report(&Evidence::new(places.clone()));
        let findings = findings_of(report);
        let unknown = matches!(report.outcome, Outcome::Unknown { .. });
        // The same may have another number in its words now.
        let gone = !unknown && findings.len() < before && findings.iter().all(|it| it.cause != finding.cause);
        if gone || Instant::now() >= deadline {
            break gone;
        }
        thread::sleep(PAUSE);
    };
    Ok(match applied {
        Err(error) => RepairResult::Failed { error: format!("{error:#}") },
        Ok(Left { commands, pending: true }) if gone => RepairResult::Pending { left: commands },
        Ok(Left { commands, .. }) if gone => RepairResult::Gone { left: commands },
        Ok(Left { commands, .. }) => RepairResult::StillThere { left: commands },
    })
}

fn findings_of(report: &CheckReport) -> &[Finding] {
    match &report.outcome {
        Outcome::Found { findings } => findings,
        _ => &[],
    }
}

/// What a fix has left to do on the host itself.
#[derive(Debug, Default, PartialEq, Eq)]
struct Left {
    commands: Vec<String>,
    /// Nothing of the fix is in force before.
    pending: bool,
}

/// Does it; returns what has to be done on the host itself, which this process is not in, or at a time that a person chooses.
fn apply(fix: &Fix, host: &HostFiles) -> Result<Left> {
    let mut left = Left::default();
    for action in &fix.actions {
        match action {
            Action::WriteFile { path, contents } => {
                host.seen()?;
                let path = host.path(path);
                let parent = path.parent().unwrap_or(Path::new("/"));
                files::create_directory(parent, 0o755)?;
                files::replace(&path, contents.as_bytes(), 0o644)?;
            }
            Action::RenameFile { from, to } => {
                host.seen()?;
                let (from, to) = (host.path(from), host.path(to));
                if to.try_exists()? {
                    bail!("{} exists already", to.display());
                }
                fs::rename(&from, &to)
                    .with_context(|| format!("cannot rename {} to {}", from.display(), to.display()))?;
            }
            Action::SetSysctl { path, value } => sysctl::write(path, value)?,
            Action::ReleaseLease { address, run_directory, .. } => {
                let run_directory = run_directory.as_deref().unwrap_or(Path::new(marks::RUN_DIRECTORY));
                leases::release(run_directory, *address)?;
            }
            Action::Run { program, arguments } => run(program, arguments)?,
            Action::RunOnHost { program, arguments } | Action::TakeUp { program, arguments, disturbs: false }
                if host.is_here() =>
            {
                run(program, arguments)?;
            }
            Action::RunOnHost { .. } => left.commands.push(action.to_string()),
            Action::TakeUp { .. } => {
                left.commands.push(action.to_string());
                left.pending = true;
            }
        }
    }
    Ok(left)
}

fn run(program: &str, arguments: &[String]) -> Result<()> {
    let mut command = Command::new(program);
    command.args(arguments).env("PATH", programs::search_path()).env("LC_ALL", "C");
    let Ran { complaint, status, .. } = programs::run(&mut command, Keep::End, LIMITS)?;
    if status != Some(0) {
        let status = status.map_or_else(|| "a signal ended it".to_owned(), |status| format!("exit status {status}"));
        bail!("`{program} {}` failed ({status}): {complaint}", arguments.join(" "));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn a_step_that_fails_says_what_its_program_said_and_ends_the_fix() {
        let root = tempfile::tempdir().unwrap();
        let after = Action::WriteFile { path: "/etc/after".into(), contents: String::new() };
        let fix = Fix::safe("", [Action::run("sh", ["-c", "echo no such device >&2; exit 7"]), after]);
        let error = apply(&fix, &HostFiles::new(root.path())).unwrap_err().to_string();
        assert!(error.ends_with("failed (exit status 7): no such device"), "{error}");
        assert!(!root.path().join("etc").exists());
        let missing = apply(&Fix::safe("", [Action::run("/nonexistent", [""])]), &HostFiles::new(root.path()));
        assert_eq!(missing.unwrap_err().to_string(), "/nonexistent is not installed");
    }

    #[test]
    fn what_no_service_has_taken_up_is_not_told_to_be_gone() {
        let root = tempfile::tempdir().unwrap();
        let host = HostFiles::new(root.path());
        let file = Action::WriteFile { path: "/etc/file".into(), contents: "x".into() };
        let elsewhere = Fix::safe("", [file.clone(), Action::reload("nmcli", ["general", "reload", "conf"])]);
        let left = Left { commands: vec!["nmcli general reload conf".into()], pending: true };
        assert_eq!(apply(&elsewhere, &host).unwrap(), left);
        let here = HostFiles::here();
        assert_eq!(apply(&Fix::safe("", [Action::reload("true", ["x"])]), &here).unwrap(), Left::default());
        let later = apply(&Fix::safe("", [Action::restart_later("systemd-networkd")]), &here).unwrap();
        assert_eq!(later, Left { commands: vec!["systemctl restart systemd-networkd".into()], pending: true });
        // What lasts only is left, and what is there now is mended.
        let lasting = apply(&Fix::safe("", [Action::run_on_host("udevadm", ["control", "--reload"])]), &host).unwrap();
        assert!(!lasting.pending && lasting.commands.len() == 1);
        let mut report = crate::report::DoctorReport::default();
        assert!(!report.hurts());
        let result = RepairResult::Pending { left: left.commands };
        report.repairs.push(RepairReport { id: String::new(), cause: String::new(), result });
        assert!(report.hurts(), "the exit status says that it is not over");
    }

    #[test]
    fn what_is_over_by_the_time_of_the_answer_is_left_alone() {
        static WRONG: AtomicBool = AtomicBool::new(true);
        fn look(_: &Evidence) -> super::super::Looked {
            let fix = Fix::safe("", [Action::run("sh", ["-c", "exit 7"])]);
            let found = WRONG.load(Ordering::Relaxed).then(|| Finding::warning("it is wrong", vec![], fix));
            Ok(Outcome::of(found.into_iter().collect(), ""))
        }
        let check = Check { id: "c", title: "t", look };
        let places = Places::of_tests();
        let mut report = check.report(&Evidence::new(places.clone()));
        let mut ask = |_: &Finding| {
            WRONG.store(false, Ordering::Relaxed);
            Ok(Answer::Yes)
        };
        let repairs = repair(&check, &mut report, &places, &mut ask).unwrap();
        assert_eq!(repairs[0].result, RepairResult::Gone { left: vec![] }, "the program would have failed");
    }
}
