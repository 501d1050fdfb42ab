//! Husk in everyday operation on a real Kubernetes: many pods come and go, the daemon crashes again and again, runtime and kubelet
//! are restarted, and the runtime's rarer questions are asked.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_tests::kubernetes::{IMAGE, Kubectl, Kubernetes, KubernetesPod, NAMESPACE, Node, NodeService, step};
use husk_tests::probe::tcp::Flow;
use husk_tests::probe::{Echo, EchoServer, Stream};
use husk_tests::{Family, Signal, eventually};
use serde_json::{Value, json};

/// How long a change may take.
const SOON: Duration = Duration::from_secs(60);

/// Pods that come and go, on two nodes, and how often.
const PODS: usize = 50;
const ROUNDS: usize = 10;

/// As often as `HUSK_TEST_ROUNDS` says, where time is short.
fn rounds() -> usize {
    std::env::var("HUSK_TEST_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(ROUNDS)
}

/// How long a round may take until all pods run, and until all are gone.
const ROUND: Duration = Duration::from_secs(180);

/// What is done, and the doing.
type Step = (&'static str, fn(&Bench) -> Result<()>);

/// Steps that share a cluster.
const STEPS: [Step; 4] = [
    ("runtime and kubelet restart, and nothing happens", restarts_are_nothing),
    ("a daemon that crashes again and again leaves pods alone and lets them be deleted", crash_loops_are_survived),
    ("STATUS and GC answer a caller", status_and_gc_answer),
    ("fifty pods, ten times over, leave nothing", many_pods_leave_nothing),
];

#[test]
fn in_operation() -> Result<()> {
    let kubernetes = Kubernetes::builder().nodes(2).start()?;
    kubernetes.install("vxlan")?;
    let pods = (1..=2).map(|node| kubernetes.pod(&format!("pod{node}"), node).add()).collect::<Result<Vec<_>>>()?;
    let bench = Bench { kubernetes, pods };
    let done = STEPS.into_iter().try_for_each(|(name, work)| step(name, || work(&bench)));
    bench.kubernetes.with_logs(done)
}

struct Bench {
    kubernetes: Kubernetes,
    pods: Vec<KubernetesPod>,
}

impl Bench {
    fn admin(&self) -> Kubectl {
        self.kubernetes.admin()
    }

    /// Does something while packets and a connection go between the two pods, none of which may be lost.
    fn while_streaming(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let [one, two] = self.pods.as_slice() else { unreachable!("there are two pods") };
        let server = EchoServer::start(two.netns())?;
        let address = two.address(Family::Ipv4)?;
        let datagrams = Stream::udp(one.netns(), two.netns(), address, 500)?;
        let flow = Flow::start(one.netns(), server.at(address), 500_000)?;
        work()?;
        let moved = flow.stop().context("the TCP stream")?;
        let report = datagrams.stop()?;
        eprintln!("  {report}; TCP: longest stall {:?}", moved.largest_stall);
        ensure!(report.lossless(), "{report}");
        Ok(())
    }
}

fn restarts_are_nothing(bench: &Bench) -> Result<()> {
    bench.while_streaming(|| {
        for node in bench.kubernetes.nodes() {
            for service in [NodeService::Containerd, NodeService::Kubelet] {
                node.restart(service, Signal::SIGKILL)?;
            }
        }
        bench.kubernetes.wait_nodes_ready()?;
        for number in 1..=2 {
            let pod = bench.kubernetes.pod("after", number).add()?;
            let reach = Echo::to(pod.address(Family::Ipv4)?).run(bench.pods[2 - number].netns())?;
            ensure!(reach.arrived(), "a pod made after the restarts of node {number}: {reach:?}");
            pod.delete_at_once()?;
        }
        Ok(())
    })
}

fn crash_loops_are_survived(bench: &Bench) -> Result<()> {
    let admin = bench.admin();
    let doomed = bench.kubernetes.pod("doomed", 1).add()?;
    let set = ["daemonset/husk", "--namespace", NAMESPACE];
    let command = |command: Value| {
        let containers = json!([{ "name": "huskd", "command": command }]);
        json!({ "spec": { "template": { "spec": { "containers": containers } } } }).to_string()
    };
    bench.while_streaming(|| {
        // A version that ends at once, everywhere: pods of a DaemonSet that never get ready hold up its rollout, so they are deleted.
        let broken = command(json!(["huskd", "run", "--config", "/nowhere/config.yaml"]));
        admin.run(["patch"].into_iter().chain(set).chain(["--patch", &broken]))?;
        let own = ["--namespace", NAMESPACE, "--selector", "app.kubernetes.io/component=daemon"];
        admin.run(["delete", "pods", "--wait=false"].into_iter().chain(own))?;
        eventually("the daemons to crash", SOON * 2, || {
            let path = "jsonpath={.items[*].status.containerStatuses[*].restartCount}";
            let counts = admin.run(["get", "pods", "--output", path].into_iter().chain(own))?;
            Ok(counts.split_whitespace().filter(|count| count.parse::<u32>().is_ok_and(|it| it >= 2)).count() == 2)
        })?;
        // A DEL needs no daemon, an ADD does and says so.
        doomed.delete_at_once()?;
        bench.kubernetes.pod("waiting", 1).create()?;
        eventually("an event that says what a new pod waits for", SOON, || {
            let events = admin.list("events")?;
            Ok(events.iter().any(|event| {
                event["involvedObject"]["name"] == "waiting"
                    && event["message"].as_str().is_some_and(|it| it.contains("husk") && it.contains("daemon"))
            }))
        })?;
        admin.run(["rollout", "undo"].into_iter().chain(set))?;
        admin.run(["delete", "pods", "--wait=false"].into_iter().chain(own))?;
        bench.kubernetes.wait_installed()?;
        admin.wait(SOON, ["wait", "--for=condition=Ready", "pod/waiting"])?;
        Ok(())
    })?;
    // Not with `--force`: the kubelet would make a sandbox for it once more, while the next step asks who there is.
    bench.kubernetes.find_pod("default", "waiting")?.delete()
}

fn status_and_gc_answer(bench: &Bench) -> Result<()> {
    let node = bench.kubernetes.node(1);
    let config = |extra: Value| {
        let mut config = json!({ "cniVersion": "1.1.0", "name": "husk", "type": "husk" });
        config.as_object_mut().expect("a map").extend(extra.as_object().cloned().unwrap_or_default());
        config.to_string()
    };
    let call = |command: &str, config: &str| {
        let environment = [("CNI_COMMAND", command), ("CNI_PATH", "/opt/cni/bin")];
        let environment = environment.map(|(key, value)| (key.to_owned(), value.into()));
        node.program("/opt/cni/bin/husk").environment(environment).stdin(config).run()
    };
    let said = call("STATUS", &config(json!({})))?;
    ensure!(said.status.success(), "STATUS: {said:?}");
    // What containerd 1.6 does not call: everything it has is valid, so that nothing goes; then an attachment that nobody has.
    let attachments = attachments_of(&node)?;
    ensure!(!attachments.is_empty(), "the node has no attachments");
    let reach = || Echo::to(bench.pods[0].address(Family::Ipv4)?).run(bench.pods[1].netns());
    let said = call("GC", &config(json!({ "cni.dev/valid-attachments": attachments })))?;
    ensure!(said.status.success() && reach()?.arrived(), "GC took a pod that lives: {said:?}");
    let abandoned = bench.kubernetes.pod("abandoned", 1).add()?;
    let said = call("GC", &config(json!({ "cni.dev/valid-attachments": attachments })))?;
    ensure!(said.status.success() && reach()?.arrived(), "{said:?}");
    let left = attachments_of(&node)?;
    let known = left.iter().all(|it| attachments.contains(it));
    ensure!(known, "GC left an attachment that nobody has: {left:?}, valid were {attachments:?}");
    ensure!(!Echo::to(abandoned.address(Family::Ipv4)?).run(bench.pods[1].netns())?.arrived());
    // Gently, for the same reason: the next step counts what there is.
    abandoned.delete()
}

/// What the node's leases say that there is, as a runtime would say it.
fn attachments_of(node: &Node<'_>) -> Result<Vec<Value>> {
    let leases = node.host().leases()?.into_iter().map(|path| {
        let lease: Value = serde_json::from_str(&std::fs::read_to_string(path)?)?;
        Ok(json!({ "containerID": lease["containerId"], "ifname": lease["ifname"] }))
    });
    leases.collect()
}

/// What a node has of pods, and what of rules.
fn residue(node: &Node<'_>) -> Result<BTreeMap<&'static str, usize>> {
    let host = node.host();
    let lines = |program: &str, arguments: &[&str]| -> Result<usize> {
        Ok(node.netns().program(program).args(arguments).check()?.lines().count())
    };
    Ok(BTreeMap::from([
        ("leases", host.leases()?.len()),
        ("links", lines("ip", &["-o", "link"])?),
        ("routes", lines("ip", &["route", "show", "table", "all"])?),
        ("rules", lines("ip", &["rule"])?),
        ("neighbours", lines("ip", &["neigh", "show", "nud", "permanent"])?),
        ("nft", lines("nft", &["list", "table", "inet", "husk"])?),
    ]))
}

fn many_pods_leave_nothing(bench: &Bench) -> Result<()> {
    let admin = bench.admin();
    let nodes = bench.kubernetes.nodes();
    let before = nodes.iter().map(residue).collect::<Result<Vec<_>>>()?;
    for round in 1..=rounds() {
        let pod = |index: usize| {
            json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": { "name": format!("many-{round}-{index}"), "labels": { "many": "yes" } },
                "spec": {
                    "nodeName": nodes[index % nodes.len()].name(), "terminationGracePeriodSeconds": 0,
                    "containers": [{ "name": "main", "image": IMAGE, "imagePullPolicy": "IfNotPresent" }],
                },
            })
        };
        let list = json!({ "apiVersion": "v1", "kind": "List", "items": (0..PODS).map(pod).collect::<Vec<_>>() });
        let started = Instant::now();
        admin.program().args(["create", "-f", "-"]).stdin(list.to_string()).limit(ROUND).check()?;
        admin.wait(ROUND, ["wait", "--for=condition=Ready", "pods", "--selector", "many=yes"])?;
        let running = started.elapsed();
        let addresses = "jsonpath={.items[*].status.podIP}";
        let addresses = admin.run(["get", "pods", "--selector", "many=yes", "--output", addresses])?;
        let unique: std::collections::BTreeSet<&str> = addresses.split_whitespace().collect();
        ensure!(unique.len() == PODS, "{} addresses for {PODS} pods", unique.len());
        let to = SocketAddr::new(unique.iter().next_back().context("no pod")?.parse()?, 0).ip();
        ensure!(Echo::to(to).run(bench.pods[0].netns())?.arrived(), "{to} does not answer");
        let started = Instant::now();
        // All at once, as when a namespace is deleted.
        admin.run(["delete", "--raw", "/api/v1/namespaces/default/pods?labelSelector=many%3Dyes"])?;
        let mut left = Vec::new();
        let gone = eventually("everything of the pods to be gone", ROUND, || {
            left = nodes.iter().map(residue).collect::<Result<Vec<_>>>()?;
            Ok(left == before)
        });
        gone.with_context(|| format!("round {round}: {before:?} became {left:?}"))?;
        eprintln!("  round {round}: {PODS} pods ready after {running:.1?}, gone after {:.1?}", started.elapsed());
    }
    Ok(())
}
