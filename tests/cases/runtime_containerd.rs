//! containerd as the runtime, asked for pods through its CRI as the kubelet asks: pods are made with what they want (host ports,
//! limits of what passes), reach pods of another host, and leave nothing when they are removed.

use std::fs::{self, File};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::cri::{self, Cri, Message};
use husk_tests::engine::Engine;
use husk_tests::probe::tcp;
use husk_tests::process::Program;
use husk_tests::{Cluster, Family, Mode, eventually};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(20);

const IMAGE: &str = "localhost/husk-test:1";

/// Where the server in a container listens, and the host's port that leads to it.
const CONTAINER_PORT: u16 = 80;
const HOST_PORT: u16 = 8080;

/// What containerd calls for every pod before the network's own plugins (until 2.0, which sets the interface up by itself).
const LOOPBACK: &str = "/usr/lib/cni/loopback";

/// containerd in its place.
struct Containerd<'a> {
    cri: Cri,
    engine: Engine<'a>,
}

impl<'a> Containerd<'a> {
    fn start(engine: Engine<'a>) -> Result<Self> {
        let directory = engine.directory().to_owned();
        // containerd looks in one directory only.
        fs::copy(LOOPBACK, engine.host().file("/opt/cni/bin/loopback"))
            .with_context(|| format!("{LOOPBACK}: install the package containernetworking-plugins"))?;
        let socket = directory.join("containerd.sock");
        let path = |name: &str| directory.join(name).display().to_string();
        let config = cri::containerd(&path("root"), &socket.display().to_string(), IMAGE);
        fs::write(directory.join("config.toml"), config)?;
        let log = File::create(directory.join("log"))?;
        engine.program("containerd").args(["--config", &path("config.toml")]).spawn(&log)?;
        let containerd = Self { cri: Cri::at(&socket), engine };
        eventually("containerd to answer", SOON, || Ok(containerd.ctr(["version"]).is_ok()))?;
        containerd.import_image()?;
        Ok(containerd)
    }

    fn ctr<'b>(&self, arguments: impl IntoIterator<Item = &'b str>) -> Result<String> {
        let socket = self.engine.directory().join("containerd.sock");
        let common = ["--address", socket.to_str().context("a path that is no text")?, "--namespace", "k8s.io"];
        self.engine.program("ctr").args(common).args(arguments).check()
    }

    /// An image of one layer, busybox, written by hand: no registry is needed.
    fn import_image(&self) -> Result<()> {
        let directory = self.engine.directory();
        let tar = |content: &Path, to: &str, files: &[&str]| {
            let (content, to) = (content.display().to_string(), directory.join(to).display().to_string());
            Program::new("tar").args(["-C", &content, "-cf", &to]).args(files).check()
        };
        tar(&self.engine.root_file_system()?, "layer.tar", &["."])?;
        let sum = Program::new("sha256sum").args([directory.join("layer.tar")]).check()?;
        let digest = sum.split_whitespace().next().context("no digest")?;
        let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        let config = json!({
            "architecture": architecture,
            "os": "linux",
            "config": {"Cmd": ["/bin/busybox", "sleep", "100000"]},
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]},
        });
        fs::write(directory.join("config.json"), config.to_string())?;
        let manifest = json!([{"Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"]}]);
        fs::write(directory.join("manifest.json"), manifest.to_string())?;
        tar(directory, "image.tar", &["manifest.json", "config.json", "layer.tar"])?;
        let image = directory.join("image.tar");
        // CRI's own image store hears of an image a moment after it is there.
        self.ctr(["images", "import", image.to_str().context("a path that is no text")?])?;
        Ok(())
    }

    /// `PodSandboxConfig` of a pod without special wishes.
    fn plain(&self, name: &str) -> Message {
        let metadata = Message::new().text(1, name).text(2, name).text(3, "default");
        let linux = Message::new().text(1, &self.engine.control_group());
        let logs = self.engine.directory().join("pods");
        Message::new().message(1, &metadata).text(2, name).text(3, &logs.display().to_string()).message(8, &linux)
    }

    /// `PodSandboxConfig` of a pod with a host port and limits, as the kubelet makes it of `hostPort` and annotations.
    fn demanding(&self, name: &str) -> Message {
        let mapping = Message::new().number(2, CONTAINER_PORT.into()).number(3, HOST_PORT.into());
        let annotation = |key: &str, value: &str| Message::new().text(1, key).text(2, value);
        let plain = self.plain(name).message(5, &mapping);
        let plain = plain.message(7, &annotation("kubernetes.io/ingress-bandwidth", "20M"));
        plain.message(7, &annotation("kubernetes.io/egress-bandwidth", "8M"))
    }

    fn run_sandbox(&self, config: Message) -> Result<Sandbox<'_>> {
        let answer = self.cri.call("RunPodSandbox", &Message::new().message(1, &config));
        let answer = answer.with_context(|| self.last_words())?;
        Ok(Sandbox { containerd: self, config, id: answer.one(1)?.as_text() })
    }

    fn last_words(&self) -> String {
        let log = self.engine.log("log");
        let lines: Vec<&str> = log.lines().filter(|line| line.contains("level=error")).collect();
        lines[lines.len().saturating_sub(5)..].join("\n")
    }
}

