//! A node: a machine with containerd, a kubelet and kube-proxy.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use husk_overlay::prefix::Family;
use nix::sys::signal::Signal;
use serde_json::json;

use super::Kubernetes;
use super::control_plane::Ranges;
use super::credentials::{self, KUBE_PROXY};
use super::image;
use super::machine::{self, Machine};
use super::service::Service;
use crate::cri;
use crate::eventually;
use crate::host::Host;
use crate::netns::Netns;
use crate::process::{self, Program};

/// How long containerd may take until it answers.
const TIME_LIMIT: Duration = Duration::from_secs(30);

const SOCKET: &str = "/run/containerd/containerd.sock";

/// What containerd calls for every pod before the network's own plugins (until 2.0, which sets the interface up by itself).
const LOOPBACK: &str = "/usr/lib/cni/loopback";

/// A program of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeService {
    /// The container runtime. Containers go on without it.
    Containerd,
    /// What runs the pods. Containers go on without it.
    Kubelet,
    /// What makes the addresses of services work.
    KubeProxy,
}

impl NodeService {
    /// All, in the order in which they start.
    pub const ALL: [Self; 3] = [Self::Containerd, Self::Kubelet, Self::KubeProxy];

    /// Its name, which is also that of its log.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Containerd => "containerd",
            Self::Kubelet => "kubelet",
            Self::KubeProxy => "kube-proxy",
        }
    }
}

/// What there is of a node besides its host.
#[derive(Debug)]
pub(super) struct Equipment {
    services: [Service; 3],
    // After the services: it ends what they left running.
    machine: Machine,
}

impl Equipment {
    /// Makes a node of a host and starts containerd on it, with the test's image.
    pub(super) fn install(host: &Host, kubernetes: &Kubernetes) -> Result<Self> {
        let machine = Machine::on(host, kubernetes.scope())?;
        let directory = machine::directory(kubernetes.scope(), host.name());
        let services = NodeService::ALL.map(|service| Service::new(service.name(), &directory));
        let equipment = Self { services, machine };
        // containerd looks in one directory only.
        fs::copy(LOOPBACK, host.file("/opt/cni/bin/loopback"))
            .with_context(|| format!("{LOOPBACK}: install the package containernetworking-plugins"))?;
        let node = Node { kubernetes, host, equipment: &equipment };
        node.start(NodeService::Containerd)?;
        eventually("containerd to answer", TIME_LIMIT, || {
            node.service(NodeService::Containerd).ensure_runs()?;
            Ok(node.ctr(["version"]).is_ok())
        })?;
        node.import_image(&kubernetes.image)?;
        Ok(equipment)
    }
}

/// A node, as a view of the cluster it is in.
#[derive(Debug, Clone, Copy)]
pub struct Node<'a> {
    pub(super) kubernetes: &'a Kubernetes,
    pub(super) host: &'a Host,
    pub(super) equipment: &'a Equipment,
}

