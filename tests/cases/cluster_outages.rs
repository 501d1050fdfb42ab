//! What pods notice when the API server is away, forgets a node, hears another address of one, or goes back in time: nothing, as far
//! as Husk can help it, and whatever the API has lost comes back by itself.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_tests::kubernetes::{ControlService, Kubernetes, KubernetesPod, Node, NodeService, husk_image, render, step};
use husk_tests::probe::{Echo, Report, Stream};
use husk_tests::{Family, Prefix, Signal, eventually};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// How long a change may take until every node has it.
const SOON: Duration = Duration::from_secs(30);

/// How long what was away for long may take to be heard again: pauses between attempts grow with the time without an answer.
const AFTER_OUTAGE: Duration = Duration::from_secs(60);

/// How long the API server is away.
const OUTAGE: Duration = Duration::from_secs(60);

/// How long a `Node` object is missing: long enough for every other daemon to find that out, which each looks for twice a minute, and
/// to take the node for gone after that, if it were.
const ABSENCE: Duration = Duration::from_secs(55);

/// How long a node has to be gone until its blocks are given away: the shortest that the configuration takes.
const RELEASE_AFTER: u32 = 10;

/// How long pods may be out of reach whose node got another address.
const MOVE: Duration = Duration::from_secs(10);

/// How long the API has forgotten a block that is in use: less than the minute for which the other nodes go on as before.
const FORGOTTEN: Duration = Duration::from_secs(8);

/// Packets per second of each stream.
const RATE: u32 = 100;

