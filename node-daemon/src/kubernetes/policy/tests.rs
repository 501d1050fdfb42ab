use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use husk_overlay::issue::IssueKind;
use kube::core::{ApiResource, DynamicObject};
use serde_json::{Value, json};

use super::objects::{WatchedNamespace, WatchedPod, policy};
use super::*;

fn store() -> (PolicyStore, Arc<AtomicUsize>) {
    let wakes = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&wakes);
    let wake = Box::new(move || {
        count.fetch_add(1, Ordering::SeqCst);
    });
    (PolicyStore::new(wake), wakes)
}

fn list<T>(items: Vec<T>, take: impl Fn(Event<T>)) {
    take(Event::Init);
    items.into_iter().for_each(|item| take(Event::InitApply(item)));
    take(Event::InitDone);
}

fn pod(namespace: &str, name: &str, address: &str) -> (ObjectName, Arc<Pod>) {
    let pod = Pod { addresses: [address.parse().unwrap()].into(), ..Pod::default() };
    (ObjectName::new(namespace, name), Arc::new(pod))
}

fn namespace(name: &str) -> (String, Labels) {
    (name.to_owned(), Labels::new())
}

fn network_policy(name: &str, spec: &Value) -> (ObjectName, Reading) {
    let resource = ApiResource::erase::<k8s_openapi::api::networking::v1::NetworkPolicy>(&());
    // As in a list: without a kind.
    let object = json!({ "metadata": { "namespace": "shop", "name": name, "managedFields": [] }, "spec": spec });
    policy(serde_json::from_value::<DynamicObject>(object).unwrap(), &resource).unwrap()
}

fn cluster_policy(name: &str) -> (String, Reading) {
    let object = read_cluster(name);
    (name.to_owned(), object)
}

fn read_cluster(name: &str) -> Reading {
    husk_policy::read::read(&json!({
        "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy", "metadata": { "name": name },
        "spec": { "tier": "Admin", "priority": 1, "subject": { "namespaces": {} } },
    }))
}

/// A store that has listed a pod, its namespace and a policy.
fn listed() -> (PolicyStore, Arc<AtomicUsize>) {
    let (store, wakes) = store();
    list(vec![pod("shop", "web", "10.0.0.1")], |event| store.pod(event));
    list(vec![namespace("shop")], |event| store.namespace(event));
    list(vec![network_policy("p", &json!({}))], |event| store.network_policy(event));
    list(vec![], |event| store.cluster_policy(event));
    (store, wakes)
}

#[test]
fn there_is_nothing_before_everything_was_listed_or_found_not_to_exist() {
    let (store, _) = store();
    let now = Instant::now();
    let steps: [&dyn Fn(); 4] = [
        &|| list(vec![], |event| store.pod(event)),
        &|| list(vec![], |event| store.namespace(event)),
        &|| list(vec![], |event| store.network_policy(event)),
        &|| assert!(store.no_cluster_policies(now)),
    ];
    for step in steps {
        assert_eq!(store.objects(now), Err(Missing::NotYet));
        step();
    }
    assert_eq!(*store.objects(now).unwrap(), Objects::default());
}

#[test]
fn the_value_is_the_same_until_something_changes_and_only_news_wake() {
    let (store, wakes) = listed();
    let now = Instant::now();
    let first = store.objects(now).unwrap();
    assert_eq!((first.pods.len(), first.namespaces.len(), first.network_policies.len()), (1, 1, 1));
    let before = wakes.load(Ordering::SeqCst);
    store.pod(Event::Apply(pod("shop", "web", "10.0.0.1")));
    list(vec![pod("shop", "web", "10.0.0.1")], |event| store.pod(event));
    store.network_policy(Event::Apply(network_policy("p", &json!({ "policyTypes": ["Ingress"] }))));
    assert!(Arc::ptr_eq(&first, &store.objects(now).unwrap()));
    assert_eq!(wakes.load(Ordering::SeqCst), before);
    store.pod(Event::Apply(pod("shop", "web", "10.0.0.2")));
    let second = store.objects(now).unwrap();
    assert_ne!(first, second);
    assert_eq!(wakes.load(Ordering::SeqCst), before + 1);
    store.network_policy(Event::Delete(network_policy("p", &json!({}))));
    assert!(store.objects(now).unwrap().network_policies.is_empty());
}

#[test]
fn a_pod_is_held_back_until_its_namespace_is_known() {
    let (store, _) = listed();
    let now = Instant::now();
    let before = store.objects(now).unwrap();
    store.pod(Event::Apply(pod("new", "web", "10.0.0.9")));
    assert!(Arc::ptr_eq(&before, &store.objects(now).unwrap()));
    store.namespace(Event::Apply(namespace("new")));
    let pods: Vec<String> = store.objects(now).unwrap().pods.keys().map(ToString::to_string).collect();
    assert_eq!(pods, ["new/web", "shop/web"]);
    store.namespace(Event::Delete(namespace("new")));
    assert_eq!(store.objects(now).unwrap(), before);
}

