//! Tables for people.

mod doctor;
mod keys;
mod mtu;
mod paths;
mod policy;
mod trace;

use std::fmt::Write as _;

use comfy_table::{ContentArrangement, Table, presets};

use husk_overlay::issue::{Issue, Severity};

use super::style::{Tone, paint};

pub(super) use self::doctor::{doctor, doctor_list, question, repair, repair_width, repaired, to_repair};
pub(super) use self::keys::keys;
pub(super) use self::mtu::{mtu, what_if};
pub(super) use self::paths::{milliseconds, paths, percent};
pub(super) use self::policy::{flows, policy, policy_of, quarantine, quarantined};
pub(super) use self::trace::trace;
use crate::report::{DiffReport, IpamReport, KeysSummary, PeerReport, PeerState, PoolReport, ReleaseReport, Status};

/// A table without lines.
pub(super) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(header.iter().map(|name| paint(Tone::Strong, name)));
    table
}

fn list<T: ToString>(items: impl IntoIterator<Item = T>) -> String {
    let texts: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    if texts.is_empty() { "-".into() } else { texts.join(", ") }
}

pub(super) fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".into(), |value| value.to_string())
}

/// Bytes in the unit a person would choose, powers of 1024.
pub(crate) fn bytes(value: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    let mut whole = value;
    let mut rest = 0;
    while whole >= 1024 && unit + 1 < UNITS.len() {
        rest = (whole % 1024) * 10 / 1024;
        whole /= 1024;
        unit += 1;
    }
    if unit == 0 { format!("{whole} B") } else { format!("{whole}.{rest} {}", UNITS[unit]) }
}

/// Seconds in the unit a person would choose.
fn age(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds / 60),
        7200..=172_799 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86400),
    }
}

pub(super) fn status(status: &Status) -> String {
    let mut lines = Table::new();
    lines.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    let readiness = match (&status.ready, &status.reason) {
        (true, _) => paint(Tone::Good, "yes"),
        (false, Some(reason)) => format!("{}: {reason}", paint(Tone::Bad, "NO")),
        (false, None) => paint(Tone::Bad, "NO"),
    };
    let interface = status.underlay_interface.as_ref().map_or_else(String::new, |name| format!(" on {name}"));
    let rows = [
        ("Node", format!("{} (huskd {})", status.node, status.version)),
        ("Ready", readiness),
        ("Mode", status.mode.to_string()),
        ("Encryption", encryption(status)),
        ("Keys", status.keys.as_ref().map_or_else(|| "none".into(), summary)),
        ("Underlay", format!("{}{interface}, MTU {}", list(status.addresses.iter()), status.underlay_mtu)),
        ("Pod MTU", or_dash(status.pod_mtu)),
        ("Blocks", list(&status.blocks)),
        ("Router addresses", list(status.router.iter())),
        ("Pods", status.endpoints.to_string()),
        (
            "Peers",
            match status.peers {
                (_, 0) => "none: this node is alone in its cluster".to_owned(),
                (routed, all) => format!("{routed} of {all} routed"),
            },
        ),
        ("Source", status.source.clone()),
        (
            "Last pass",
            format!(
                "#{} in {}.{} ms, {} changes, {} failures",
                status.passes,
                status.last_pass.microseconds / 1000,
                status.last_pass.microseconds % 1000 / 100,
                status.last_pass.changes,
                status.last_pass.failures
            ),
        ),
    ];
    for (name, value) in rows {
        lines.add_row(vec![format!("{name}:"), value]);
    }
    let dropped = status.counters.iter().filter(|(_, counter)| counter.packets > 0);
    for (name, counter) in dropped {
        lines.add_row(vec![
            format!("Dropped ({name}):"),
            format!("{} packets, {}", counter.packets, bytes(counter.bytes)),
        ]);
    }
    for (name, packets) in &status.xfrm_errors {
        lines.add_row(vec![format!("IPsec errors ({name}):"), format!("{packets} packets")]);
    }
    format!("{}\n{}", lines.trim_fmt(), issues(&status.issues))
}

fn encryption(status: &Status) -> String {
    match (status.encrypted, status.cipher, &status.wireguard_device) {
        (false, _, _) => "none".to_owned(),
        (true, Some(cipher), _) => {
            let udp = status.udp_encapsulation.map_or_else(String::new, |port| format!(", in UDP at port {port}"));
            format!("IPsec ({cipher}{udp})")
        }
        (true, None, Some(device)) => format!("WireGuard ({device} device)"),
        (true, None, None) => "WireGuard (no device)".to_owned(),
    }
}

fn summary(keys: &KeysSummary) -> String {
    let Some(newest) = keys.newest else { return "none yet".into() };
    let rotating = if keys.rotating { ", a rotation is under way" } else { "" };
    format!("epoch {newest}, {} old{rotating}", keys.age.map_or_else(|| "-".into(), age))
}

