//! Husk as the network of a real Kubernetes, from the manifests that people apply to the host as it was before: pods and Services,
//! host ports, what the daemon may do, a configuration that changes, a rolling update under load, and the way out.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_tests::kubernetes::{IMAGE, Kubectl, Kubernetes, KubernetesPod, NAMESPACE, NodeService, render, step};
use husk_tests::probe::tcp::{self, Flow};
use husk_tests::probe::{Datagram, Echo, EchoServer, Stream};
use husk_tests::process::Program;
use husk_tests::state::HostState;
use husk_tests::{Family, Leak, Netns, Signal, eventually, patience};
use serde_json::{Value, json};

/// How long a change may take until every node has it.
const SOON: Duration = Duration::from_secs(30);

/// How long a rollout may take.
const ROLLOUT: Duration = Duration::from_secs(180);

/// The port that pods serve at.
const PORT: u16 = 7000;

/// The port of the Service at every node.
const NODE_PORT: u16 = 30700;

/// What is done, and the doing.
type Step = (&'static str, fn(&Bench) -> Result<()>);

/// Steps that share a cluster: bringing one up takes longer than most of them.
const STEPS: [Step; 11] = [
    ("nodes are ready and say so", nodes_are_ready_and_say_so),
    ("huskctl on a node, out of the container, sees what the container cannot", huskctl_runs_on_nodes),
    ("pods reach each other and the wire tells nothing of them", pods_reach_each_other),
    ("services by cluster address and node port, from everywhere", services_are_reached),
    ("host ports, by husk and by the chained portmap", host_ports_lead_to_pods),
    ("the daemon may do what it needs and nothing else", the_daemon_may_do_what_it_needs),
    ("every manifest is taken by the API server", every_manifest_is_taken),
    ("the smoke test that people run has nothing to complain of", the_smoke_test_passes),
    ("a bad configuration is refused with an event, a good one taken", configuration_is_followed),
    ("a rolling update loses nothing", a_rolling_update_loses_nothing),
    ("uninstalled, every host is as it was", uninstalled_hosts_are_as_they_were),
];

#[test]
fn from_an_empty_cluster_and_back() -> Result<()> {
    let kubernetes = Kubernetes::builder().nodes(3).dual_stack().start()?;
    let before = kubernetes.nodes().iter().map(|node| HostState::of(node.host())).collect::<Result<Vec<_>>>()?;
    let leak = Leak::watch(kubernetes.underlay())?;
    let started = Instant::now();
    kubernetes.install("dual-stack")?;
    eprintln!("installed and ready after {:.1?}", started.elapsed());
    let pods = (1..=3).map(|node| kubernetes.pod(&format!("pod{node}"), node).label("app", "echo").add());
    let pods = pods.collect::<Result<Vec<_>>>()?;
    let bench = Bench { kubernetes, pods, before, leak: Some(leak).into() };
    STEPS.into_iter().try_for_each(|(name, work)| step(name, || work(&bench)))
}

struct Bench {
    kubernetes: Kubernetes,
    pods: Vec<KubernetesPod>,
    before: Vec<HostState>,
    leak: std::cell::Cell<Option<Leak>>,
}

impl Bench {
    fn admin(&self) -> Kubectl {
        self.kubernetes.admin()
    }

    fn servers(&self) -> Result<Vec<EchoServer>> {
        let serve = |pod: &KubernetesPod| EchoServer::start_on(pod.netns(), SocketAddr::new([0_u16; 8].into(), PORT));
        self.pods.iter().map(serve).collect()
    }
}

/// Asks over TCP and UDP.
fn ask(from: &Netns, to: SocketAddr) -> Result<()> {
    tcp::transfer(from, to, 200_000).with_context(|| format!("TCP from {} to {to}", from.name()))?;
    let reach = Datagram::to(to).run(from)?;
    ensure!(reach.arrived(), "UDP from {} to {to}: {reach:?}", from.name());
    Ok(())
}

fn nodes_are_ready_and_say_so(bench: &Bench) -> Result<()> {
    let admin = bench.admin();
    eventually("NetworkUnavailable to be cleared on every node", SOON, || {
        let path =
            r#"jsonpath={range .items[*]}{.status.conditions[?(@.type=="NetworkUnavailable")].status}{"\n"}{end}"#;
        Ok(admin.run(["get", "nodes", "--output", path])?.lines().filter(|line| *line == "False").count() == 3)
    })?;
    eventually("every record to have the condition Ready", SOON, || {
        let records = admin.list("overlaynodes")?;
        Ok(records.len() == 3 && records.iter().all(|it| it["status"]["conditions"][0]["status"] == "True"))
    })?;
    let shown = admin.run(["get", "overlaynodes"])?;
    let first = shown.lines().next().unwrap_or_default();
    ensure!(first.split_whitespace().eq(["NAME", "READY", "ADDRESS", "BLOCKS", "MTU", "ISSUES", "AGE"]), "{shown}");
    ensure!(shown.contains("192.0.2.1") && shown.contains("True"), "{shown}");
    for node in bench.kubernetes.nodes() {
        let status = node.host().huskctl_json(["status"])?;
        ensure!(status["ready"] == true && status["source"] == "Kubernetes API", "{status}");
        ensure!(status["issues"].as_array().is_some_and(Vec::is_empty), "{}", status["issues"]);
    }
    Ok(())
}

/// As docs/huskctl.md has it under "On a node of Kubernetes", and docs/support-bundle.md.
fn huskctl_runs_on_nodes(bench: &Bench) -> Result<()> {
    let (admin, node) = (bench.admin(), bench.kubernetes.node(1));
    let here = |arguments: &str| {
        let script = format!("exec /proc/$(pidof -s huskd)/root/usr/local/bin/huskctl {arguments}");
        node.program("sh").args(["-c", &script]).limit(patience(Duration::from_secs(60))).run()
    };
    let doctor = here("doctor -o json")?;
    ensure!(matches!(doctor.status.code(), Some(0 | 1)), "{doctor:?}");
    let report: Value = serde_json::from_str(&doctor.stdout)?;
    let checks = report["checks"].as_array().context("checks")?;
    let of = |id: &str| checks.iter().find(|check| check["id"] == id);
    // In the container it cannot be seen who loads what at boot, what else is installed, and nobody answers a ping.
    for id in ["daemon", "peers", "cni-config-order", "other-cni", "forwarding", "systemd-networkd"] {
        let check = of(id).with_context(|| format!("no check {id} in {report}"))?;
        ensure!(check["outcome"] != "unknown", "{check}");
    }
    let capture = here("capture host --outer --duration 1 -o json")?;
    ensure!(capture.status.code() == Some(0), "{capture:?}");

    let selector = format!("spec.nodeName={}", node.name());
    let name = [
        "get",
        "pods",
        "--selector",
        "app.kubernetes.io/name=husk,app.kubernetes.io/component=daemon",
        "--output",
        "name",
        "--field-selector",
    ];
    let pod = admin.run(["--namespace", "husk-system"].into_iter().chain(name).chain([selector.as_str()]))?;
    let bundle = node.file("/run/bundle.tar.gz");
    let script = r#""$0" -n husk-system exec "$1" -c huskd -- huskctl support-bundle --file - >"$2""#;
    let kubeconfig = ("KUBECONFIG".to_owned(), admin.kubeconfig().as_os_str().to_owned());
    let path = ("PATH".to_owned(), std::env::var_os("PATH").unwrap_or_default());
    let told = node
        .netns()
        .program("sh")
        .environment([path, kubeconfig])
        .args([
            std::ffi::OsStr::new("-c"),
            script.as_ref(),
            admin.path().as_ref(),
            pod.trim().as_ref(),
            bundle.as_ref(),
        ])
        .limit(patience(Duration::from_secs(120)))
        .run()?;
    ensure!(told.status.code() == Some(0) && told.stderr.contains("The bundle ("), "{told:?}");
    let list = Program::new("tar").args([std::ffi::OsStr::new("-tzf"), bundle.as_ref()]).check()?;
    for entry in ["/reports/status.json", "/reports/doctor.json", "/husk/", "/network/", "/index.json"] {
        ensure!(list.contains(entry), "{entry} is not in {list}");
    }
    Ok(())
}

fn pods_reach_each_other(bench: &Bench) -> Result<()> {
    let _servers = bench.servers()?;
    for from in &bench.pods {
        for to in &bench.pods {
            for address in to.addresses() {
                ask(from.netns(), SocketAddr::new(*address, PORT))?;
                let reach = Echo::to(*address).run(from.netns())?;
                ensure!(reach.arrived(), "echo from {} to {address}: {reach:?}", from.name());
            }
        }
        for (node, address) in bench
            .kubernetes
            .nodes()
            .iter()
            .flat_map(|node| from.addresses().iter().map(move |address| (*node, *address)))
        {
            ask(node.netns(), SocketAddr::new(address, PORT)).with_context(|| format!("node {}", node.name()))?;
        }
    }
    // The API server lies beyond the nodes: nothing of it is encrypted by Husk, and nothing of it is a pod's either.
    let seen = bench.leak.take().context("the watch was ended already")?.finish(bench.kubernetes.underlay())?;
    ensure!(seen.kinds.keys().any(|kind| *kind == husk_tests::Kind::Wireguard), "{seen:?}");
    Ok(())
}

fn service(name: &str, family: Family, node_port: u16) -> Value {
    let port = |protocol: &str| json!({ "name": protocol.to_lowercase(), "protocol": protocol, "port": 80, "targetPort": PORT, "nodePort": node_port });
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": name },
        "spec": {
            "type": "NodePort", "selector": { "app": "echo" }, "ports": [port("TCP"), port("UDP")],
            "ipFamilyPolicy": "SingleStack", "ipFamilies": [format!("{family}")],
        },
    })
}

