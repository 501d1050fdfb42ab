//! What a cluster should look like, and the order in which it comes up.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result};
use husk_overlay::prefix::{Family, Prefix};

use super::control_plane::{ControlPlane, Ranges, Site};
use super::node::Equipment;
use super::{CONTROL_PLANE, Kubernetes, binaries, image};
use crate::cluster::Cluster;

/// Where clouds keep what they tell their machines: kubelets ask there before anything else, and wait for an answer.
const METADATA: &str = "169.254.169.254";

/// What a cluster should look like.
#[derive(Debug, Clone)]
pub struct KubernetesBuilder {
    nodes: u8,
    ranges: Ranges,
    users: Vec<(String, String)>,
    programs: Vec<PathBuf>,
    binaries: Option<PathBuf>,
    kube_proxy: bool,
}

impl Default for KubernetesBuilder {
    fn default() -> Self {
        let (pods, services) = (Ipv4Addr::new(10, 244, 0, 0), Ipv4Addr::new(10, 96, 0, 0));
        let ranges = Ranges { pods: prefix(pods, 16), services: prefix(services, 16), allocate: true };
        let (users, programs) = (Vec::new(), Vec::new());
        Self { nodes: 3, ranges, users, programs, binaries: None, kube_proxy: true }
    }
}

impl KubernetesBuilder {
    /// The number of nodes; three by default.
    #[must_use]
    pub fn nodes(mut self, nodes: u8) -> Self {
        self.nodes = nodes;
        self
    }

    /// Both families for pods, nodes and services: `10.244.0.0/16` and `fd00:10:244::/56` for pods.
    #[must_use]
    pub fn dual_stack(mut self) -> Self {
        self.ranges.pods.extend(prefix(Ipv6Addr::new(0xfd00, 0x10, 0x244, 0, 0, 0, 0, 0), 56));
        self.ranges.services.extend(prefix(Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0), 112));
        self
    }

    /// The pods' address space, one prefix per family; `10.244.0.0/16` by default.
    #[must_use]
    pub fn pod_cidrs(mut self, cidrs: impl IntoIterator<Item = Prefix>) -> Self {
        self.ranges.pods = cidrs.into_iter().collect();
        self
    }

    /// The services' address space, one prefix per family of the pods; `10.96.0.0/16` by default.
    #[must_use]
    pub fn service_cidrs(mut self, cidrs: impl IntoIterator<Item = Prefix>) -> Self {
        self.ranges.services = cidrs.into_iter().collect();
        self
    }

    /// Nodes without CIDRs of their own (`spec.podCIDRs`): the controller manager gives them none.
    #[must_use]
    pub fn without_node_cidrs(mut self) -> Self {
        self.ranges.allocate = false;
        self
    }

    /// No kube-proxy: services do not work, nor does what relies on them.
    #[must_use]
    pub fn without_kube_proxy(mut self) -> Self {
        self.kube_proxy = false;
        self
    }

    /// A user besides the admin, in groups separated by commas, with no rights but those of the groups.
    #[must_use]
    pub fn user(mut self, name: &str, groups: &str) -> Self {
        self.users.push((name.to_owned(), groups.to_owned()));
        self
    }

    /// A static program to have in `/bin` of the test's image, beside busybox.
    #[must_use]
    pub fn program(mut self, path: impl Into<PathBuf>) -> Self {
        self.programs.push(path.into());
        self
    }

    /// A directory with the programs of Kubernetes, rather than `HUSK_KUBERNETES_DIR` or the cache.
    #[must_use]
    pub fn binaries(mut self, directory: impl Into<PathBuf>) -> Self {
        self.binaries = Some(directory.into());
        self
    }

    /// Brings the cluster up until the API server knows every node. Without a network none of them is ready yet.
    ///
    /// # Errors
    /// When a part is missing or does not start; what was made is removed.
    pub fn start(self) -> Result<Kubernetes> {
        self.start_and_tell(&|_| ())
    }

    /// As [`KubernetesBuilder::start`], with each step told as it begins.
    ///
    /// # Errors
    /// As [`KubernetesBuilder::start`].
    pub fn start_and_tell(self, tell: &dyn Fn(&str)) -> Result<Kubernetes> {
        let binaries = self.binaries.map_or_else(binaries::find, binaries::check)?;
        tell("laying the underlay");
        // Both families: what pods have is one thing, what nodes have another.
        let underlay = Cluster::builder().dual_stack().hosts(self.nodes).build()?;
        // Refused at once there, rather than waited for.
        underlay.outside().command("ip", ["addr", "add", METADATA, "dev", "lo"])?;
        let directory = underlay.scope().directory();
        let image = image::build(&directory.join("image"), &self.programs).context("making the test's image")?;
        let net = underlay.outside().file().try_clone().context("duplicating a namespace's file")?;
        let control_plane = ControlPlane::create(Site {
            directory: directory.join(CONTROL_PLANE),
            binaries,
            address: Cluster::gateway(Family::Ipv4),
            net: Arc::new(net),
            ranges: self.ranges,
            users: &self.users,
        })?;
        let kube_proxy = self.kube_proxy;
        let mut kubernetes = Kubernetes { equipment: Vec::new(), control_plane, image, kube_proxy, underlay };
        tell("starting the control plane, and containerd on every node");
        kubernetes.equipment = kubernetes.bring_up()?.into_iter().map(Some).collect();
        tell("starting a kubelet on every node");
        kubernetes.start_nodes()?;
        Ok(kubernetes)
    }
}

impl Kubernetes {
    /// The control plane and the nodes without kubelets, all at the same time.
    fn bring_up(&self) -> Result<Vec<Equipment>> {
        thread::scope(|scope| {
            let control_plane = scope.spawn(|| self.control_plane.start_all());
            let nodes: Vec<_> =
                self.underlay.hosts().iter().map(|host| scope.spawn(|| Equipment::install(host, self))).collect();
            let nodes = nodes.into_iter().map(join).collect();
            join(control_plane)?;
            nodes
        })
    }

    fn start_nodes(&self) -> Result<()> {
        thread::scope(|scope| {
            let numbers = 1..=self.equipment.len();
            let nodes: Vec<_> = numbers.map(|number| scope.spawn(move || self.start_node(number))).collect();
            nodes.into_iter().try_for_each(join)
        })
    }
}

/// What a thread returned; a panic in it continues here.
fn join<T>(thread: thread::ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// A constant prefix; none if it were wrong, which the first start would tell.
fn prefix(address: impl Into<std::net::IpAddr>, length: u8) -> Vec<Prefix> {
    Prefix::containing(address.into(), length).into_iter().collect()
}
