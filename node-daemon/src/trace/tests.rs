//! Each hop, broken.

use std::time::Duration;

use husk_dataplane::way::{MatchedRoute, NeighbourStanding, Way};
use husk_overlay::kernel::{Route, RouteTarget};
use husk_overlay::mode::Mode;
use husk_overlay::mtu::ledger;
use husk_overlay::name::{InterfaceName, NodeName};
use husk_overlay::prefix::Family;
use husk_overlay::probe::{Report, Standing};
use husk_policy::compile::path::Path;
use husk_policy::object::{Direction, ObjectName};
use husk_policy::rules::Origin;
use husk_policy::verdict::{Connection, Scope, Side, Verdict};
use nix::errno::Errno;

use super::*;
use crate::report::{Carrier, Crossing, Decider, Live, TraceEnd, TracePeer, TraceReport, TraceSide, Translation};

const OWN: &str = "10.42.0.2";
const THEIRS: &str = "10.42.1.2";

fn interface(name: &str) -> InterfaceName {
    InterfaceName::new(name).unwrap()
}

fn leaves(name: &str, mtu: u32, protocol: u8) -> Way {
    let route = MatchedRoute { destination: Some("10.42.1.0/24".parse().unwrap()), protocol };
    Way::Leaves { interface: interface(name), mtu, up: true, via: None, source: None, route: Some(route) }
}

fn end(address: &str, pod: Option<&str>, place: Place) -> TraceEnd {
    TraceEnd { address: address.parse().unwrap(), pod: pod.map(|name| ObjectName::new("default", name)), place }
}

fn side(direction: Direction, decider: Decider, live: Live) -> TraceSide {
    let side = Side {
        direction,
        pod: Some(ObjectName::new("default", "a")),
        scope: Scope::ThisNode,
        verdict: Verdict::Allow,
        decided_by: None,
        asked: Vec::new(),
    };
    TraceSide { direction, decider, side, live }
}

fn endpoint(deviations: Vec<String>) -> EndpointEvidence {
    EndpointEvidence {
        name: "default/a".into(),
        interface: interface("husk0123456789a"),
        inside: interface("eth0"),
        mtu: Some(1450),
        deviations: Ok(deviations),
    }
}

/// By these interfaces, and in VXLAN to the other node.
pub(super) fn crossing(input: Option<&str>, output: Option<&str>) -> Crossing {
    let [own, peer] = ["172.16.0.1", "172.16.0.2"].map(|it| it.parse().unwrap());
    let (own_port, peer_port) = (Some(4789), Some(4789));
    let carrier = Carrier { interface: interface("eth0"), own: Some(own), peer, protocol: 17, own_port, peer_port };
    let cluster_cidrs = vec!["10.42.0.0/16".parse().unwrap()];
    Crossing {
        input: input.map(interface),
        output: output.map(interface),
        carrier: (output == Some("husk-vx")).then_some(carrier),
        cluster_cidrs,
    }
}

fn probed(standing: Standing) -> Report {
    Report {
        standing,
        promised: 1450,
        passes: Some(1450),
        rtt: Some(Duration::from_micros(400)),
        loss_per_mille: Some(0),
        sent: 9,
        answered: 8,
        since: Duration::ZERO,
        concluded: None,
        clock_skew: None,
    }
}

