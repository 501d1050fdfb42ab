use super::*;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

fn store(origin: BlockOrigin) -> (Store, Arc<AtomicUsize>) {
    let wakes = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&wakes);
    let wake = Box::new(move || {
        count.fetch_add(1, Ordering::SeqCst);
    });
    (Store::new(NodeName::new("own").unwrap(), origin, wake), wakes)
}

fn block(cidr: &str, node: &str, version: &str) -> (String, Kept) {
    let cidr = cidr.parse().unwrap();
    let read = Ok(manifest::block(cidr, &NodeName::new(node).unwrap()));
    (manifest::block_name(cidr), Kept { uid: "u".into(), version: version.into(), generation: 1, read })
}

fn list(store: &Store, watched: Watched, objects: Vec<(String, Kept)>) {
    store.object(watched, Event::Init);
    objects.into_iter().for_each(|object| store.object(watched, Event::InitApply(object)));
    store.object(watched, Event::InitDone);
}

fn list_nodes(store: &Store, nodes: &[(&str, &[&str])]) {
    store.node(Event::Init);
    for (name, cidrs) in nodes {
        store.node(Event::InitApply(((*name).to_owned(), cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect())));
    }
    store.node(Event::InitDone);
}

fn listed(blocks: Vec<(String, Kept)>) -> (Store, Arc<AtomicUsize>) {
    let (store, wakes) = store(BlockOrigin::Pools);
    list(&store, Watched::Records, Vec::new());
    list(&store, Watched::Pools, Vec::new());
    list_nodes(&store, &[("own", &[])]);
    list(&store, Watched::Blocks, blocks);
    (store, wakes)
}

fn owners(store: &Store) -> Vec<String> {
    let snapshot = store.snapshot(Instant::now()).unwrap();
    snapshot.blocks.iter().map(|(block, node)| format!("{block} {node}")).collect()
}

#[test]
fn there_is_no_snapshot_before_everything_was_listed() {
    let (store, _) = store(BlockOrigin::Pools);
    for watched in [Watched::Records, Watched::Pools, Watched::Blocks] {
        assert_eq!(store.snapshot(Instant::now()), Err(Missing::NotYet));
        list(&store, watched, Vec::new());
    }
    // Half a list is none.
    store.node(Event::Init);
    store.node(Event::InitApply(("own".into(), Vec::new())));
    assert_eq!(store.snapshot(Instant::now()), Err(Missing::NotYet));
    store.node(Event::InitDone);
    assert_eq!(store.snapshot(Instant::now()).unwrap(), Snapshot::default());
}

#[test]
fn what_a_new_list_lacks_is_gone_and_nothing_is_missing_while_it_arrives() {
    let (store, _) = listed(vec![block("10.42.0.0/26", "a", "1"), block("10.42.0.64/26", "b", "1")]);
    assert_eq!(owners(&store), ["10.42.0.0/26 a", "10.42.0.64/26 b"]);
    store.object(Watched::Blocks, Event::Init);
    assert_eq!(owners(&store).len(), 2);
    store.object(Watched::Blocks, Event::InitApply(block("10.42.0.64/26", "c", "2")));
    assert_eq!(owners(&store), ["10.42.0.0/26 a", "10.42.0.64/26 b"]);
    store.object(Watched::Blocks, Event::InitDone);
    assert_eq!(owners(&store), ["10.42.0.64/26 c"]);
    store.object(Watched::Blocks, Event::Delete(block("10.42.0.64/26", "c", "2")));
    assert!(owners(&store).is_empty());
}

#[test]
fn only_news_wake() {
    let (store, wakes) = listed(vec![block("10.42.0.0/26", "a", "1")]);
    let before = wakes.load(Ordering::SeqCst);
    list(&store, Watched::Blocks, vec![block("10.42.0.0/26", "a", "1")]);
    store.object(Watched::Blocks, Event::Apply(block("10.42.0.0/26", "a", "1")));
    assert_eq!(wakes.load(Ordering::SeqCst), before);
    store.object(Watched::Blocks, Event::Apply(block("10.42.0.64/26", "a", "2")));
    assert_eq!(wakes.load(Ordering::SeqCst), before + 1);
}

#[test]
fn a_short_failure_is_nothing_a_long_one_makes_the_source_unavailable() {
    let (store, wakes) = listed(Vec::new());
    let start = Instant::now();
    store.failed(Watched::Blocks, "connection refused".into(), start);
    store.failed(Watched::Blocks, "no route".into(), start + TOLERANCE / 2);
    assert!(store.snapshot(start + TOLERANCE / 2).is_ok());
    let failing = Err(Missing::Failing("no route".into()));
    assert_eq!(store.snapshot(start + TOLERANCE), failing, "the time counts from the first failure");
    store.object(Watched::Blocks, Event::Init);
    assert_eq!(store.snapshot(start + TOLERANCE), failing, "asking is not being answered");
    let before = wakes.load(Ordering::SeqCst);
    store.object(Watched::Blocks, Event::InitDone);
    assert!(store.snapshot(start + TOLERANCE).is_ok());
    assert_eq!(wakes.load(Ordering::SeqCst), before + 1, "the loop hears that it is back");
}

