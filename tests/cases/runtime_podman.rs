//! podman with its CNI backend as the runtime: containers on the network that the daemon configured reach pods of another host,
//! and leave nothing when they are removed. No image is needed: a container's root is a directory.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::engine::Engine;
use husk_tests::probe::tcp;
use husk_tests::{Cluster, Family, Mode, eventually};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(20);

struct Podman<'a> {
    engine: Engine<'a>,
    root: String,
}

impl<'a> Podman<'a> {
    fn new(engine: Engine<'a>) -> Result<Self> {
        // Everything else is podman's default.
        let config = "[containers]\nlog_driver = \"k8s-file\"\n\
             [engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"none\"\nruntime = \"runc\"\n\
             tmp_dir = \"/run/libpod\"\n\
             [network]\nnetwork_backend = \"cni\"\nnetwork_config_dir = \"/etc/cni/net.d\"\n\
             cni_plugin_dirs = [\"/opt/cni/bin\", \"/usr/lib/cni\"]\n";
        fs::write(engine.directory().join("containers.conf"), config)?;
        let root = engine.root_file_system()?.display().to_string();
        let podman = Self { engine, root };
        podman.require_cni()?;
        Ok(podman)
    }

    /// From version 5 on podman is built without it.
    fn require_cni(&self) -> Result<()> {
        let backend = self.call(["info", "--format", "{{.Host.NetworkBackend}}"]);
        let backend = backend.context("podman with its CNI backend is needed, such as Debian 12's package podman")?;
        ensure!(backend.trim() == "cni", "podman takes {backend:?} instead of CNI");
        Ok(())
    }

    fn call<'b>(&self, arguments: impl IntoIterator<Item = &'b str>) -> Result<String> {
        let config = format!("CONTAINERS_CONF={}", self.engine.directory().join("containers.conf").display());
        self.engine.program("env").args([&config, "podman", "--storage-driver", "vfs"]).args(arguments).check()
    }

    fn run(&self, name: &str, options: &[&str]) -> Result<()> {
        let group = self.engine.control_group();
        let common = ["run", "--detach", "--network", "husk", "--cgroup-parent", &group, "--name", name];
        let command = ["--rootfs", &self.root, "/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/bin"];
        self.call(common.into_iter().chain(options.iter().copied()).chain(command)).map(drop)
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.call(["rm", "--force", "--time", "0", name]).map(drop)
    }

    fn addresses(&self, name: &str) -> Result<Vec<IpAddr>> {
        let inspected: Value = serde_json::from_str(&self.call(["inspect", name])?)?;
        let network = &inspected[0]["NetworkSettings"]["Networks"]["husk"];
        let text = |key: &str| network[key].as_str().with_context(|| format!("no {key} in {network}"));
        Ok(vec![text("IPAddress")?.parse()?, text("GlobalIPv6Address")?.parse()?])
    }
}

#[test]
fn containers_of_podman() -> Result<()> {
    let cluster = Cluster::builder().mode(Mode::Vxlan).start()?;
    let host = cluster.host(1);
    let peer = cluster.host(2).add_pod("peer")?;
    let before = host.residue()?;
    ensure!(before.is_empty(), "{before:?}");
    let podman = Podman::new(Engine::on(host, cluster.scope())?)?;

    podman.run("one", &[])?;
    podman.run("two", &[])?;
    let (one, two) = (podman.addresses("one")?, podman.addresses("two")?);
    for address in one.iter().chain(&two) {
        peer.await_answer_at(*address, SOON)?;
    }
    for to in Family::ALL.iter().map(|family| peer.address(*family)).chain(two.iter().copied().map(Ok)) {
        let to = to?.to_string();
        let said = podman.call(["exec", "one", "/bin/busybox", "ping", "-c", "1", "-W", "5", &to])?;
        ensure!(said.contains("1 packets received"), "{said}");
    }
    podman.remove("one")?;
    peer.await_answer_at(two[0], SOON)?;
    podman.remove("two")?;
    ensure!(host.residue()?.is_empty(), "containers that were removed left {:?}", host.residue()?);

    // What the user chose, by the capabilities that the network declares.
    let (wish, mac) = (one[0].to_string(), "02:00:5e:10:20:30");
    podman.run("three", &["--ip", &wish, "--mac-address", mac, "--publish", "8080:80"])?;
    ensure!(podman.addresses("three")?[0] == one[0]);
    let link = podman.call(["exec", "three", "/bin/busybox", "ip", "link", "show", "eth0"])?;
    ensure!(link.contains(mac), "{link}");
    peer.await_answer_at(one[0], SOON)?;
    let at = SocketAddr::new(host.address(Family::Ipv4)?, 8080);
    let answers = || tcp::connect(cluster.host(2).netns(), at, Duration::from_secs(1)).is_ok();
    eventually("the published port to lead to the container", SOON, || Ok(answers()))?;
    podman.remove("three")?;
    ensure!(host.residue()?.is_empty(), "{:?}", host.residue()?);
    eventually("the published port to lead nowhere", SOON, || Ok(!answers()))?;
    Ok(())
}
