//! Policy on a real Kubernetes: applied with kubectl, held by the kernel of every node, seen between pods and through Services.

use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use husk_tests::kubernetes::{Kubectl, Kubernetes, KubernetesPod, step};
use husk_tests::policy::scene::{Service, answers};
use husk_tests::probe::{EchoServer, tcp};
use husk_tests::{Family, Netns, eventually};
use serde_json::{Value, json};

/// How long a change may take until every node has it. Whether there are cluster policies is looked at every half minute.
const SOON: Duration = Duration::from_secs(60);

/// Where pods serve, and the name of that port.
const PORT: u16 = 8080;

/// What is done, and the doing.
type Step = (&'static str, fn(&Bench) -> Result<()>);

const STEPS: [Step; 6] = [
    ("policies by pod, namespace and named port", policies_hold),
    ("a label decides", a_label_decides),
    ("through a Service it is the pods that count", services_lead_to_pods),
    ("a pod that starts under a policy is under it from its first packet", pods_start_under_policy),
    ("cluster policies come with their definition, and what is not understood is told", cluster_policies_hold),
    ("quarantine by label, told as an event", quarantine_cuts_off),
];

#[test]
fn policy_on_kubernetes() -> Result<()> {
    let kubernetes = Kubernetes::builder().nodes(2).dual_stack().start()?;
    kubernetes.install("dual-stack")?;
    let admin = kubernetes.admin();
    admin.run(["create", "namespace", "dev"])?;
    admin.run(["label", "namespace", "dev", "stage=dev"])?;
    admin.run(["label", "namespace", "default", "stage=prod"])?;
    let port = |pod: &mut Value| {
        pod["spec"]["containers"][0]["ports"] = json!([{ "name": "echo", "containerPort": PORT }]);
    };
    let pod = |name: &str, node: usize, app: &str| kubernetes.pod(name, node).label("app", app).change(port);
    let pods = vec![
        pod("web", 1, "web").add()?,
        pod("near", 1, "client").add()?,
        pod("far", 2, "client").add()?,
        pod("dev", 2, "client").in_namespace("dev").add()?,
    ];
    let at = SocketAddr::new([0_u16; 8].into(), PORT);
    let servers = pods.iter().map(|pod| EchoServer::start_on(pod.netns(), at)).collect::<Result<Vec<_>>>()?;
    let bench = Bench { kubernetes, pods, _servers: servers };
    STEPS.into_iter().try_for_each(|(name, work)| step(name, || work(&bench)))
}

struct Bench {
    kubernetes: Kubernetes,
    pods: Vec<KubernetesPod>,
    _servers: Vec<EchoServer>,
}

impl Bench {
    fn admin(&self) -> Kubectl {
        self.kubernetes.admin()
    }

    fn pod(&self, name: &str) -> &KubernetesPod {
        self.pods.iter().find(|pod| pod.name() == name).expect("the pods are fixed")
    }

    fn policy(&self, name: &str, spec: &Value) -> Result<()> {
        let policy = json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": { "name": name, "namespace": "default" }, "spec": spec,
        });
        self.admin().apply(&policy.to_string()).map(drop)
    }

    fn clear(&self) -> Result<()> {
        self.admin().run(["delete", "networkpolicies", "--all"]).map(drop)
    }

    /// Waits until exactly these reach the pod `web`, over both families, and asks once more.
    fn assert_reaching_web(&self, what: &str, clients: &[&str]) -> Result<()> {
        let started = Instant::now();
        let services = [Service::Tcp(PORT), Service::Udp(PORT)];
        let questions: Vec<_> = ["near", "far", "dev"]
            .iter()
            .flat_map(|client| self.pod("web").addresses().iter().map(move |address| (*client, *address)))
            .flat_map(|(client, address)| services.map(|service| (client, address, service)))
            .collect();
        // All at once, since every answer that must not come is waited for.
        let surprises = || -> Result<Vec<String>> {
            thread::scope(|scope| {
                let asked = questions.iter().map(|(client, address, service)| {
                    let netns = self.pod(client).netns();
                    (
                        format!("{client} {service:?} {address}"),
                        clients.contains(client),
                        scope.spawn(|| answers(netns, *service, *address)),
                    )
                });
                let mut all = Vec::new();
                for (question, expected, answer) in asked.collect::<Vec<_>>() {
                    if answer.join().map_err(|_| anyhow!("a question panicked"))?? != expected {
                        all.push(question);
                    }
                }
                Ok(all)
            })
        };
        let mut last = Vec::new();
        let settled = eventually(what, SOON, || {
            last = surprises()?;
            Ok(last.is_empty())
        });
        settled.with_context(|| format!("{what}: {last:?}"))?;
        eprintln!("  {what}: in force within {:.1?}", started.elapsed());
        let again = surprises()?;
        ensure!(again.is_empty(), "{what}: not for long: {again:?}");
        Ok(())
    }
}

