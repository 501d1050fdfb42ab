//! Blocks out of pools in a real Kubernetes: who gets which, what becomes of pods when there is none left, and how a block comes
//! back from a node that does not need it any more, or is gone.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_tests::kubernetes::{Kubernetes, KubernetesPod, husk_image, render, step};
use husk_tests::probe::Echo;
use husk_tests::{Family, Prefix, eventually};
use serde_json::{Value, json};

/// How long a change may take until every node has it.
const SOON: Duration = Duration::from_secs(30);

/// How long a pod that failed may take to be tried again: the kubelet's pause between two attempts, and the attempt.
const ANOTHER_ATTEMPT: Duration = Duration::from_secs(60);

/// How long a daemon may take to look at the pools: it does so every half minute or so.
const NEXT_LOOK: Duration = Duration::from_secs(75);

/// How long a node has to be gone, as the configuration says, before it counts as gone; and how long it may take beyond that
/// until some daemon has found it missing and removed what it left.
const RELEASE_AFTER: Duration = Duration::from_secs(10);
const DISCOVERY: Duration = Duration::from_secs(60);

/// Blocks of four addresses: three for pods in a node's first one, whose first address is the node's own.
const PER_BLOCK: usize = 4;

/// Pods that a first block has room for.
const PER_FIRST_BLOCK: usize = PER_BLOCK - 1;

