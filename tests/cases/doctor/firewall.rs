//! Breakages by other firewalls, each shown by packets that do not arrive.

use std::time::Duration;

use anyhow::{Result, ensure};
use husk_tests::Pod;

use super::{Bed, Breakage};

pub(crate) const BREAKAGES: &[Breakage] = &[
    Breakage { check: "foreign-firewall", finds: &["udp dport 4000-5000 drop", "policy of chain FORWARD"], run: rules },
    Breakage { check: "iptables-backends", finds: &["table ip filter"], run: backends },
];

/// How long a packet may take that is expected to arrive.
const ARRIVES: Duration = Duration::from_secs(10);

/// How long one is waited for that is not.
const LOST: Duration = Duration::from_secs(1);

fn rules(bed: &mut Bed) -> Result<()> {
    let (a, b) = (bed.host().add_pod("a")?, bed.cluster.host(2).add_pod("b")?);
    a.await_answer_of(&b, ARRIVES)?;
    let other = bed.cluster.host(2).address(husk_tests::Family::Ipv4)?;
    // The tunnel's packets from one peer, in a chain that another calls.
    let table = format!(
        "table inet company {{
            set blocked {{ type ipv4_addr; elements = {{ 203.0.113.9, {other} }} }}
            chain services {{ ip saddr @blocked udp dport 4000-5000 counter drop; }}
            chain arriving {{ type filter hook input priority 0; policy accept; iifname lo accept; meta l4proto udp jump services; }}
        }}"
    );
    let names = [
        "chain services",
        "inet company",
        "hook input",
        "UDP port 4789",
        &other.to_string(),
        "udp dport 4000-5000 drop",
    ];
    closed(bed, [&a, &b], &table, &names)?;
    // A policy that nobody thought of pods for, as Docker sets it.
    let table = "table ip company {
        chain FORWARD { type filter hook forward priority 0; policy drop; oifname docker0 ct state related,established accept; }
    }";
    closed(bed, [&a, &b], table, &["policy of chain FORWARD", "ip company", "packets from or to pods"])?;
    // One that never concerns us.
    let table = "table inet company {
        chain arriving { type filter hook input priority 0; policy accept; tcp dport 22 drop; ct state invalid drop; }
    }";
    bed.host().netns().command("nft", [table])?;
    bed.well("foreign-firewall")?;
    bed.host().netns().command("nft", ["delete table inet company"]).map(drop)
}

/// A table closes the way, is named, and is opened by what was told.
fn closed(bed: &Bed, [a, b]: [&Pod; 2], table: &str, names: &[&str]) -> Result<()> {
    let check = "foreign-firewall";
    bed.well(check)?;
    bed.host().netns().command("nft", [table])?;
    ensure!(!a.reaches(b, LOST)?, "{table} should drop packets");
    let finding = bed.found(check, names)?;
    ensure!(finding["severity"] == "error", "{finding:#}");
    // Somebody else's firewall is for a person to open.
    let report = bed.report(check, &["--fix", "--yes"])?;
    ensure!(report["repairs"][0]["result"] == "byHand", "{report:#}");
    bed.obey(&finding)?;
    a.await_answer_of(b, ARRIVES)?;
    bed.well(check)?;
    let name: Vec<&str> = table.split_whitespace().skip(1).take(2).collect();
    bed.host().netns().command("nft", [format!("delete table {}", name.join(" ")).as_str()]).map(drop)
}

fn backends(bed: &mut Bed) -> Result<()> {
    let check = "iptables-backends";
    bed.well(check)?;
    let host = bed.host().netns();
    host.command("iptables-nft", ["-A", "INPUT", "-i", "lo", "-j", "ACCEPT"])?;
    bed.well(check)?;
    host.command("iptables-legacy", ["-A", "INPUT", "-i", "lo", "-j", "ACCEPT"])?;
    bed.found(check, &["IPv4 filter", "table ip filter"])?;
    host.command("nft", ["delete table ip filter"])?;
    bed.well(check)
}