/// From a pod of this node to one of another, by VXLAN; all is well.
pub(super) fn healthy() -> Evidence {
    let route = Route {
        target: RouteTarget::Interface { interface: interface("husk-vx"), via: None, onlink: true },
        source: None,
        mtu: Some(1450),
    };
    Evidence {
        mode: Mode::Vxlan,
        cluster_cidrs: vec!["10.42.0.0/16".parse().unwrap()],
        connection: Connection {
            originator: OWN.parse().unwrap(),
            responder: THEIRS.parse().unwrap(),
            protocol: 6,
            port: 80,
        },
        size: None,
        source: end(OWN, Some("a"), Place::PodHere),
        destination: end(THEIRS, Some("b"), Place::PodElsewhere { node: Some("host2".into()) }),
        sides: vec![
            side(Direction::Egress, Decider::ThisNode, Live::Agrees { path: Path::Free }),
            side(Direction::Ingress, Decider::OtherNode { node: Some("host2".into()) }, Live::NotHere),
        ],
        source_endpoint: Some(endpoint(Vec::new())),
        destination_endpoint: None,
        back: Some(Ok(leaves("husk0123456789a", 1450, 72))),
        route: Some(RouteEvidence {
            way: Ok(leaves("husk-vx", 1450, 72)),
            planned: Some(("10.42.1.0/24".parse().unwrap(), route)),
        }),
        answers: Some((interface("husk-vx"), Ok(leaves("husk0123456789a", 1450, 72)))),
        guard: Guard { deviations: Ok(Vec::new()) },
        crossing: Some(crossing(Some("husk0123456789a"), Some("husk-vx"))),
        peer: Some(PeerEvidence {
            name: NodeName::new("host2").unwrap(),
            refused: None,
            remedy: None,
            ledger: ledger(&Mode::Vxlan.stack(false), Family::Ipv4, 1500),
            probed: None,
            mtu: Some(1450),
            tunnel: Tunnel {
                devices: vec![Device { name: interface("husk-vx"), wrong: None }],
                kind: Ok(TunnelKind::Vxlan { vni: 4242, port: 4789, entries: Entries { wanted: 3, found: 3 } }),
            },
            underlay: Some(UnderlayEvidence {
                address: "172.16.0.2".parse().unwrap(),
                way: Ok(leaves("eth0", 1500, 2)),
                neighbour: Some(NeighbourStanding::Known),
            }),
            probe: Some((probed(Standing::Verified), Some(Duration::from_secs(3)))),
        }),
        masquerade: true,
        host_ports: Vec::new(),
        mapped_to: None,
    }
}

/// The first broken hop with its cause and remedy.
fn verdict(evidence: &Evidence) -> Option<(HopName, String, String)> {
    let hops = hops(evidence);
    assert!(hops.is_sorted_by_key(|hop| hop.name));
    let first = first_broken(&hops)?;
    let HopStanding::Broken { cause, remedy, .. } = hops.into_iter().find(|hop| hop.name == first)?.standing else {
        panic!("it is broken")
    };
    Some((first, cause, remedy))
}

fn peer(evidence: &mut Evidence) -> &mut PeerEvidence {
    evidence.peer.as_mut().unwrap()
}

type Breakage = (HopName, &'static str, &'static str, fn(&mut Evidence));

