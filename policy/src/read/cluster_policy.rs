//! ClusterNetworkPolicy, `policy.networking.k8s.io/v1alpha2`.

use serde_json::{Map, Value};

use super::place::{Fault, Faults, Fields, Spot};
use super::selector::selector;
use super::values::{cidr, port_name, port_number};
use crate::object::{
    ClusterAction, ClusterNetworkPolicy, ClusterRule, Direction, NamespaceChoice, Peer, PolicyRule, PortMatch,
    Protocol, Tier,
};
use crate::selector::LabelSelector;

/// Highest number of a priority.
const LAST_PRIORITY: u16 = 1000;

/// Reads a policy.
pub(super) fn read(spec: Option<&Value>, faults: &mut Faults) -> ClusterNetworkPolicy {
    let empty = Value::Object(Map::new());
    let spot = Spot::root("spec", spec.filter(|spec| !spec.is_null()).unwrap_or(&empty));
    let Some(fields) = faults.settle(spot.map(), "the policy denies everything") else {
        return ClusterNetworkPolicy {
            tier: Tier::Admin,
            priority: 0,
            namespaces: LabelSelector::default(),
            pods: LabelSelector::default(),
            ingress: vec![deny_everything("0")],
            egress: vec![deny_everything("0")],
        };
    };
    let rest = "rules that accept are left out, and those that pass deny";
    let known = fields.only(&["tier", "priority", "subject", "ingress", "egress"]);
    let known = faults.settle(known, rest).is_some();
    let tier = faults.settle(tier(&fields), &format!("the policy counts in the tier Admin, {rest}"));
    let priority = faults.settle(priority(&fields), &format!("its priority is taken for 0, {rest}"));
    let subject = faults.settle(subject(&fields), &format!("the policy selects every pod, {rest}"));
    let trusted = known && tier.is_some() && priority.is_some() && subject.is_some();
    let mut rules = |direction| rules(&fields, direction, trusted, faults);
    let (ingress, egress) = (rules(Direction::Ingress), rules(Direction::Egress));
    let Pods { namespaces, pods } = subject.unwrap_or_default();
    let (tier, priority) = (tier.unwrap_or(Tier::Admin), priority.unwrap_or(0));
    ClusterNetworkPolicy { tier, priority, namespaces, pods, ingress, egress }
}

fn tier(fields: &Fields<'_>) -> Result<Tier, Fault> {
    let spot = fields.required("tier")?;
    match spot.text()? {
        "Admin" => Ok(Tier::Admin),
        "Baseline" => Ok(Tier::Baseline),
        _ => Err(spot.fault("a tier is Admin or Baseline", "write one of them")),
    }
}

fn priority(fields: &Fields<'_>) -> Result<u16, Fault> {
    let spot = fields.required("priority")?;
    let number = spot.whole().and_then(|number| u16::try_from(number).ok()).filter(|number| *number <= LAST_PRIORITY);
    number.ok_or_else(|| {
        let reason = format!("a priority is a whole number from 0 to {LAST_PRIORITY}");
        spot.fault(reason, "write one of these; the lowest comes first")
    })
}

/// Pods by their labels and those of their namespaces.
#[derive(Default)]
struct Pods {
    namespaces: LabelSelector,
    pods: LabelSelector,
}

fn subject(fields: &Fields<'_>) -> Result<Pods, Fault> {
    let spot = fields.required("subject")?;
    spot.map_of(&["namespaces", "pods"])?;
    match variant(&spot)? {
        ("namespaces", given) => Ok(Pods { namespaces: selector(&given)?, pods: LabelSelector::default() }),
        (_, given) => pods(&given),
    }
}

fn pods(spot: &Spot<'_>) -> Result<Pods, Fault> {
    let fields = spot.map_of(&["namespaceSelector", "podSelector"])?;
    let namespaces = fields.get("namespaceSelector");
    let namespaces = namespaces.map_or_else(|| Ok(LabelSelector::default()), |given| selector(&given))?;
    Ok(Pods { namespaces, pods: selector(&fields.required("podSelector")?)? })
}

/// The one key that a map has. Where it has none, the API server may have removed one that its definitions do not know.
fn variant<'s>(spot: &'s Spot<'_>) -> Result<(&'s str, Spot<'s>), Fault> {
    let fields = spot.map()?;
    let mut given = fields.entries().filter(|(_, value)| !value.is_null());
    match (given.next(), given.next()) {
        (Some(only), None) => Ok(only),
        _ => Err(spot.fault("it has exactly one key", "write one key, and one more item for each other")),
    }
}

fn rules(fields: &Fields<'_>, direction: Direction, trusted: bool, faults: &mut Faults) -> Vec<ClusterRule> {
    let key = match direction {
        Direction::Ingress => "ingress",
        Direction::Egress => "egress",
    };
    let Some(spot) = fields.get(key) else { return Vec::new() };
    let Some(all) = faults.settle(spot.items(), &format!("the policy denies all {direction}")) else {
        return vec![deny_everything("0")];
    };
    all.enumerate().filter_map(|(index, spot)| closed(index, &spot, direction, trusted, faults)).collect()
}