/// What is done, and the doing.
type Step = (&'static str, fn(&Bench) -> Result<()>);

/// Steps that share a cluster: bringing one up takes longer than most of them.
const STEPS: [Step; 4] = [
    ("an api server that is away, and daemons that start meanwhile, are not noticed", an_outage_is_not_noticed),
    ("a node whose object was deleted keeps its pods and blocks", a_forgotten_node_keeps_what_it_has),
    ("a node with another address is followed", a_moved_node_is_followed),
    ("an etcd restored from an older state is told what it has forgotten", a_restored_etcd_is_told),
];

#[test]
fn the_api_server_fails_and_forgets() -> Result<()> {
    let kubernetes = Kubernetes::builder().nodes(3).without_node_cidrs().start()?;
    // Blocks that nodes claim, so that there is something to forget; small ones, so that four pods need a second one.
    let manifests = render("pools")?;
    let changed = manifests.replace("mode: wireguard", "mode: vxlan").replace(
        "ipam: {blocks: pools}",
        &format!("ipam: {{blocks: pools, releaseAfter: {RELEASE_AFTER}, coolDown: 0}}\n    blockLengths: {{ipv4: 30}}"),
    );
    ensure!(
        ["mode: vxlan", "blockLengths"].iter().all(|it| changed.contains(it)),
        "the overlay's configuration is another by now"
    );
    let ready = kubernetes.import_image(&husk_image()?).and_then(|()| kubernetes.install_manifests(&changed));
    kubernetes.with_logs(ready)?;
    let pods = (1..=3).map(|node| kubernetes.pod(&format!("pod{node}"), node).add()).collect::<Result<_>>()?;
    let bench = Bench { kubernetes, pods };
    let done = bench
        .wait_settled(SOON)
        .and_then(|()| STEPS.into_iter().try_for_each(|(name, work)| step(name, || work(&bench))));
    bench.kubernetes.with_logs(done)
}

struct Bench {
    kubernetes: Kubernetes,
    /// One on each node, in the nodes' order, to the end.
    pods: Vec<KubernetesPod>,
}

impl Bench {
    /// Every node is ready, has nothing to complain about and routes to both others.
    fn wait_settled(&self, limit: Duration) -> Result<()> {
        let mut last = BTreeMap::new();
        eventually("every node to be settled", limit, || {
            for node in self.kubernetes.nodes() {
                let status = node.host().huskctl_json(["status"]).unwrap_or_default();
                last.insert(node.name(), status);
            }
            let settled = |it: &Value| it["ready"] == true && it["issues"] == json!([]) && it["peers"] == json!([2, 2]);
            Ok(last.values().all(settled))
        })
        .with_context(|| format!("{last:#?}"))?;
        self.kubernetes.wait_nodes_ready()
    }

    /// What nodes tell of themselves.
    fn records(&self) -> Result<BTreeMap<String, Value>> {
        let records = self.kubernetes.admin().list("overlaynodes")?;
        let name = |it: &Value| it["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        Ok(records.iter().map(|it| (name(it), it["spec"].clone())).collect())
    }

    /// A pod comes, is reached by a pod of another node, and goes.
    fn try_new_pod(&self, name: &str, node: usize) -> Result<()> {
        let pod = self.kubernetes.pod(name, node).add()?;
        self.pods.iter().try_for_each(|from| await_answer(from, &pod))?;
        pod.delete_at_once()
    }

    /// Traffic from every node to every other one.
    fn streams(&self) -> Result<Streams> {
        let [one, two, three] = self.pods.as_slice() else { unreachable!("there are three pods") };
        Ok(Streams(vec![
            ("udp host1 to host2", Stream::udp(one.netns(), two.netns(), address(two)?, RATE)?),
            ("udp host2 to host3", Stream::udp(two.netns(), three.netns(), address(three)?, RATE)?),
            ("ping host3 to host1", Stream::ping(three.netns(), address(one)?, RATE)?),
        ]))
    }
}

/// Traffic of which nothing may be lost.
struct Streams(Vec<(&'static str, Stream)>);

impl Streams {
    fn finish_lossless(self) -> Result<()> {
        for (name, report) in self.finish()? {
            ensure!(report.lossless(), "{name}: {report}");
        }
        Ok(())
    }

    fn finish(self) -> Result<Vec<(&'static str, Report)>> {
        let reports: Vec<_> =
            self.0.into_iter().map(|(name, stream)| Ok((name, stream.stop()?))).collect::<Result<_>>()?;
        reports.iter().for_each(|(name, report)| eprintln!("  {name}: {report}"));
        Ok(reports)
    }
}

fn address(pod: &KubernetesPod) -> Result<IpAddr> {
    pod.address(Family::Ipv4)
}

fn await_answer(from: &KubernetesPod, to: &KubernetesPod) -> Result<()> {
    let echo = Echo::to(address(to)?).limit(Duration::from_millis(200));
    eventually(&format!("{} to reach {}", from.name(), to.name()), SOON, || Ok(echo.run(from.netns())?.arrived()))
}

/// Asks again and again, until the time since `start` is over, for what has to hold all the time.
fn throughout(start: Instant, length: Duration, mut holds: impl FnMut() -> Result<()>) -> Result<()> {
    while start.elapsed() < length {
        holds()?;
        std::thread::sleep(Duration::from_millis(500));
    }
    Ok(())
}

fn daemon(node: &Node<'_>) -> Option<Pid> {
    node.host().processes().into_iter().find(|it| it.command.contains("huskd run")).map(|it| it.pid)
}

/// Kills the daemon and waits until the kubelet has started another one that answers.
fn restart_daemon(node: &Node<'_>) -> Result<()> {
    let old = daemon(node).with_context(|| format!("no daemon runs on {}", node.name()))?;
    nix::sys::signal::kill(old, Signal::SIGKILL)?;
    eventually(&format!("another daemon on {}", node.name()), AFTER_OUTAGE, || {
        let answers = || node.host().huskctl_json(["status"]).is_ok_and(|it| it["passes"].as_u64() > Some(0));
        Ok(daemon(node).is_some_and(|new| new != old) && answers())
    })
}

fn an_outage_is_not_noticed(bench: &Bench) -> Result<()> {
    let (kubernetes, streams) = (&bench.kubernetes, bench.streams()?);
    kubernetes.stop_control(ControlService::ApiServer, Signal::SIGKILL)?;
    let stopped = Instant::now();
    let mut blocks = BTreeMap::new();
    for node in kubernetes.nodes() {
        blocks.insert(node.name(), node.host().huskctl_json(["status"])?["blocks"].clone());
        restart_daemon(&node)?;
    }
    eprintln!("all daemons were started again {:.1?} after the API server was killed", stopped.elapsed());
    throughout(stopped, OUTAGE, || {
        for node in kubernetes.nodes() {
            let status = node.host().huskctl_json(["status"])?;
            ensure!(status["peers"] == json!([2, 2]) && status["blocks"] == blocks[node.name()], "{status:#}");
            let told = node.host().issues("SourceUnavailable")?;
            ensure!(!told.is_empty(), "that the API is away is not told: {status:#}");
        }
        Ok(())
    })?;
    kubernetes.start_control(ControlService::ApiServer)?;
    kubernetes.wait_api_server()?;
    let back = Instant::now();
    bench.wait_settled(AFTER_OUTAGE)?;
    eprintln!("every node was settled {:.1?} after the API server was back", back.elapsed());
    bench.try_new_pod("after-outage", 2)?;
    streams.finish_lossless()
}

fn a_forgotten_node_keeps_what_it_has(bench: &Bench) -> Result<()> {
    let (kubernetes, streams) = (&bench.kubernetes, bench.streams()?);
    let (owners, records) = (bench.kubernetes.block_owners()?, bench.records()?);
    // It would delete the node's pods after 40 s, and the kubelet would end them: no matter of Husk's.
    kubernetes.stop_control(ControlService::ControllerManager, Signal::SIGKILL)?;
    kubernetes.kubectl(["delete", "node", "host3"])?;
    let deleted = Instant::now();
    let forgotten = kubernetes.node(3);
    eventually("the node to say that its object is missing", SOON, || {
        Ok(!forgotten.host().issues("NodeMissing")?.is_empty())
    })?;
    throughout(deleted, ABSENCE, || {
        ensure!(
            bench.kubernetes.block_owners()? == owners,
            "blocks changed hands: {:?}, before {owners:?}",
            bench.kubernetes.block_owners()
        );
        ensure!(bench.records()? == records, "a record is gone or another: {:?}", bench.records());
        for node in kubernetes.nodes() {
            let status = node.host().huskctl_json(["status"])?;
            ensure!(status["peers"] == json!([2, 2]) && status["ready"] == true, "{status:#}");
        }
        Ok(())
    })?;
    forgotten.restart(NodeService::Kubelet, Signal::SIGTERM)?;
    eventually("the node to be registered again", SOON, || {
        Ok(kubernetes.admin().output(["get", "node", "host3"])?.status.success())
    })?;
    kubernetes.start_control(ControlService::ControllerManager)?;
    bench.wait_settled(AFTER_OUTAGE)?;
    ensure!(bench.kubernetes.block_owners()? == owners, "{:?}, before {owners:?}", bench.kubernetes.block_owners());
    bench.try_new_pod("registered-again", 3)?;
    streams.finish_lossless()
}

fn a_moved_node_is_followed(bench: &Bench) -> Result<()> {
    let (kubernetes, streams) = (&bench.kubernetes, bench.streams()?);
    let [one, two, three] = bench.pods.as_slice() else { unreachable!("there are three pods") };
    kubernetes.readdress(3, 33)?;
    [(one, three), (three, two)].into_iter().try_for_each(|(from, to)| await_answer(from, to))?;
    // Its connections to the API began at an address that is no more: it has to find that out.
    let names: Vec<String> = (1..=3).map(|number| format!("further{number}")).collect();
    names.iter().try_for_each(|name| kubernetes.pod(name, 1).create())?;
    let further = names.iter().map(|name| kubernetes.find_pod("default", name)).collect::<Result<Vec<_>>>()?;
    let asked = Instant::now();
    further.iter().try_for_each(|pod| await_answer(three, pod))?;
    eprintln!("pods in another node's new block were reached from it {:.1?} after they ran", asked.elapsed());
    further.into_iter().try_for_each(KubernetesPod::delete_at_once)?;
    bench.wait_settled(AFTER_OUTAGE)?;
    ensure!(bench.records()?["host3"]["addresses"]["ipv4"] == "192.0.2.33", "{:?}", bench.records());
    for (name, report) in streams.finish()? {
        // What happens between others does not concern them.
        let limit = if name.contains("host3") { husk_tests::patience(MOVE) } else { Duration::ZERO };
        ensure!(report.lossless() || report.largest_gap < limit, "{name}: {report}");
    }
    Ok(())
}

fn a_restored_etcd_is_told(bench: &Bench) -> Result<()> {
    let kubernetes = &bench.kubernetes;
    let [_, two, three] = bench.pods.as_slice() else { unreachable!("there are three pods") };
    eventually("blocks that the step before needed to be given back", SOON, || {
        Ok(bench.kubernetes.block_owners()?.len() == kubernetes.nodes().len())
    })?;
    // Pods that the snapshot knows, and which take a block that it does not know.
    kubernetes.node(1).stop(NodeService::Kubelet, Signal::SIGTERM)?;
    let names: Vec<String> = (1..=3).map(|number| format!("late{number}")).collect();
    names.iter().try_for_each(|name| kubernetes.pod(name, 1).create())?;
    let before = bench.kubernetes.block_owners()?;
    let snapshot = kubernetes.snapshot("early")?;
    kubernetes.node(1).start(NodeService::Kubelet)?;
    let late = names.iter().map(|name| kubernetes.find_pod("default", name)).collect::<Result<Vec<_>>>()?;
    let (owners, records) = (bench.kubernetes.block_owners()?, bench.records()?);
    let new: BTreeSet<&Prefix> = owners.keys().filter(|block| !before.contains_key(block)).collect();
    ensure!(new.len() == 1, "{owners:?}, before {before:?}");
    let within = late.iter().find(|pod| address(pod).is_ok_and(|it| new.iter().any(|block| block.contains(it))));
    let within = within.context("no pod has an address of the new block")?;
    // And one that it does not know at all: its kubelet will end it.
    let unknown = kubernetes.pod("unknown", 2).add()?;
    await_answer(three, within)?;

    let mut streams = bench.streams()?;
    streams.0.push(("udp host2 to the block on host1 that was forgotten", {
        Stream::udp(two.netns(), within.netns(), address(within)?, RATE)?
    }));
    // Whose block was forgotten hears of it last.
    let last = daemon(&kubernetes.node(1)).context("no daemon runs on host1")?;
    nix::sys::signal::kill(last, Signal::SIGSTOP)?;
    kubernetes.restore(&snapshot)?;
    let restored = Instant::now();
    // As the documentation of etcd asks of its users: their watches would go on from versions that are yet to come.
    for node in kubernetes.nodes() {
        node.restart(NodeService::Kubelet, Signal::SIGTERM)?;
    }
    eventually("the others to hear the API", SOON, || {
        let sources = [2, 3].map(|number| kubernetes.node(number).host().huskctl_json(["status"]));
        Ok(sources.into_iter().all(|it| it.is_ok_and(|it| it["issues"] == json!([]) && it["peers"] == json!([2, 2]))))
    })?;
    throughout(restored, FORGOTTEN, || {
        ensure!(bench.kubernetes.block_owners()? == before, "{:?}, before {before:?}", bench.kubernetes.block_owners());
        let report = streams.0.last().context("no stream")?.1.so_far();
        ensure!(report.refused == 0, "routes went at once: {report}");
        Ok(())
    })?;
    nix::sys::signal::kill(last, Signal::SIGCONT)?;
    let awake = Instant::now();
    eventually("blocks and records to be as they were", AFTER_OUTAGE, || {
        Ok(bench.kubernetes.block_owners()? == owners && bench.records()? == records)
    })
    .with_context(|| format!("{:?}, before {owners:?}", bench.kubernetes.block_owners()))?;
    eprintln!("the node had told and claimed everything again after {:.1?}", awake.elapsed());
    bench.wait_settled(AFTER_OUTAGE)?;
    unknown.wait_gone()?;
    bench.try_new_pod("after-restore", 1)?;
    streams.finish_lossless()
}
