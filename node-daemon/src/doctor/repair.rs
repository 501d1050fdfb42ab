//! `--fix`: asks, does what a fix says, and looks again.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use husk_dataplane::sysctl;

use super::{Action, Check, Evidence, Finding, Fix, HostFiles, Outcome, Places};
use crate::files;
use crate::report::{CheckReport, RepairReport, RepairResult};

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
    if !finding.fix.is_safe() {
        let because = finding.fix.by_hand.clone().unwrap_or_else(|| "there is no command for it".into());
        return Ok(RepairResult::ByHand { because });
    }
    if ask(finding)? == Answer::No {
        return Ok(RepairResult::Declined);
    }
    let left = match apply(&finding.fix, host) {
        Ok(left) => left,
        Err(error) => return Ok(RepairResult::Failed { error: format!("{error:#}") }),
    };
    *report = check.report(&Evidence::new(places.clone()));
    let still = match &report.outcome {
        Outcome::Found { findings } => findings.iter().any(|it| it.cause == finding.cause),
        Outcome::Unknown { .. } => true,
        Outcome::Well { .. } | Outcome::DoesNotApply { .. } => false,
    };
    Ok(if still { RepairResult::StillThere { left } } else { RepairResult::Gone { left } })
}

/// Does it; returns what has to be done on the host itself, which this process is not in.
fn apply(fix: &Fix, host: &HostFiles) -> Result<Vec<String>> {
    let mut left = Vec::new();
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
            Action::Run { program, arguments } => run(program, arguments)?,
            Action::RunOnHost { program, arguments } if host.is_here() => run(program, arguments)?,
            Action::RunOnHost { .. } => left.push(action.to_string()),
        }
    }
    Ok(left)
}

fn run(program: &str, arguments: &[String]) -> Result<()> {
    // As for the daemon: a path without the directories of administration programs is common.
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let output = Command::new(program)
        .args(arguments)
        .env("PATH", path)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {program}; is it installed?"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`{program} {}` failed ({}): {}", arguments.join(" "), output.status, said.trim());
    }
    Ok(())
}
