//! Where the MTU towards a peer comes from, and what does not go together.

use std::collections::BTreeMap;

use husk_dataplane::kernel::Kernel;
use husk_overlay::facts::{RouteLimit, UnderlayRoute};
use husk_overlay::issue::{Issue, IssueKind, Severity};
use husk_overlay::name::InterfaceName;

use super::{Engine, Node, Pass};
use crate::report::{MismatchKind, MtuMismatch, MtuOrigin, MtuReport, MtuSource};
use crate::source::ClusterSource;

impl<K: Kernel, S: ClusterSource, N: Node> Engine<K, S, N> {
    pub(super) fn mtu(&mut self, last: &Pass) -> Vec<MtuReport> {
        let config = &self.parts.config;
        let underlay = Underlay {
            interface: last.facts.underlay_interface.clone(),
            mtu: last.facts.underlay_mtu,
            configured: config.underlay.mtu,
        };
        let own = MtuReport {
            node: self.parts.node_name.clone(),
            own: true,
            address: last.facts.addresses.get(config.underlay.family),
            ledger: last.plan.ledger.clone(),
            sources: underlay.own_sources(),
            probed: None,
            mtu: last.plan.pod_mtu,
            mismatches: own_mismatches(&last.plan.issues),
        };
        let mut of_peers = told_of_peers(&last.plan.issues);
        let peers = last.plan.peers.iter().map(|(name, peer)| {
            let route = peer.address.and_then(|address| last.facts.routes.get(&address));
            let towards = Towards { route, published: self.snapshot.nodes.get(name).map(|record| record.underlay_mtu) };
            MtuReport {
                node: name.clone(),
                own: false,
                address: peer.address,
                ledger: peer.ledger.clone(),
                sources: underlay.sources(&towards),
                probed: peer.probed.map(|limit| limit.bytes),
                mtu: peer.mtu.filter(|_| peer.refused.is_none()),
                mismatches: of_peers
                    .remove(name.as_str())
                    .into_iter()
                    .flatten()
                    .chain(underlay.mismatches(&towards))
                    .collect(),
            }
        });
        std::iter::once(own).chain(peers).collect()
    }
}

/// What the plan says of the MTU of an underlay, of the own one or on the way to a peer, and of paths: in the words of
/// `huskctl status`, and as severe.
fn told(issue: &Issue) -> Option<MtuMismatch> {
    let kind = match issue.kind {
        IssueKind::MtuTooLarge => MismatchKind::ConfiguredTooLarge,
        IssueKind::MtuTooSmall => MismatchKind::TooSmall,
        IssueKind::PathMtu => MismatchKind::PathLimited,
        _ => return None,
    };
    let (severity, message, remedy) = (issue.severity, issue.message.clone(), issue.remedy.clone());
    Some(MtuMismatch { severity, kind, message, remedy })
}

/// Whatever concerns a peer alone does not block the own node.
fn concerns_own_node(issue: &Issue) -> bool {
    issue.kind == IssueKind::MtuTooLarge || issue.severity == Severity::Blocking
}

fn own_mismatches(issues: &[Issue]) -> Vec<MtuMismatch> {
    issues.iter().filter(|issue| concerns_own_node(issue)).filter_map(told).collect()
}

/// What leaves too little for a family on the way to a peer, or vanishes there, by the peer's name.
fn told_of_peers(issues: &[Issue]) -> BTreeMap<&str, Vec<MtuMismatch>> {
    let mut peers = BTreeMap::<_, Vec<_>>::new();
    for issue in issues.iter().filter(|issue| !concerns_own_node(issue)) {
        if let Some(mismatch) = told(issue) {
            peers.entry(issue.subject.as_str()).or_default().push(mismatch);
        }
    }
    peers
}

/// The own side.
struct Underlay {
    interface: Option<InterfaceName>,
    /// MTU in bytes of that interface.
    mtu: u32,
    /// MTU in bytes that is configured.
    configured: Option<u32>,
}

/// A peer's side, and what is between.
struct Towards<'a> {
    route: Option<&'a UnderlayRoute>,
    /// Underlay MTU in bytes that the peer has published.
    published: Option<u32>,
}

impl Underlay {
    fn own_sources(&self) -> Vec<MtuSource> {
        let interface = self.interface.clone();
        let interface =
            interface.map(|interface| MtuSource { origin: MtuOrigin::Interface { interface }, bytes: self.mtu });
        let configured = self.configured.map(|bytes| MtuSource { origin: MtuOrigin::Configuration, bytes });
        interface.into_iter().chain(configured).collect()
    }

