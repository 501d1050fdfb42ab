use std::collections::BTreeSet;

use super::collect::objects_from;
use super::*;

fn pod(value: Value) -> Pod {
    let Reading { object, issues } = read(&value);
    assert_eq!(issues, []);
    let Some(Object::Pod(_, pod)) = object else { panic!("{object:?}") };
    pod.as_ref().clone()
}

fn minimal(namespace: &str, name: &str) -> Value {
    json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "namespace": namespace, "name": name } })
}

#[test]
fn of_a_pod_what_policy_needs_is_read() {
    let ports =
        |name: &str, port: u16, protocol: Value| json!([{ "name": name, "containerPort": port, "protocol": protocol }]);
    let got = pod(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "namespace": "shop", "name": "web", "uid": "u-1", "labels": { "app": "web" },
            "annotations": { "kubernetes.io/config.mirror": "hash", "kubernetes.io/config.hash": "hash", "x": "y" },
        },
        "spec": {
            "nodeName": "a",
            "containers": [
                { "name": "c", "image": "x", "ports": ports("http", 8080, json!(null)) },
                { "ports": ports("dns", 53, json!("UDP")) }, { "ports": [{ "containerPort": 1 }] }, { "ports": null },
            ],
            "initContainers": [
                { "restartPolicy": "Always", "ports": ports("mesh", 15001, json!("TCP")) },
                { "ports": ports("gone", 1, json!("TCP")) },
            ],
        },
        "status": { "phase": "Running", "podIP": "10.0.0.5", "podIPs": [{ "ip": "10.0.0.5" }, { "ip": "fd00::5" }] },
    }));
    assert_eq!(got.uids, BTreeSet::from(["u-1".into(), "hash".into()]));
    assert_eq!((got.labels, got.node), ([("app".into(), "web".into())].into(), Some("a".into())));
    assert_eq!((got.host_network, got.finished), (false, false));
    assert_eq!(got.addresses, ["10.0.0.5", "fd00::5"].map(|it| it.parse().unwrap()).into());
    let ports: Vec<String> = got.ports.iter().map(|it| format!("{} {} {}", it.name, it.protocol, it.port)).collect();
    assert_eq!(ports, ["dns UDP 53", "http TCP 8080", "mesh TCP 15001"]);
}

#[test]
fn a_pod_may_be_on_the_host_or_finished_or_next_to_nothing() {
    assert_eq!(pod(minimal("a", "b")), Pod::default());
    let nothing = json!({ "labels": null, "name": "b", "annotations": null });
    let nulls = json!({ "apiVersion": "v1", "kind": "Pod", "metadata": nothing, "spec": null, "status": null });
    assert_eq!(pod(nulls.clone()), Pod::default());
    assert!(matches!(read(&nulls).object, Some(Object::Pod(name, _)) if name == ObjectName::new("default", "b")));
    let mut host = minimal("a", "b");
    host["spec"] = json!({ "hostNetwork": true });
    assert!(pod(host).host_network);
    for (phase, finished) in [("Pending", false), ("Running", false), ("Succeeded", true), ("Failed", true)] {
        let mut ended = minimal("a", "b");
        ended["status"] = json!({ "phase": phase, "podIP": "::ffff:10.0.0.1" });
        let ended = pod(ended);
        assert_eq!(ended.finished, finished);
        assert_eq!(ended.addresses, ["10.0.0.1".parse().unwrap()].into());
    }
}

#[test]
fn a_namespace_has_its_name_as_a_label_whatever_it_says() {
    for labels in [json!(null), json!({}), json!({ "kubernetes.io/metadata.name": "other" })] {
        let object =
            json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "shop", "labels": labels } });
        let expected = Object::Namespace("shop".into(), [(NAMESPACE_NAME_LABEL.into(), "shop".into())].into());
        assert_eq!(read(&object), Reading { object: Some(expected), issues: vec![] });
    }
}

#[test]
fn what_has_no_name_or_makes_no_sense_is_left_out_and_told() {
    let mut bad_label = minimal("a", "b");
    bad_label["metadata"]["labels"] = json!({ "app": 1 });
    let namespace =
        json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "n", "labels": { "a": 1 } } });
    let policy = "networking.k8s.io/v1";
    for (object, subject, said) in [
        (json!({ "apiVersion": "v1", "kind": "Pod" }), "Pod", "metadata: null: a map"),
        (json!({ "apiVersion": "v1", "kind": "Pod", "metadata": {} }), "Pod", "metadata.name: the key is missing"),
        (
            json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "" } }),
            "Namespace",
            "metadata.name: \"\"",
        ),
        (minimal("", "x"), "Pod", "metadata.namespace: \"\""),
        (bad_label, "Pod a/b", "it cannot be read: invalid type: integer"),
        (namespace, "Namespace n", "metadata.labels.a: 1: text"),
        (
            json!({ "apiVersion": policy, "kind": "NetworkPolicy", "metadata": { "name": 1 } }),
            "NetworkPolicy",
            "metadata.name: 1",
        ),
        (
            json!({ "apiVersion": "networking.k8s.io/v2", "kind": "NetworkPolicy", "metadata": { "name": "p" } }),
            "NetworkPolicy p",
            "apiVersion",
        ),
    ] {
        let Reading { object: found, issues } = read(&object);
        assert_eq!(found, None, "{object}");
        let [issue] = issues.as_slice() else { panic!("{object}: {issues:#?}") };
        assert_eq!(issue.subject, subject);
        assert!(issue.message.contains(said), "{}", issue.message);
        assert!(issue.message.ends_with("nothing of it is in force"), "{}", issue.message);
    }
}

#[test]
fn objects_of_others_are_nothing() {
    for object in [
        json!(null),
        json!({}),
        json!({ "apiVersion": "v1", "kind": "Secret" }),
        json!({ "apiVersion": "networking.k8s.io/v1", "kind": "Ingress" }),
        json!({ "apiVersion": "example.com/v1", "kind": "NetworkPolicy" }),
        json!({ "apiVersion": "example.com/v1", "kind": "Pod" }),
        json!({ "apiVersion": 1, "kind": "Pod" }),
    ] {
        assert_eq!(read(&object), Reading::default(), "{object}");
    }
}

#[test]
fn readings_are_put_together_in_any_order() {
    let policy = |spec: Value| {
        read(
            &json!({ "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": { "namespace": "shop", "name": "p" }, "spec": spec }),
        )
    };
    let all = [
        read(&minimal("shop", "web")),
        read(&minimal("shop", "web")),
        read(
            &json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "other", "labels": { "t": "x" } } }),
        ),
        policy(json!({ "ingress": [{}] })),
        policy(json!({ "ingress": "x" })),
        policy(json!({ "ingress": [{}] })),
        Reading::default(),
    ];
    let objects = objects_from(&all);
    assert_eq!(objects, objects_from(all.iter().rev()));
    assert_eq!(objects.pods.len(), 1);
    let namespaces: Vec<(&str, usize)> =
        objects.namespaces.iter().map(|(name, labels)| (name.as_str(), labels.len())).collect();
    assert_eq!(namespaces, [("other", 2), ("shop", 1)], "a namespace with pods is there");
    let told: Vec<(IssueKind, &str)> = objects.issues.iter().map(|it| (it.kind, it.subject.as_str())).collect();
    assert_eq!(
        told,
        [(IssueKind::BadManifest, "NetworkPolicy shop/p"), (IssueKind::BadPolicy, "NetworkPolicy shop/p")]
    );
    // `[]` sorts before `[{`.
    assert_eq!(objects.network_policies.values().next().unwrap().ingress, Some(vec![]));
}
