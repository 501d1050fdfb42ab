//! `huskctl doctor`: the checks of [`crate::doctor`], told as they are made; with `--fix` somebody is asked about each fix.

use std::io::{BufRead as _, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};

use anyhow::bail;
use clap::Args;
use clap::builder::PossibleValuesParser;
use husk_dataplane::sysctl;
use husk_overlay::ipc::SOCKET_FILE;
use husk_overlay::marks;

use super::{Output, Show, standpoint, style, tables};
use crate::daemon::CONFIG_FILE;
use crate::doctor::{Answer, CHECKS, CheckListing, DoctorReport, Evidence, Finding, Places, chosen, repair};
use crate::programs;
use crate::report::RepairReport;

/// What to look at, and what may be done.
#[derive(Debug, Clone, Args)]
pub(super) struct Options {
    /// Only these checks, with commas between them (see --list)
    #[arg(long, value_name = "CHECK", value_delimiter = ',', value_parser = PossibleValuesParser::new(CHECKS.iter().map(|check| check.id)), hide_possible_values = true)]
    only: Vec<String>,
    /// Names the checks and what they look at, and does nothing else
    #[arg(long, conflicts_with_all = ["only", "fix", "yes"])]
    list: bool,
    /// Applies the fixes that are safe: those that disturb no traffic and can be undone. Asks before each, and looks again after it
    #[arg(long)]
    fix: bool,
    /// Asks nothing: every safe fix is applied
    #[arg(long, requires = "fix")]
    yes: bool,
    /// Root of the host's files, where they are mounted elsewhere
    #[arg(long, env = "HUSK_HOST_ROOT", default_value = "/")]
    host_root: PathBuf,
    /// The daemon's configuration file
    #[arg(long, default_value = CONFIG_FILE)]
    config: PathBuf,
    /// The daemon's directory of what survives a reboot
    #[arg(long, default_value = marks::STATE_DIRECTORY)]
    state_directory: PathBuf,
    /// Where kernel parameters are set: in a container, whose /proc/sys is read-only, the host's as it was mounted
    #[arg(long, env = "HUSK_PROC_SYS", default_value = sysctl::PROC_SYS)]
    proc_sys: PathBuf,
}

pub(super) fn run(run_directory: &Path, options: &Options, show: &Show) -> anyhow::Result<(String, bool)> {
    if options.list {
        let listing: Vec<CheckListing> =
            CHECKS.iter().map(|check| CheckListing { id: check.id.into(), title: check.title.into() }).collect();
        return Ok((show.text(&listing, |listing| tables::doctor_list(listing))?, false));
    }
    let can_ask = std::io::stdin().is_terminal() && show.output == Output::Table;
    if options.fix && !options.yes && !can_ask {
        bail!("--fix asks before each fix, and nobody can answer here; --yes applies every safe fix without asking");
    }
    standpoint::ensure_here(&run_directory.join(SOCKET_FILE))?;
    sysctl::set_through(&options.proc_sys);
    let places = Places {
        run_directory: run_directory.to_owned(),
        state_directory: options.state_directory.clone(),
        config: options.config.clone(),
        host_root: options.host_root.clone(),
        huskctl: programs::own_name("huskctl"),
    };
    let evidence = Evidence::new(places.clone());
    let checks = chosen(&options.only);
    let mut report = DoctorReport::default();
    for check in &checks {
        say_where(check.title);
        report.checks.push(check.report(&evidence));
    }
    say_where("");
    if !options.fix {
        let hurts = report.hurts();
        return Ok((show.text(&report, tables::doctor)?, hurts));
    }
    if show.output == Output::Table {
        style::print(&show.finish(&tables::to_repair(&report)))?;
    }
    let width = tables::repair_width(&report);
    let mut ask = |finding: &Finding| if options.yes { Ok(Answer::Yes) } else { ask(finding) };
    for (check, found) in checks.iter().zip(&mut report.checks) {
        let repairs = repair(check, found, &places, &mut ask)?;
        if show.output == Output::Table {
            let tell = |repair: &RepairReport| style::print(&show.finish(&tables::repair(repair, width))).map(drop);
            repairs.iter().try_for_each(tell)?;
        }
        report.repairs.extend(repairs);
    }
    let hurts = report.hurts();
    Ok((show.text(&report, tables::repaired)?, hurts))
}

/// Which check is being made, for who waits at a terminal.
fn say_where(title: &str) {
    let mut terminal = std::io::stderr();
    if terminal.is_terminal() {
        // The line is wiped by the next (ECMA-48 `EL`).
        let _ = write!(terminal, "\r\x1b[K{title}");
        let _ = terminal.flush();
    }
}

fn ask(finding: &Finding) -> anyhow::Result<Answer> {
    style::print(&tables::question(finding))?;
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    let yes = matches!(line.trim().to_lowercase().as_str(), "y" | "yes");
    Ok(if yes { Answer::Yes } else { Answer::No })
}