/// What is broken, what the cause and the remedy have to say, and how.
const BREAKAGES: [Breakage; 24] = [
    (HopName::Source, "eth0 is down", "delete the pod", |it| {
        it.source_endpoint = Some(endpoint(vec!["in the pod, the interface eth0 is down".into()]));
    }),
    (HopName::Source, "route is missing", "huskctl status", |it| {
        it.source_endpoint = Some(endpoint(vec!["on the host, the route is missing".into()]));
    }),
    (HopName::Source, "no lease", "huskctl ipam check", |it| it.source_endpoint = None),
    (HopName::Antispoofing, "leads to husk-vx", "huskctl diff", |it| it.back = Some(Ok(leaves("husk-vx", 1450, 72)))),
    (HopName::EgressPolicy, "denied by quarantine", "--release", |it| {
        it.sides[0].side.verdict = Verdict::Deny;
        it.sides[0].side.decided_by = Some(Origin::Quarantine);
    }),
    (HopName::EgressPolicy, "in the kernel say something else", "huskctl diff", |it| {
        it.sides[0].live = Live::Differs { path: Path::Unknown };
    }),
    (HopName::Route, "to eth0, where Husk wants it to go to husk-vx", "ip route del", |it| {
        it.route.as_mut().unwrap().way = Ok(leaves("eth0", 1500, 3));
    }),
    (HopName::Route, "though a route is planned", "huskctl diff", |it| {
        it.route.as_mut().unwrap().way = Ok(Way::Refused { errno: Errno::EHOSTUNREACH });
    }),
    (HopName::Route, "answers, which arrives by husk-vx", "huskctl doctor", |it| {
        it.answers.as_mut().unwrap().1 = Ok(Way::Refused { errno: Errno::EHOSTUNREACH });
    }),
    (HopName::Route, "claims the same key", "remove the copy", |it| {
        it.route = Some(RouteEvidence { way: Ok(Way::Refused { errno: Errno::EHOSTUNREACH }), planned: None });
        peer(it).refused = Some("claims the same key".into());
        peer(it).remedy = Some("remove the copy".into());
    }),
    (HopName::Route, "no node of the cluster owns", "huskctl peers", |it| {
        it.route = Some(RouteEvidence { way: Ok(Way::Refused { errno: Errno::EHOSTUNREACH }), planned: None });
        it.peer = None;
    }),
    (HopName::Route, "does not take packets from", "rp_filter", |it| {
        it.route.as_mut().unwrap().way = Ok(Way::Refused { errno: Errno::EXDEV });
    }),
    (HopName::Mtu, "1600 bytes does not fit", "at most 1450", |it| it.size = Some(1600)),
    (HopName::Mtu, "lets packets of 1500", "huskctl diff", |it| {
        it.route.as_mut().unwrap().way = Ok(leaves("husk-vx", 1500, 72));
    }),
    (HopName::Tunnel, "husk-vx is down", "huskctl status", |it| {
        peer(it).tunnel.devices[0].wrong = Some("is down".into());
    }),
    (HopName::Tunnel, "of 3 forwarding and neighbour entries", "huskctl diff", |it| {
        peer(it).tunnel.kind = Ok(TunnelKind::Vxlan { vni: 1, port: 4789, entries: Entries { wanted: 3, found: 2 } });
    }),
    (HopName::Tunnel, "does not have the peer", "huskctl diff", |it| peer(it).tunnel.kind = Ok(wireguard(false, None))),
    (HopName::Tunnel, "there was no handshake yet, and what is sent brings none about", "UDP 51820", |it| {
        peer(it).tunnel.kind = Ok(wireguard(true, None));
        peer(it).probe = Some((probed(Standing::Unreachable), None));
    }),
    (HopName::Underlay, "no route to 172.16.0.2", "ip route", |it| {
        peer(it).underlay.as_mut().unwrap().way = Ok(Way::Refused { errno: Errno::ENETUNREACH });
    }),
    (HopName::Underlay, "does not answer on eth0", "is host2 up", |it| {
        peer(it).underlay.as_mut().unwrap().neighbour = Some(NeighbourStanding::Silent);
    }),
    (HopName::Underlay, "does not answer on eth0", "is host2 up", |it| {
        peer(it).underlay.as_mut().unwrap().neighbour = Some(NeighbourStanding::Asked);
        peer(it).probe = Some((probed(Standing::Unreachable), None));
    }),
    (HopName::Firewall, "not as planned: add rule", "huskctl status", |it| {
        it.guard.deviations = Ok(vec!["add rule".into()]);
    }),
    (HopName::Probe, "no probe is answered by host2", "UDP 4789", |it| {
        peer(it).probe = Some((probed(Standing::Unreachable), None));
    }),
    (HopName::IngressPolicy, "denied by default deny by: default/b", "huskctl policy show", |it| {
        it.sides[1].side.verdict = Verdict::Deny;
        it.sides[1].side.decided_by = Some(Origin::DefaultDeny { policies: vec![ObjectName::new("default", "b")] });
    }),
];

fn wireguard(configured: bool, handshake: Option<Duration>) -> TunnelKind {
    let endpoint = Some(([172, 16, 0, 2], 51820).into());
    TunnelKind::Wireguard { configured, generation: Some(1), endpoint, handshake, bytes: (9, 0) }
}

#[test]
fn what_is_well_passes_every_hop_of_this_node() {
    let hops = hops(&healthy());
    assert_eq!(first_broken(&hops), None, "{hops:#?}");
    let unknown: Vec<_> = hops.iter().filter(|hop| matches!(hop.standing, HopStanding::Unknown { .. })).collect();
    let names: Vec<HopName> = unknown.iter().map(|hop| hop.name).collect();
    // The daemon looks at no rules of others, and what another node decides is its word.
    assert_eq!(names, [HopName::OtherFirewalls, HopName::IngressPolicy, HopName::Destination]);
    let HopStanding::Unknown { why } = &unknown[1].standing else { panic!("{unknown:?}") };
    assert!(why.contains("node host2 decides, and should allow it"), "{why}");
    let HopStanding::Unknown { why } = &unknown[2].standing else { panic!("{unknown:?}") };
    assert!(why.contains("node host2 knows; run there: huskctl trace default/a default/b"), "{why}");
}

