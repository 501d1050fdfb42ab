//! One host with Husk, on which the checklist is gone through, and what it looks like from outside.

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_overlay::marks::is_pod_interface;
use husk_tests::process::Process;
use husk_tests::runtime::{Attachment, Network};
use husk_tests::{Cluster, Family, Host, Mode, Pod, Prefix, Signal, eventually};
use serde_json::{Value, json};

/// How long what happens by itself may take.
pub(crate) const SOON: Duration = Duration::from_secs(10);

/// A host with Husk whose pods have addresses of these families.
pub(crate) struct Bed {
    pub(crate) cluster: Cluster,
    pub(crate) families: Vec<Family>,
    pods: Cell<u32>,
}

impl Bed {
    pub(crate) fn start(families: &[Family]) -> Result<Self> {
        let cidrs = families.iter().map(|family| match family {
            Family::Ipv4 => "10.42.0.0/16".parse(),
            Family::Ipv6 => "fd42::/48".parse(),
        });
        let cidrs = cidrs.collect::<Result<Vec<Prefix>, _>>()?;
        let underlay = families.first().copied().unwrap_or(Family::Ipv4);
        let cluster = Cluster::builder().mode(Mode::Vxlan).underlay(underlay).hosts(1).cluster_cidrs(cidrs).start()?;
        let bin = cluster.host(1).file("/opt/cni/bin").join("step");
        fs::copy(env!("CARGO_BIN_EXE_cni-step"), &bin).with_context(|| format!("copying to {}", bin.display()))?;
        Ok(Self { cluster, families: families.to_vec(), pods: Cell::new(0) })
    }

    pub(crate) fn host(&self) -> &Host {
        self.cluster.host(1)
    }

    /// The network that the daemon configured, for a runtime that speaks this version at most.
    pub(crate) fn network(&self, version: &str) -> Result<Network<'_>> {
        let path = self.host().conflist_path();
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        Network::read(self.host(), &serde_json::from_str(&text)?, version)
    }

    /// A new, empty sandbox and an attachment `eth0` for it.
    pub(crate) fn sandbox(&self) -> Result<(Pod, Attachment)> {
        let number = self.pods.get();
        self.pods.set(number + 1);
        let pod = self.host().sandbox(&format!("p{number}"))?;
        let attachment = Attachment::new(&format!("container-{number}"), "eth0", pod.netns());
        Ok((pod, attachment))
    }

    /// A file in the host's run directory.
    pub(crate) fn run_file(&self, name: &str) -> PathBuf {
        self.host().file("/run/husk").join(name)
    }

    /// The lease of a container's interface, if it has one, with its file.
    pub(crate) fn lease(&self, attachment: &Attachment) -> Result<Option<(PathBuf, Value)>> {
        let found = self.leases()?.into_iter();
        let mut own = found.filter(|(_, lease)| {
            lease["containerId"] == *attachment.container_id && lease["ifname"] == *attachment.ifname
        });
        Ok(own.next())
    }

    pub(crate) fn leases(&self) -> Result<Vec<(PathBuf, Value)>> {
        let read = |path: PathBuf| Ok((path.clone(), serde_json::from_str(&fs::read_to_string(&path)?)?));
        self.host().leases()?.into_iter().map(read).collect()
    }

    /// Nothing of any pod is left on the host.
    pub(crate) fn ensure_empty(&self) -> Result<()> {
        let left = self.host().residue()?;
        ensure!(left.is_empty(), "{left:?} is left");
        Ok(())
    }
}

/// The daemon of a host, which hangs until this is dropped.
pub(crate) struct Stopped(Vec<Process>);

impl Stopped {
    pub(crate) fn daemon(bed: &Bed) -> Result<Self> {
        let mut processes = bed.host().processes();
        processes.retain(|process| process.command.contains("huskd"));
        ensure!(!processes.is_empty(), "no daemon runs");
        let stopped = Self(processes);
        stopped.0.iter().try_for_each(|process| process.signal(Signal::SIGSTOP))?;
        // Another processor may execute it for a moment longer.
        eventually("the daemon to stand still", SOON, || Ok(stopped.0.iter().all(stands_still)))?;
        Ok(stopped)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        for process in &self.0 {
            process.signal(Signal::SIGCONT).ok();
        }
    }
}

/// True if every thread of a process is stopped (proc_pid_status(5), `State`).
fn stands_still(process: &Process) -> bool {
    let threads = fs::read_dir(format!("/proc/{}/task", process.pid)).into_iter().flatten().flatten();
    let states = threads.map(|thread| fs::read_to_string(thread.path().join("status")).unwrap_or_default());
    states.fold(None, |all, state| Some(all.unwrap_or(true) && state.contains("State:\tT"))).unwrap_or(false)
}

/// An attachment's host end, as its result reports it.
pub(crate) fn host_end(attachment: &Attachment) -> Result<String> {
    let interfaces =
        attachment.cached.as_ref().and_then(|it| it["interfaces"].as_array()).context("nothing was added")?;
    let on_host = interfaces.iter().filter(|it| it["sandbox"].as_str().unwrap_or_default().is_empty());
    let name = on_host.filter_map(|it| it["name"].as_str()).find(|name| is_pod_interface(name));
    name.map(str::to_owned).context("no host end was reported")
}

/// A step of a chain, see `cni-step`.
pub(crate) fn step(extra: Value) -> Value {
    let mut plugin = json!({"type": "step"});
    for (key, value) in extra.as_object().into_iter().flatten() {
        plugin[key] = value.clone();
    }
    plugin
}

/// What a step has noted: environment and configuration of each call.
pub(crate) fn noted(log: &Path) -> Result<Vec<Value>> {
    let text = fs::read_to_string(log).with_context(|| format!("reading {}", log.display()))?;
    text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
}