/// What is done, and the doing.
type Step = (&'static str, fn(&mut Bench) -> Result<()>);

/// Steps that share a cluster, since each goes on from the blocks that the one before left.
const STEPS: [Step; 4] = [
    ("nodes that start at once take different blocks", nodes_take_different_blocks),
    ("an exhausted pool is told of everywhere and another one ends it", an_exhausted_pool_is_told_of),
    ("a block that is not needed goes back and another node takes it", a_spare_block_changes_hands),
    ("what a node that is gone for good had is used by others", a_gone_node_leaves_its_blocks),
];

#[test]
fn blocks_out_of_pools() -> Result<()> {
    let kubernetes = Kubernetes::builder().nodes(3).without_node_cidrs().start()?;
    let mut bench = Bench { kubernetes, pods: Vec::new() };
    let done = STEPS.into_iter().try_for_each(|(name, work)| step(name, || work(&mut bench)));
    bench.kubernetes.with_logs(done)
}

struct Bench {
    kubernetes: Kubernetes,
    /// One on each node, in the nodes' order, to the end.
    pods: Vec<KubernetesPod>,
}

impl Bench {
    fn blocks_of(&self, number: usize) -> Result<BTreeSet<Prefix>> {
        let name = format!("host{number}");
        Ok(self
            .kubernetes
            .block_owners()?
            .into_iter()
            .filter(|(_, owner)| *owner == name)
            .map(|(block, _)| block)
            .collect())
    }

    /// Has pods made, all at once, and waits for none of them.
    fn request(&self, name: &str, node: usize, count: usize) -> Result<Vec<String>> {
        let names: Vec<String> = (1..=count).map(|number| format!("{name}{number}")).collect();
        names.iter().try_for_each(|it| self.kubernetes.pod(it, node).label("group", name).create())?;
        Ok(names)
    }

    fn find(&self, names: &[String]) -> Result<Vec<KubernetesPod>> {
        names.iter().map(|name| self.kubernetes.find_pod("default", name)).collect()
    }

    /// The names of those pods of a group that have an address, and of those that wait for one.
    fn running_and_waiting(&self, group: &str) -> Result<(Vec<String>, Vec<String>)> {
        let selector = format!("group={group}");
        let pods = self.kubernetes.admin().json(["get", "pods", "--selector", &selector])?;
        let (mut running, mut waiting) = (Vec::new(), Vec::new());
        for pod in pods["items"].as_array().into_iter().flatten() {
            let name = pod["metadata"]["name"].as_str().unwrap_or_default().to_owned();
            let state = &pod["status"]["containerStatuses"][0]["state"];
            if state["running"].is_object() {
                running.push(name);
            } else if state["waiting"]["reason"] == "ContainerCreating" {
                waiting.push(name);
            }
        }
        Ok((running, waiting))
    }

    fn wait_for_waiting(&self, group: &str, running: usize, waiting: usize) -> Result<Vec<String>> {
        let mut seen = (Vec::new(), Vec::new());
        eventually(&format!("{running} pods to run and {waiting} to wait"), SOON * 2, || {
            seen = self.running_and_waiting(group)?;
            Ok((seen.0.len(), seen.1.len()) == (running, waiting))
        })
        .with_context(|| format!("running and waiting: {seen:?}; blocks: {:?}", self.kubernetes.block_owners()))?;
        Ok(seen.1)
    }

    /// Some event of an object, in words.
    fn wait_for_event(&self, kind: &str, object: &str, reason: &str) -> Result<String> {
        let mut message = None;
        eventually(&format!("an event {reason} of {kind} {object}"), SOON, || {
            let events = self.kubernetes.admin().list("events")?;
            let about = |event: &&Value| {
                let of = &event["involvedObject"];
                of["kind"] == kind && of["name"] == object && event["reason"] == reason
            };
            message = events.iter().rfind(about).and_then(|event| event["message"].as_str().map(str::to_owned));
            Ok(message.is_some())
        })?;
        Ok(message.unwrap_or_default())
    }
}

fn pool(name: &str, cidr: &str) -> String {
    json!({
        "apiVersion": "husk.dev/v1alpha1", "kind": "AddressPool", "metadata": { "name": name },
        "spec": { "cidr": cidr, "blockLength": 30 },
    })
    .to_string()
}

fn address(pod: &KubernetesPod) -> Result<IpAddr> {
    pod.address(Family::Ipv4)
}

fn await_answer(from: &KubernetesPod, to: &KubernetesPod) -> Result<()> {
    let echo = Echo::to(address(to)?).limit(Duration::from_millis(500));
    eventually(&format!("{} to reach {}", from.name(), to.name()), SOON, || Ok(echo.run(from.netns())?.arrived()))
}

fn nodes_take_different_blocks(bench: &mut Bench) -> Result<()> {
    let settings = "ipam: {blocks: pools}";
    let manifests = render("pools")?;
    ensure!(manifests.contains(settings), "the overlay's configuration is another by now");
    let seconds = RELEASE_AFTER.as_secs();
    let manifests =
        manifests.replace(settings, &format!("ipam: {{blocks: pools, releaseAfter: {seconds}, coolDown: 0}}"));
    bench.kubernetes.import_image(&husk_image()?)?;
    // Four blocks for three nodes, there before the first daemon asks.
    bench.kubernetes.install_manifests(&format!("{manifests}\n---\n{}\n", pool("first", "10.244.100.0/28")))?;
    let owners = bench.kubernetes.block_owners()?;
    let nodes: BTreeSet<&String> = owners.values().collect();
    ensure!(owners.len() == 3 && nodes.len() == 3, "{owners:?}");
    let shown = bench.kubernetes.kubectl(["get", "addressblocks"])?;
    let rows: Vec<Vec<&str>> = shown.lines().map(|line| line.split_whitespace().collect()).collect();
    ensure!(rows[0] == ["NAME", "CIDR", "NODE", "AGE"], "{shown}");
    for (block, node) in &owners {
        let cidr = block.to_string();
        let row = [cidr.replace('/', "-"), cidr, node.clone()];
        ensure!(
            rows.iter().any(|it| it.starts_with(&row.each_ref().map(String::as_str))),
            "{row:?} is not in\n{shown}"
        );
    }
    for node in bench.kubernetes.nodes() {
        let status = node.host().huskctl_json(["status"])?;
        let own: Vec<String> =
            owners.iter().filter(|(_, owner)| *owner == node.name()).map(|it| it.0.to_string()).collect();
        ensure!(status["blocks"] == json!(own) && status["issues"] == json!([]), "{own:?}: {status:#}");
    }
    for number in 1..=3 {
        let pod = bench.kubernetes.pod(&format!("stay{number}"), number).add()?;
        bench.pods.push(pod);
    }
    let [one, two, three] = bench.pods.as_slice() else { unreachable!("there are three pods") };
    [(one, two), (two, three), (three, one)].into_iter().try_for_each(|(from, to)| await_answer(from, to))
}

fn an_exhausted_pool_is_told_of(bench: &mut Bench) -> Result<()> {
    // With the pod that is there: room for one first block and the only other one.
    let (room, more) = (PER_FIRST_BLOCK - 1 + PER_BLOCK, 2);
    bench.request("burst", 1, room + more)?;
    let waiting = bench.wait_for_waiting("burst", room, more)?;
    ensure!(
        bench.kubernetes.block_owners()?.len() == 4 && bench.blocks_of(1)?.len() == 2,
        "{:?}",
        bench.kubernetes.block_owners()
    );

    let told = bench.wait_for_event("Pod", &waiting[0], "FailedCreatePodSandBox")?;
    eprintln!("the pod's event: {told}");
    for part in ["husk", "10.244.100.", "every IPv4 block of the cluster's pools belongs to a node", "AddressPool"] {
        ensure!(told.contains(part), "{part:?} is not in {told}");
    }
    let told = bench.wait_for_event("Node", "host1", "PoolExhausted")?;
    ensure!(told.contains("add an AddressPool"), "no remedy: {told}");
    let host = bench.kubernetes.node(1).host();
    let status = host.huskctl_json(["status"])?;
    ensure!(!host.issues("PoolExhausted")?.is_empty(), "{status:#}");
    ensure!(status["ready"] == true, "a pod that goes would make room: {status:#}");
    let (admin, started) = (bench.kubernetes.admin(), Instant::now());
    let mut condition = Value::Null;
    eventually("the pool to say that it is exhausted", NEXT_LOOK, || {
        condition = admin.json(["get", "addresspool", "first"])?["status"]["conditions"][0].clone();
        Ok(condition["reason"] == "Exhausted")
    })
    .with_context(|| condition.to_string())?;
    ensure!(condition["type"] == "Usable" && condition["status"] == "False", "{condition}");
    eprintln!("the pool's status said so {:.0?} later", started.elapsed());
    let shown = admin.run(["get", "addresspool", "first", "--no-headers"])?;
    ensure!(shown.contains("False") && shown.contains("4/4"), "{shown}");

    let added = Instant::now();
    admin.apply(&pool("second", "10.244.101.0/28"))?;
    for pod in bench.find(&waiting)? {
        let block: Prefix = "10.244.101.0/28".parse()?;
        ensure!(block.contains(address(&pod)?), "{} has {}", pod.name(), address(&pod)?);
        await_answer(&bench.pods[1], &pod)?;
        await_answer(&bench.pods[2], &pod)?;
    }
    eprintln!("the pods that waited ran {:.1?} after a pool was added", added.elapsed());
    ensure!(added.elapsed() < husk_tests::patience(ANOTHER_ATTEMPT), "this took {:?}", added.elapsed());
    eventually("nothing to be wrong any more", SOON, || {
        Ok(bench.kubernetes.node(1).host().huskctl_json(["status"])?["issues"] == json!([]))
    })
}

fn a_spare_block_changes_hands(bench: &mut Bench) -> Result<()> {
    let (admin, first) = (bench.kubernetes.admin(), "10.244.100.0/28".parse::<Prefix>()?);
    let spare: Vec<Prefix> = {
        let kept = address(&bench.pods[0])?;
        bench.blocks_of(1)?.into_iter().filter(|block| first.covers(block) && !block.contains(kept)).collect()
    };
    ensure!(spare.len() == 1, "{spare:?}");
    admin.run(["delete", "pods", "--selector=group=burst", "--force", "--grace-period=0"])?;
    let deleted = Instant::now();
    eventually("host1 to have one block", SOON * 2, || Ok(bench.blocks_of(1)?.len() == 1))
        .with_context(|| format!("{:?}", bench.kubernetes.block_owners()))?;
    eprintln!("spare blocks were back {:.1?} after their pods were deleted", deleted.elapsed());
    ensure!(
        !bench.kubernetes.block_owners()?.contains_key(&spare[0]),
        "the node's first block went back: {:?}",
        bench.kubernetes.block_owners()
    );

    let pods = bench.find(&bench.request("heir", 2, PER_FIRST_BLOCK)?)?;
    ensure!(
        bench.kubernetes.block_owners()?.get(&spare[0]).is_some_and(|owner| owner == "host2"),
        "{:?}",
        bench.kubernetes.block_owners()
    );
    let inside = pods.iter().find(|pod| address(pod).is_ok_and(|it| spare[0].contains(it)));
    let inside = inside.with_context(|| format!("no pod has an address of {}", spare[0]))?;
    await_answer(&bench.pods[0], inside)?;
    await_answer(&bench.pods[2], inside)
}

fn a_gone_node_leaves_its_blocks(bench: &mut Bench) -> Result<()> {
    let admin = bench.kubernetes.admin();
    // From now on every block there is belongs to a node.
    admin.run(["delete", "addresspool", "second"])?;
    let left: Vec<Prefix> = bench.blocks_of(3)?.into_iter().collect();
    ensure!(left.len() == 1, "{left:?}");
    bench.request("late", 1, PER_FIRST_BLOCK)?;
    let waiting = bench.wait_for_waiting("late", PER_FIRST_BLOCK - 1, 1)?;

    let gone = Instant::now();
    bench.kubernetes.remove_node(3)?;
    let mut released = None;
    let limit = RELEASE_AFTER + DISCOVERY;
    eventually("record and block of the node that is gone to vanish", limit, || {
        if bench.blocks_of(3)?.is_empty() {
            released.get_or_insert_with(|| gone.elapsed());
        }
        let records = bench.kubernetes.admin().list("overlaynodes")?;
        Ok(released.is_some() && records.len() == 2)
    })?;
    let released = released.context("no time was taken")?;
    ensure!(released >= RELEASE_AFTER, "the block was given away after {released:?}");
    eprintln!("a node's block was free {released:.0?} after it failed (releaseAfter: {RELEASE_AFTER:?})");

    let heir = bench.find(&waiting)?;
    ensure!(left[0].contains(address(&heir[0])?), "{} has {}", heir[0].name(), address(&heir[0])?);
    eprintln!("a pod had an address of it {:.0?} after that", gone.elapsed() - released);
    await_answer(&bench.pods[1], &heir[0])?;
    for number in [1, 2] {
        let status = bench.kubernetes.node(number).host().huskctl_json(["status"])?;
        ensure!(status["peers"] == json!([1, 1]), "{status:#}");
    }
    Ok(())
}