fn policies_hold(bench: &Bench) -> Result<()> {
    bench.assert_reaching_web("without any policy", &["near", "far", "dev"])?;
    bench.policy("deny", &json!({ "podSelector": {} }))?;
    bench.assert_reaching_web("default deny", &[])?;
    let web = json!({ "matchLabels": { "app": "web" } });
    let clients = json!([{ "podSelector": { "matchLabels": { "app": "client" } } }]);
    let ports = json!([{ "port": "echo" }, { "port": "echo", "protocol": "UDP" }, { "port": PORT, "protocol": "UDP" }]);
    bench.policy("clients", &json!({ "podSelector": web, "ingress": [{ "from": clients, "ports": ports }] }))?;
    bench.assert_reaching_web("clients of the namespace, at a named port", &["near", "far"])?;
    let dev = json!([{ "namespaceSelector": { "matchLabels": { "stage": "dev" } } }]);
    bench.policy("clients", &json!({ "podSelector": web, "ingress": [{ "from": dev }] }))?;
    bench.assert_reaching_web("another namespace", &["dev"])?;
    // What was denied is told with names.
    let node = bench.kubernetes.node(1);
    eventually("a flow record that names both pods and the policies", SOON, || {
        answers(bench.pod("far").netns(), Service::Udp(PORT), bench.pod("web").addresses()[0])?;
        let text = node.host().huskctl(["flows", "--denied", "--output", "json"])?.stdout;
        let records = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        Ok(records.into_iter().any(|it| {
            let text = it.to_string();
            text.contains("\"far\"") && text.contains("\"web\"") && text.contains("default/clients")
        }))
    })?;
    let traced = node.host().huskctl(["trace", "default/near", "default/web", "--port", "8080"])?;
    ensure!(traced.status.code() == Some(1) && traced.stdout.contains("default/clients"), "{traced:?}");
    bench.clear()
}

fn a_label_decides(bench: &Bench) -> Result<()> {
    let web = json!({ "matchLabels": { "app": "web" } });
    let chosen = json!([{ "podSelector": { "matchLabels": { "chosen": "yes" } } }]);
    bench.policy("chosen", &json!({ "podSelector": web, "ingress": [{ "from": chosen }] }))?;
    bench.assert_reaching_web("nobody is chosen", &[])?;
    let admin = bench.admin();
    for pod in ["far", "near"] {
        admin.run(["label", "pod", pod, "chosen=yes"])?;
        bench.assert_reaching_web("one is chosen", &[pod])?;
        admin.run(["label", "pod", pod, "chosen-"])?;
    }
    bench.assert_reaching_web("nobody is chosen any more", &[])?;
    bench.clear()
}

fn services_lead_to_pods(bench: &Bench) -> Result<()> {
    let admin = bench.admin();
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "web" },
        "spec": { "selector": { "app": "web" }, "ports": [{ "port": 80, "targetPort": PORT }] },
    });
    admin.apply(&service.to_string())?;
    let address: IpAddr = admin.run(["get", "service", "web", "--output", "jsonpath={.spec.clusterIP}"])?.parse()?;
    let at = SocketAddr::new(address, 80);
    let reaches = |pod: &str| tcp::connect(bench.pod(pod).netns(), at, Duration::from_millis(500)).is_ok();
    eventually("everybody to reach the service", SOON, || Ok(["near", "far", "dev"].into_iter().all(reaches)))?;
    let near = json!([{ "podSelector": { "matchLabels": { "name": "near" } } }]);
    let spec = json!({ "podSelector": { "matchLabels": { "app": "web" } }, "ingress": [{ "from": near, "ports": [{ "port": PORT },
        { "port": PORT, "protocol": "UDP" }] }] });
    bench.policy("near", &spec)?;
    bench.assert_reaching_web("one client", &["near"])?;
    ensure!(reaches("near") && !reaches("far") && !reaches("dev"), "and the same through the service");
    admin.run(["delete", "service", "web"])?;
    bench.clear()
}

