//! The ends of a connection, and policy.

use husk_dataplane::way::Way;
use husk_overlay::marks;
use husk_policy::object::{Direction, Protocol};
use husk_policy::verdict::Verdict;

use super::{EndpointEvidence, Evidence, broken, not_here, passes, unknown};
use crate::report::{Decider, Hop, HopName, Live, Place, TraceEnd, TraceSide};

pub(super) fn source(evidence: &Evidence) -> Hop {
    end(HopName::Source, &evidence.source, evidence.source_endpoint.as_ref(), evidence)
}

pub(super) fn destination(evidence: &Evidence) -> Hop {
    end(HopName::Destination, &evidence.destination, evidence.destination_endpoint.as_ref(), evidence)
}

/// What is said of an end that is neither in the cluster nor at an address that could be.
pub(super) const OUTSIDE: &str = "it is outside of the cluster, where Husk sees nothing";

fn end(name: HopName, end: &TraceEnd, endpoint: Option<&EndpointEvidence>, evidence: &Evidence) -> Hop {
    let ask = |node: &str| {
        let Evidence { source, destination, connection, .. } = evidence;
        let named = |end: &TraceEnd| end.pod.as_ref().map_or_else(|| end.address.to_string(), ToString::to_string);
        let how = match Protocol::of(connection.protocol) {
            None => " --protocol icmp".to_owned(),
            Some(Protocol::Tcp) => format!(" --port {}", connection.port),
            Some(other) => format!(" --port {} --protocol {}", connection.port, other.to_string().to_lowercase()),
        };
        format!("node {node} knows; run there: huskctl trace {} {}{how}", named(source), named(destination))
    };
    match &end.place {
        Place::PodHere => endpoint.map_or_else(
            || {
                broken(
                    name,
                    format!(
                        "the pod of {} has no lease on this node: it is not connected, or not any more",
                        end.address
                    ),
                    "see huskctl ipam check and the plugin's log; delete the pod, its replacement is connected anew",
                    Vec::new(),
                )
            },
            |endpoint| pod(name, endpoint),
        ),
        Place::ThisNode => passes(name, vec![format!("{} is an address of this node", end.address)]),
        Place::PodElsewhere { node: Some(node) } => unknown(name, ask(node), Vec::new()),
        Place::PodElsewhere { node: None } => {
            unknown(name, "the pod's node knows, whose name is not known here", Vec::new())
        }
        Place::OtherNode { node } => {
            unknown(name, ask(node), vec![format!("{} is an address of node {node}", end.address)])
        }
        Place::External if evidence.is_in_cluster(end.address) => unknown(
            name,
            format!("{} is in the cluster's address range, but no pod and no node is known to have it", end.address),
            Vec::new(),
        ),
        Place::External => unknown(name, OUTSIDE, Vec::new()),
    }
}

fn pod(name: HopName, endpoint: &EndpointEvidence) -> Hop {
    let EndpointEvidence { interface, inside, .. } = endpoint;
    let mtu = endpoint.mtu.map(|mtu| format!(", MTU {mtu}")).unwrap_or_default();
    let pair = format!("{interface} on the host, {inside} in the pod{mtu}");
    match &endpoint.deviations {
        Ok(deviations) if deviations.is_empty() => passes(name, vec![pair, "both ends are as they were wired".into()]),
        Ok(deviations) => {
            let cause = format!("{} is not as it was wired: {}", endpoint.name, deviations[0]);
            let on_host_only = deviations.iter().all(|it| it.starts_with("on the host"));
            let remedy = if on_host_only {
                format!(
                    "if it is down: ip link set {interface} up. huskd mends routes and neighbours by itself, see huskctl status; \
                     what it does not mend a new pod does: delete this one"
                )
            } else {
                format!(
                    "see who changes it (ip monitor in the pod's network namespace), then delete the pod, whose replacement is \
                     wired anew: an interface that is only set up again ({inside}) has lost its routes and its addresses of IPv6"
                )
            };
            broken(name, cause, remedy, std::iter::once(pair).chain(deviations.iter().skip(1).cloned()).collect())
        }
        Err(reason) => unknown(name, format!("its network namespace cannot be looked at: {reason}"), vec![pair]),
    }
}