#[test]
fn each_breakage_is_named_with_its_cause_and_remedy() {
    for (name, cause, remedy, break_it) in BREAKAGES {
        let mut evidence = healthy();
        break_it(&mut evidence);
        let (found, told, advised) =
            verdict(&evidence).unwrap_or_else(|| panic!("{name:?}, {cause}: nothing is broken"));
        assert_eq!(found, name, "{cause}: {told}");
        assert!(told.contains(cause), "{name:?}: {told}");
        assert!(advised.contains(remedy), "{name:?}: {advised}");
    }
}

#[test]
fn of_two_breakages_the_first_on_the_way_is_named() {
    let mut evidence = healthy();
    for (.., break_it) in BREAKAGES.iter().filter(|(name, ..)| *name >= HopName::Underlay) {
        break_it(&mut evidence);
    }
    assert_eq!(verdict(&evidence).unwrap().0, HopName::Underlay);
}

#[test]
fn esp_without_keys_or_associations_is_broken_at_the_tunnel() {
    let esp = |epochs, found| TunnelKind::Esp {
        epochs,
        key_age: None,
        associations: Entries { wanted: 2, found },
        spis: vec![7],
        policies: Entries { wanted: 3, found: 3 },
        errors: vec!["XfrmInNoStates 4".into()],
        forwarding: None,
    };
    let mut evidence = healthy();
    for (kind, cause) in
        [(esp(None, 2), "nothing can be sent to host2 yet"), (esp(Some((3, 4)), 1), "of 2 associations of host2, 1")]
    {
        peer(&mut evidence).tunnel.kind = Ok(kind);
        let (name, told, _) = verdict(&evidence).unwrap();
        assert!(name == HopName::Tunnel && told.contains(cause), "{name:?}: {told}");
    }
    peer(&mut evidence).tunnel.kind = Ok(esp(Some((3, 4)), 2));
    assert_eq!(verdict(&evidence), None);
    let tunnel = remote::tunnel(&evidence).evidence.join("; ");
    for told in ["SPI 0x00000007", "own epoch 3, the peer's 4", "XfrmInNoStates 4"] {
        assert!(tunnel.contains(told), "{tunnel}");
    }
}

#[test]
fn a_pod_that_talks_to_the_outside_is_masqueraded() {
    let mut evidence = healthy();
    evidence.destination = end("192.0.2.9", None, Place::External);
    evidence.peer = None;
    evidence.route = Some(RouteEvidence { way: Ok(leaves("eth0", 1500, 3)), planned: None });
    assert_eq!(verdict(&evidence), None);
    let nat = path::nat(&evidence).evidence.join("; ");
    assert!(nat.contains("the address of eth0 (masquerade)"), "{nat}");
    evidence.masquerade = false;
    assert!(path::nat(&evidence).evidence[0].contains("masquerade is off"));
    evidence.route = Some(RouteEvidence { way: Ok(Way::Refused { errno: Errno::ENETUNREACH }), planned: None });
    let (name, cause, remedy) = verdict(&evidence).unwrap();
    assert!(name == HopName::Route && cause.contains("no route to 192.0.2.9") && remedy.contains("default route"));
}

#[test]
fn nobody_outside_speaks_to_a_pods_own_address() {
    let mut evidence = healthy();
    evidence.source = end("192.0.2.9", None, Place::External);
    evidence.destination = end(OWN, Some("a"), Place::PodHere);
    (evidence.destination_endpoint, evidence.source_endpoint) = (evidence.source_endpoint.take(), None);
    (evidence.peer, evidence.back) = (None, None);
    evidence.route = Some(RouteEvidence { way: Ok(leaves("husk0123456789a", 1450, 72)), planned: None });
    evidence.host_ports = vec!["TCP 8080 -> 80".into()];
    let (name, cause, remedy) = verdict(&evidence).unwrap();
    assert!(
        name == HopName::Firewall && cause.contains("plaintext_in") && remedy.contains("TCP 8080 -> 80"),
        "{cause}"
    );
}

#[test]
fn between_two_other_nodes_this_one_knows_little_and_says_so() {
    let mut evidence = healthy();
    evidence.source = end("10.42.2.2", None, Place::PodElsewhere { node: Some("host3".into()) });
    (evidence.peer, evidence.route, evidence.back, evidence.source_endpoint) = (None, None, None, None);
    let hops = hops(&evidence);
    assert_eq!(first_broken(&hops), None);
    let passing = hops.iter().filter(|hop| hop.standing == HopStanding::Passes).map(|hop| hop.name);
    assert!(passing.into_iter().all(|name| name == HopName::EgressPolicy));
}