#[test]
fn a_failure_before_the_first_list_is_told_at_once() {
    let (store, _) = store(BlockOrigin::NodeCidrs);
    store.failed(Watched::Records, "forbidden".into(), Instant::now());
    assert_eq!(store.snapshot(Instant::now()), Err(Missing::Failing("forbidden".into())));
}

#[test]
fn cidrs_of_nodes_are_blocks_where_kubernetes_allocates_them() {
    let (store, _) = store(BlockOrigin::NodeCidrs);
    list(&store, Watched::Records, Vec::new());
    list_nodes(&store, &[("own", &["10.244.0.0/24", "fd00:244::/64"]), ("b", &["10.244.1.0/24"]), ("c", &[])]);
    assert_eq!(owners(&store), ["10.244.0.0/24 own", "10.244.1.0/24 b", "fd00:244::/64 own"]);
}

#[test]
fn a_missing_node_object_is_an_issue() {
    let (store, _) = listed(Vec::new());
    list_nodes(&store, &[]);
    let issues = store.snapshot(Instant::now()).unwrap().issues;
    assert_eq!(issues.iter().map(|issue| issue.kind).collect::<Vec<_>>(), [IssueKind::NodeMissing]);
    assert!(store.own_node_is_missing());
}

#[test]
fn what_nodes_own_is_told_by_owner_and_never_the_own() {
    let (store, _) = listed(vec![block("10.42.0.0/26", "own", "1"), block("10.42.0.64/26", "b", "1")]);
    let all = store.belongings();
    let told: Vec<(&str, &str)> = all.iter().map(|(node, _, name, _)| (node.as_str(), name.as_str())).collect();
    assert_eq!(told, [("b", "10.42.0.64-26")]);
}

/// A record of which nothing but the content ever changed, so that its generation is its version.
fn record(name: &str, blocks: &[&str], version: &str) -> (String, Kept) {
    let json = serde_json::json!({
        "apiVersion": "husk.dev/v1alpha1", "kind": "OverlayNode",
        "metadata": { "name": name, "creationTimestamp": "2026-11-28T08:00:00Z" },
        "spec": {
            "instance": "0123456789abcdef", "addresses": { "ipv4": "192.0.2.1" }, "underlayMtu": 1500, "blocks": blocks,
            "router": {},
        },
    });
    let read = manifest::from_json(name, &json).map(|manifest| manifest.expect("it is of our group"));
    (name.to_owned(), Kept { uid: "u".into(), version: version.into(), generation: version.parse().unwrap(), read })
}

fn told(store: &Store, now: Instant) -> Vec<String> {
    let snapshot = store.snapshot(now).unwrap();
    let blocks = snapshot.blocks.iter().map(|(block, node)| format!("{block} {node}"));
    let records = snapshot.nodes.values().map(|it| format!("{} {:?}", it.name, it.blocks.iter().collect::<Vec<_>>()));
    blocks.chain(records).collect()
}

const LATER: Duration = Duration::from_secs(60);

/// A store that knows two other nodes and itself, when its watches fail.
fn failing(start: Instant) -> Store {
    let (first, second) = ("10.42.0.0/26", "10.42.0.64/26");
    let (store, _) = listed(vec![block(first, "a", "1"), block(second, "a", "5"), block("10.42.1.0/26", "own", "2")]);
    list(&store, Watched::Records, vec![record("a", &[first, second], "6"), record("own", &["10.42.1.0/26"], "3")]);
    store.failed(Watched::Blocks, "gone".into(), start);
    store.failed(Watched::Records, "gone".into(), start);
    store
}

#[test]
fn what_a_restored_server_has_forgotten_of_others_counts_until_they_could_say_it_again() {
    let start = Instant::now();
    let store = failing(start);
    let before = told(&store, start);
    // The first block of each only, in the state that was; of the own node nothing.
    list(&store, Watched::Blocks, vec![block("10.42.0.0/26", "a", "1")]);
    list(&store, Watched::Records, vec![record("a", &["10.42.0.0/26"], "2")]);
    let others = |told: &[String]| told.iter().filter(|it| !it.contains("own")).cloned().collect::<Vec<_>>();
    assert_eq!(told(&store, start), others(&before));
    assert_eq!(told(&store, start + LATER / 2), others(&before));
    // A failure meanwhile changes nothing but the time.
    let again = start + LATER / 2;
    store.failed(Watched::Records, "gone".into(), again);
    list(&store, Watched::Records, vec![record("a", &["10.42.0.0/26"], "2")]);
    assert_eq!(told(&store, again), others(&before));
    assert_eq!(told(&store, again + LATER), ["10.42.0.0/26 a", "a [10.42.0.0/26]"]);
}