struct Sandbox<'a> {
    containerd: &'a Containerd<'a>,
    config: Message,
    id: String,
}

impl Sandbox<'_> {
    /// `PodSandboxStatus`, and the result of ADD that is in its details.
    fn status(&self) -> Result<(Message, Value)> {
        let answer = self.containerd.cri.call("PodSandboxStatus", &Message::new().text(1, &self.id).number(2, 1))?;
        let entries = answer.all(2)?;
        let info = entries.iter().find(|entry| entry.one(1).is_ok_and(|key| key.as_text() == "info"));
        let info: Value = serde_json::from_str(&info.context("no details")?.one(2)?.as_text())?;
        Ok((answer.one(1)?, info["cniResult"].clone()))
    }

    /// The addresses that the kubelet would publish as the pod's.
    fn addresses(&self) -> Result<Vec<IpAddr>> {
        let network = self.status()?.0.one(5)?;
        let more = network.all(2)?.iter().map(|it| it.one(1)).collect::<Result<Vec<_>>>()?;
        [network.one(1)?].iter().chain(&more).map(|it| Ok(it.as_text().parse()?)).collect()
    }

    /// Starts a container whose program is one of busybox; returns its id.
    fn start(&self, command: &[&str]) -> Result<String> {
        let containerd = self.containerd;
        let metadata = Message::new().text(1, "main");
        let image = Message::new().text(1, IMAGE);
        let config = Message::new().message(1, &metadata).message(2, &image).text(3, "/bin/busybox");
        let config = command.iter().fold(config, |config, argument| config.text(4, argument));
        let request = Message::new().text(1, &self.id).message(2, &config).message(3, &self.config);
        let container = containerd.cri.call("CreateContainer", &request).with_context(|| containerd.last_words())?;
        let id = container.one(1)?.as_text();
        let started = containerd.cri.call("StartContainer", &Message::new().text(1, &id));
        started.with_context(|| containerd.last_words())?;
        Ok(id)
    }

    /// Runs a program of busybox in a container; returns its output.
    fn exec(&self, container: &str, command: &[&str]) -> Result<String> {
        let request = Message::new().text(1, container).text(2, "/bin/busybox");
        let request = command.iter().fold(request, |request, word| request.text(2, word)).number(3, 20);
        let answer = self.containerd.cri.call("ExecSync", &request);
        let answer = answer.with_context(|| self.containerd.last_words())?;
        Ok(answer.all(1)?.iter().chain(&answer.all(2)?).map(Message::as_text).collect())
    }

    fn stop(&self) -> Result<()> {
        self.containerd.cri.call("StopPodSandbox", &Message::new().text(1, &self.id)).map(drop)
    }

    fn remove(&self) -> Result<()> {
        self.containerd.cri.call("RemovePodSandbox", &Message::new().text(1, &self.id)).map(drop)
    }
}