fn pods_start_under_policy(bench: &Bench) -> Result<()> {
    let egress = json!({ "podSelector": { "matchLabels": { "app": "locked" } }, "policyTypes": ["Egress"] });
    bench.policy("locked", &egress)?;
    let to = bench.pod("web").addresses()[0];
    let watch = husk_tests::policy::scene::watch(bench.pod("web").netns(), SocketAddr::new(to, 53))?;
    // The first act of its first process is to send, and it goes on.
    let script = format!("while :; do nslookup name {to}; done");
    let pod = bench.kubernetes.pod("locked", 1).label("app", "locked").command(&["sh", "-c", &script]).add()?;
    ensure!(watch.is_silent()?, "something passed");
    bench.clear()?;
    eventually("the pod to be heard once the policy is gone", SOON, || Ok(!watch.is_silent()?))?;
    pod.delete_at_once()
}

/// As much of the definition as an API server needs.
fn definition() -> Value {
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": { "name": "clusternetworkpolicies.policy.networking.k8s.io",
            "annotations": { "api-approved.kubernetes.io": "https://github.com/kubernetes-sigs/network-policy-api" } },
        "spec": {
            "group": "policy.networking.k8s.io", "scope": "Cluster",
            "names": { "kind": "ClusterNetworkPolicy", "plural": "clusternetworkpolicies", "singular": "clusternetworkpolicy" },
            "versions": [{ "name": "v1alpha2", "served": true, "storage": true,
                "schema": { "openAPIV3Schema": { "type": "object", "x-kubernetes-preserve-unknown-fields": true } } }],
        },
    })
}

fn cluster_policies_hold(bench: &Bench) -> Result<()> {
    let admin = bench.admin();
    admin.apply(&definition().to_string())?;
    let named = "crd/clusternetworkpolicies.policy.networking.k8s.io";
    admin.wait(SOON, ["wait", "--for=condition=Established", named])?;
    let policy = |spec: &Value| {
        json!({ "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy",
            "metadata": { "name": "admin" }, "spec": spec })
        .to_string()
    };
    let subject = json!({ "pods": { "namespaceSelector": {}, "podSelector": { "matchLabels": { "app": "web" } } } });
    let dev = json!([{ "namespaces": { "matchLabels": { "stage": "dev" } } }]);
    admin.apply(&policy(&json!({ "tier": "Admin", "priority": 1, "subject": subject,
        "ingress": [{ "name": "no-dev", "action": "Deny", "from": dev }] })))?;
    bench.assert_reaching_web("Admin denies a namespace", &["near", "far"])?;
    // A kind of peer that nobody has heard of: a rule that denies it denies everything, and says why.
    admin.apply(&policy(&json!({ "tier": "Admin", "priority": 1, "subject": subject,
        "ingress": [{ "action": "Deny", "from": [{ "planets": {} }] }] })))?;
    bench.assert_reaching_web("a peer that is not understood", &[])?;
    eventually("an event that names the field", SOON, || {
        let events = admin.list("events")?;
        Ok(events.iter().any(|it| it["message"].as_str().is_some_and(|text| text.contains("planets"))))
    })?;
    admin.run(["delete", "clusternetworkpolicies.policy.networking.k8s.io", "admin"])?;
    bench.assert_reaching_web("without it", &["near", "far", "dev"])?;
    admin.run(["delete", named]).map(drop)
}

fn quarantine_cuts_off(bench: &Bench) -> Result<()> {
    let admin = bench.admin();
    admin.run(["label", "pod", "far", "husk.dev/quarantine=true"])?;
    bench.assert_reaching_web("one in quarantine", &["near", "dev"])?;
    let own = bench.kubernetes.node(2).host().address(Family::Ipv4)?;
    let pings = |netns: &Netns| answers(netns, Service::Ping, own);
    ensure!(!pings(bench.pod("far").netns())?, "not even its own host");
    eventually("an event that tells of it", SOON, || {
        let events = admin.list("events")?;
        Ok(events.iter().any(|it| it["reason"] == "Quarantined" && it["involvedObject"]["name"] == "far"))
    })?;
    admin.run(["label", "pod", "far", "husk.dev/quarantine-"])?;
    bench.assert_reaching_web("let out again", &["near", "far", "dev"])
}
