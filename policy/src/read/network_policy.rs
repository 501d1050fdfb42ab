//! NetworkPolicy, `networking.k8s.io/v1`.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::place::{Fault, Faults, Fields, Spot};
use super::selector::selector;
use super::values::{cidr, port_name, port_number};
use crate::object::{Direction, NamespaceChoice, NetworkPolicy, Peer, PolicyRule, PortMatch, Protocol};
use crate::selector::LabelSelector;

/// What a policy does in a direction.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Effect {
    /// Nothing.
    None,
    /// It allows what its rules say.
    Rules,
    /// It allows nothing.
    Isolation,
}

/// Reads a policy of a namespace.
pub(super) fn read(namespace: &str, spec: Option<&Value>, faults: &mut Faults) -> NetworkPolicy {
    let empty = Value::Object(Map::new());
    let spot = Spot::root("spec", spec.filter(|spec| !spec.is_null()).unwrap_or(&empty));
    let everything = LabelSelector::default();
    let closed = "the policy selects every pod of its namespace and allows them nothing";
    let Some(fields) = faults.settle(spot.map(), closed) else {
        return NetworkPolicy { selector: everything, ingress: Some(Vec::new()), egress: Some(Vec::new()) };
    };
    let known = fields.only(&["podSelector", "policyTypes", "ingress", "egress"]);
    let known = faults.settle(known, "the policy allows its pods nothing, in both directions").is_some();
    let selector = match fields.get("podSelector") {
        None => Some(everything.clone()),
        Some(spot) => faults.settle(selector(&spot), closed),
    };
    let effects = if known {
        effects(&fields, faults)
    } else {
        Effects { ingress: Effect::Isolation, egress: Effect::Isolation }
    };
    let mut reader = Reader { namespace, faults };
    let mut rules = |effect: Effect, direction: Direction| match effect {
        Effect::None => None,
        Effect::Rules if selector.is_some() => Some(reader.rules(&fields, direction)),
        Effect::Rules | Effect::Isolation => Some(Vec::new()),
    };
    let ingress = rules(effects.ingress, Direction::Ingress);
    let egress = rules(effects.egress, Direction::Egress);
    NetworkPolicy { selector: selector.unwrap_or(everything), ingress, egress }
}

struct Effects {
    ingress: Effect,
    egress: Effect,
}

/// What `policyTypes` says. Without it, the policy is for ingress, and for egress if it has such rules.
fn effects(fields: &Fields<'_>, faults: &mut Faults) -> Effects {
    let types = fields.get("policyTypes");
    let items = match &types {
        None => None,
        Some(types) => match faults.settle(types.items(), "the policy allows its pods nothing, in both directions") {
            None => return Effects { ingress: Effect::Isolation, egress: Effect::Isolation },
            Some(items) => Some(items).filter(|items| items.len() > 0),
        },
    };
    let Some(items) = items else {
        // As API servers fill `policyTypes` in (pkg/apis/networking/v1/defaults.go, `SetDefaults_NetworkPolicy`): only a list
        // with rules counts.
        let has_rules = fields.get("egress").is_some_and(|rules| rules.items().map_or(true, |items| items.len() > 0));
        let egress = if has_rules { Effect::Rules } else { Effect::None };
        return Effects { ingress: Effect::Rules, egress };
    };
    let (mut ingress, mut egress, mut others) = (None, None, Effect::None);
    for item in items {
        match item.text() {
            Ok("Ingress") => ingress = Some(Effect::Rules),
            Ok("Egress") => egress = Some(Effect::Rules),
            other => {
                let unknown = |_| Err(item.fault("a type is Ingress or Egress", "write one of them, or both"));
                let fault = other.and_then(unknown);
                faults.settle::<()>(fault, "in a direction that is not named the policy allows nothing");
                others = Effect::Isolation;
            }
        }
    }
    Effects { ingress: ingress.unwrap_or(others), egress: egress.unwrap_or(others) }
}

struct Reader<'r> {
    namespace: &'r str,
    faults: &'r mut Faults,
}