/// Kube-proxy chooses a pod by chance: asked as often as this, each of three is chosen, or the test fails once in a million times.
const TRIES: usize = 36;

fn services_are_reached(bench: &Bench) -> Result<()> {
    let (admin, servers) = (bench.admin(), bench.servers()?);
    let outside = bench.kubernetes.underlay().outside();
    for (index, family) in (0_u16..).zip(Family::ALL) {
        let (name, node_port) = (format!("echo-{index}"), NODE_PORT + index);
        admin.apply(&service(&name, family, node_port).to_string())?;
        let path = ["get", "service", &name, "--output", "jsonpath={.spec.clusterIP}"];
        let cluster_ip: IpAddr = admin.run(path)?.parse()?;
        let at_service = SocketAddr::new(cluster_ip, 80);
        let first = bench.pods[0].netns();
        eventually("kube-proxy to know the service", SOON, || Ok(ask(first, at_service).is_ok()))?;
        for pod in &bench.pods {
            for _ in 0..TRIES {
                // The own one is among those who may be chosen: a hairpin.
                tcp::transfer(pod.netns(), at_service, 1000)
                    .with_context(|| format!("{} to {at_service}", pod.name()))?;
            }
            ask(pod.netns(), at_service)?;
        }
        for node in bench.kubernetes.nodes() {
            for _ in 0..TRIES / 3 {
                tcp::transfer(node.netns(), at_service, 1000)
                    .with_context(|| format!("{} to {at_service}", node.name()))?;
            }
            let at_node = SocketAddr::new(node.host().address(family)?, node_port);
            for _ in 0..TRIES / 3 {
                tcp::transfer(outside, at_node, 1000).with_context(|| format!("outside to {at_node}"))?;
            }
            ask(outside, at_node)?;
            ask(node.netns(), at_node)?;
            ask(first, at_node)?;
        }
    }
    for (pod, server) in bench.pods.iter().zip(&servers) {
        let peers: BTreeSet<IpAddr> = server.peers().iter().map(SocketAddr::ip).collect();
        let others = bench.pods.iter().filter(|other| other.name() != pod.name());
        let unseen: Vec<&str> = others
            .filter(|other| !other.addresses().iter().all(|address| peers.contains(address)))
            .map(KubernetesPod::name)
            .collect();
        ensure!(unseen.is_empty(), "{} was never asked by {unseen:?} with their own addresses: {peers:?}", pod.name());
    }
    // The API server, as every pod finds it.
    let api: IpAddr = admin.run(["get", "service", "kubernetes", "--output", "jsonpath={.spec.clusterIP}"])?.parse()?;
    for pod in &bench.pods {
        tcp::connect(pod.netns(), SocketAddr::new(api, 443), SOON)
            .with_context(|| format!("{} to the API server", pod.name()))?;
    }
    Ok(())
}