impl<'a> Node<'a> {
    /// Its name, `host1` and so on.
    #[must_use]
    pub fn name(&self) -> &'a str {
        self.host.name()
    }

    /// The machine as the other cases know it: `huskctl` on it, its MTU, its leases, a capture of its underlay interface.
    #[must_use]
    pub fn host(&self) -> &'a Host {
        self.host
    }

    /// Its network namespace.
    #[must_use]
    pub fn netns(&self) -> &'a Netns {
        self.host.netns()
    }

    /// Path, from outside, of a file in one of the directories that the node has of its own: `/etc/cni`, `/etc/husk`, `/opt/cni`,
    /// `/run`, `/var/lib`, `/var/log`. What is mounted there is not seen; see [`Node::seen`].
    #[must_use]
    pub fn file(&self, path: &str) -> PathBuf {
        machine::own_file(&self.directory(), path).unwrap_or_else(|| self.host.file(path))
    }

    /// Path of a file as the node's processes see it, mounts included, while the node lives.
    #[must_use]
    pub fn seen(&self, path: &str) -> PathBuf {
        self.equipment.machine.seen(path)
    }

    /// A program to be run to its end among the node's processes, with its mounts and its network.
    #[must_use]
    pub fn program(&self, program: &str) -> Program<'static> {
        self.equipment.machine.program(program)
    }

    /// Starts one of its programs.
    ///
    /// # Errors
    /// When it runs already, or is missing.
    pub fn start(&self, service: NodeService) -> Result<()> {
        let binaries = self.kubernetes.control_plane.binaries();
        let (program, arguments) = match service {
            NodeService::Containerd => (PathBuf::from("containerd"), self.containerd()?),
            NodeService::Kubelet => (binaries.join("kubelet"), self.kubelet()?),
            NodeService::KubeProxy => (binaries.join("kube-proxy"), self.kube_proxy()?),
        };
        let started = self.service(service).start(&self.equipment.machine.namespaces(), program, arguments);
        started.with_context(|| format!("on {}", self.name()))
    }

    /// Sends one of its programs a signal and waits for its end.
    ///
    /// # Errors
    /// When it does not run, or does not end in time.
    pub fn stop(&self, service: NodeService, signal: Signal) -> Result<()> {
        self.service(service).stop(signal).with_context(|| format!("on {}", self.name()))
    }

    /// Ends one of its programs and starts it again.
    ///
    /// # Errors
    /// As [`Node::stop`] and [`Node::start`].
    pub fn restart(&self, service: NodeService, signal: Signal) -> Result<()> {
        self.stop(service, signal)?;
        self.start(service)
    }

    /// An error, with the end of its log, when a program that was started does not run any more.
    ///
    /// # Errors
    /// See above.
    pub fn ensure_runs(&self, service: NodeService) -> Result<()> {
        self.service(service).ensure_runs().with_context(|| format!("on {}", self.name()))
    }

    /// Where the log of one of its programs is.
    #[must_use]
    pub fn log(&self, service: NodeService) -> &'a Path {
        self.service(service).log()
    }

    /// Gives containerd the images of an archive.
    ///
    /// # Errors
    /// When containerd refuses.
    pub fn import_image(&self, archive: &Path) -> Result<()> {
        let archive = archive.to_str().context("a path that is no text")?;
        self.ctr(["images", "import", archive]).with_context(|| format!("on {}", self.name())).map(drop)
    }

    /// The names of the images that containerd has.
    ///
    /// # Errors
    /// When containerd does not answer.
    pub fn images(&self) -> Result<Vec<String>> {
        Ok(self.ctr(["images", "list", "--quiet"])?.lines().map(str::to_owned).collect())
    }

    pub(super) fn service(&self, service: NodeService) -> &'a Service {
        // The order of `ALL` is that of the declaration.
        &self.equipment.services[service as usize]
    }

    /// Ends everything that runs on it, at once, as when the power fails.
    pub(super) fn end(&self) -> Result<()> {
        process::end_all_in_netns(self.netns().file()).with_context(|| format!("ending {}", self.name()))
    }

    fn directory(&self) -> PathBuf {
        machine::directory(self.kubernetes.scope(), self.name())
    }

    fn ctr<'b>(&self, arguments: impl IntoIterator<Item = &'b str>) -> Result<String> {
        self.program("ctr").args(["--address", SOCKET, "--namespace", "k8s.io"]).args(arguments).check()
    }

    fn containerd(&self) -> Result<Vec<String>> {
        let config = cri::containerd("/var/lib/containerd", SOCKET, image::IMAGE);
        let path = self.write("containerd.toml", &config)?;
        Ok(vec!["--config".to_owned(), path])
    }

    fn kubelet(&self) -> Result<Vec<String>> {
        let ranges = self.kubernetes.control_plane.ranges();
        let families: Vec<Family> = ranges.pods.iter().map(husk_overlay::prefix::Prefix::family).collect();
        let addresses: Result<Vec<IpAddr>> = families.iter().map(|family| self.host.address(*family)).collect();
        let addresses: Vec<_> = addresses?.iter().map(IpAddr::to_string).collect();
        let config = json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            // The API server shows no certificate.
            "authentication": {"anonymous": {"enabled": true}, "webhook": {"enabled": false}},
            "authorization": {"mode": "AlwaysAllow"},
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": self.equipment.machine.control_group(),
            "enforceNodeAllocatable": [],
            // The machine is shared: how full its disk and memory are is no business of a test's.
            "evictionHard": {"memory.available": "0%", "nodefs.available": "0%", "imagefs.available": "0%"},
            "imageGCHighThresholdPercent": 100,
            "failSwapOn": false,
            "nodeStatusUpdateFrequency": "2s",
            "resolvConf": self.write("resolv.conf", "")?,
            "volumePluginDir": "/var/lib/kubelet/volume-plugins",
        });
        let kubeconfig = self.kubernetes.control_plane.credentials().kubeconfig(&credentials::node(self.name()))?;
        let mut arguments = vec![
            format!("--config={}", self.write("kubelet.yaml", &config.to_string())?),
            format!("--kubeconfig={}", kubeconfig.display()),
            format!("--hostname-override={}", self.name()),
            format!("--node-ip={}", addresses.join(",")),
            "--root-dir=/var/lib/kubelet".to_owned(),
            "--cert-dir=/var/lib/kubelet/pki".to_owned(),
            "--container-runtime=remote".to_owned(),
            format!("--container-runtime-endpoint=unix://{SOCKET}"),
            "--v=2".to_owned(),
        ];
        arguments.extend(ranges.feature_gates().map(str::to_owned));
        Ok(arguments)
    }

    fn kube_proxy(&self) -> Result<Vec<String>> {
        let ranges = self.kubernetes.control_plane.ranges();
        let kubeconfig = self.kubernetes.control_plane.credentials().kubeconfig(KUBE_PROXY)?;
        let mut arguments = vec![
            format!("--kubeconfig={}", kubeconfig.display()),
            format!("--hostname-override={}", self.name()),
            "--proxy-mode=iptables".to_owned(),
            format!("--cluster-cidr={}", Ranges::list(&ranges.pods)),
            // The limit is the machine's, and not a namespace's to set.
            "--conntrack-max-per-core=0".to_owned(),
            "--v=1".to_owned(),
        ];
        arguments.extend(ranges.feature_gates().map(str::to_owned));
        Ok(arguments)
    }

    /// Writes a file for a program of the node, which sees it under the same path.
    fn write(&self, name: &str, content: &str) -> Result<String> {
        let path = self.directory().join(name);
        fs::write(&path, content).with_context(|| format!("writing {}", path.display()))?;
        Ok(path.display().to_string())
    }
}