pub(super) fn report(evidence: &Evidence) -> TraceReport {
    let hops = hops(evidence);
    TraceReport {
        connection: evidence.connection,
        source: evidence.source.clone(),
        destination: evidence.destination.clone(),
        verdict: Verdict::Allow,
        sides: evidence.sides.clone(),
        broken: first_broken(&hops),
        hops,
        peer: None,
        translated: None,
        crossing: evidence.crossing.clone(),
    }
}

#[test]
fn a_translated_destination_is_told_and_what_is_not_translated_has_a_remedy() {
    let hop = |report: &TraceReport, name| report.hops.iter().find(|hop| hop.name == name).unwrap().clone();
    let mut behind = report(&healthy());
    assert!(!may_be_translated(&behind), "a pod's own address is what it is");
    let [from, to] = ["10.96.0.10:443", "10.42.1.2:80"].map(|it| it.parse().unwrap());
    let masqueraded = Some("10.42.0.1".parse().unwrap());
    translated(&mut behind, Translation { from, to, connections: 3, of: 4, masqueraded });
    let nat = hop(&behind, HopName::Nat);
    assert_eq!((&nat.standing, nat.evidence.len()), (&HopStanding::Passes, 2));
    assert!(nat.evidence[1].starts_with("the source became 10.42.0.1, which the other end"), "{nat:?}");
    assert!(nat.evidence[0].starts_with("10.96.0.10:443 became 10.42.1.2:80 for 3 of 4 connections"), "{nat:?}");

    let mut evidence = healthy();
    evidence.destination = end("10.96.0.10", None, Place::External);
    evidence.connection.responder = evidence.destination.address;
    evidence.peer = None;
    evidence.route = Some(RouteEvidence { way: Ok(Way::Refused { errno: Errno::ENETUNREACH }), planned: None });
    let mut service = report(&evidence);
    assert!(may_be_translated(&service));
    untranslated(&mut service, None);
    let HopStanding::Broken { remedy, .. } = hop(&service, HopName::Route).standing else { panic!("{service:?}") };
    assert!(remedy.contains("connect once and trace again") && remedy.contains("endpointslices"), "{remedy}");
    untranslated(&mut service, Some("not permitted"));
    let told = hop(&service, HopName::Destination).evidence;
    assert!(told[0].contains("no connection to it is translated now, so connect once"), "{told:?}");
    assert!(told[1].contains("could not be read (not permitted)"), "{told:?}");
    evidence.cluster_cidrs.push("10.96.0.0/16".parse().unwrap());
    let mut nobodys = report(&evidence);
    untranslated(&mut nobodys, None);
    assert_eq!(nobodys, report(&evidence), "an address of the cluster is no Service's");
    evidence.connection.protocol = 1;
    assert!(!may_be_translated(&report(&evidence)), "a ping has no port");
}

#[test]
fn a_knock_tells_a_dead_daemon_from_a_path_that_is_cut() {
    let mut evidence = healthy();
    peer(&mut evidence).probe = Some((probed(Standing::Unreachable), None));
    let to = TracePeer { node: NodeName::new("host2").unwrap(), inside: None, underlay: None, port: None };
    let knock = |inside, underlay| {
        let mut report = report(&evidence);
        assert_eq!(report.broken, Some(HopName::Probe));
        knocked(&mut report, &to, Knocks { inside, underlay });
        let probe = report.hops.iter().find(|hop| hop.name == HopName::Probe).unwrap();
        let told = match &probe.standing {
            HopStanding::Broken { cause, .. } => cause.clone(),
            _ => probe.evidence.join("; "),
        };
        (report.broken, told)
    };
    let (broken, told) = knock(Some(Knock::Answered), Some(Knock::Answered));
    assert!(broken.is_none() && told.contains("is huskd running there?"), "{told}");
    let (broken, told) = knock(Some(Knock::Silent), Some(Knock::Answered));
    assert!(broken == Some(HopName::Probe) && told.contains("filtered on the way"), "{told}");
    let (broken, told) = knock(Some(Knock::Silent), Some(Knock::Silent));
    assert!(broken == Some(HopName::Probe) && told.contains("it is down, cut off"), "{told}");
    assert_eq!(knock(None, None).0, Some(HopName::Probe));
}
