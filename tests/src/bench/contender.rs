//! Who competes: chains of plugins, called as a runtime does.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use husk_overlay::marks;
use serde_json::{Value, json};

use crate::Host;

/// Husk, and the beginning of the names of its variants.
pub(super) const HUSK: &str = "husk";

/// The reference plugin that counts.
pub(super) const BRIDGE: &str = "bridge";

/// Where Debian's containernetworking-plugins are.
const REFERENCE_DIRECTORY: &str = "/usr/lib/cni";

/// The newest version of the specification that Debian's reference plugins know.
const VERSION: &str = "1.0.0";

/// Port of the host, of the pods, and limits in bits per second and bits.
const HOST_PORT: u16 = 8080;
const POD_PORT: u16 = 80;
const RATE: u64 = 100_000_000;
const BURST: u64 = 10_000_000;

/// A chain of plugins under one name.
#[derive(Debug, Clone)]
pub(super) struct Contender {
    pub(super) name: &'static str,
    pub(super) chain: Vec<Plugin>,
}

/// A plugin with its configuration.
#[derive(Debug, Clone)]
pub(super) struct Plugin {
    program: PathBuf,
    configuration: Value,
}

/// A pod to be.
#[derive(Debug, Clone)]
pub(super) struct Pod {
    pub(super) container_id: String,
    pub(super) netns: PathBuf,
}

/// A chain that has run.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) result: Value,
    pub(super) elapsed: Duration,
}

/// Everybody, Husk first.
pub(super) fn all(dual_stack: bool, host_local: &Path, host: &Host) -> Result<Vec<Contender>> {
    for tool in ["bridge", "ptp", "host-local", "portmap", "bandwidth"] {
        let path = Path::new(REFERENCE_DIRECTORY).join(tool);
        ensure!(
            path.exists(),
            "{} is missing: install containernetworking-plugins (hack/prerequisites bench)",
            path.display()
        );
    }
    let ipam = |number: u8| {
        let mut ranges = vec![json!([{"subnet": format!("10.250.{number}.0/24")}])];
        let mut routes = vec![json!({"dst": "0.0.0.0/0"})];
        if dual_stack {
            ranges.push(json!([{"subnet": format!("fd50:{number}::/64")}]));
            routes.push(json!({"dst": "::/0"}));
        }
        json!({"type": "host-local", "dataDir": host_local, "ranges": ranges, "routes": routes})
    };
    let bridge = |name: &str, number, masquerade: bool| {
        reference(
            "bridge",
            name,
            json!({
                "bridge": format!("bench{number}"), "isGateway": true, "ipMasq": masquerade, "ipam": ipam(number),
            }),
        )
    };
    let ptp = reference("ptp", "bench-ptp", json!({"ipMasq": false, "ipam": ipam(3)}));
    let port_mapping = json!([{"hostPort": HOST_PORT, "containerPort": POD_PORT, "protocol": "tcp"}]);
    let limits = json!({"ingressRate": RATE, "ingressBurst": BURST});
    let portmap =
        |name: &str| reference("portmap", name, json!({"snat": true, "runtimeConfig": {"portMappings": port_mapping}}));
    let bandwidth = |name: &str| reference("bandwidth", name, json!({"runtimeConfig": {"bandwidth": limits}}));
    let with = |name, runtime: Value| -> Result<Contender> {
        let mut contender = husk(host, None)?;
        contender.name = name;
        contender.chain[0].configuration["runtimeConfig"] = runtime;
        Ok(contender)
    };
    Ok(vec![
        husk(host, None)?,
        Contender { name: BRIDGE, chain: vec![bridge("bench-bridge", 1, false)] },
        Contender { name: "bridge, ipMasq", chain: vec![bridge("bench-masq", 2, true)] },
        Contender { name: "ptp", chain: vec![ptp] },
        with("husk, port mapping", json!({"portMappings": port_mapping}))?,
        Contender {
            name: "bridge + portmap",
            chain: vec![bridge("bench-portmap", 4, false), portmap("bench-portmap")],
        },
        with("husk, bandwidth", json!({"bandwidth": limits}))?,
        Contender {
            name: "bridge + bandwidth",
            chain: vec![bridge("bench-bandwidth", 5, false), bandwidth("bench-bandwidth")],
        },
    ])
}