fn host_ports_lead_to_pods(bench: &Bench) -> Result<()> {
    let outside = bench.kubernetes.underlay().outside();
    let node = bench.kubernetes.node(1);
    let ask_host_port = |name: &str, host_port: u16| -> Result<()> {
        let ports = json!([{ "containerPort": PORT, "hostPort": host_port, "protocol": "TCP" }]);
        let pod = bench.kubernetes.pod(name, 1).change(|pod| pod["spec"]["containers"][0]["ports"] = ports).add()?;
        let _server = EchoServer::start_on(pod.netns(), SocketAddr::new([0_u16; 8].into(), PORT))?;
        for family in Family::ALL {
            let at = SocketAddr::new(node.host().address(family)?, host_port);
            tcp::transfer(outside, at, 10_000).with_context(|| format!("{name} at {at}"))?;
            tcp::transfer(bench.pods[1].netns(), at, 10_000)
                .with_context(|| format!("{name} at {at} from another node"))?;
        }
        pod.delete_at_once()
    };
    ask_host_port("native", 8101)?;

    // The reference plugin in its place: an administrator's own list, which sorts before Husk's.
    fs::copy("/usr/lib/cni/portmap", node.file("/opt/cni/bin/portmap")).context("copying portmap")?;
    let capabilities = json!({ "portMappings": false });
    let list = json!({
        "cniVersion": "0.4.0", "name": "husk",
        "plugins": [
            { "type": "husk", "capabilities": capabilities },
            { "type": "portmap", "capabilities": { "portMappings": true } },
        ],
    });
    let chained = node.file("/etc/cni/net.d/01-chained.conflist");
    fs::write(&chained, list.to_string())?;
    // Containerd reads the directory when it changes; a start makes sure.
    node.restart(NodeService::Containerd, Signal::SIGTERM)?;
    bench.kubernetes.wait_nodes_ready()?;
    ask_host_port("chained", 8102)?;
    fs::remove_file(&chained)?;
    fs::remove_file(node.file("/opt/cni/bin/portmap"))?;
    node.restart(NodeService::Containerd, Signal::SIGTERM)?;
    bench.kubernetes.wait_nodes_ready()
}

