//! The harness of the tier cluster by itself, without Husk: what the other cases of the tier measure with has to be right first.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::kubernetes::{ControlService, IMAGE, Kubernetes, NodeService};
use husk_tests::probe::Reach;
use husk_tests::{Family, Signal, eventually, scope};
use serde_json::json;

/// How long a change may take until the API server shows it.
const SOON: Duration = Duration::from_secs(30);

/// Why each node is not ready.
const NOT_READY: &str = r#"jsonpath={range .items[*]}{.status.conditions[?(@.type=="Ready")].message}{"\n"}{end}"#;

/// Debian's reference plugins, which serve here in Husk's place.
const PLUGINS: &str = "/usr/lib/cni";

#[test]
fn nodes_register_and_are_not_ready_for_lack_of_a_network_alone() -> Result<()> {
    let kubernetes = Kubernetes::builder().nodes(2).user("visitor", "").start()?;
    let prefix = kubernetes.scope().prefix().to_owned();
    // As long as there is any other reason, it stands there too.
    eventually("the lack of a network to be the only reason", SOON, || {
        let said = kubernetes.kubectl(["get", "nodes", "--output", NOT_READY])?;
        let alone = |line: &&str| line.contains("NetworkPluginNotReady") && !line.contains(',');
        Ok(said.lines().filter(alone).count() == 2)
    })?;
    eventually("node CIDRs", SOON, || {
        let cidrs = kubernetes.kubectl(["get", "nodes", "--output", "jsonpath={.items[*].spec.podCIDR}"])?;
        Ok(cidrs.split_whitespace().filter(|cidr| cidr.starts_with("10.244.")).count() == 2)
    })?;
    let refused = kubernetes.user("visitor")?.output(["get", "nodes"])?;
    ensure!(refused.stderr.contains("Forbidden"), "{refused:?}");
    ensure!(!remains(&prefix)?.is_empty(), "the search for remains finds nothing of a cluster that is up");
    drop(kubernetes);
    let remains = remains(&prefix)?;
    ensure!(remains.is_empty(), "left behind: {remains:#?}");
    Ok(())
}

#[test]
fn pods_run_are_entered_and_go_on_without_kubelet_runtime_and_api_server() -> Result<()> {
    let mut kubernetes = Kubernetes::builder().nodes(2).start()?;
    install_bridge(&kubernetes)?;
    let (a, b) = (kubernetes.pod("a", 1).label("app", "x").add()?, kubernetes.pod("b", 2).add()?);
    for (pod, node) in [(&a, 1), (&b, 2)] {
        let address = pod.address(Family::Ipv4)?.to_string();
        ensure!(pod.exec(["ip", "-4", "addr", "show", "dev", "eth0"])?.contains(&format!("inet {address}/")));
        // The same namespace by the shorter way.
        ensure!(pod.program("ip").args(["-4", "addr", "show", "dev", "eth0"]).check()?.contains(&address));
        ping(kubernetes.node(node).netns(), &address)?;
        ensure!(kubernetes.node(node).images()?.iter().any(|image| image == IMAGE));
    }

    let node = kubernetes.node(1);
    for service in [NodeService::Kubelet, NodeService::Containerd, NodeService::KubeProxy] {
        node.restart(service, Signal::SIGKILL)?;
    }
    let snapshot = kubernetes.snapshot("before")?;
    kubernetes.stop_control(ControlService::ApiServer, Signal::SIGKILL)?;
    let address = a.address(Family::Ipv4)?.to_string();
    ping(kubernetes.node(1).netns(), &address)?;
    kubernetes.start_control(ControlService::ApiServer)?;
    kubernetes.wait_api_server()?;
    eventually("the kubelet to serve again", SOON, || Ok(a.exec(["true"]).is_ok()))?;

    kubernetes.kubectl(["create", "namespace", "later"])?;
    kubernetes.restore(&snapshot)?;
    ensure!(kubernetes.kubectl(["get", "namespace", "later"]).is_err(), "the namespace outlived the restore");
    ensure!(a.exec(["echo", "still"])? == "still\n");

    kubernetes.readdress(2, 77)?;
    eventually("the node's new address", SOON, || {
        let path = r#"jsonpath={.status.addresses[?(@.type=="InternalIP")].address}"#;
        Ok(kubernetes.kubectl(["get", "node", "host2", "--output", path])? == "192.0.2.77")
    })?;
    kubernetes.wait_nodes_ready()?;
    a.delete()?;

    let number = kubernetes.add_node()?;
    install_bridge(&kubernetes)?;
    kubernetes.pod("c", number).add()?.delete_at_once()?;
    kubernetes.remove_node(2)?;
    ensure!(kubernetes.kubectl(["get", "nodes", "--output", "jsonpath={.items[*].metadata.name}"])? == "host1 host3");
    ensure!(kubernetes.nodes().len() == 2);
    Ok(())
}

