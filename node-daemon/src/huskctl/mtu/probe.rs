//! `huskctl mtu probe`: has the paths to a peer probed now, and looks on until it is known what passes.

use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use husk_overlay::ipc::Request;
use husk_overlay::mtu::underlay_needed;
use husk_overlay::name::NodeName;
use husk_overlay::probe::Standing;
use husk_overlay::probe::wire::SMALL;
use serde::Serialize;

use super::super::{Show, ask, tables};
use crate::report::{MtuReport, PathReport, ProbeStarted};

/// Pause between two questions.
const POLL: Duration = Duration::from_millis(250);

/// Whom to probe.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Options {
    /// The node: its name, as in huskctl peers, or an address of it
    peer: String,
    /// Seconds to wait at most; a search takes up to 30
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
    timeout: u64,
}

/// What became of it.
#[derive(Debug, Serialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(in crate::huskctl) struct Outcome {
    peer: NodeName,
    /// It is known what passes.
    finished: bool,
    /// Bytes of the underlay packets that pass, where that is less than it promises: what to set `underlay.mtu` to. None where all
    /// that is promised passes, or not even what the cluster needs.
    underlay: Option<u32>,
    paths: Vec<PathReport>,
}

/// The text to print, and whether less passes than is promised, or that is not known.
pub(super) fn run(socket: &Path, options: &Options, show: &Show) -> anyhow::Result<(String, bool)> {
    let started: ProbeStarted = ask(socket, &Request::ProbePeer { peer: options.peer.clone() })?;
    let limit = Duration::from_secs(options.timeout);
    let asked = Instant::now();
    let mut told = String::new();
    loop {
        let paths: Vec<PathReport> = ask(socket, &Request::ProbesOf { peer: started.peer.clone() })?;
        anyhow::ensure!(!paths.is_empty(), "{} is not probed any more; see huskctl peers", started.peer);
        let finished = paths.iter().all(|it| is_done(it, &started));
        if finished || asked.elapsed() >= limit {
            let wrong = !finished || paths.iter().any(|it| it.report.standing != Standing::Verified);
            let underlay = carried(&paths).and_then(|passes| underlay_of(socket, &started.peer, passes));
            let outcome = Outcome { peer: started.peer, finished, underlay, paths };
            return Ok((show.text(&outcome, |outcome| ending(outcome, limit))?, wrong));
        }
        let line = progress(&paths, &started);
        if line != told {
            // Who does not read this has the result.
            let _ = writeln!(std::io::stderr(), "{line}");
            told = line;
        }
        std::thread::sleep(POLL.min(limit.saturating_sub(asked.elapsed())));
    }
}

/// Bytes of the largest packet that passes in every family, where that is less than promised.
fn carried(paths: &[PathReport]) -> Option<u32> {
    let limited = paths.iter().filter_map(|it| match it.report.standing {
        Standing::Limited { passes } => Some(passes),
        _ => None,
    });
    // So small is what probing says of a path that does not carry the least of its family.
    limited.min().filter(|passes| *passes > SMALL)
}

/// Bytes of the underlay's packets that those have become which are so large inside the tunnel. What was found counts without it.
fn underlay_of(socket: &Path, peer: &NodeName, passes: u32) -> Option<u32> {
    let rows: Vec<MtuReport> = ask(socket, &Request::Mtu).ok()?;
    let row = rows.into_iter().find(|row| row.node == *peer)?;
    Some(underlay_needed(&row.ledger.stack, row.ledger.outer, passes))
}

fn is_done(it: &PathReport, started: &ProbeStarted) -> bool {
    it.report.concluded.is_some_and(|concluded| concluded > started.begun)
}

/// How far it is, in one line.
fn progress(paths: &[PathReport], started: &ProbeStarted) -> String {
    let words = paths.iter().map(|it| {
        let (family, promised) = (it.path.family, it.report.promised);
        match it.report.standing {
            Standing::Searching { passes: 0, fails } => {
                format!("{family}: {fails} bytes do not pass, smaller sizes are open")
            }
            Standing::Searching { passes, fails } => {
                let open = fails.saturating_sub(passes).saturating_sub(1);
                format!("{family}: {passes} bytes pass, {fails} do not, {open} sizes are open")
            }
            Standing::Verified if is_done(it, started) => format!("{family}: {promised} bytes pass"),
            Standing::Limited { passes } if is_done(it, started) => format!("{family}: {passes} bytes pass, no more"),
            Standing::Unreachable if is_done(it, started) => format!("{family}: no answer"),
            _ => format!("{family}: trying {promised} bytes"),
        }
    });
    words.collect::<Vec<_>>().join("; ")
}

