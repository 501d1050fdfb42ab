//! The path of a connection through the table, look-up by look-up as the kernel makes them. Whoever has the sets may be asked:
//! the table itself, or the kernel.

use husk_overlay::kernel::policy::{
    PolicyAction, PolicyChain, PolicyClass, PolicyElement, PolicyTable, PolicyValue, PolicyVerdict,
};
use husk_overlay::prefix::Family;
use serde::{Deserialize, Serialize};

use super::{named, services};
use crate::object::Direction;
use crate::verdict::{Connection, Verdict};

/// How the table comes to a verdict on one side of a connection of a pod of this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum Path {
    /// The address is in no set of pods that are known: everything is dropped.
    Unknown,
    /// The pod talks with itself.
    Itself,
    /// The pod has no rules for this direction.
    Free,
    /// The pod's chain has a class for the peer, and the class a verdict at the port.
    Judged {
        /// The chain.
        chain: String,
        /// The class; none if the chain is not as it was compiled.
        class: Option<u32>,
        /// No rule speaks of the peer: the class is that of all others.
        others: bool,
        /// The verdict.
        verdict: Verdict,
    },
}

impl Path {
    /// The verdict at its end.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        match self {
            Self::Unknown => Verdict::Deny,
            Self::Itself | Self::Free => Verdict::Allow,
            Self::Judged { verdict, .. } => *verdict,
        }
    }
}

/// Follows one side of a connection. `table` says what the rules of chains are, `look_up` what a set holds for a key.
///
/// # Errors
/// Those of `look_up`.
pub fn follow<E>(
    table: &PolicyTable,
    connection: &Connection,
    direction: Direction,
    mut look_up: impl FnMut(&str, PolicyElement) -> Result<Option<PolicyValue>, E>,
) -> Result<Path, E> {
    let Connection { originator, responder, protocol, port } = *connection;
    let (own, other) = match direction {
        Direction::Egress => (originator, responder),
        Direction::Ingress => (responder, originator),
    };
    let family = Family::of(own);
    if look_up(&named("known", family), PolicyElement::Address(own))?.is_none() {
        return Ok(Path::Unknown);
    }
    let pair = PolicyElement::AddressPair(originator, responder);
    if originator == responder && look_up(&named("itself", family), pair)?.is_some() {
        return Ok(Path::Itself);
    }
    let attached = look_up(&named(direction, family), PolicyElement::Address(own))?;
    let Some(PolicyValue::Verdict(PolicyVerdict::Jump(chain))) = attached else { return Ok(Path::Free) };
    let others = table.chains.get(&chain).and_then(|chain| class_of_others(chain));
    let of_peer = match look_up(&named(&chain, family), PolicyElement::Address(other))? {
        Some(PolicyValue::Class(class)) => Some(class),
        _ => None,
    };
    // As the chain does: what has no verdict for one class goes on to the next, and at the end it is denied.
    for (class, is_others) in of_peer.map(|class| (class, false)).into_iter().chain(others.map(|class| (class, true))) {
        let key = PolicyElement::ClassAndService { class, protocols: (protocol, protocol), ports: (port, port) };
        let verdict = match look_up(&services(direction), key)? {
            Some(PolicyValue::Verdict(PolicyVerdict::Return | PolicyVerdict::Accept)) => Verdict::Allow,
            Some(_) => Verdict::Deny,
            None => continue,
        };
        return Ok(Path::Judged { chain: chain.to_string(), class: Some(class), others: is_others, verdict });
    }
    Ok(Path::Judged { chain: chain.to_string(), class: of_peer, others: of_peer.is_none(), verdict: Verdict::Deny })
}

/// The class that a chain has for peers that its map does not know.
fn class_of_others(chain: &PolicyChain) -> Option<u32> {
    chain.rules.iter().find_map(|rule| match &rule.action {
        PolicyAction::Judge { class: PolicyClass::Always(class), .. } => Some(*class),
        _ => None,
    })
}