/// What the daemon's account may do beyond what every account may, as `kubectl auth can-i --list` shows it; events in one namespace.
const RIGHTS: [&str; 11] = [
    "addressblocks.husk.dev [get list watch create delete]",
    "addresspools.husk.dev [get list watch]",
    "addresspools.husk.dev/status [patch]",
    "clusternetworkpolicies.policy.networking.k8s.io [get list watch]",
    "namespaces [get list watch]",
    "networkpolicies.networking.k8s.io [get list watch]",
    "nodes [get list watch]",
    "nodes/status [patch]",
    "overlaynodes.husk.dev [get list watch create patch delete]",
    "overlaynodes.husk.dev/status [patch]",
    "pods [get list watch]",
];

const EVENTS: &str = "events [create patch]";

/// Addresses that are no resources and that every account may read (ClusterRoles `system:discovery`,
/// `system:public-info-viewer` and `system:service-account-issuer-discovery`).
const PUBLIC: [&str; 9] =
    ["/api", "/openapi", "/openid", "/healthz", "/livez", "/readyz", "/version", "/.well-known", "/apis"];

fn the_daemon_may_do_what_it_needs(bench: &Bench) -> Result<()> {
    let admin = bench.admin();
    let account = "--as=system:serviceaccount:husk-system:husk";
    let groups = ["--as-group=system:serviceaccounts", "--as-group=system:authenticated"];
    for namespace in ["default", NAMESPACE, "kube-system"] {
        let listed = ["auth", "can-i", "--list", account, groups[0], groups[1], "--namespace", namespace];
        let listed = admin.run(listed)?;
        let mut found: BTreeSet<String> = BTreeSet::new();
        for line in listed.lines().skip(1) {
            let Some((resource, rest)) = line.split_once(char::is_whitespace) else { continue };
            let verbs = rest.rsplit_once('[').map(|(_, verbs)| format!("[{verbs}")).unwrap_or_default();
            let public = |address: &str| PUBLIC.iter().any(|it| address.starts_with(it));
            if resource.is_empty() {
                let address = rest.trim().trim_start_matches('[').split(']').next().unwrap_or_default();
                ensure!(public(address) && verbs == "[get]", "{namespace}: {line}");
            } else if !resource.starts_with("selfsubject") {
                // Asking about oneself everybody may.
                found.insert(format!("{resource} {verbs}"));
            }
        }
        let own = RIGHTS.into_iter().chain((namespace == "default").then_some(EVENTS));
        let expected: BTreeSet<String> = own.map(str::to_owned).collect();
        let difference: Vec<_> = found.symmetric_difference(&expected).collect();
        ensure!(difference.is_empty(), "in {namespace} too much or too little: {difference:?}\n{listed}");
    }
    for forbidden in [["get", "secrets"], ["update", "pods"], ["update", "nodes"], ["create", "addresspools.husk.dev"]]
    {
        let said = admin.output(["auth", "can-i", forbidden[0], forbidden[1], account, groups[0], groups[1]])?;
        ensure!(said.stdout.trim() == "no", "{forbidden:?}: {said:?}");
    }
    Ok(())
}

