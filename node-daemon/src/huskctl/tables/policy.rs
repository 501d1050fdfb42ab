//! Tables about network policy.

use std::fmt::Write as _;

use husk_policy::object::Direction;
use husk_policy::rules::Effect;

use super::super::style::{Tone, paint};
use super::{bytes, list, or_dash, table};
use crate::flows::{Flow, FlowVerdict};
use crate::report::{
    PodPolicyReport, PodPolicyState, PolicyReport, PolicyRow, QuarantineReport, QuarantinedPod, RuleReport,
};

pub(in crate::huskctl) fn policy(report: &PolicyReport) -> String {
    let mut text = String::new();
    let enforced = match (report.enabled, report.known) {
        (false, _) => "no (policy.enabled): nothing is denied",
        (true, false) => "NOTHING KNOWN YET: no pod gets a packet until the cluster source answers",
        (true, true) => "yes",
    };
    let _ = writeln!(text, "Enforced       {enforced}");
    let _ = writeln!(text, "Pods           {} of this node", report.pods);
    if !report.unknown_pods.is_empty() {
        let _ = writeln!(text, "NOT KNOWN YET  {} (they get no packet)", list(&report.unknown_pods));
    }
    if !report.quarantined.is_empty() {
        let _ = writeln!(text, "QUARANTINED    {}", list(report.quarantined.iter().map(|it| &it.pod)));
    }
    let programming = &report.programming;
    if let Some(mean) = programming.total.checked_div(programming.count) {
        let _ = writeln!(
            text,
            "Programming    {} changes; last {} (of which {} in the kernel), mean {}, slowest {}",
            programming.count,
            milliseconds(programming.last_compile + programming.last_apply),
            milliseconds(programming.last_apply),
            milliseconds(mean),
            milliseconds(programming.slowest),
        );
    }
    if !report.counters.is_empty() {
        let mut rows = table(&["COUNTER", "PACKETS", "BYTES"]);
        for (name, counter) in &report.counters {
            rows.add_row(vec![name.clone(), counter.packets.to_string(), bytes(counter.bytes)]);
        }
        let _ = writeln!(text, "\n{}", rows.trim_fmt());
    }
    if report.policies.is_empty() {
        text += "\nThe cluster has no policies: everything is allowed.\n";
    } else {
        let mut rows = table(&["KIND", "NAME", "TIER", "PRIORITY", "DIRECTIONS", "PODS OF THIS NODE"]);
        for row in &report.policies {
            rows.add_row(vec![
                row.kind.to_string(),
                name_of(row),
                row.tier.map_or_else(|| "-".into(), |tier| format!("{tier:?}")),
                or_dash(row.priority),
                list(&row.directions),
                few(&row.pods),
            ]);
        }
        let _ = writeln!(text, "\n{}", rows.trim_fmt());
    }
    for issue in &report.issues {
        let severity = paint(issue.severity.into(), format!("{:?}", issue.severity));
        let _ = write!(text, "\n{severity} {}: {}\n  -> {}\n", issue.subject, issue.message, issue.remedy);
    }
    text
}

fn name_of(row: &PolicyRow) -> String {
    match &row.namespace {
        Some(namespace) => format!("{namespace}/{}", row.name),
        None => row.name.clone(),
    }
}

/// The first of many.
fn few<T: ToString>(all: &[T]) -> String {
    const NAMED: usize = 4;
    match all.len().checked_sub(NAMED) {
        Some(more @ 1..) => format!("{} and {more} more", list(all[..NAMED].iter().map(ToString::to_string))),
        _ => list(all.iter().map(ToString::to_string)),
    }
}

fn milliseconds(microseconds: u64) -> String {
    format!("{}.{} ms", microseconds / 1000, microseconds % 1000 / 100)
}

pub(in crate::huskctl) fn policy_of(report: &PodPolicyReport) -> String {
    let mut text = format!("Pod    {} ({})\n", report.pod, list(&report.addresses));
    let state = match &report.state {
        PodPolicyState::Enforced => "enforced".to_owned(),
        PodPolicyState::Pending => {
            "NOT ENFORCED YET: the pod gets no packet; huskctl status tells what is wrong".to_owned()
        }
        PodPolicyState::Unknown => {
            "NOT KNOWN YET: the cluster source has not told of the pod, and it gets no packet".to_owned()
        }
        PodPolicyState::Elsewhere { node: Some(node) } => format!("enforced by node {node}"),
        PodPolicyState::Elsewhere { node: None } => "enforced by another node".to_owned(),
        PodPolicyState::HostNetwork => "none: it has the addresses of its node, which no policy reaches".to_owned(),
        PodPolicyState::Disabled => "NOT ENFORCED: policy is switched off (policy.enabled)".to_owned(),
    };
    let _ = writeln!(text, "State  {state}");
    if report.quarantined {
        text += "QUARANTINED; huskctl quarantine --list tells by whom\n";
    }
    if matches!(report.state, PodPolicyState::Unknown | PodPolicyState::HostNetwork) {
        return text;
    }
    for (direction, rules) in [(Direction::Egress, &report.egress), (Direction::Ingress, &report.ingress)] {
        let what = match direction {
            Direction::Egress => "Egress (from the pod)",
            Direction::Ingress => "Ingress (to the pod)",
        };
        if rules.is_empty() {
            let _ = writeln!(text, "\n{what}: no rules, everything is allowed");
        } else {
            let _ = writeln!(text, "\n{what}: the first rule that matches decides\n{}", rules_table(rules));
        }
    }
    text
}

