//! The hops of a connection.

use std::fmt::Write as _;

use husk_policy::compile::path::Path;
use husk_policy::object::Direction;
use husk_policy::verdict::{Outcome, Verdict};

use super::super::style::{Tone, paint};
use super::policy::effect;
use super::table;
use crate::report::{Decider, Hop, HopName, HopStanding, Live, Place, TraceEnd, TraceReport, TraceSide};

/// Bytes of the longest name of a hop.
const NAME_WIDTH: usize = 15;

pub(in crate::huskctl) fn trace(report: &TraceReport, verbose: bool) -> String {
    let via = report.translated.as_ref().map(|it| format!("  via  {}, translated\n", it.from)).unwrap_or_default();
    let mut text = format!(
        "{}  {}\n  from {}\n{via}  to   {}\n",
        verdict(report),
        report.connection,
        end(&report.source),
        end(&report.destination)
    );
    if !report.hops.is_empty() {
        text += "\n";
    }
    for hop in &report.hops {
        if verbose || hop.standing != HopStanding::NotHere {
            text += &line(hop);
        }
    }
    for side in &report.sides {
        let is_telling = side.side.verdict == Verdict::Deny || matches!(side.live, Live::Differs { .. });
        if verbose || report.hops.is_empty() || is_telling {
            text += "\n";
            text += &trace_side(side);
        }
    }
    if !report.hops.is_empty() {
        text += "\n";
        text += &ending(report);
    }
    text
}

/// The answer in a word.
fn verdict(report: &TraceReport) -> String {
    let denies = |name| matches!(name, HopName::EgressPolicy | HopName::IngressPolicy);
    let (tone, word) = match (report.broken, report.verdict) {
        (Some(name), _) if !denies(name) => (Tone::Bad, "BROKEN"),
        (_, Verdict::Deny) => (Tone::Bad, "DENIED"),
        (Some(_), Verdict::Allow) => (Tone::Bad, "BROKEN"),
        (None, Verdict::Allow) if report.hops.is_empty() => (Tone::Good, "ALLOWED"),
        // Of all hops this one alone tells what becomes of packets between the nodes; without its word nobody knows that they pass.
        (None, Verdict::Allow) if report.hops.iter().any(is_untold_probe) => (Tone::Warning, "NOT KNOWN"),
        // What the other node decides, it tells itself.
        (None, Verdict::Allow) if open(report).next().is_some() => (Tone::Good, "PASSES as far as this node knows"),
        (None, Verdict::Allow) => (Tone::Good, "PASSES"),
    };
    paint(tone, word)
}

fn is_untold_probe(hop: &Hop) -> bool {
    hop.name == HopName::Probe && matches!(hop.standing, HopStanding::Unknown { .. })
}

fn line(hop: &Hop) -> String {
    let (mark, first) = match &hop.standing {
        HopStanding::Passes => (paint(Tone::Good, "ok"), None),
        HopStanding::Broken { cause, .. } => (paint(Tone::Bad, "!!"), Some(cause)),
        HopStanding::Unknown { why } => (paint(Tone::Warning, "??"), Some(why)),
        HopStanding::NotHere => (paint(Tone::Faint, "--"), None),
    };
    // Of what is broken the end tells the rest.
    let is_broken = matches!(hop.standing, HopStanding::Broken { .. });
    let rest = hop.evidence.iter().filter(|_| !is_broken);
    let said: Vec<&str> = first.into_iter().chain(rest).map(String::as_str).collect();
    format!("  {mark}  {:<NAME_WIDTH$}  {}\n", hop.name, said.join("; "))
}

/// The verdict, and what to do about it.
fn ending(report: &TraceReport) -> String {
    let broken = report.hops.iter().find_map(|hop| match &hop.standing {
        HopStanding::Broken { cause, remedy, commands } => Some((hop, cause, remedy, commands)),
        _ => None,
    });
    if let Some((hop, cause, remedy, commands)) = broken {
        let mut text = format!("The first hop that is broken is the {}: {cause}\n", hop.name);
        for evidence in &hop.evidence {
            let _ = writeln!(text, "     {evidence}");
        }
        let colon = if commands.is_empty() { "" } else { ":" };
        let _ = writeln!(text, "  -> {remedy}{colon}");
        for line in commands.iter().flat_map(|command| command.lines()) {
            let _ = writeln!(text, "     {line}");
        }
        return text;
    }
    let open: Vec<String> = open(report).map(|hop| hop.name.to_string()).collect();
    if open.is_empty() {
        "Every hop passes it.\n".to_owned()
    } else {
        format!("Nothing that this node can see is broken; it cannot tell: {}.\n", open.join(", "))
    }
}