/// The limits of a pod are there on both of its ends.
fn limited(sandbox: &Sandbox<'_>) -> Result<()> {
    let (_, result) = sandbox.status()?;
    let interfaces = result["Interfaces"].as_object().context("no interfaces")?;
    let host_end = interfaces.keys().find(|name| name.starts_with("husk")).with_context(|| result.to_string())?;
    let netns = interfaces["eth0"]["Sandbox"].as_str().context("no sandbox")?;
    let in_pod = format!("nsenter --net={netns} tc qdisc show dev eth0 root");
    let on_host = format!("tc qdisc show dev {host_end} root");
    for (command, rate) in [(on_host, "20Mbit"), (in_pod, "8Mbit")] {
        let mut words = command.split(' ');
        let program = sandbox.containerd.engine.program(words.next().unwrap_or_default());
        let shown = program.args(words).check()?;
        ensure!(shown.contains("tbf") && shown.contains(rate), "{command}: {shown}");
    }
    Ok(())
}

#[test]
fn pods_of_containerd() -> Result<()> {
    let cluster = Cluster::builder().mode(Mode::Vxlan).start()?;
    let host = cluster.host(1);
    let peer = cluster.host(2).add_pod("peer")?;
    let before = host.residue()?;
    ensure!(before.is_empty(), "{before:?}");
    let containerd = Containerd::start(Engine::on(host, cluster.scope())?)?;

    let configs = [containerd.demanding("one"), containerd.plain("two"), containerd.plain("three")];
    let sandboxes = configs.map(|config| containerd.run_sandbox(config)).into_iter().collect::<Result<Vec<_>>>()?;
    for sandbox in &sandboxes {
        let (_, result) = sandbox.status()?;
        ensure!(result["Interfaces"]["eth0"]["IPConfigs"].as_array().is_some_and(|it| it.len() == 2), "{result}");
        let addresses = sandbox.addresses()?;
        ensure!(addresses.len() == 2, "{addresses:?}");
        addresses.iter().try_for_each(|address| peer.await_answer_at(*address, SOON))?;
    }
    let [one, ..] = &sandboxes[..] else { anyhow::bail!("no sandbox") };
    let container = one.start(&["httpd", "-f", "-p", &CONTAINER_PORT.to_string(), "-h", "/bin"])?;
    for family in Family::ALL {
        let address = peer.address(family)?.to_string();
        let said = one.exec(&container, &["ping", "-c", "1", "-W", "5", &address])?;
        ensure!(said.contains("1 packets received"), "{address}: {said}");
    }
    let at = SocketAddr::new(host.address(Family::Ipv4)?, HOST_PORT);
    let answers = || tcp::connect(cluster.host(2).netns(), at, Duration::from_secs(1)).is_ok();
    eventually("the host port to lead to the pod", SOON, || Ok(answers()))?;
    limited(one)?;
    ensure!(!host.residue()?.is_empty());
    for sandbox in &sandboxes {
        sandbox.stop()?;
        sandbox.stop()?;
        sandbox.remove()?;
    }
    let after = host.residue()?;
    ensure!(after.is_empty(), "pods that were removed left {after:?}");
    eventually("the host port to lead nowhere", SOON, || Ok(!answers()))?;

    // A pod whose sandbox failed, since the daemon was away, is made as soon as it is back.
    host.stop_daemon(husk_tests::Signal::SIGKILL)?;
    ensure!(containerd.run_sandbox(containerd.plain("four")).is_err());
    ensure!(containerd.last_words().contains("huskd is not running"), "{}", containerd.last_words());
    ensure!(host.residue()?.is_empty(), "a pod that could not be made left {:?}", host.residue()?);
    host.start_daemon()?;
    host.wait_ready()?;
    let four = containerd.run_sandbox(containerd.plain("four"))?;
    four.addresses()?.iter().try_for_each(|address| peer.await_answer_at(*address, SOON))?;
    // Nor does a pod need a daemon to go.
    host.stop_daemon(husk_tests::Signal::SIGKILL)?;
    four.stop()?;
    four.remove()?;
    ensure!(host.residue()?.is_empty(), "{:?}", host.residue()?);
    Ok(())
}