/// Kubernetes 1.20 has no admission policies; of the others none is stored, but all are judged as if.
fn every_manifest_is_taken(bench: &Bench) -> Result<()> {
    let admin = bench.admin();
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests");
    let file = |name: &str| -> Result<String> {
        let path = directory.join(name);
        fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    };
    let mut all = vec![file("install.yaml")?, file("examples/pool.yaml")?];
    let overlays = ["wireguard", "vxlan", "ipsec", "vxlan-ipsec", "dual-stack", "pools", "uninstall"];
    for overlay in overlays {
        all.push(render(overlay)?);
    }
    for manifests in all {
        let said = admin.run_with(["apply", "--dry-run=server", "-f", "-"], &manifests);
        said.with_context(|| manifests.lines().take(12).collect::<Vec<_>>().join("\n"))?;
    }
    Ok(())
}

fn the_smoke_test_passes(bench: &Bench) -> Result<()> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../hack/smoke-test");
    let kubectl = bench.admin();
    let kubectl = format!("{} --kubeconfig {}", kubectl.path().display(), kubectl.kubeconfig().display());
    let outside = bench.kubernetes.underlay().outside();
    let test = outside.program(script).args(["--kubectl", &kubectl, "--image", IMAGE]).limit(ROLLOUT);
    let said = test.check()?;
    eprintln!("{}", said.lines().last().unwrap_or_default());
    Ok(())
}

fn configuration_is_followed(bench: &Bench) -> Result<()> {
    let admin = bench.admin();
    let good: Value = admin.json(["get", "configmap", "husk-config", "--namespace", NAMESPACE])?;
    let good = good["data"]["config.yaml"].as_str().context("a ConfigMap without config.yaml")?.to_owned();
    let write = |text: &str| -> Result<()> {
        let patch = json!({ "data": { "config.yaml": text } }).to_string();
        admin.run(["patch", "configmap", "husk-config", "--namespace", NAMESPACE, "--patch", &patch])?;
        // The kubelet brings a ConfigMap to its pods once a minute or so, and at once when the pod changes.
        let annotation = format!("husk.dev/test={}", text.len());
        admin.run(["annotate", "pods", "--namespace", NAMESPACE, "--all", "--overwrite", &annotation])?;
        Ok(())
    };
    write(&good.replace("mode: wireguard", "mode: wiregaurd"))?;
    eventually("an event of every node that names the bad value", Duration::from_secs(150), || {
        let events = admin.list("events")?;
        let told = |event: &Value| {
            event["reason"] == "BadConfig" && event["message"].as_str().is_some_and(|it| it.contains("wiregaurd"))
        };
        Ok(events.iter().filter(|event| told(event)).count() == 3)
    })?;
    let described = admin.run(["describe", "node", "host1"])?;
    ensure!(described.contains("BadConfig") && described.contains("stays in force"), "{described}");
    ask_pair(bench).context("with a bad configuration")?;
    write(&format!("{good}\nlog: {{level: debug}}\n"))?;
    for node in bench.kubernetes.nodes() {
        eventually("the daemon to take the new configuration", Duration::from_secs(150), || {
            let kept = fs::read_to_string(node.file("/var/lib/husk/config.yaml")).unwrap_or_default();
            Ok(kept.contains("level: debug")
                && node.host().huskctl_json(["status"]).is_ok_and(|it| it["ready"] == true))
        })?;
    }
    let restarts = r"jsonpath={.items[*].status.containerStatuses[*].restartCount}";
    let restarts = admin.run(["get", "pods", "--namespace", NAMESPACE, "--output", restarts])?;
    ensure!(restarts.split_whitespace().all(|count| count == "0"), "a container was restarted: {restarts}");
    write(&good)?;
    ask_pair(bench)
}