#[test]
fn a_short_failure_is_nothing_a_long_one_is_told() {
    let (store, wakes) = listed();
    let start = Instant::now();
    store.failed(PolicyKind::Pods, "connection refused".into(), start);
    store.failed(PolicyKind::Pods, "no route".into(), start + TOLERANCE / 2);
    assert!(store.objects(start + TOLERANCE / 2).is_ok());
    assert_eq!(store.objects(start + TOLERANCE), Err(Missing::Failing("no route".into())));
    store.pod(Event::Init);
    assert!(store.objects(start + TOLERANCE).is_err(), "asking is not being answered");
    let before = wakes.load(Ordering::SeqCst);
    store.pod(Event::InitApply(pod("shop", "web", "10.0.0.1")));
    store.pod(Event::InitDone);
    assert!(store.objects(start + TOLERANCE).is_ok());
    assert!(wakes.load(Ordering::SeqCst) > before, "the loop hears that it is back");
    // What was never listed is not merely old.
    let (store, _) = self::store();
    store.failed(PolicyKind::ClusterPolicies, "forbidden".into(), start);
    assert_eq!(store.objects(start), Err(Missing::Failing("forbidden".into())));
}

#[test]
fn cluster_policies_that_are_known_stay_until_their_absence_lasts() {
    let (store, _) = listed();
    let start = Instant::now();
    store.cluster_policy(Event::Apply(cluster_policy("c")));
    assert_eq!(store.objects(start).unwrap().cluster_policies.len(), 1);
    assert!(!store.no_cluster_policies(start));
    assert_eq!(store.objects(start + TOLERANCE / 2).unwrap().cluster_policies.len(), 1);
    assert!(!store.no_cluster_policies(start + TOLERANCE / 2));
    assert!(store.no_cluster_policies(start + TOLERANCE));
    assert!(store.objects(start + TOLERANCE).unwrap().cluster_policies.is_empty());
    // They may come back.
    list(vec![cluster_policy("d")], |event| store.cluster_policy(event));
    assert_eq!(store.objects(start + TOLERANCE).unwrap().cluster_policies.len(), 1);
}

#[test]
fn issues_of_policies_are_among_the_objects() {
    let (store, _) = listed();
    store.network_policy(Event::Apply(network_policy("bad", &json!({ "podSelector": 7 }))));
    let objects = store.objects(Instant::now()).unwrap();
    let told: Vec<(IssueKind, &str)> = objects.issues.iter().map(|it| (it.kind, it.subject.as_str())).collect();
    assert_eq!(told, [(IssueKind::BadPolicy, "NetworkPolicy shop/bad")]);
    assert_eq!(objects.network_policies.len(), 2, "it is closed, and there");
}

#[test]
fn of_pods_and_namespaces_as_they_arrive_what_is_needed_is_kept() {
    let object = json!({
        "metadata": {
            "namespace": "shop", "name": "web", "uid": "u", "resourceVersion": "7", "labels": { "app": "web" },
            "annotations": { "a": "b" }, "managedFields": [{ "manager": "kubelet", "fieldsV1": { "f:status": {} } }],
        },
        "spec": { "nodeName": "a", "containers": [{ "name": "c", "image": "i", "resources": {} }], "tolerations": [] },
        "status": { "phase": "Running", "podIP": "10.0.0.1", "conditions": [] },
    });
    let watched: WatchedPod = serde_json::from_value(object).unwrap();
    let meta = kube::Resource::meta(&watched);
    assert_eq!((meta.resource_version.as_deref(), meta.managed_fields.as_ref()), (Some("7"), None));
    let (name, pod) = watched.kept().unwrap();
    assert_eq!((name, pod.node.as_deref()), (ObjectName::new("shop", "web"), Some("a")));
    assert_eq!((pod.labels.len(), pod.addresses.len(), pod.uids.len()), (1, 1, 1));
    let watched: WatchedNamespace = serde_json::from_value(json!({ "metadata": { "name": "shop" } })).unwrap();
    let name_label = (husk_policy::object::NAMESPACE_NAME_LABEL.to_owned(), "shop".to_owned());
    assert_eq!(watched.kept(), Some(("shop".into(), [name_label].into())));
}

#[test]
fn ten_thousand_pods_are_put_together_quickly() {
    let (store, _) = listed();
    let name = |index: usize| format!("web-{index}");
    let address = |index: usize| format!("10.1.{}.{}", index / 250, index % 250);
    list((0..10_000).map(|index| pod("shop", &name(index), &address(index))).collect(), |event| store.pod(event));
    assert_eq!(store.objects(Instant::now()).unwrap().pods.len(), 10_000);
    store.pod(Event::Apply(pod("shop", "one-more", "10.2.0.1")));
    let start = Instant::now();
    assert_eq!(store.objects(start).unwrap().pods.len(), 10_001);
    let taken = start.elapsed();
    println!("one assembly took {taken:?}");
    // A few milliseconds; a busy machine may take its time.
    assert!(taken < Duration::from_secs(1), "{taken:?}");
}