fn issues(issues: &[Issue]) -> String {
    if issues.is_empty() {
        return "\nNo issues.\n".into();
    }
    let mut text = format!("\nIssues ({}):\n", issues.len());
    for issue in issues {
        let _ = writeln!(
            text,
            "  {} {:?} {}: {}\n      -> {}",
            mark(issue.severity),
            issue.kind,
            issue.subject,
            issue.message,
            issue.remedy
        );
    }
    text
}

/// How much something hurts, in a word: the same in every table.
fn mark(severity: Severity) -> String {
    let word = match severity {
        Severity::Warning => "warning",
        Severity::Error => "ERROR",
        Severity::Blocking => "BLOCKS",
    };
    paint(severity.into(), word)
}

pub(super) fn peers(peers: &[PeerReport]) -> String {
    if peers.is_empty() {
        return "No peers: this node is alone in its cluster. Do all hosts share one source.directory.path?\n".into();
    }
    // IPsec has no handshakes; what is known there is when something came.
    let heard = if peers.iter().any(|peer| peer.received_age.is_some()) { "LAST PACKET" } else { "HANDSHAKE" };
    let mut rows = table(&[
        "PEER", "STATE", "ENDPOINT", heard, "RECEIVED", "SENT", "MTU", "RTT", "LOSS", "PATH", "BLOCKS", "REASON",
    ]);
    for peer in peers {
        let state = match peer.state {
            PeerState::Connected => paint(Tone::Good, "connected"),
            PeerState::Idle => "idle".into(),
            PeerState::Waiting => paint(Tone::Warning, "waiting for keys"),
            PeerState::Configured => "configured".into(),
            PeerState::Refused => paint(Tone::Bad, "REFUSED"),
        };
        let [rtt, loss, path] = paths::columns(&peer.paths);
        rows.add_row(vec![
            peer.node.to_string(),
            state,
            or_dash(peer.endpoint.as_ref()),
            peer.handshake_age.or(peer.received_age).map_or_else(|| "-".into(), age),
            peer.received.map_or_else(|| "-".into(), bytes),
            peer.sent.map_or_else(|| "-".into(), bytes),
            or_dash(peer.mtu),
            rtt,
            loss,
            path,
            list(&peer.blocks),
            peer.reason.clone().unwrap_or_default(),
        ]);
    }
    format!("{}\n", rows.trim_fmt())
}

pub(super) fn diff(diff: &DiffReport) -> String {
    if diff.changes.is_empty() {
        return "Nothing: the kernel is as it should be.\n".into();
    }
    diff.changes.iter().fold(String::new(), |text, change| text + change + "\n")
}

pub(super) fn released(report: &ReleaseReport) -> String {
    let addresses: Vec<String> = report.released.addresses.iter().map(|address| address.to_string()).collect();
    let (pod, addresses) = (report.released.display_name(), addresses.join(", "));
    format!("Released the lease of {pod}: {addresses} rest before another pod gets them.\n")
}

pub(super) fn ipam(ipam: &IpamReport) -> String {
    let mut pools = table(&["POOL", "CIDR", "BLOCK", "BLOCKS USED"]);
    for row in &ipam.pools {
        pools.add_row(vec![
            row.pool.name.clone(),
            row.pool.cidr.to_string(),
            format!("/{}", row.pool.block_length),
            format!("{} of {}", row.used_blocks, total_blocks(row)),
        ]);
    }
    let mut blocks = table(&["OWN BLOCK", "LEASED", "ADDRESSES"]);
    for row in &ipam.blocks {
        blocks.add_row(vec![row.block.to_string(), row.leased.to_string(), row.total.to_string()]);
    }
    let mut leases = table(&["POD", "ADDRESSES", "INTERFACE", "CONTAINER"]);
    for lease in &ipam.leases {
        leases.add_row(vec![
            lease.display_name(),
            list(lease.addresses.iter()),
            lease.host_interface.to_string(),
            lease.id.container_id.to_string(),
        ]);
    }
    format!("{}\n\n{}\n\n{}\n", pools.trim_fmt(), blocks.trim_fmt(), leases.trim_fmt())
}

/// Blocks of a pool; as a power of two where a number would tell nobody anything.
fn total_blocks(row: &PoolReport) -> String {
    match row.total_blocks {
        0..=0xffff_ffff => row.total_blocks.to_string(),
        _ => format!("2^{}", row.pool.block_length.saturating_sub(row.pool.cidr.length())),
    }
}

pub(super) fn findings(findings: &[String]) -> String {
    if findings.is_empty() {
        return "Leases, blocks and interfaces agree.\n".into();
    }
    findings.iter().fold(String::new(), |text, finding| text + finding + "\n")
}

#[cfg(test)]
mod tests {
    #[test]
    fn units_a_person_would_choose() {
        assert_eq!(super::bytes(1023), "1023 B");
        assert_eq!(super::bytes(1536), "1.5 KiB");
        assert_eq!(super::bytes(u64::MAX), "16777215.9 TiB");
        assert_eq!(super::age(119), "119 s");
        assert_eq!(super::age(7200), "2 h");
        assert_eq!(super::age(400_000), "4 d");
    }
}
