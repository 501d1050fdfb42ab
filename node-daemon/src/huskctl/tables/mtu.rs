//! The byte ledger as a table.

use std::fmt::Write as _;

use comfy_table::Table;
use husk_overlay::issue::Severity;
use husk_overlay::mtu::Ledger;

use super::super::style::{Tone, paint};
use super::{mark, or_dash, table};
use crate::report::{MtuOrigin, MtuReport, MtuSource, WhatIfReport};

pub(in crate::huskctl) fn mtu(rows: &[MtuReport]) -> String {
    let mut text = String::new();
    for row in rows {
        let whom =
            if row.own { format!("{} (this node: MTU of its pods)", row.node) } else { format!("to {}", row.node) };
        let _ = writeln!(text, "{}", paint(Tone::Strong, whom));
        let mut lines = ledger(&row.ledger, &sources(row));
        if let Some(probed) = row.probed {
            lines.add_row(["  passes the path".to_owned(), String::new(), probed.to_string()]);
        }
        let _ = writeln!(text, "{}", lines.trim_fmt());
        for mismatch in &row.mismatches {
            let mark = mark(mismatch.severity);
            let _ = writeln!(text, "  {mark} {}\n      -> {}", mismatch.message, mismatch.remedy);
        }
        text.push('\n');
    }
    text
}

pub(in crate::huskctl) fn what_if(rows: &[WhatIfReport]) -> String {
    let mut text = String::new();
    for row in rows {
        let _ = writeln!(text, "{} over {} ({})", row.mode, row.ledger.outer, row.ledger.stack);
        let _ = writeln!(text, "{}", ledger(&row.ledger, "").trim_fmt());
        for (family, reason) in &row.refused {
            let _ = writeln!(text, "  {} no {family}: {reason}", mark(Severity::Error));
        }
        text.push('\n');
    }
    text
}

fn ledger(ledger: &Ledger, origin: &str) -> Table {
    let mut lines = table(&["", "BYTES", "LEFT"]);
    lines.add_row([format!("  underlay MTU{origin}"), String::new(), ledger.underlay_mtu.to_string()]);
    for entry in &ledger.entries {
        for part in &entry.parts {
            lines.add_row([format!("    {}", part.component), format!("-{}", part.bytes), String::new()]);
        }
        lines.add_row([format!("  inside {}", entry.layer), String::new(), or_dash(entry.mtu)]);
    }
    lines.add_row(["  pod packet".to_owned(), String::new(), or_dash(ledger.inner)]);
    lines
}

/// Where the underlay MTU comes from, in parentheses: what decides it alone, or all that has a say where they differ.
fn sources(row: &MtuReport) -> String {
    let decides = |source: &&MtuSource| source.bytes == row.ledger.underlay_mtu;
    let deciding = row.sources.iter().filter(decides).map(origin);
    let others = row.sources.iter().filter(|source| !decides(source));
    let others = others.map(|source| format!("{} has {}", origin(source), source.bytes));
    let deciding: Vec<String> = deciding.collect();
    let told: Vec<String> = others.collect();
    match (deciding.is_empty(), told.is_empty()) {
        (true, true) => String::new(),
        (true, false) => format!(" ({})", told.join(", ")),
        (false, true) => format!(" ({})", deciding.join(", ")),
        (false, false) => format!(" ({}; {})", deciding.join(", "), told.join(", ")),
    }
}

fn origin(source: &MtuSource) -> String {
    match &source.origin {
        MtuOrigin::Interface { interface } => interface.to_string(),
        MtuOrigin::Route { interface } => format!("route by {interface}"),
        MtuOrigin::RouteAttribute { interface } => format!("mtu of the route by {interface}"),
        MtuOrigin::Router { interface } => format!("a router on the path by {interface}"),
        MtuOrigin::Configuration => "underlay.mtu".to_owned(),
        MtuOrigin::PeerRecord => "peer's record".to_owned(),
    }
}