/// Hops that this node cannot judge.
fn open(report: &TraceReport) -> impl Iterator<Item = &Hop> {
    report.hops.iter().filter(|hop| matches!(hop.standing, HopStanding::Unknown { .. }))
}

fn end(end: &TraceEnd) -> String {
    let place = match &end.place {
        Place::PodHere => "pod of this node".to_owned(),
        Place::PodElsewhere { node: Some(node) } => format!("pod of node {node}"),
        Place::PodElsewhere { node: None } => "pod of another node".to_owned(),
        Place::ThisNode => "this node".to_owned(),
        Place::OtherNode { node } => format!("node {node}"),
        Place::External => "outside of the cluster".to_owned(),
    };
    match &end.pod {
        Some(pod) => format!("{} {pod}, {place}", end.address),
        None => format!("{}, {place}", end.address),
    }
}

fn trace_side(it: &TraceSide) -> String {
    let verdict = match it.side.verdict {
        Verdict::Allow => "allowed",
        Verdict::Deny => "DENIED",
    };
    let name = match it.direction {
        Direction::Egress => "Egress",
        Direction::Ingress => "Ingress",
    };
    let why = match (&it.side.decided_by, it.side.asked.is_empty(), &it.decider) {
        (Some(origin), ..) => format!(" by {origin}"),
        (None, _, Decider::ThisNode) if it.side.verdict == Verdict::Deny => {
            ": the cluster source has not told of the pod yet".to_owned()
        }
        (None, false, _) => ": no rule decides".to_owned(),
        (None, true, Decider::ThisNode | Decider::OtherNode { .. }) => ": no policy selects the pod".to_owned(),
        (None, true, _) => String::new(),
    };
    let who = match &it.decider {
        Decider::ThisNode => "this node decides".to_owned(),
        Decider::OtherNode { node: Some(node) } => format!("node {node} decides; ask huskctl there for its ruleset"),
        Decider::OtherNode { node: None } => "the pod's node decides".to_owned(),
        Decider::Host => "a node's own traffic with its pods is always allowed".to_owned(),
        Decider::Nobody => "nobody decides".to_owned(),
        Decider::Disabled => "policy is switched off (policy.enabled)".to_owned(),
    };
    let mut text = format!("{name}: {verdict}{why} ({who})\n");
    if !it.side.asked.is_empty() {
        let mut rows = table(&["  #", "RULE", "EFFECT", "ASKED"]);
        for (index, asked) in it.side.asked.iter().enumerate() {
            let outcome = match asked.outcome {
                Outcome::Matched => "matched",
                Outcome::OtherPeer => "is for other peers",
                Outcome::OtherPort => "is for other ports",
                Outcome::Skipped => "passed over",
            };
            rows.add_row(vec![
                format!("  {}", index + 1),
                asked.origin.to_string(),
                effect(asked.effect),
                outcome.to_owned(),
            ]);
        }
        text += &rows.trim_fmt();
        text += "\n";
    }
    match &it.live {
        Live::NotHere => {}
        Live::Agrees { path } => {
            let _ = writeln!(text, "  live ruleset agrees: {}", in_words(path));
        }
        Live::Differs { path } => {
            let _ = writeln!(
                text,
                "  LIVE RULESET DIFFERS: {}\n  -> look at huskctl diff and huskctl status; if it stays so, this is a bug",
                in_words(path)
            );
        }
        Live::Unreadable { reason } => {
            let _ = writeln!(text, "  live ruleset could not be read: {reason}");
        }
    }
    text
}

fn in_words(path: &Path) -> String {
    match path {
        Path::Unknown => "the address is of no pod that is known -> drop".to_owned(),
        Path::Itself => "the pod talks with itself -> accept".to_owned(),
        Path::Free => "the pod has no chain -> accept".to_owned(),
        Path::Judged { chain, class, others, verdict } => {
            let class = class.map_or_else(|| "no class".to_owned(), |class| format!("class {class:#010x}"));
            let others = if *others { " (that of all others)" } else { "" };
            let verdict = match verdict {
                Verdict::Allow => "accept",
                Verdict::Deny => "drop",
            };
            format!("chain {chain}, {class}{others} -> {verdict}")
        }
    }
}
