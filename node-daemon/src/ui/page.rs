//! The templates. Whatever stands in parentheses is escaped.

use husk_overlay::issue::Severity;
use maud::{DOCTYPE, Markup, html};

use super::map::map;
use super::view::{PeerView, ROWS, View};
use crate::flows::Flow;

/// The whole page.
pub(super) fn whole(view: &View) -> Markup {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { (view.node) " · Husk" }
                link rel="stylesheet" href="/style.css";
                script src="/app.js" defer {}
                noscript { meta http-equiv="refresh" content="15"; }
            }
            body {
                header {
                    h1 { "Husk " span class="node" { (view.node) } }
                    p id="lost" class="lost" hidden { "The daemon does not answer. What you see is old." }
                    p id="shut" class="lost" hidden {
                        "The key has changed, as it does when the node reboots: run huskctl ui again for the address. What you see is old."
                    }
                }
                main id="part" { (part(view)) }
            }
        }
    }
}

/// What changes.
pub(super) fn part(view: &View) -> Markup {
    html! {
        (summary(view))
        @if view.all_issues > 0 { (issues(view)) }
        section {
            h2 { "Nodes" }
            @if view.all == 0 {
                p class="empty" { "This node knows of no other one." }
            } @else {
                (map(view))
                ul class="legend" {
                    @for (health, count) in &view.counts {
                        li class=(health.class()) { strong { (count) } " " (health.word()) }
                    }
                }
                (peers(view))
            }
        }
        section {
            h2 { "Denied lately" }
            (flows(view))
        }
        footer { "huskd " (view.version) ", as of " (ago(view.age)) }
    }
}

fn summary(view: &View) -> Markup {
    html! {
        ul class="summary" {
            li {
                @if view.ready { b class="badge well" { "ready" } } @else { b class="badge broken" { "not ready" } }
                @if let Some(reason) = &view.reason { " " (reason) }
            }
            li {
                "mode " b { (view.mode.as_str()) } ", "
                @if view.encrypted { "encrypted" } @else { b class="badge troubled" { "not encrypted" } }
            }
            li { b { (view.pods) } @if view.pods == 1 { " pod here" } @else { " pods here" } }
            @if let Some(mtu) = view.pod_mtu { li { "pod MTU " b { (mtu) } } }
            @if let Some(age) = view.key_age { li { "key made " (ago(age)) } }
            @if !view.source_up { li { b class="badge troubled" { "cluster source does not answer" } } }
        }
    }
}

fn issues(view: &View) -> Markup {
    html! {
        section {
            h2 { "Issues" }
            @for issue in &view.issues {
                article class={ "issue " (severity(issue.severity).1) } {
                    p {
                        b class={ "badge " (severity(issue.severity).1) } { (severity(issue.severity).0) }
                        " " b { (format!("{:?}", issue.kind)) } " " span class="subject" { (issue.subject) }
                    }
                    p { (issue.message) }
                    p class="remedy" { "→ " (issue.remedy) }
                }
            }
            @if view.all_issues > view.issues.len() {
                p class="more" { (view.all_issues - view.issues.len()) " more: huskctl status has all." }
            }
        }
    }
}

fn severity(severity: Severity) -> (&'static str, &'static str) {
    match severity {
        Severity::Warning => ("warning", "quiet"),
        Severity::Error => ("error", "troubled"),
        Severity::Blocking => ("blocking", "broken"),
    }
}

fn peers(view: &View) -> Markup {
    html! {
        form method="get" action="/" role="search" {
            input id="search" type="search" name="q" value=(view.search) maxlength="100" placeholder="name, address or state" aria-label="Search nodes";
            button { "Search" }
        }
        @if view.peers.is_empty() {
            p class="empty" { "No node has that in its name, address or state." }
        } @else {
            div class="wide" {
                table {
                    thead {
                        tr { th { "Node" } th { "State" } th { "Address" } th class="number" { "RTT" } th class="number" { "Loss" } th class="number" { "MTU" } th class="number" { (heard_word(view)) } }
                    }
                    tbody { @for peer in &view.peers { (row(peer, heard_word(view))) } }
                }
            }
            @if view.found > view.peers.len() {
                p class="more" { "The first " (ROWS) " of " (view.found) ", those in trouble first; search to see others." }
            }
        }
    }
}

/// What the age of a peer is that of.
fn heard_word(view: &View) -> &'static str {
    if view.mode.uses_wireguard() { "Handshake" } else { "Heard" }
}

fn row(peer: &PeerView, heard_word: &str) -> Markup {
    html! {
        tr class=(peer.health.class()) {
            th scope="row" { (peer.node) }
            td { span class="dot" {} (peer.state) @if let Some(reason) = &peer.reason { div class="reason" { (reason) } } }
            td { @if let Some(address) = &peer.address { (address) } @else { "–" } }
            td class="number" data-label="RTT" { @if let Some(rtt) = peer.rtt_ms { (format!("{rtt:.2} ms")) } @else { "–" } }
            td class="number" data-label="loss" { @if let Some(loss) = peer.loss { (format!("{:.1} %", loss * 100.0)) } @else { "–" } }
            td class="number" data-label="MTU" {
                @if let Some(mtu) = peer.mtu { (mtu) } @else { "–" }
                @if let Some(promised) = peer.promised { div class="reason" { "should be " (promised) } }
            }
            td class="number" data-label=(heard_word.to_lowercase()) { @if let Some(heard) = peer.heard { (ago(heard)) } @else { "–" } }
        }
    }
}

fn flows(view: &View) -> Markup {
    html! {
        @if !view.policy {
            p class="empty" { "Network policy is not enforced (policy.enabled)." }
        } @else if let Some(reason) = &view.flows_unavailable {
            p class="empty" { "Denied flows are counted, and not recorded: " (reason) }
        } @else if view.flows.is_empty() {
            p class="empty" { "Policy has denied nothing since the daemon started." }
        } @else {
            div class="wide" {
                table {
                    thead { tr { th { "Time" } th { "From" } th { "To" } th { "Protocol" } th { "Denied by" } th class="number" { "Packets" } } }
                    tbody { @for flow in &view.flows { (flow_row(flow)) } }
                }
            }
            p class="more" { "huskctl flows has more, and follows." }
        }
    }
}

fn flow_row(flow: &Flow) -> Markup {
    html! {
        tr {
            td class="time" { time datetime=(flow.time) { (flow.time.strftime("%H:%M:%S")) } " UTC" }
            td { (flow.source) }
            td data-label="→" { (flow.destination) }
            td { (flow.protocol) }
            td { (flow.direction) ", " (flow.reason) }
            td class="number" data-label="packets" { (flow.count) }
        }
    }
}

/// A time in the past, in words.
pub(super) fn ago(seconds: u64) -> String {
    match seconds {
        0..=1 => "now".to_owned(),
        2..120 => format!("{seconds} s ago"),
        120..7200 => format!("{} min ago", seconds / 60),
        7200..172_800 => format!("{} h ago", seconds / 3600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}