fn ask_pair(bench: &Bench) -> Result<()> {
    let _servers = bench.servers()?;
    let [from, .., to] = bench.pods.as_slice() else { unreachable!("there are three pods") };
    to.addresses().iter().try_for_each(|address| ask(from.netns(), SocketAddr::new(*address, PORT)))
}

fn a_rolling_update_loses_nothing(bench: &Bench) -> Result<()> {
    let (admin, servers) = (bench.admin(), bench.servers()?);
    let [one, two, three] = bench.pods.as_slice() else { unreachable!("there are three pods") };
    let streams = [
        Stream::udp(one.netns(), two.netns(), two.address(Family::Ipv4)?, 200)?,
        Stream::udp(two.netns(), three.netns(), three.address(Family::Ipv6)?, 200)?,
        Stream::ping(three.netns(), one.address(Family::Ipv4)?, 100)?,
    ];
    let flow = Flow::start(one.netns(), servers[2].at(three.address(Family::Ipv4)?), 200_000)?;
    admin.run(["rollout", "restart", "daemonset/husk", "--namespace", NAMESPACE])?;
    admin.wait(ROLLOUT, ["rollout", "status", "daemonset/husk", "--namespace", NAMESPACE])?;
    let moved = flow.stop().context("the TCP stream")?;
    eprintln!("TCP: {} bytes, longest stall {:?}", moved.bytes, moved.largest_stall);
    for stream in streams {
        let report = stream.stop()?;
        eprintln!("{report}");
        ensure!(report.lossless(), "{report}");
    }
    Ok(())
}

fn uninstalled_hosts_are_as_they_were(bench: &Bench) -> Result<()> {
    let admin = bench.admin();
    admin.run(["delete", "service", "echo-0", "echo-1"])?;
    admin.wait(ROLLOUT, ["delete", "pods", "--all"])?;
    bench.pods.iter().try_for_each(KubernetesPod::wait_gone)?;
    // As the README tells it.
    for set in ["daemonset/husk", "daemonset/husk-tunnels"] {
        admin.wait(ROLLOUT, ["delete", set, "--namespace", NAMESPACE])?;
    }
    eventually("the daemons to be gone", ROLLOUT, || Ok(admin.list("pods")?.is_empty()))
        .with_context(|| admin.run(["get", "pods", "--all-namespaces", "--output", "wide"]).unwrap_or_default())?;
    admin.apply(&render("uninstall")?)?;
    admin.wait(ROLLOUT, ["rollout", "status", "daemonset/husk-cleanup", "--namespace", NAMESPACE])?;
    ensure!(admin.list("overlaynodes")?.is_empty(), "records are left");
    admin.wait(ROLLOUT, ["delete", "--ignore-not-found", "namespace", NAMESPACE])?;
    admin.run_with(["delete", "--ignore-not-found", "--wait=false", "-f", "-"], &render("dual-stack")?)?;
    let left = admin.run(["get", "clusterroles,clusterrolebindings,customresourcedefinitions", "--output", "name"])?;
    ensure!(!left.contains("husk"), "{left}");
    for (node, before) in bench.kubernetes.nodes().iter().zip(&bench.before) {
        let mut difference = Vec::new();
        let restored = eventually("the host to be as it was", SOON, || {
            difference = before.difference(&HostState::of(node.host())?);
            difference.retain(|line| !is_of_kubernetes(line) || line.contains("husk"));
            Ok(difference.is_empty())
        });
        restored.with_context(|| format!("{}: {difference:#?}", node.name()))?;
    }
    Ok(())
}

/// What kube-proxy, kubelet and containerd keep or leave themselves; nothing of it has Husk's name.
fn is_of_kubernetes(line: &str) -> bool {
    // kube-proxy turns route_localnet on, some time after it was started.
    ["nft list ruleset", "nf_conntrack", "process ", "kube", "conf/all/route_localnet"]
        .iter()
        .any(|part| line.contains(part))
}