fn rules_table(rules: &[RuleReport]) -> String {
    let mut rows = table(&["  #", "EFFECT", "PEERS", "PORTS", "FROM"]);
    for (index, rule) in rules.iter().enumerate() {
        rows.add_row(vec![
            format!("  {}", index + 1),
            effect(rule.effect),
            rule.peers.join("; "),
            rule.ports.join("; "),
            rule.origin.to_string(),
        ]);
    }
    rows.trim_fmt()
}

pub(super) fn effect(effect: Effect) -> String {
    match effect {
        Effect::Allow => paint(Tone::Good, "allow"),
        Effect::Deny => paint(Tone::Bad, "DENY"),
        Effect::Pass => "next tier".into(),
    }
}

pub(in crate::huskctl) fn quarantined(pods: &[QuarantinedPod]) -> String {
    if pods.is_empty() {
        return "No pod of this node is cut off.\n".into();
    }
    let mut rows = table(&["POD", "BY"]);
    for pod in pods {
        let by = [(pod.by_label, "label husk.dev/quarantine"), (pod.by_request, "request")];
        rows.add_row(vec![pod.pod.to_string(), list(by.iter().filter(|(is, _)| *is).map(|(_, by)| by))]);
    }
    format!("{}\n", rows.trim_fmt())
}

pub(in crate::huskctl) fn quarantine(report: &QuarantineReport) -> String {
    let pod = &report.pod;
    let mut text = match (report.quarantined, report.changed, report.by_label) {
        (true, true, _) => format!("{pod} is cut off.\n"),
        (true, false, false) => format!("{pod} was cut off already.\n"),
        (true, false, true) => {
            format!(
                "{pod} stays cut off: by its label husk.dev/quarantine; take that off to let it onto the network.\n"
            )
        }
        (false, true, _) => format!("{pod} is on the network again, as far as policy lets it.\n"),
        (false, false, _) => format!("{pod} was not cut off.\n"),
    };
    if !report.enforced {
        text += "The kernel does not have that yet; huskctl status and the daemon's log tell why.\n";
    }
    text
}

/// Widths of what comes bit by bit cannot depend on what is still to come.
pub(in crate::huskctl) fn flows(flows: &[Flow], with_header: bool) -> String {
    let line = |[time, event, direction, protocol, count, flow, more]: [&str; 7]| {
        let line = format!("{time:<20}  {event:<6}  {direction:<9}  {protocol:<6}  {count:>5}  {flow}  {more}");
        line.trim_end().to_owned() + "\n"
    };
    let mut text = String::new();
    if with_header {
        text += &line(["TIME", "EVENT", "DIRECTION", "PROTO", "COUNT", "FROM -> TO", ""]);
    }
    for flow in flows {
        let icmp = flow.icmp.map_or_else(String::new, |icmp| format!(" type {} code {}", icmp.kind, icmp.code));
        let event = match flow.verdict {
            FlowVerdict::Denied => "denied",
            FlowVerdict::New => "new",
            FlowVerdict::Closed => "closed",
        };
        text += &line([
            &format!("{:.0}", flow.time),
            event,
            &flow.direction.to_string(),
            &flow.protocol,
            &flow.count.to_string(),
            &format!("{} -> {}{icmp}", flow.source, flow.destination),
            &more_of(flow),
        ]);
    }
    text
}

/// Why it was denied, or what is known of a connection.
fn more_of(flow: &Flow) -> String {
    let mut parts = Vec::new();
    if flow.verdict == FlowVerdict::Denied {
        parts.push(flow.reason.clone());
    }
    if flow.answer {
        parts.push("an answer".to_owned());
    }
    parts.extend(flow.addressed.map(|addressed| format!("by way of {addressed}")));
    parts.extend(flow.milliseconds.map(|all| format!("{}.{} s", all / 1000, all % 1000 / 100)));
    parts.extend(flow.sent.map(|sent| format!("sent {}", bytes(sent.bytes))));
    parts.extend(flow.received.map(|received| format!("received {}", bytes(received.bytes))));
    if parts.is_empty() { String::new() } else { format!("({})", parts.join("; ")) }
}