pub(super) fn antispoofing(evidence: &Evidence) -> Hop {
    const NAME: HopName = HopName::Antispoofing;
    let Some(endpoint) = evidence.source_endpoint.as_ref().filter(|_| evidence.source.place == Place::PodHere) else {
        return not_here(NAME, "only what pods of this node send is looked at here");
    };
    let address = evidence.source.address;
    let interface = &endpoint.interface;
    let back = match &evidence.back {
        None => return unknown(NAME, "the route back was not looked at", Vec::new()),
        Some(Err(reason)) => return unknown(NAME, reason.clone(), Vec::new()),
        Some(Ok(way)) => way,
    };
    match back {
        Way::Leaves { interface: found, .. } if found == interface => {}
        other => {
            let leads = match other {
                Way::Leaves { interface, .. } => format!("leads to {interface}"),
                Way::Local => "leads to the host itself".to_owned(),
                Way::Refused { errno } => format!("is refused ({errno})"),
            };
            return broken(
                NAME,
                format!("packets from {address} are dropped as spoofed: the route to it {leads}, not to {interface}"),
                "huskctl diff shows whether the pod's route is missing; remove the route or address that somebody else put there",
                Vec::new(),
            );
        }
    }
    match &evidence.guard.deviations {
        Ok(deviations) if deviations.is_empty() => passes(
            NAME,
            vec![
                format!("the way back to {address} leads to {interface}"),
                "the rule against others' addresses is in place".into(),
            ],
        ),
        // The hop of the firewall tells of it.
        _ => passes(NAME, vec![format!("the way back to {address} leads to {interface}")]),
    }
}

pub(super) fn policy(evidence: &Evidence, name: HopName) -> Hop {
    let direction = if name == HopName::EgressPolicy { Direction::Egress } else { Direction::Ingress };
    let Some(side) = evidence.sides.iter().find(|side| side.direction == direction) else {
        return not_here(name, "policy was not asked");
    };
    let rule = in_words(side);
    match (&side.decider, side.side.verdict) {
        (Decider::Disabled, _) => not_here(name, "policy is switched off (policy.enabled)"),
        (Decider::Nobody, _) => not_here(name, "no pod is selected at this end"),
        (Decider::Host, _) => passes(name, vec!["a node's own traffic with its pods is always allowed".into()]),
        (_, Verdict::Deny) => {
            let pod = side.side.pod.as_ref().map(ToString::to_string).unwrap_or_default();
            let whose = match &side.decider {
                Decider::OtherNode { node: Some(node) } => {
                    vec![format!("node {node} decides; this is what it should say")]
                }
                Decider::OtherNode { node: None } => {
                    vec!["the pod's node decides; this is what it should say".to_owned()]
                }
                _ => Vec::new(),
            };
            broken(name, format!("denied {rule}"), remedy(side, &pod), whose)
        }
        (Decider::OtherNode { node }, Verdict::Allow) => {
            let node = node.as_deref().map_or_else(|| "the pod's node".to_owned(), |node| format!("node {node}"));
            unknown(name, format!("{node} decides, and should allow it {rule}"), Vec::new())
        }
        (Decider::ThisNode, Verdict::Allow) => match &side.live {
            Live::Differs { .. } => broken(
                name,
                format!("policy allows it {rule}, but the rules in the kernel say something else"),
                "see huskctl diff and huskctl status: the kernel refuses the rules, or somebody changes them",
                Vec::new(),
            ),
            Live::Unreadable { reason } => unknown(
                name,
                format!("allowed {rule}, but the rules in the kernel could not be read: {reason}"),
                Vec::new(),
            ),
            _ => passes(name, vec![format!("allowed {rule}"), "the rules in the kernel agree".into()]),
        },
    }
}

fn in_words(side: &TraceSide) -> String {
    match (&side.side.decided_by, side.side.asked.is_empty(), side.side.verdict) {
        (Some(origin), ..) => format!("by {origin}"),
        (None, _, Verdict::Deny) => "since the cluster source has not told of the pod yet".into(),
        (None, false, _) => "as no rule forbids it".into(),
        (None, true, _) => "as no policy selects the pod".into(),
    }
}

fn remedy(side: &TraceSide, pod: &str) -> String {
    use husk_policy::rules::Origin;
    match &side.side.decided_by {
        Some(Origin::Quarantine) => {
            format!("huskctl quarantine {pod} --release, and take the label husk.dev/quarantine off it")
        }
        Some(_) => {
            let (what, whom) = match side.direction {
                Direction::Egress => ("egress", "to"),
                Direction::Ingress => ("ingress", "from"),
            };
            format!(
                "if it should be allowed: a policy that selects {pod} with an {what} rule {whom} the other end; huskctl policy show {pod} lists what there is"
            )
        }
        None => "see huskctl policy list and the daemon's log: the cluster source has to tell of the pod".into(),
    }
}

/// True for the interface of a pod of this node.
pub(super) fn is_of_pod(interface: &husk_overlay::name::InterfaceName) -> bool {
    marks::is_pod_interface(interface.as_str())
}
