//! A trace's view of the real kernel: the path of connections through the sets that the kernel holds.

// clippy.toml allows this in test functions; what they call belongs to the test as well.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;

use husk_dataplane::linux::Linux;
use husk_dataplane::netns::Netns;
use husk_dataplane::policy::lookup;
use husk_dataplane::reconcile::reconcile_policy;
use husk_overlay::endpoint::Endpoint;
use husk_overlay::kernel::Desired;
use husk_overlay::prefix::Family;
use husk_policy::cluster::{Cluster, Membership, Quarantine};
use husk_policy::compile::compile;
use husk_policy::compile::path::follow;
use husk_policy::object::{Direction, NetworkPolicy, ObjectName, Objects, Peer, PolicyRule, PortMatch, Protocol};
use husk_policy::selector::LabelSelector;
use husk_policy::verdict::{Connection, verdict};

/// A pod to which others of its network may talk at some ports, and which may talk to nobody but them.
fn cluster() -> Cluster {
    let block = |cidr: &str, except: &[&str]| Peer::Block {
        cidr: cidr.parse().unwrap(),
        except: except.iter().map(|it| it.parse().unwrap()).collect(),
    };
    let peers = vec![block("10.0.0.0/24", &["10.0.0.128/25"]), block("fd42::/64", &[])];
    let ports = vec![PortMatch::Range(Protocol::Tcp, 80, 90), PortMatch::All(Protocol::Sctp)];
    let rule = |ports| PolicyRule { peers: Some(peers.clone()), ports };
    let policy = NetworkPolicy {
        selector: LabelSelector::default(),
        ingress: Some(vec![rule(Some(ports))]),
        egress: Some(vec![rule(None)]),
    };
    let objects =
        Objects { network_policies: [(ObjectName::new("shop", "db"), Arc::new(policy))].into(), ..Objects::default() };
    let endpoint: Endpoint = serde_json::from_value(serde_json::json!({
        "network": "husk", "containerId": "a", "ifname": "eth0", "podName": "db-0", "podNamespace": "shop",
        "hostInterface": "husk0123456789a", "netns": {"path": "/run/netns/a", "device": 4, "inode": 7},
        "addresses": {"ipv4": "10.0.0.1", "ipv6": "fd42::1"}, "podMac": "02:00:00:00:00:01",
    }))
    .unwrap();
    let endpoints = [(endpoint.id.clone(), endpoint)].into();
    Cluster::new(Arc::new(objects), &endpoints, Membership::Optional, &Quarantine::default())
}

#[test]
fn the_path_through_the_kernels_sets_comes_to_the_verdict_of_policy() {
    let world = || {
        let cluster = cluster();
        let table = Arc::new(compile(&cluster, &Family::ALL.into()));
        let desired = Desired { policy: Some(Arc::clone(&table)), ..Desired::default() };
        let mut kernel = Linux::open(Path::new("/nowhere")).unwrap();
        let outcome = reconcile_policy(&mut kernel, &desired);
        assert!(outcome.is_clean(), "{:?}", outcome.failures);
        let (mut allowed, mut denied) = (0, 0);
        let pods = ["10.0.0.1", "fd42::1"];
        let others =
            [&["10.0.0.1", "10.0.0.7", "10.0.0.128", "192.0.2.1"], &["fd42::1", "fd42::7", "2001:db8::1", "::1"]];
        for (pod, others) in pods.into_iter().zip(others) {
            for (other, direction) in others.iter().flat_map(|other| Direction::ALL.map(|it| (*other, it))) {
                let (originator, responder) = match direction {
                    Direction::Egress => (pod, other),
                    Direction::Ingress => (other, pod),
                };
                for (protocol, port) in [(6, 79), (6, 80), (6, 90), (6, 91), (17, 80), (132, 5), (1, 0), (58, 0)] {
                    let (originator, responder) = (originator.parse().unwrap(), responder.parse().unwrap());
                    let connection = Connection { originator, responder, protocol, port };
                    let ask = |set: &str, key| lookup(set, &key).map(|found| found.map(|(_, value)| value));
                    let path = follow(&table, &connection, direction, ask).unwrap();
                    let sides = verdict(&cluster, &connection).sides;
                    let expected = sides.iter().find(|side| side.direction == direction).unwrap().verdict;
                    assert_eq!(path.verdict(), expected, "{direction} {connection}: {path:?}");
                    match expected {
                        husk_policy::verdict::Verdict::Allow => allowed += 1,
                        husk_policy::verdict::Verdict::Deny => denied += 1,
                    }
                }
            }
        }
        assert!(allowed > 20 && denied > 20, "{allowed} {denied}");
    };
    Netns::new_unnamed().unwrap().run_in(world).unwrap();
}
