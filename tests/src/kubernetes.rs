//! A real Kubernetes on one machine, without Docker, registry or virtual machine: each node is a [`Host`](crate::Host) of a [`crate::Cluster`]
//! with processes, control groups and directories of its own, on which containerd and a kubelet run; the control plane runs
//! beyond the nodes' gateway, as a hosted one would.
//!
//! ```no_run
//! use husk_tests::Family;
//! use husk_tests::kubernetes::{Kubernetes, NodeService};
//!
//! fn main() -> anyhow::Result<()> {
//!     let kubernetes = Kubernetes::builder().nodes(2).start()?;
//!     kubernetes.install("wireguard")?;
//!     let (a, b) = (kubernetes.pod("a", 1).add()?, kubernetes.pod("b", 2).label("app", "b").add()?);
//!     let target = b.address(Family::Ipv4)?.to_string();
//!     a.program("ping").args(["-c", "1", &target]).check()?;
//!     kubernetes.node(2).restart(NodeService::Kubelet, husk_tests::Signal::SIGKILL)?;
//!     b.delete()
//! }
//! ```
//!
//! Reading order: `builder` says what is made, and in which order; `machine` makes a node of a host, `node` what runs on it;
//! `control_plane` and `credentials` are the API server's side, `kubectl` the user's; `image` and `pod` what tests run; `install`
//! brings Husk; `logs` saves what was logged; `keep` serves hack/cluster. `binaries` says where Kubernetes comes from, `service`
//! is any of its programs.

mod binaries;
mod builder;
mod control_plane;
mod credentials;
mod image;
mod install;
mod keep;
mod kubectl;
mod logs;
mod machine;
mod node;
mod pod;
mod service;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::Signal;

pub use self::binaries::VERSION;
pub use self::builder::KubernetesBuilder;
use self::control_plane::ControlPlane;
pub use self::control_plane::ControlService;
pub use self::image::IMAGE;
pub use self::install::{NAMESPACE, husk_image, render};
pub use self::keep::{Kept, Log};
pub use self::kubectl::Kubectl;
use self::node::Equipment;
pub use self::node::{Node, NodeService};
pub use self::pod::{KubernetesPod, PodRequest};
use crate::capture::Capture;
use crate::cluster::Cluster;
use crate::eventually;
use crate::scope::Scope;

/// How long a node may take until the API server knows it, and until it is ready.
const NODE_LIMIT: Duration = Duration::from_secs(60);

/// Directory, within the scope's, of the control plane's files.
const CONTROL_PLANE: &str = "control-plane";

/// A running cluster. Everything goes when it is dropped.
#[derive(Debug)]
pub struct Kubernetes {
    /// By number, counted from 1; none where a node was removed.
    equipment: Vec<Option<Equipment>>,
    control_plane: ControlPlane,
    image: PathBuf,
    kube_proxy: bool,
    // Last: the directory goes after everything that lives in it.
    underlay: Cluster,
}

impl Kubernetes {
    /// A cluster of three nodes whose pods have IPv4 addresses, to be changed as needed.
    #[must_use]
    pub fn builder() -> KubernetesBuilder {
        KubernetesBuilder::default()
    }

    /// The hosts and the network between them: its outside, its capture, cables to pull.
    #[must_use]
    pub fn underlay(&self) -> &Cluster {
        &self.underlay
    }

    /// What owns the names and the directory of this cluster.
    #[must_use]
    pub fn scope(&self) -> &Scope {
        self.underlay.scope()
    }