/// The rule, or what the specification makes of one that is not understood.
fn closed(
    index: usize,
    spot: &Spot<'_>,
    direction: Direction,
    trusted: bool,
    faults: &mut Faults,
) -> Option<ClusterRule> {
    match rule(index, spot, direction) {
        Ok(rule) if trusted => Some(rule),
        Ok(ClusterRule { action: ClusterAction::Accept, .. }) => None,
        Ok(rule) => Some(ClusterRule { action: ClusterAction::Deny, ..rule }),
        Err(fault) => {
            let fields = spot.map().ok();
            let accepts = fields.is_some_and(|it| matches!(action(&it), Ok(ClusterAction::Accept)));
            faults.add(fault, if accepts { "the rule accepts nothing" } else { "the rule denies everything" });
            let name = fields.and_then(|it| name(&it).ok()?).unwrap_or_else(|| index.to_string());
            (!accepts).then(|| deny_everything(&name))
        }
    }
}

fn deny_everything(name: &str) -> ClusterRule {
    ClusterRule { name: name.to_owned(), action: ClusterAction::Deny, matches: PolicyRule::default() }
}

fn action(fields: &Fields<'_>) -> Result<ClusterAction, Fault> {
    let spot = fields.required("action")?;
    match spot.text()? {
        "Accept" => Ok(ClusterAction::Accept),
        "Deny" => Ok(ClusterAction::Deny),
        "Pass" => Ok(ClusterAction::Pass),
        _ => Err(spot.fault("an action is one of Accept, Deny, Pass", "write one of them")),
    }
}

fn name(fields: &Fields<'_>) -> Result<Option<String>, Fault> {
    let Some(name) = fields.get("name") else { return Ok(None) };
    Ok(Some(name.text()?.to_owned()).filter(|name| !name.is_empty()))
}

fn rule(index: usize, spot: &Spot<'_>, direction: Direction) -> Result<ClusterRule, Fault> {
    let peers_key = match direction {
        Direction::Ingress => "from",
        Direction::Egress => "to",
    };
    let fields = spot.map_of(&["name", "action", peers_key, "protocols"])?;
    let name = name(&fields)?.unwrap_or_else(|| index.to_string());
    let action = action(&fields)?;
    let given = fields.required(peers_key)?;
    let mut peers = Vec::new();
    for item in given.items()? {
        peers.extend(peer(&item, direction)?);
    }
    if peers.is_empty() {
        return Err(given.fault("a rule has at least one peer", "write a peer; namespaces: {} is every pod"));
    }
    let mut ports = None;
    if let Some(protocols) = fields.get("protocols") {
        let all = protocols.items()?.map(|item| protocol(&item)).collect::<Result<Vec<PortMatch>, Fault>>()?;
        if all.is_empty() {
            return Err(protocols.fault("the list has no protocol", "write one, or remove the key for all traffic"));
        }
        let named = all.iter().any(|port| matches!(port, PortMatch::Named(..)));
        if named && peers.iter().any(|peer| matches!(peer, Peer::Block { .. })) {
            let reason = "networks have no ports with names";
            return Err(protocols.fault(reason, "write a number in place of destinationNamedPort, or two rules"));
        }
        ports = Some(all);
    }
    Ok(ClusterRule { name, action, matches: PolicyRule { peers: Some(peers), ports } })
}

fn peer(spot: &Spot<'_>, direction: Direction) -> Result<Vec<Peer>, Fault> {
    let known: &[&str] = match direction {
        Direction::Ingress => &["namespaces", "pods"],
        Direction::Egress => &["namespaces", "pods", "networks", "nodes", "domainNames"],
    };
    spot.map_of(known)?;
    let selected =
        |Pods { namespaces, pods }| vec![Peer::Pods { namespaces: NamespaceChoice::Selected(namespaces), pods }];
    match variant(spot)? {
        ("namespaces", given) => Ok(selected(Pods { namespaces: selector(&given)?, pods: LabelSelector::default() })),
        ("pods", given) => pods(&given).map(selected),
        ("networks", given) => {
            let block = |item: Spot<'_>| Ok(Peer::Block { cidr: cidr(&item)?, except: [].into() });
            let all = given.items()?.map(block).collect::<Result<Vec<Peer>, Fault>>()?;
            if all.is_empty() {
                return Err(given.fault("the list has no network", "write a CIDR, or remove the peer"));
            }
            Ok(all)
        }
        (_, given) => Err(given.fault("Husk does not support this kind of peer", "write namespaces, pods or networks")),
    }
}

fn protocol(spot: &Spot<'_>) -> Result<PortMatch, Fault> {
    spot.map_of(&["tcp", "udp", "sctp", "destinationNamedPort"])?;
    let (protocol, given) = match variant(spot)? {
        ("tcp", given) => (Protocol::Tcp, given),
        ("udp", given) => (Protocol::Udp, given),
        ("sctp", given) => (Protocol::Sctp, given),
        (_, given) => return Ok(PortMatch::Named(None, port_name(&given)?)),
    };
    let Some(port) = given.map_of(&["destinationPort"])?.get("destinationPort") else {
        return Ok(PortMatch::All(protocol));
    };
    port.map_of(&["number", "range"])?;
    match variant(&port)? {
        ("number", given) => {
            let number = port_number(&given)?;
            Ok(PortMatch::Range(protocol, number, number))
        }
        (_, given) => {
            let fields = given.map_of(&["start", "end"])?;
            let end = fields.required("end")?;
            let (first, last) = (port_number(&fields.required("start")?)?, port_number(&end)?);
            if last < first {
                return Err(end.fault(format!("the range begins at {first}"), "write a number that is not lower"));
            }
            Ok(PortMatch::Range(protocol, first, last))
        }
    }
}