/// What a set of the table itself holds for a key.
#[must_use]
pub fn look_up(table: &PolicyTable, set: &str, key: PolicyElement) -> Option<PolicyValue> {
    let elements = &table.sets.get(set)?.elements;
    let holds = |element: &PolicyElement| match (*element, key) {
        (PolicyElement::AddressRange(first, last), PolicyElement::Address(address)) => {
            (first..=last).contains(&address)
        }
        (
            PolicyElement::ClassAndService { class, protocols, ports },
            PolicyElement::ClassAndService { class: wanted, protocols: (protocol, _), ports: (port, _) },
        ) => class == wanted && (protocols.0..=protocols.1).contains(&protocol) && (ports.0..=ports.1).contains(&port),
        (element, key) => element == key,
    };
    elements.iter().find(|(element, _)| holds(element)).map(|(_, value)| value.clone())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::convert::Infallible;
    use std::sync::Arc;

    use super::*;
    use crate::cluster::{Cluster, Membership, Quarantine};
    use crate::compile::compile;
    use crate::object::{NetworkPolicy, ObjectName, Objects, Peer, PolicyRule, PortMatch, Protocol};
    use crate::selector::LabelSelector;
    use crate::verdict::verdict;

    /// A pod 10.0.0.1 to which 10.0.0.0/24 may talk at TCP 80 to 90.
    fn cluster() -> Cluster {
        let block = Peer::Block { cidr: "10.0.0.0/24".parse().unwrap(), except: BTreeSet::new() };
        let rule = PolicyRule { peers: Some(vec![block]), ports: Some(vec![PortMatch::Range(Protocol::Tcp, 80, 90)]) };
        let policy = NetworkPolicy { selector: LabelSelector::default(), ingress: Some(vec![rule]), egress: None };
        let objects = Objects {
            network_policies: [(ObjectName::new("default", "p"), Arc::new(policy))].into(),
            ..Objects::default()
        };
        let endpoint = serde_json::from_value::<husk_overlay::endpoint::Endpoint>(serde_json::json!({
            "network": "husk", "containerId": "a", "ifname": "eth0",
            "podName": "a", "podNamespace": "default",
            "hostInterface": "husk0123456789a", "netns": {"path": "/run/netns/a", "device": 4, "inode": 7},
            "addresses": {"ipv4": "10.0.0.1", "ipv6": null}, "podMac": "02:00:00:00:00:01",
        }));
        let endpoint = endpoint.unwrap();
        let endpoints = [(endpoint.id.clone(), endpoint)].into();
        Cluster::new(Arc::new(objects), &endpoints, Membership::Optional, &Quarantine::default())
    }

    #[test]
    fn the_path_comes_to_the_verdict_and_tells_how() {
        let cluster = cluster();
        let table = compile(&cluster, &Family::ALL.into());
        let connection = |originator: &str, responder: &str, protocol, port| Connection {
            originator: originator.parse().unwrap(),
            responder: responder.parse().unwrap(),
            protocol,
            port,
        };
        let path = |connection: &Connection, direction| {
            let ask = |set: &str, key| Ok::<_, Infallible>(look_up(&table, set, key));
            follow(&table, connection, direction, ask).unwrap()
        };
        let cases = [
            (connection("10.0.0.7", "10.0.0.1", 6, 80), Some(false)),
            (connection("10.0.0.7", "10.0.0.1", 6, 91), Some(false)),
            (connection("10.0.0.7", "10.0.0.1", 1, 0), Some(false)),
            (connection("10.0.1.7", "10.0.0.1", 6, 80), Some(true)),
            (connection("10.0.0.1", "10.0.0.1", 6, 1), None),
        ];
        for (connection, expected_others) in cases {
            let path = path(&connection, Direction::Ingress);
            assert_eq!(path.verdict(), verdict(&cluster, &connection).verdict, "{connection}: {path:?}");
            match path {
                Path::Judged { class, others, .. } => assert!(class.is_some() && Some(others) == expected_others),
                other => assert_eq!((other, expected_others), (Path::Itself, None)),
            }
        }
        let out = connection("10.0.0.1", "8.8.8.8", 17, 53);
        assert_eq!(path(&out, Direction::Egress), Path::Free);
        let unknown = connection("10.0.0.9", "8.8.8.8", 17, 53);
        assert_eq!(path(&unknown, Direction::Egress), Path::Unknown);
    }
}
