//! Peers that do not answer: one issue for all of them, since what makes one silent (a switch, a rack's power, a rule of the own
//! firewall) as a rule makes many, and a cluster has thousands.
//!
//! It changes with who is silent and with nothing else: no times, no counts of probes. Whoever tells what is new tells it once.

use std::collections::{BTreeMap, BTreeSet};

use super::Context;
use super::peers::Peer;
use crate::issue::{Issue, IssueKind, Severity};
use crate::name::NodeName;
use crate::prefix::Family;
use crate::probe::Path;

/// Peers that are named, of whatever number is silent.
const NAMED: usize = 5;

/// The families in which a peer is probed and does not answer.
pub(super) fn of(context: &Context<'_>, peer: &Peer) -> BTreeSet<Family> {
    if context.facts.silent.is_empty() {
        return BTreeSet::new();
    }
    let path = |family| Path { peer: peer.record.name.clone(), family };
    let probed = peer.plan.probe.keys().copied();
    probed.filter(|family| context.facts.silent.contains(&path(*family))).collect()
}

/// What is wrong, if there is a peer that does not answer.
pub(super) fn issue(context: &Context<'_>, peers: &BTreeMap<NodeName, Peer>) -> Option<Issue> {
    let probed = peers.values().filter(|peer| !peer.plan.probe.is_empty()).count();
    let silent: Vec<&Peer> = peers.values().filter(|peer| !peer.plan.silent.is_empty()).collect();
    if silent.is_empty() {
        return None;
    }
    let mut names: Vec<String> = silent.iter().take(NAMED).map(|peer| named(peer)).collect();
    if let Some(more) = silent.len().checked_sub(NAMED).filter(|more| *more > 0) {
        names.push(format!("{more} more"));
    }
    let way = if context.config.mode.tunnelled() { " through the tunnel" } else { "" };
    let all = silent.len() == probed && probed > 1 && silent.iter().all(|peer| peer.plan.is_silent());
    let whose = if all { ": all there are, so that it may be this node that is cut off" } else { "" };
    Some(Issue {
        severity: Severity::Error,
        kind: IssueKind::PeerSilent,
        subject: "peers".into(),
        message: format!(
            "{} of {probed} do not answer{way}: {}{whose}; pods here and there do not reach each other, unless it is only the \
             daemon there that does not run",
            silent.len(),
            names.join(", "),
        ),
        remedy: "run huskctl doctor, which finds out whether the host is down, the tunnel is blocked or only the daemon does \
                 not run, and says what mends it; huskctl peers lists them all"
            .into(),
    })
}

/// Its name, with the family where the other one is answered.
fn named(peer: &Peer) -> String {
    let name = &peer.record.name;
    match peer.plan.silent.first() {
        Some(family) if !peer.plan.is_silent() => format!("{name} (in {family} alone)"),
        _ => name.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Plan;
    use super::super::tests::*;
    use super::*;
    use crate::facts::Facts;
    use crate::mode::Mode;
    use crate::probe::Limit;

    fn silent(count: u8, paths: impl IntoIterator<Item = (String, Family)>) -> Facts {
        let mut facts = facts(count);
        facts.silent = paths.into_iter().map(|(name, family)| Path { peer: node(&name), family }).collect();
        facts
    }

    fn both(names: impl IntoIterator<Item = String>) -> impl Iterator<Item = (String, Family)> {
        names.into_iter().flat_map(|name| Family::ALL.map(move |family| (name.clone(), family)))
    }

    fn told(plan: &Plan) -> &Issue {
        let [issue] = &plan.issues[..] else { panic!("{:?}", plan.issues) };
        assert_eq!(
            (issue.kind, issue.severity, issue.subject.as_str()),
            (IssueKind::PeerSilent, Severity::Error, "peers")
        );
        assert!(issue.remedy.contains("huskctl doctor"), "{issue}");
        issue
    }

    #[test]
    fn a_dead_tunnel_is_an_error_that_names_the_peer_and_keeps_nobody_from_adding_pods() {
        for mode in [Mode::Direct, Mode::Vxlan, Mode::Wireguard] {
            let before = plan_of(&config(mode), &snapshot(4), &facts(4));
            let plan = plan_of(&config(mode), &snapshot(4), &silent(4, both(["host1".into()])));
            let way = if mode == Mode::Direct { "" } else { " through the tunnel" };
            let message = &told(&plan).message;
            assert!(message.starts_with(&format!("1 of 3 do not answer{way}: host1; pods here")), "{message}");
            assert_eq!((plan.pod_mtu, &plan.desired), (before.pod_mtu, &before.desired), "{mode}");
            assert!(plan.peers[&node("host1")].is_silent() && !plan.peers[&node("host2")].is_silent());
        }
    }

    #[test]
    fn however_many_there_are_it_is_one_issue_of_a_few_lines() {
        let plan =
            plan_of(&config(Mode::Vxlan), &snapshot(60), &silent(60, both((1..50).map(|it| format!("host{it}")))));
        let message = &told(&plan).message;
        assert!(message.starts_with("49 of 59 do not answer"), "{message}");
        assert!(message.contains(", 44 more; pods here"), "{message}");
        assert!(message.len() < 1000 && !message.contains("cut off"), "{message}");
        let plan = plan_of(&config(Mode::Vxlan), &snapshot(4), &silent(4, both((1..4).map(|it| format!("host{it}")))));
        assert!(told(&plan).message.contains("it may be this node that is cut off"), "{}", told(&plan));
    }

    #[test]
    fn a_family_that_is_dead_alone_is_named() {
        let plan = plan_of(&config(Mode::Vxlan), &snapshot(3), &silent(3, [("host1".into(), Family::Ipv6)]));
        assert!(told(&plan).message.starts_with("1 of 2 do not answer through the tunnel: host1 (in IPv6 alone)"));
        assert!(!plan.peers[&node("host1")].is_silent());
    }

    #[test]
    fn who_has_left_or_gets_no_packets_is_not_missed() {
        let facts = silent(3, both(["host1".into(), "gone".into()]));
        let mut snapshot = snapshot(3);
        snapshot.nodes.remove(&node("host1"));
        assert_eq!(plan_of(&config(Mode::Vxlan), &snapshot, &facts).issues, []);
    }

    #[test]
    fn what_a_path_swallowed_before_it_fell_silent_is_not_told_and_still_kept_to() {
        let mut facts = silent(3, both(["host1".into()]));
        let limits = Family::ALL.map(|family| (family, Limit { bytes: 1400, found: true }));
        facts.probed.insert(node("host1"), limits.into());
        let plan = plan_of(&config(Mode::Vxlan), &snapshot(3), &facts);
        told(&plan);
        assert_eq!(plan.peers[&node("host1")].mtu, Some(1400));
        // With one family alive, what vanishes there does so now.
        facts.silent.retain(|path| path.family == Family::Ipv6);
        let kinds: Vec<_> =
            plan_of(&config(Mode::Vxlan), &snapshot(3), &facts).issues.iter().map(|it| it.kind).collect();
        assert_eq!(kinds, [IssueKind::PathMtu, IssueKind::PeerSilent]);
    }
}