fn ending(outcome: &Outcome, limit: Duration) -> String {
    let mut text = tables::paths(&outcome.paths);
    let peer = &outcome.peer;
    let stands = |wanted: fn(&Standing) -> bool| outcome.paths.iter().any(|it| wanted(&it.report.standing));
    if !outcome.finished {
        text += &format!("Not finished within {} s; the search goes on by itself.\n", limit.as_secs());
    }
    if stands(|standing| matches!(standing, Standing::Limited { .. })) {
        let or_set = outcome.underlay.map(|bytes| format!(", or set underlay.mtu to {bytes} on the node"));
        text += &format!(
            "Larger packets vanish on the way, and the routes were lowered to what passes.\n  -> raise the MTU of what lies \
             between the two nodes{}\n",
            or_set.unwrap_or_default()
        );
    }
    if stands(|standing| *standing == Standing::Unreachable) {
        text += &format!(
            "Small packets are not answered either, which says nothing about sizes.\n  -> is huskd running on {peer}, and can \
             it be reached? See huskctl peers there and here\n"
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use husk_overlay::prefix::Family;
    use husk_overlay::probe::{Path, Report};

    use super::*;

    fn path(family: Family, standing: Standing, concluded: Option<u64>) -> PathReport {
        let peer = NodeName::new("host2").unwrap();
        let report = Report {
            standing,
            promised: 1450,
            passes: None,
            rtt: None,
            loss_per_mille: None,
            clock_skew: None,
            sent: 0,
            answered: 0,
            since: Duration::ZERO,
            concluded: concluded.map(Duration::from_secs),
        };
        PathReport { path: Path { peer, family }, report }
    }

    fn told(paths: &[PathReport]) -> String {
        let started = ProbeStarted { peer: NodeName::new("host2").unwrap(), begun: Duration::from_secs(100) };
        progress(paths, &started)
    }

    #[test]
    fn what_was_concluded_before_anybody_asked_is_no_result() {
        let verified = |concluded| told(&[path(Family::Ipv4, Standing::Verified, concluded)]);
        for concluded in [None, Some(99), Some(100)] {
            assert_eq!(verified(concluded), "IPv4: trying 1450 bytes");
        }
        assert_eq!(verified(Some(101)), "IPv4: 1450 bytes pass");
        let limited = Standing::Limited { passes: 1350 };
        assert_eq!(told(&[path(Family::Ipv4, limited, Some(99))]), "IPv4: trying 1450 bytes");
        assert_eq!(told(&[path(Family::Ipv4, limited, Some(101))]), "IPv4: 1350 bytes pass, no more");
        assert_eq!(told(&[path(Family::Ipv6, Standing::Unreachable, Some(99))]), "IPv6: trying 1450 bytes");
        assert_eq!(told(&[path(Family::Ipv6, Standing::Unreachable, Some(101))]), "IPv6: no answer");
    }

    #[test]
    fn what_the_path_carries_is_told_as_a_number_to_set() {
        let limited = |passes| path(Family::Ipv4, Standing::Limited { passes }, Some(101));
        let verified = path(Family::Ipv6, Standing::Verified, Some(101));
        assert_eq!(carried(&[limited(1350), verified.clone()]), Some(1350));
        assert_eq!(carried(&[limited(1350), limited(1349)]), Some(1349));
        assert_eq!(carried(&[verified]), None);
        assert_eq!(carried(&[limited(SMALL)]), None, "no MTU is as small as that");
        let told = |underlay| {
            let peer = NodeName::new("host2").unwrap();
            let outcome = Outcome { peer, finished: true, underlay, paths: vec![limited(1350)] };
            ending(&outcome, Duration::from_secs(60))
        };
        assert!(told(Some(1400)).ends_with("between the two nodes, or set underlay.mtu to 1400 on the node\n"));
        assert!(told(None).ends_with("between the two nodes\n"));
    }

    #[test]
    fn a_search_tells_how_far_it_is_for_each_family() {
        let search = |passes, fails| path(Family::Ipv4, Standing::Searching { passes, fails }, None);
        let line = told(&[search(1280, 1450), path(Family::Ipv6, Standing::Verified, Some(101))]);
        assert_eq!(line, "IPv4: 1280 bytes pass, 1450 do not, 169 sizes are open; IPv6: 1450 bytes pass");
        assert_eq!(told(&[search(1350, 1351)]), "IPv4: 1350 bytes pass, 1351 do not, 0 sizes are open");
        // Before a small one is answered, nothing is known to pass.
        assert_eq!(told(&[search(0, 1450)]), "IPv4: 1450 bytes do not pass, smaller sizes are open");
        // Between the look that found the answer and this one the search may have ended.
        assert_eq!(told(&[search(1351, 1351)]), "IPv4: 1351 bytes pass, 1351 do not, 0 sizes are open");
    }
}
