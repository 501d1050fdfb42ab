mod closed;
mod cluster;
mod network;
mod objects;

use husk_overlay::issue::{IssueKind, Severity};
use serde_json::json;

use super::*;
use crate::object::{NamespaceChoice, Peer, PortMatch};

fn network_policy(spec: Value) -> (NetworkPolicy, Vec<Issue>) {
    let object = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": { "namespace": "shop", "name": "p" }, "spec": spec,
    });
    let Reading { object, issues } = read(&object);
    let Some(Object::NetworkPolicy(name, policy)) = object else { panic!("{object:?}") };
    assert_eq!(name, ObjectName::new("shop", "p"));
    for issue in &issues {
        assert_eq!((issue.kind, issue.severity), (IssueKind::BadPolicy, Severity::Error));
        assert_eq!(issue.subject, "NetworkPolicy shop/p");
        assert!(!issue.remedy.is_empty(), "{issue:?}");
    }
    (policy.as_ref().clone(), issues)
}

fn cluster_policy(spec: Value) -> (ClusterNetworkPolicy, Vec<Issue>) {
    let object = json!({
        "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy",
        "metadata": { "name": "c" }, "spec": spec,
    });
    let Reading { object, issues } = read(&object);
    let Some(Object::ClusterNetworkPolicy(name, policy)) = object else { panic!("{object:?}") };
    assert_eq!(name, "c");
    assert!(issues.iter().all(|issue| issue.subject == "ClusterNetworkPolicy c" && !issue.remedy.is_empty()));
    (policy.as_ref().clone(), issues)
}

/// Peers and ports, short.
fn shown(rule: &crate::object::PolicyRule) -> String {
    let peers = rule.peers.as_ref().map_or("everybody".to_owned(), |peers| {
        let all: Vec<String> = peers.iter().map(peer).collect();
        format!("[{}]", all.join("; "))
    });
    let ports = rule.ports.as_ref().map_or("everything".to_owned(), |ports| {
        let all: Vec<String> = ports.iter().map(port).collect();
        format!("[{}]", all.join("; "))
    });
    format!("{peers} {ports}")
}

fn peer(peer: &Peer) -> String {
    match peer {
        Peer::Pods { namespaces: NamespaceChoice::Named(name), pods } => format!("{pods} in {name}"),
        Peer::Pods { namespaces: NamespaceChoice::Selected(selector), pods } => format!("{pods} in <{selector}>"),
        Peer::Block { cidr, except } if except.is_empty() => cidr.to_string(),
        Peer::Block { cidr, except } => format!("{cidr} but {except:?}"),
    }
}

fn port(port: &PortMatch) -> String {
    match port {
        PortMatch::All(protocol) => protocol.to_string(),
        PortMatch::Range(protocol, first, last) if first == last => format!("{protocol} {first}"),
        PortMatch::Range(protocol, first, last) => format!("{protocol} {first}-{last}"),
        PortMatch::Named(Some(protocol), name) => format!("{protocol} {name}"),
        PortMatch::Named(None, name) => name.clone(),
    }
}