/// Husk with the configuration that its daemon wrote, or another run directory.
pub(super) fn husk(host: &Host, run_directory: Option<&str>) -> Result<Contender> {
    let path = host.conflist_path();
    let list: Value =
        serde_json::from_str(&fs::read_to_string(&path)?).with_context(|| format!("{}", path.display()))?;
    let mut configuration = list["plugins"][0].clone();
    configuration["name"] = list["name"].clone();
    configuration["cniVersion"] = VERSION.into();
    if let Some(directory) = run_directory {
        configuration["runDirectory"] = directory.into();
    }
    let program = Path::new("/opt/cni/bin").join(marks::CNI_TYPE);
    Ok(Contender { name: HUSK, chain: vec![Plugin { program, configuration }] })
}

fn reference(kind: &str, network: &str, mut configuration: Value) -> Plugin {
    configuration["type"] = kind.into();
    configuration["name"] = network.into();
    configuration["cniVersion"] = VERSION.into();
    Plugin { program: Path::new(REFERENCE_DIRECTORY).join(kind), configuration }
}

impl Contender {
    /// Adds a pod; the calling thread is on the host.
    pub(super) fn add(&self, pod: &Pod) -> Result<Outcome> {
        let started = Instant::now();
        let mut result = Value::Null;
        for plugin in &self.chain {
            result = plugin.call("ADD", pod, &result, &[])?;
        }
        Ok(Outcome { result, elapsed: started.elapsed() })
    }

    /// Deletes a pod.
    pub(super) fn del(&self, pod: &Pod, result: Option<&Value>) -> Result<Outcome> {
        let started = Instant::now();
        for plugin in self.chain.iter().rev() {
            plugin.call("DEL", pod, result.unwrap_or(&Value::Null), &[])?;
        }
        Ok(Outcome { result: Value::Null, elapsed: started.elapsed() })
    }

    /// How long a process takes that has nothing to do: VERSION of the first plugin.
    pub(super) fn idle(&self) -> Result<Duration> {
        let pod = Pod { container_id: String::new(), netns: PathBuf::new() };
        let started = Instant::now();
        self.chain.first().context("an empty chain")?.call("VERSION", &pod, &Value::Null, &[])?;
        Ok(started.elapsed())
    }

    /// The largest resident set, in KiB, of the processes of an ADD and of those of a DEL.
    pub(super) fn peak_memory(&self, pod: &Pod) -> Result<(u64, u64)> {
        // What time(1) writes goes to a file, as standard error is the plugin's.
        let file = std::env::temp_dir().join(format!("husk-bench-{}", std::process::id()));
        let before = ["/usr/bin/time", "--format=%M", "--append", "--output"].map(Path::new);
        let before: Vec<&Path> = before.into_iter().chain([file.as_path()]).collect();
        let measured = (|| {
            let mut result = Value::Null;
            for plugin in &self.chain {
                result = plugin.call("ADD", pod, &result, &before)?;
            }
            let add = largest(&file)?;
            for plugin in self.chain.iter().rev() {
                plugin.call("DEL", pod, &result, &before)?;
            }
            Ok((add, largest(&file)?))
        })();
        if file.exists() {
            fs::remove_file(&file)?;
        }
        measured
    }
}

/// Reads the numbers in a file, empties it, and returns the largest.
fn largest(file: &Path) -> Result<u64> {
    let text = fs::read_to_string(file).context("time(1) wrote nothing; it is Debian's package time")?;
    fs::write(file, "")?;
    text.lines().filter_map(|line| line.trim().parse().ok()).max().context("time(1) wrote no number")
}

impl Plugin {
    fn call(&self, command: &str, pod: &Pod, previous: &Value, before: &[&Path]) -> Result<Value> {
        let mut configuration = self.configuration.clone();
        if !previous.is_null() {
            configuration["prevResult"] = previous.clone();
        }
        let mut words: Vec<&Path> = before.to_vec();
        words.push(&self.program);
        let environment = BTreeMap::from([
            ("CNI_COMMAND", command.into()),
            ("CNI_CONTAINERID", pod.container_id.clone().into()),
            ("CNI_NETNS", pod.netns.clone().into_os_string()),
            ("CNI_IFNAME", "eth0".into()),
            ("CNI_PATH", REFERENCE_DIRECTORY.into()),
            ("PATH", std::env::var_os("PATH").unwrap_or_default()),
        ]);
        let mut child = Command::new(words[0])
            .args(&words[1..])
            .env_clear()
            .envs(environment)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {}", self.program.display()))?;
        if let Some(mut pipe) = child.stdin.take() {
            pipe.write_all(configuration.to_string().as_bytes())?;
        }
        let output = child.wait_with_output()?;
        let stdout = String::from_utf8_lossy(&output.stdout);
        if !output.status.success() {
            bail!(
                "{command} of {}: {}{}",
                self.program.display(),
                stdout.trim(),
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(serde_json::from_str(&stdout).unwrap_or_default())
    }
}