/// The node that hears the API again tells of itself at once, as that it is ready, and of its blocks a moment later.
#[test]
fn a_status_is_no_news_of_a_record_in_an_older_state() {
    let start = Instant::now();
    let store = failing(start);
    let before = told(&store, start);
    let others = |told: &[String]| told.iter().filter(|it| !it.contains("own")).cloned().collect::<Vec<_>>();
    let stale = |version: &str| {
        let (name, mut kept) = record("a", &["10.42.0.0/26"], "2");
        kept.version = version.to_owned();
        (name, kept)
    };
    list(&store, Watched::Blocks, vec![block("10.42.0.0/26", "a", "1")]);
    list(&store, Watched::Records, vec![stale("2")]);
    store.object(Watched::Records, Event::Apply(stale("9")));
    assert_eq!(told(&store, start), others(&before));
    // Neither is it in a list that comes later.
    list(&store, Watched::Records, vec![stale("10")]);
    assert_eq!(told(&store, start), others(&before));
    store.object(Watched::Records, Event::Apply(record("a", &["10.42.0.64/26"], "3")));
    assert_eq!(told(&store, start), ["10.42.0.0/26 a", "10.42.0.64/26 a", "a [10.42.0.64/26]"]);
}

#[test]
fn a_node_whose_address_another_one_has_by_now_is_no_past() {
    let start = Instant::now();
    let store = failing(start);
    list(&store, Watched::Blocks, Vec::new());
    // All records of these tests have one address.
    list(&store, Watched::Records, vec![record("b", &[], "9")]);
    assert_eq!(told(&store, start), ["b []"]);
}

#[test]
fn news_and_what_others_have_by_now_end_the_past_at_once() {
    let start = Instant::now();
    let store = failing(start);
    // A newer record, one block fewer, and another owner of the other.
    list(&store, Watched::Blocks, vec![block("10.42.0.64/26", "b", "7")]);
    list(&store, Watched::Records, vec![record("a", &["10.42.0.0/26"], "8")]);
    assert_eq!(told(&store, start), ["10.42.0.0/26 a", "10.42.0.64/26 b", "a [10.42.0.0/26]"]);
    // Whatever is told after the lists counts, also with a lower version.
    store.object(Watched::Records, Event::Apply(record("a", &[], "4")));
    assert_eq!(told(&store, start), ["10.42.0.64/26 b", "a []"]);
    store.object(Watched::Records, Event::Delete(record("a", &[], "4")));
    assert_eq!(told(&store, start), ["10.42.0.64/26 b"]);
}

#[test]
fn a_node_without_its_object_keeps_its_cidrs_unless_another_has_them() {
    let (store, _) = store(BlockOrigin::NodeCidrs);
    let record = |name: &str, block: &str| {
        let record = serde_json::json!({
            "apiVersion": "husk.dev/v1alpha1", "kind": "OverlayNode",
            "metadata": { "name": name, "creationTimestamp": "2026-11-28T08:00:00Z" },
            "spec": { "instance": "0123456789abcdef", "underlayMtu": 1500, "blocks": [block] },
        });
        let read = manifest::from_json(name, &record).map(|manifest| manifest.expect("a record"));
        (name.to_owned(), Kept { uid: "u".into(), version: "1".into(), generation: 1, read })
    };
    list(&store, Watched::Records, vec![record("b", "10.244.1.0/24"), record("c", "10.244.2.0/24")]);
    list_nodes(&store, &[("own", &["10.244.0.0/24"]), ("b", &["10.244.1.0/24"]), ("c", &["10.244.2.0/24"])]);
    store.node(Event::Delete(("b".into(), Vec::new())));
    store.node(Event::Delete(("c".into(), Vec::new())));
    assert_eq!(owners(&store), ["10.244.0.0/24 own", "10.244.1.0/24 b", "10.244.2.0/24 c"]);
    store.node(Event::Apply(("d".into(), vec!["10.244.2.0/24".parse().unwrap()])));
    assert_eq!(owners(&store), ["10.244.0.0/24 own", "10.244.1.0/24 b", "10.244.2.0/24 d"]);
    store.object(Watched::Records, Event::Delete(record("b", "10.244.1.0/24")));
    assert_eq!(owners(&store), ["10.244.0.0/24 own", "10.244.2.0/24 d"]);
}