#[test]
fn both_families_and_no_node_cidrs_where_asked() -> Result<()> {
    let kubernetes = Kubernetes::builder().nodes(1).dual_stack().start()?;
    let node = ["get", "node", "host1", "--output"];
    eventually("a node CIDR of each family", SOON, || {
        let cidrs = kubernetes.kubectl(node.into_iter().chain(["jsonpath={.spec.podCIDRs}"]))?;
        Ok(cidrs.contains("10.244.") && cidrs.contains("fd00:10:244:"))
    })?;
    let addresses = r#"jsonpath={.status.addresses[?(@.type=="InternalIP")].address}"#;
    let addresses = kubernetes.kubectl(node.into_iter().chain([addresses]))?;
    ensure!(addresses == "192.0.2.1 2001:db8::1", "{addresses}");
    drop(kubernetes);

    let kubernetes = Kubernetes::builder().nodes(1).without_node_cidrs().start()?;
    install_bridge(&kubernetes)?;
    // Once the node is ready, the controller manager has had as much time as it takes otherwise.
    ensure!(kubernetes.kubectl(["get", "node", "host1", "--output", "jsonpath={.spec.podCIDR}"])?.is_empty());
    Ok(())
}

/// Gives every node a network of its own, of Debian's plugin `bridge`, and waits until all are ready.
fn install_bridge(kubernetes: &Kubernetes) -> Result<()> {
    for (number, node) in (1..).zip(kubernetes.nodes()) {
        for plugin in ["bridge", "host-local"] {
            let (from, to) = (Path::new(PLUGINS).join(plugin), node.file("/opt/cni/bin").join(plugin));
            // Not over one that may be running.
            if !to.exists() {
                fs::copy(&from, to).with_context(|| format!("copying {}", from.display()))?;
            }
        }
        let bridge = json!({
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": true,
            "ipMasq": true,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": format!("10.244.{number}.0/24")}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        });
        let list = json!({"cniVersion": "0.4.0", "name": "bridge", "plugins": [bridge]});
        fs::write(node.file("/etc/cni/net.d/10-bridge.conflist"), list.to_string())?;
    }
    kubernetes.wait_nodes_ready()
}

fn ping(from: &husk_tests::Netns, address: &str) -> Result<()> {
    let reach = husk_tests::probe::Echo::to(address.parse()?).run(from)?;
    ensure!(matches!(reach, Reach::Answered { .. }), "{address}: {reach:?}");
    Ok(())
}

/// What there is of a cluster: names of namespaces, directories, mounts, control groups, processes.
fn remains(prefix: &str) -> Result<Vec<String>> {
    let mut found = scope::namespaces(prefix);
    let mut search = |directory: &Path| -> Result<()> {
        for entry in fs::read_dir(directory).with_context(|| format!("listing {}", directory.display()))? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(prefix) {
                found.push(entry.path().display().to_string());
            }
        }
        Ok(())
    };
    search(&std::env::temp_dir())?;
    search(Path::new("/sys/fs/cgroup"))?;
    for hierarchy in fs::read_dir("/sys/fs/cgroup")?.flatten().filter(|entry| entry.path().is_dir()) {
        search(&hierarchy.path())?;
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    found.extend(mounts.lines().filter(|line| line.contains(prefix)).map(str::to_owned));
    for process in fs::read_dir("/proc")?.flatten() {
        // Programs of a cluster name its directory, or are in a control group of its; the case's own process does neither.
        let read = |file: &str| fs::read_to_string(process.path().join(file)).unwrap_or_default().replace('\0', " ");
        let (command, groups) = (read("cmdline"), read("cgroup"));
        if command.contains(prefix) || groups.contains(prefix) {
            found.push(format!("process {}: {command}", process.path().display()));
        }
    }
    Ok(found)
}