    /// The node called `host<number>`, counted from 1.
    ///
    /// # Panics
    /// When it was removed, or there never was one.
    #[must_use]
    pub fn node(&self, number: usize) -> Node<'_> {
        let equipment = self.equipment[number - 1].as_ref().expect("the node was not removed");
        Node { kubernetes: self, host: self.underlay.host(number), equipment }
    }

    /// The nodes in order, without removed ones.
    #[must_use]
    pub fn nodes(&self) -> Vec<Node<'_>> {
        let there = |(number, equipment): (usize, &Option<Equipment>)| equipment.as_ref().map(|_| self.node(number));
        (1..).zip(&self.equipment).filter_map(there).collect()
    }

    /// Runs `kubectl` as the admin and returns its standard output.
    ///
    /// # Errors
    /// When it fails.
    pub fn kubectl<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Result<String> {
        self.admin().run(arguments)
    }

    /// `kubectl` as the admin.
    #[must_use]
    pub fn admin(&self) -> Kubectl {
        self.control_plane.admin()
    }

    /// `kubectl` as one of the users that the builder was given.
    ///
    /// # Errors
    /// When there is no such user.
    pub fn user(&self, name: &str) -> Result<Kubectl> {
        self.control_plane.user(name)
    }

    /// A pod to be made on a node.
    pub fn pod(&self, name: &str, node: usize) -> PodRequest<'_> {
        PodRequest::new(self.node(node), self.control_plane.admin(), name)
    }

    /// Waits until a pod that somebody else made is ready, such as one of a DaemonSet's.
    ///
    /// # Errors
    /// When it is not in time, or runs on no node of the cluster.
    pub fn find_pod(&self, namespace: &str, name: &str) -> Result<KubernetesPod> {
        let (admin, pod) = (self.admin(), format!("pod/{name}"));
        let node = admin.run(["get", "--namespace", namespace, &pod, "--output", "jsonpath={.spec.nodeName}"])?;
        let found = self.nodes().into_iter().find(|it| it.name() == node);
        KubernetesPod::find(found.with_context(|| format!("{pod} is on no node: {node:?}"))?, admin, namespace, name)
    }

    /// Gives every node the images of an archive, as `docker save` and hack/image write them.
    ///
    /// # Errors
    /// When containerd refuses on a node.
    pub fn import_image(&self, archive: &Path) -> Result<()> {
        self.on_every_node(|node| node.import_image(archive))
    }

    /// Waits until every node is ready for pods.
    ///
    /// # Errors
    /// When one is not in time; the error carries what the nodes say.
    pub fn wait_nodes_ready(&self) -> Result<()> {
        let admin = self.admin();
        let waited = admin.wait(NODE_LIMIT, ["wait", "--for=condition=Ready", "node", "--all"]);
        waited.map(drop).with_context(|| {
            let said = r#"jsonpath={range .items[*]}{.metadata.name}: {.status.conditions[?(@.type=="Ready")].message}{"\n"}{end}"#;
            admin.run(["get", "nodes", "--output", said]).unwrap_or_default()
        })
    }

    /// Adds a node and waits until the API server knows it. Returns its number.
    ///
    /// # Errors
    /// When a part cannot be made.
    pub fn add_node(&mut self) -> Result<usize> {
        let number = self.underlay.add_host()?;
        let equipment = Equipment::install(self.underlay.host(number), self)?;
        self.equipment.push(Some(equipment));
        self.start_node(number)?;
        Ok(number)
    }

    /// A node fails for good and is taken out of the cluster: its cable is pulled, all its processes end at once, pods' and daemons'
    /// included, and then its `Node` object is deleted.
    ///
    /// # Errors
    /// When the kernel or the API server refuses.
    pub fn remove_node(&mut self, number: usize) -> Result<()> {
        self.fail_node(number)?;
        let name = self.underlay.host(number).name();
        self.admin().wait(NODE_LIMIT, ["delete", "node", name]).map(drop)
    }

    /// A node fails for good, and the API server is not told.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn fail_node(&mut self, number: usize) -> Result<()> {
        self.underlay.set_cable(number, false)?;
        self.node(number).end()?;
        self.equipment[number - 1] = None;
        Ok(())
    }

    /// Gives a node other underlay addresses, which end in `byte`, and its kubelet and kube-proxy the news.
    ///
    /// # Errors
    /// When the kernel refuses, or one of the programs does not start again.
    pub fn readdress(&self, number: usize, byte: u8) -> Result<()> {
        self.underlay.readdress(number, byte)?;
        let node = self.node(number);
        for service in [NodeService::Kubelet, NodeService::KubeProxy] {
            if node.service(service).was_started() {
                node.restart(service, Signal::SIGTERM)?;
            }
        }
        Ok(())
    }

    /// Starts a program of the control plane that was stopped.
    ///
    /// # Errors
    /// When it runs already, or is missing.
    pub fn start_control(&self, service: ControlService) -> Result<()> {
        self.control_plane.start(service)
    }

    /// Ends a program of the control plane.
    ///
    /// # Errors
    /// When it does not run, or does not end in time.
    pub fn stop_control(&self, service: ControlService, signal: Signal) -> Result<()> {
        self.control_plane.stop(service, signal)
    }

    /// Where the log of a program of the control plane is.
    #[must_use]
    pub fn control_log(&self, service: ControlService) -> &Path {
        self.control_plane.service(service).log()
    }

    /// An error, with the end of its log, when a program of the control plane that was started does not run any more.
    ///
    /// # Errors
    /// See above.
    pub fn ensure_control_runs(&self) -> Result<()> {
        let services = ControlService::ALL.map(|service| self.control_plane.service(service));
        services.into_iter().filter(|service| service.was_started()).try_for_each(|service| service.ensure_runs())
    }

    /// Waits until the API server is ready, for example after it was started again.
    ///
    /// # Errors
    /// When it is not in time.
    pub fn wait_api_server(&self) -> Result<()> {
        self.control_plane.wait_ready()
    }

    /// Writes what etcd holds to a file of this name in the cluster's directory, while everything runs, and returns its path.
    ///
    /// # Errors
    /// When there is such a file, or etcd does not answer.
    pub fn snapshot(&self, name: &str) -> Result<PathBuf> {
        let file = self.scope().directory().join(name);
        self.control_plane.snapshot(&file)?;
        Ok(file)
    }

    /// Has etcd forget everything but the present state: a watch that wants to go on from an earlier one is refused.
    ///
    /// # Errors
    /// When etcd does not answer.
    pub fn compact_etcd(&self) -> Result<()> {
        self.control_plane.compact()
    }

    /// Puts the cluster's objects back to what they were when a snapshot was made. The nodes and all that runs on them are left
    /// alone, and find an API server whose history is another.
    ///
    /// # Errors
    /// When a program of the control plane does not end or start.
    pub fn restore(&self, snapshot: &Path) -> Result<()> {
        self.control_plane.restore(snapshot)
    }

    /// Captures every packet of the underlay, each once. What the nodes say to the API server is among them.
    ///
    /// # Errors
    /// When the capture cannot be started.
    pub fn capture(&self) -> Result<Capture> {
        self.underlay.capture()
    }

    /// Starts a node's kubelet, waits until the API server knows the node, and starts what asks for that.
    fn start_node(&self, number: usize) -> Result<()> {
        let (node, admin) = (self.node(number), self.admin());
        node.start(NodeService::Kubelet)?;
        let object = format!("node/{}", node.name());
        eventually("the API server to know the node", NODE_LIMIT, || {
            node.ensure_runs(NodeService::Kubelet)?;
            Ok(admin.output(["get", &object])?.status.success())
        })
        .with_context(|| format!("{object}; {}", node.service(NodeService::Kubelet).last_words()))?;
        if self.kube_proxy { node.start(NodeService::KubeProxy) } else { Ok(()) }
    }

    fn on_every_node(&self, work: impl Fn(Node<'_>) -> Result<()> + Sync) -> Result<()> {
        let work = &work;
        std::thread::scope(|scope| {
            let running: Vec<_> = self.nodes().into_iter().map(|node| scope.spawn(move || work(node))).collect();
            running.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|it| std::panic::resume_unwind(it)))
        })
    }
}

/// Takes one of the steps of a case that share a cluster, and tells how long it took.
///
/// # Errors
/// Those of the work, with the step's name.
pub fn step(name: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let started = Instant::now();
    work().with_context(|| format!("step: {name}"))?;
    eprintln!("{name}: {:.1?}", started.elapsed());
    Ok(())
}
