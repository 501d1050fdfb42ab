//! The container image: the same bytes every time, and all that its programs need is in it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::engine::Engine;
use husk_tests::process::{Program, binary};
use husk_tests::{Cluster, Mode, eventually};

/// As the manifests name it.
const IMAGE: &str = concat!("husk.dev/husk:", env!("CARGO_PKG_VERSION"));

/// A rule that nft takes only if it finds what it needs to know names of protocols.
const RULE: &str = "add table inet t { chain c { meta l4proto ipv6-icmp accept; }; }";

const SOON: Duration = Duration::from_secs(20);

/// Packs the binaries that the other cases run; returns the digest that was printed, and the archive.
fn build(directory: &Path, name: &str) -> Result<(String, PathBuf)> {
    let huskd = binary("huskd")?;
    let (binaries, archive) = (huskd.parent().context("a program without a directory")?, directory.join(name));
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../hack/image");
    let arguments = [Path::new("--binaries"), binaries, Path::new("--output"), &archive];
    let printed = Program::new(script).args(arguments).limit(Duration::from_secs(120)).check()?;
    Ok((printed.trim().to_owned(), archive))
}

/// A containerd of its own, which has the image and nothing else.
struct Containerd<'a>(Engine<'a>);

impl<'a> Containerd<'a> {
    fn start(engine: Engine<'a>) -> Result<Self> {
        let path = |name: &str| engine.directory().join(name).display().to_string();
        let config = format!(
            r#"
version = 2
root = "{root}"
state = "/run/containerd"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "{socket}"
"#,
            root = path("root"),
            socket = path("containerd.sock"),
        );
        fs::write(path("config.toml"), config)?;
        let log = File::create(path("log"))?;
        engine.program("containerd").args(["--config", &path("config.toml")]).spawn(&log)?;
        let containerd = Self(engine);
        eventually("containerd to answer", SOON, || Ok(containerd.ctr(["version"]).is_ok()))?;
        Ok(containerd)
    }

    fn ctr<'b>(&self, arguments: impl IntoIterator<Item = &'b str>) -> Result<String> {
        let socket = self.0.directory().join("containerd.sock").display().to_string();
        self.0.program("ctr").args(["--address", &socket]).args(arguments).check()
    }

    /// Runs a command in a container that may write nothing and has a network of its own; returns what it printed.
    fn run(&self, command: &[&str]) -> Result<String> {
        let group = self.0.control_group();
        let place = ["--snapshotter", "native", "--cgroup", &group];
        let how = ["--rm", "--read-only", "--cap-add", "CAP_NET_ADMIN"];
        self.ctr(["run"].iter().chain(&place).chain(&how).chain(&[IMAGE, "one"]).chain(command).copied())
    }
}

#[test]
fn the_image_is_the_same_every_time_and_complete() -> Result<()> {
    let cluster = Cluster::builder().mode(Mode::Vxlan).hosts(1).start()?;
    let engine = Engine::on(cluster.host(1), cluster.scope())?;
    let (digest, archive) = build(engine.directory(), "first.tar")?;
    let (_, second) = build(engine.directory(), "second.tar")?;
    ensure!(fs::read(&archive)? == fs::read(second)?, "the same binaries gave two different images");
    let containerd = Containerd::start(engine)?;
    let archive = archive.display().to_string();
    containerd.ctr(["images", "import", "--snapshotter", "native", &archive])?;
    let images = containerd.ctr(["images", "list", &format!("name=={IMAGE}")])?;
    ensure!(images.contains(&digest), "{digest} was built, but: {images}");
    for program in ["huskd", "huskctl", "husk-cni"] {
        let said = containerd.run(&[program, "--version"])?;
        ensure!(said.trim() == format!("{program} {}", env!("CARGO_PKG_VERSION")), "{program}: {said}");
    }
    let said = containerd.run(&["nft", "--version"])?;
    ensure!(said.starts_with("nftables "), "{said}");
    containerd.run(&["nft", "--check", RULE]).context("nft in the image does not take a rule of Husk's kind")?;
    Ok(())
}
