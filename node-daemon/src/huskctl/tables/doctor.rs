//! `huskctl doctor`

use std::fmt::Write as _;

use husk_overlay::issue::Severity;

use super::{mark, table};
use crate::huskctl::style::{Tone, paint};
use crate::report::{CheckListing, CheckReport, DoctorReport, Finding, Fix, Outcome, RepairReport, RepairResult};

/// Every check with what it looks at.
pub(in crate::huskctl) fn doctor_list(listing: &[CheckListing]) -> String {
    let mut rows = table(&["CHECK", "LOOKS WHETHER"]);
    for check in listing {
        rows.add_row(vec![&check.id, &check.title]);
    }
    format!("{}\n", rows.trim_fmt())
}

/// A line per check, what was found below it, and a summary.
pub(in crate::huskctl) fn doctor(report: &DoctorReport) -> String {
    format!("{}{}", to_repair(report), hint(report))
}

/// The same without the hint at `--fix`, for who gave it.
pub(in crate::huskctl) fn to_repair(report: &DoctorReport) -> String {
    let width = report.checks.iter().map(|check| check.id.len()).max().unwrap_or_default();
    let mut text = String::new();
    for check in &report.checks {
        line(&mut text, check, width);
    }
    text + "\n" + &summary(report)
}

fn line(text: &mut String, check: &CheckReport, width: usize) {
    let id = &check.id;
    match &check.outcome {
        Outcome::Well { seen } => _ = writeln!(text, "{}  {id:width$}  {}", paint(Tone::Good, "ok     "), plain(seen)),
        Outcome::DoesNotApply { why } => _ = writeln!(text, "-        {id:width$}  {}", plain(why)),
        Outcome::Unknown { why } => {
            let _ = writeln!(text, "{}  {id:width$}  {}", paint(Tone::Warning, "UNKNOWN"), plain(why));
        }
        Outcome::Found { findings } => {
            for finding in findings {
                // A mark has no width of its own to be filled up.
                let fill = match finding.severity {
                    Severity::Warning => "",
                    Severity::Error => "  ",
                    Severity::Blocking => " ",
                };
                let mark = mark(finding.severity);
                let _ = writeln!(text, "{mark}{fill}  {id:width$}  {}", plain(&finding.cause));
                for evidence in &finding.evidence {
                    let _ = writeln!(text, "           {}", indented(&plain(evidence), "           "));
                }
                text.push_str(&fix(&finding.fix));
            }
        }
    }
}

/// What stands in files of others may have anything in it, and must not move the cursor.
fn plain(text: &str) -> String {
    text.replace(|character: char| character.is_control() && character != '\n', "\u{fffd}")
}

fn fix(fix: &Fix) -> String {
    let mut text = format!("        -> {}\n", fix.words);
    for command in &fix.commands {
        // A heredoc ends with a line of its own: nothing may stand before what is meant to be pasted.
        if command.contains('\n') {
            let _ = writeln!(text, "{command}");
        } else {
            let _ = writeln!(text, "             {command}");
        }
    }
    text
}

fn indented(text: &str, by: &str) -> String {
    text.lines().collect::<Vec<_>>().join(&format!("\n{by}"))
}

fn summary(report: &DoctorReport) -> String {
    let count = |is: fn(&Outcome) -> bool| report.checks.iter().filter(|check| is(&check.outcome)).count();
    let (well, unknown) =
        (count(|it| matches!(it, Outcome::Well { .. })), count(|it| matches!(it, Outcome::Unknown { .. })));
    let findings = report.checks.iter().map(|check| match &check.outcome {
        Outcome::Found { findings } => findings.as_slice(),
        _ => &[],
    });
    let found = match findings.flatten().count() {
        0 => "nothing is wrong".to_owned(),
        1 => "1 finding".to_owned(),
        many => format!("{many} findings"),
    };
    let checks = match report.checks.len() {
        1 => "1 check".to_owned(),
        many => format!("{many} checks"),
    };
    let mut text = format!("{checks}: {well} well, {found}");
    if unknown > 0 {
        let _ = write!(text, ", {unknown} could not be looked at");
    }
    text.push_str(".\n");
    text
}

/// How many fixes a program can apply.
fn hint(report: &DoctorReport) -> String {
    let findings = report.checks.iter().filter_map(|check| match &check.outcome {
        Outcome::Found { findings } => Some(findings),
        _ => None,
    });
    match findings.flatten().filter(|finding| finding.fix.is_safe()).count() {
        0 => String::new(),
        1 => "huskctl doctor --fix applies one of the fixes, and asks before.\n".into(),
        safe => format!("huskctl doctor --fix applies {safe} of the fixes, and asks before each.\n"),
    }
}

/// What is asked before a fix is applied.
pub(in crate::huskctl) fn question(finding: &Finding) -> String {
    format!("\n{}\n{}Apply? [y/N] ", finding.cause, fix(&finding.fix))
}

/// What became of one fix.
pub(in crate::huskctl) fn repair(repair: &RepairReport, width: usize) -> String {
    let RepairReport { id, cause, result } = repair;
    let (tone, mark, what, left): (_, _, _, &[String]) = match result {
        RepairResult::Gone { left } => (Tone::Good, "fixed  ", "applied, and gone".to_owned(), left),
        RepairResult::Pending { left } => (Tone::Warning, "waits  ", "written, and not in force yet".to_owned(), left),
        RepairResult::StillThere { left } => (Tone::Bad, "ERROR  ", "applied, and still there".to_owned(), left),
        RepairResult::Failed { error } => (Tone::Bad, "ERROR  ", error.clone(), &[]),
        RepairResult::ByHand { because } => (Tone::Warning, "left   ", format!("for you to do: {because}"), &[]),
        RepairResult::Declined => (Tone::Warning, "left   ", "as you wish".to_owned(), &[]),
    };
    let mut text = format!("{}  {id:width$}  {}\n           {}\n", paint(tone, mark), plain(cause), plain(&what));
    for command in left {
        let _ = writeln!(text, "        -> on the host: {command}");
    }
    text
}

/// Width of the names of all checks that `--fix` may tell of, which tells of one after the other.
pub(in crate::huskctl) fn repair_width(report: &DoctorReport) -> usize {
    let found = report.checks.iter().filter(|check| matches!(check.outcome, Outcome::Found { .. }));
    found.map(|check| check.id.len()).max().unwrap_or_default()
}

/// The end of `--fix`.
pub(in crate::huskctl) fn repaired(report: &DoctorReport) -> String {
    format!("\n{}", summary(report))
}
