//! What probing found, in a few words.

use std::collections::BTreeMap;
use std::time::Duration;

use husk_overlay::prefix::Family;
use husk_overlay::probe::{Report, Standing};

use super::super::style::{Tone, paint};
use super::{or_dash, table};
use crate::report::PathReport;

/// Round-trip time as a person would say it.
fn milliseconds(time: Duration) -> String {
    let tenths = time.as_micros() / 100;
    if tenths < 1000 { format!("{}.{} ms", tenths / 10, tenths % 10) } else { format!("{} ms", tenths / 10) }
}

fn percent(per_mille: u16) -> String {
    format!("{}.{} %", per_mille / 10, per_mille % 10)
}

/// How a path stands; capitals where something is wrong.
fn standing(report: &Report) -> String {
    match report.standing {
        Standing::Unknown => "-".into(),
        Standing::Verified => paint(Tone::Good, "ok"),
        Standing::Searching { passes, fails } => {
            paint(Tone::Warning, format!("SEARCHING {passes} to {}", fails.saturating_sub(1)))
        }
        Standing::Limited { passes } => paint(Tone::Warning, format!("ONLY {passes} of {}", report.promised)),
        Standing::Unreachable => paint(Tone::Bad, "NO ANSWER"),
    }
}

/// Columns of `huskctl peers`: round-trip time, loss and path. Of two families whose paths differ, both are told.
pub(super) fn columns(paths: &BTreeMap<Family, Report>) -> [String; 3] {
    let rtt = paths.values().filter_map(|report| report.rtt).max();
    let loss = paths.values().filter_map(|report| report.loss_per_mille).max();
    let mut told: Vec<String> = paths.values().map(standing).collect();
    told.dedup();
    let path = match told.as_slice() {
        [] => "-".into(),
        [one] => one.clone(),
        _ => {
            let named = paths.iter().map(|(family, report)| format!("{family} {}", standing(report)));
            named.collect::<Vec<_>>().join(", ")
        }
    };
    [or_dash(rtt.map(milliseconds)), or_dash(loss.map(percent)), path]
}

/// The result of `huskctl mtu probe`.
pub(in crate::huskctl) fn paths(paths: &[PathReport]) -> String {
    let mut rows = table(&["FAMILY", "PROMISED", "PASSES", "RTT", "LOSS", "PATH"]);
    for PathReport { path, report } in paths {
        rows.add_row([
            path.family.to_string(),
            report.promised.to_string(),
            or_dash(report.passes),
            or_dash(report.rtt.map(milliseconds)),
            or_dash(report.loss_per_mille.map(percent)),
            standing(report),
        ]);
    }
    format!("{}\n", rows.trim_fmt())
}