    fn sources(&self, towards: &Towards<'_>) -> Vec<MtuSource> {
        let mut sources = self.own_sources();
        let other = |route: &&UnderlayRoute| route.mtu != self.mtu || Some(&route.interface) != self.interface.as_ref();
        sources.extend(towards.route.filter(other).map(|route| {
            let interface = route.interface.clone();
            let origin = match route.limited_by {
                RouteLimit::Interface => MtuOrigin::Route { interface },
                RouteLimit::Attribute => MtuOrigin::RouteAttribute { interface },
                RouteLimit::Router => MtuOrigin::Router { interface },
            };
            MtuSource { origin, bytes: route.mtu }
        }));
        sources.extend(towards.published.map(|bytes| MtuSource { origin: MtuOrigin::PeerRecord, bytes }));
        sources
    }

    /// What the node publishes as its underlay's MTU in bytes.
    fn effective(&self) -> u32 {
        self.configured.map_or(self.mtu, |configured| configured.min(self.mtu))
    }

    /// What each peer gets its own value for, so that nothing is lost. It may be meant.
    fn mismatches(&self, towards: &Towards<'_>) -> Vec<MtuMismatch> {
        let mut mismatches = Vec::new();
        let own = self.effective();
        if let Some(published) = towards.published.filter(|published| *published != own) {
            mismatches.push(MtuMismatch {
                severity: Severity::Warning,
                kind: MismatchKind::UnderlayDiffers,
                message: format!("the underlay of this node carries {own} bytes, that of the peer {published}"),
                remedy: format!(
                    "nothing, if that is meant: both use {} towards each other; else give the two one MTU",
                    own.min(published)
                ),
            });
        }
        let least = towards.published.map_or(own, |published| published.min(own));
        if let Some(route) = towards.route.filter(|route| route.mtu < least) {
            let (bytes, interface) = (route.mtu, &route.interface);
            mismatches.push(MtuMismatch {
                severity: Severity::Warning,
                kind: MismatchKind::RouteSmaller,
                message: format!(
                    "{} carries {bytes} bytes, though both ends could do {least}",
                    match route.limited_by {
                        RouteLimit::Interface => format!("{interface}, by which the route to the peer leaves,"),
                        RouteLimit::Attribute => format!("the route to the peer by {interface} has an mtu attribute and"),
                        RouteLimit::Router => format!("a router on the path to the peer by {interface} says that it"),
                    }
                ),
                remedy: match route.limited_by {
                    RouteLimit::Interface => format!("if that is not meant, raise the MTU of {interface}"),
                    RouteLimit::Attribute => "if that is not meant, remove or raise the route's mtu attribute".into(),
                    RouteLimit::Router => format!(
                        "let everything on the path carry {least} bytes; this node tries it again ten minutes after it was \
                         told (net.ipv4.route.mtu_expires)"
                    ),
                },
            });
        }
        mismatches
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(name: &str) -> InterfaceName {
        InterfaceName::new(name).unwrap()
    }

    fn underlay(configured: Option<u32>) -> Underlay {
        Underlay { interface: Some(interface("eth0")), mtu: 1500, configured }
    }

    fn route(name: &str, mtu: u32) -> UnderlayRoute {
        UnderlayRoute { interface: interface(name), mtu, limited_by: RouteLimit::Interface, on_link: true }
    }

    fn kinds(mismatches: &[MtuMismatch]) -> Vec<MismatchKind> {
        mismatches.iter().map(|it| it.kind).collect()
    }

    #[test]
    fn equal_underlays_have_two_sources_and_no_mismatch() {
        let underlay = underlay(None);
        let route = route("eth0", 1500);
        let towards = Towards { route: Some(&route), published: Some(1500) };
        let sources = underlay.sources(&towards);
        let interface = MtuOrigin::Interface { interface: interface("eth0") };
        assert_eq!(
            sources,
            [MtuSource { origin: interface, bytes: 1500 }, MtuSource { origin: MtuOrigin::PeerRecord, bytes: 1500 }]
        );
        assert!(underlay.mismatches(&towards).is_empty());
    }

    #[test]
    fn every_limit_is_named_and_what_does_not_go_together_has_a_remedy() {
        let underlay = underlay(Some(9000));
        let slow = route("eth0", 1300);
        let towards = Towards { route: Some(&slow), published: Some(1400) };
        let bytes: Vec<u32> = underlay.sources(&towards).iter().map(|source| source.bytes).collect();
        assert_eq!(bytes, [1500, 9000, 1300, 1400]);
        let mismatches = underlay.mismatches(&towards);
        assert_eq!(kinds(&mismatches), [MismatchKind::UnderlayDiffers, MismatchKind::RouteSmaller]);
        assert!(mismatches.iter().all(|it| it.severity == Severity::Warning), "nothing is lost");
        assert!(mismatches[0].message.contains("1500") && mismatches[0].message.contains("1400"));
        // Another interface counts even where it carries as much.
        let other = route("eth1", 1500);
        let towards = Towards { route: Some(&other), published: None };
        assert!(
            matches!(&underlay.sources(&towards)[2].origin, MtuOrigin::Route { interface } if interface.as_str() == "eth1")
        );
        assert!(underlay.mismatches(&towards).is_empty());
    }

    #[test]
    fn whose_the_mtu_of_a_route_is_shows_in_its_origin_and_in_the_remedy() {
        let underlay = underlay(None);
        let told = |limited_by| {
            let route = UnderlayRoute { limited_by, ..route("eth0", 1400) };
            let towards = Towards { route: Some(&route), published: None };
            let mismatch = underlay.mismatches(&towards).swap_remove(0);
            assert_eq!(mismatch.kind, MismatchKind::RouteSmaller);
            (underlay.sources(&towards)[1].origin.clone(), mismatch.remedy)
        };
        let eth0 = || interface("eth0");
        let (origin, remedy) = told(RouteLimit::Attribute);
        assert!(
            origin == MtuOrigin::RouteAttribute { interface: eth0() } && remedy.contains("mtu attribute"),
            "{remedy}"
        );
        let (origin, remedy) = told(RouteLimit::Router);
        assert!(origin == MtuOrigin::Router { interface: eth0() } && remedy.contains("ten minutes"), "{remedy}");
        let (origin, remedy) = told(RouteLimit::Interface);
        assert!(origin == MtuOrigin::Route { interface: eth0() } && remedy.contains("MTU of eth0"), "{remedy}");
    }

    #[test]
    fn a_smaller_configured_mtu_is_the_own_side_of_the_comparison() {
        let underlay = underlay(Some(1400));
        let towards = Towards { route: None, published: Some(1400) };
        assert!(underlay.mismatches(&towards).is_empty());
    }

    #[test]
    fn what_the_plan_says_of_an_mtu_is_said_of_the_node_that_it_concerns() {
        let issue = |kind, severity, subject: &str| Issue {
            severity,
            kind,
            subject: subject.to_owned(),
            message: format!("of {subject}"),
            remedy: "enlarge it".to_owned(),
        };
        let issues = [
            issue(IssueKind::MtuTooLarge, Severity::Warning, "underlay.mtu"),
            issue(IssueKind::MtuTooSmall, Severity::Blocking, "IPv6 in mode vxlan"),
            issue(IssueKind::MtuTooSmall, Severity::Error, "host2"),
            issue(IssueKind::MtuTooSmall, Severity::Error, "host2"),
            issue(IssueKind::NoRouteToPeer, Severity::Warning, "host3"),
            issue(IssueKind::PathMtu, Severity::Warning, "host4"),
            issue(IssueKind::PeerSilent, Severity::Error, "peers"),
            issue(IssueKind::NoUnderlayAddress, Severity::Blocking, "host1"),
        ];
        let own = own_mismatches(&issues);
        assert_eq!(kinds(&own), [MismatchKind::ConfiguredTooLarge, MismatchKind::TooSmall]);
        assert_eq!((own[1].message.as_str(), own[1].remedy.as_str()), ("of IPv6 in mode vxlan", "enlarge it"));
        let peers = told_of_peers(&issues);
        assert_eq!(peers.keys().copied().collect::<Vec<_>>(), ["host2", "host4"]);
        assert_eq!(kinds(&peers["host2"]), [MismatchKind::TooSmall; 2]);
        assert_eq!(kinds(&peers["host4"]), [MismatchKind::PathLimited]);
        let severities = own.iter().chain(&peers["host2"]).chain(&peers["host4"]).map(|it| it.severity);
        let expected = [Severity::Warning, Severity::Blocking, Severity::Error, Severity::Error, Severity::Warning];
        assert_eq!(severities.collect::<Vec<_>>(), expected, "as in huskctl status");
    }
}
