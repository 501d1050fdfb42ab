//! `huskctl keys rotate`: asks for a new key, and looks on until the old one is gone.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use husk_overlay::ipc::Request;

use super::{Show, ask};
use crate::keys::Technology;
use crate::report::{KeysReport, RotationReport};

/// Pause between two questions.
const POLL: Duration = Duration::from_millis(250);

/// Most peers that a message names.
const NAMED: usize = 5;

/// How to rotate.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Options {
    /// Wait until the old key is gone; what it waits for is told on standard error
    #[arg(long)]
    wait: bool,
    /// Seconds to wait at most; the grace period (keys.grace) is part of every rotation
    #[arg(long, requires = "wait", value_name = "SECONDS", default_value_t = 180)]
    timeout: u64,
}

/// The text to print, and whether the rotation is not finished though it was waited for.
pub(super) fn run(socket: &Path, options: &Options, show: &Show) -> anyhow::Result<(String, bool)> {
    let started: RotationReport = ask(socket, &Request::RotateKeys)?;
    if !options.wait {
        return Ok((show.text(&started, beginning)?, false));
    }
    let mut told = String::new();
    let mut tell = |line: String| {
        if line != told {
            // Who does not read this has the exit status.
            let _ = writeln!(std::io::stderr(), "{line}");
            told = line;
        }
    };
    tell(beginning(&started).trim_end().to_owned());
    let limit = Duration::from_secs(options.timeout);
    let begun = Instant::now();
    loop {
        let keys: KeysReport = ask(socket, &Request::Keys)?;
        if is_over(&keys, started.target) {
            return Ok((show.text(&keys, |keys| ending(keys, begun.elapsed()))?, false));
        }
        if begun.elapsed() >= limit {
            return Ok((show.text(&keys, |keys| unfinished(keys, started.target, limit))?, true));
        }
        tell(progress(&keys, started.target));
        std::thread::sleep(POLL.min(limit.saturating_sub(begun.elapsed())));
    }
}

fn is_over(keys: &KeysReport, target: u64) -> bool {
    keys.settled && keys.epochs.last().is_some_and(|newest| newest.epoch >= target)
}

/// What an epoch is called.
fn noun(technology: Technology) -> &'static str {
    match technology {
        Technology::Wireguard => "generation",
        Technology::Esp => "epoch",
    }
}

fn beginning(report: &RotationReport) -> String {
    let noun = noun(report.technology);
    match (&report.begun, &report.waiting) {
        (Some(epoch), _) => format!("Begun: {noun} {epoch}.\n"),
        (None, Some(reason)) => format!("Asked for; {noun} {} has to wait: {reason}.\n", report.target),
        (None, None) => format!("Asked for; {noun} {} begins with one of the next passes.\n", report.target),
    }
}

fn ending(keys: &KeysReport, took: Duration) -> String {
    let newest = keys.epochs.last().map(|newest| newest.epoch).unwrap_or_default();
    format!(
        "Done: {} {newest} is the only one, after {}.{} s.\n",
        noun(keys.technology),
        took.as_secs(),
        took.subsec_millis() / 100
    )
}

/// How far it is, in one line.
fn progress(keys: &KeysReport, target: u64) -> String {
    let noun = noun(keys.technology);
    let Some(newest) = keys.epochs.last().filter(|newest| newest.epoch >= target) else {
        let reason = keys.waiting.clone().unwrap_or_else(|| "the daemon has not begun".into());
        return format!("Waiting: {reason}.");
    };
    let epoch = newest.epoch;
    if !newest.published {
        return format!("Waiting: {noun} {epoch} is not published yet; it has to be receivable from all peers first.");
    }
    if !newest.unconfirmed.is_empty() {
        return format!("Waiting: {} not using {noun} {epoch} yet.", names(keys, target));
    }
    match keys.epochs.first().filter(|oldest| oldest.epoch != epoch) {
        Some(oldest) => {
            format!(
                "Waiting: all peers use {noun} {epoch}; {noun} {} goes when it was quiet for the grace period.",
                oldest.epoch
            )
        }
        None => format!("Waiting: {noun} {epoch} is alone; the record has to say so."),
    }
}

/// Peers that have not confirmed, with a verb.
fn names(keys: &KeysReport, target: u64) -> String {
    let newest = keys.epochs.iter().filter(|it| it.epoch >= target);
    let all: Vec<String> = newest.flat_map(|it| &it.unconfirmed).map(ToString::to_string).collect();
    let verb = if all.len() == 1 { "is" } else { "are" };
    match all.len().checked_sub(NAMED) {
        Some(more @ 1..) => format!("{} and {more} more {verb}", all[..NAMED].join(", ")),
        _ => format!("{} {verb}", all.join(", ")),
    }
}

fn unfinished(keys: &KeysReport, target: u64, limit: Duration) -> String {
    let mut text = format!("Not finished within {} s. {}\n", limit.as_secs(), progress(keys, target));
    let newest = keys.epochs.iter().filter(|it| it.epoch >= target);
    for name in newest.flat_map(|it| &it.unconfirmed) {
        let _ = writeln!(text, "  not confirmed: {name}; is its daemon running, and can it be reached?");
    }
    text += "The rotation goes on by itself; no packet is lost meanwhile.\n";
    text
}