impl Reader<'_> {
    fn rules(&mut self, fields: &Fields<'_>, direction: Direction) -> Vec<PolicyRule> {
        let (key, peers) = match direction {
            Direction::Ingress => ("ingress", "from"),
            Direction::Egress => ("egress", "to"),
        };
        let Some(spot) = fields.get(key) else { return Vec::new() };
        let Some(rules) = self.faults.settle(spot.items(), &format!("the policy allows no {direction}")) else {
            return Vec::new();
        };
        rules.map(|rule| self.rule(&rule, peers)).collect()
    }

    fn rule(&mut self, rule: &Spot<'_>, peers_key: &'static str) -> PolicyRule {
        let Some(fields) = self.faults.settle(rule.map_of(&[peers_key, "ports"]), "the rule matches nothing") else {
            return PolicyRule { peers: Some(Vec::new()), ports: None };
        };
        let namespace = self.namespace;
        let read_peer = |spot: &Spot<'_>| peer(spot, namespace);
        let peers = self.list(fields.get(peers_key), read_peer, "the peer is left out and matches nothing");
        let ports = self.list(fields.get("ports"), port, "the port is left out and matches nothing");
        PolicyRule { peers, ports }
    }

    /// None given is everything, and so is an empty list. A list of which nothing is understood is not empty.
    fn list<T>(
        &mut self,
        spot: Option<Spot<'_>>,
        read: impl Fn(&Spot<'_>) -> Result<T, Fault>,
        left_out: &str,
    ) -> Option<Vec<T>> {
        let spot = spot?;
        let Some(items) = self.faults.settle(spot.items(), "the rule matches nothing") else {
            return Some(Vec::new());
        };
        if items.len() == 0 {
            return None;
        }
        Some(items.filter_map(|item| self.faults.settle(read(&item), left_out)).collect())
    }
}

fn peer(spot: &Spot<'_>, namespace: &str) -> Result<Peer, Fault> {
    let fields = spot.map_of(&["podSelector", "namespaceSelector", "ipBlock"])?;
    match (fields.get("ipBlock"), fields.get("podSelector"), fields.get("namespaceSelector")) {
        (Some(given), None, None) => block(&given),
        (Some(_), ..) => {
            let reason = "ipBlock stands for addresses, and allows no selector beside it";
            Err(spot.fault(reason, "write two peers, or remove one of the keys"))
        }
        (None, None, None) => {
            let reason = "a peer has one of ipBlock, podSelector and namespaceSelector, or both selectors";
            Err(spot.fault(reason, "write one of them; {} selects everything"))
        }
        (None, pods, namespaces) => Ok(Peer::Pods {
            namespaces: match namespaces {
                Some(given) => NamespaceChoice::Selected(selector(&given)?),
                None => NamespaceChoice::Named(namespace.to_owned()),
            },
            pods: pods.map_or_else(|| Ok(LabelSelector::default()), |given| selector(&given))?,
        }),
    }
}

fn block(spot: &Spot<'_>) -> Result<Peer, Fault> {
    let fields = spot.map_of(&["cidr", "except"])?;
    let whole = cidr(&fields.required("cidr")?)?;
    let mut except = BTreeSet::new();
    if let Some(given) = fields.get("except") {
        for item in given.items()? {
            let part = cidr(&item)?;
            if !whole.covers(&part) || part == whole {
                let reason = format!("it does not lie within {whole}, or is all of it");
                return Err(item.fault(reason, format!("write a part of {whole}, or remove it")));
            }
            except.insert(part);
        }
    }
    Ok(Peer::Block { cidr: whole, except })
}

fn port(spot: &Spot<'_>) -> Result<PortMatch, Fault> {
    let fields = spot.map_of(&["protocol", "port", "endPort"])?;
    let protocol = match fields.get("protocol") {
        None => Protocol::default(),
        Some(given) => {
            let text = given.text()?;
            let found = Protocol::ALL.into_iter().find(|protocol| protocol.to_string() == text);
            found.ok_or_else(|| given.fault("a protocol is one of TCP, UDP, SCTP", "write one of them"))?
        }
    };
    let end = fields.get("endPort");
    match (fields.get("port"), end) {
        (None, None) => Ok(PortMatch::All(protocol)),
        (Some(first), None) if first.is_text() => Ok(PortMatch::Named(Some(protocol), port_name(&first)?)),
        (Some(first), Some(end)) if !first.is_text() => {
            let (first, last) = (port_number(&first)?, port_number(&end)?);
            if last < first {
                return Err(end.fault(format!("the range begins at {first}"), "write a number that is not lower"));
            }
            Ok(PortMatch::Range(protocol, first, last))
        }
        (Some(first), None) => {
            let number = port_number(&first)?;
            Ok(PortMatch::Range(protocol, number, number))
        }
        (_, Some(end)) => {
            Err(end.fault("a range begins with a port that is a number", "write port as a number, or remove endPort"))
        }
    }
}
