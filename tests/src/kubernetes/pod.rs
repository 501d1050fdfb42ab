//! Pods as a user makes them, and ways into them that do not lead through the API server.

use std::fs::{self, File};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_overlay::prefix::Family;
use serde_json::{Value, json};

use super::image::IMAGE;
use super::kubectl::Kubectl;
use super::node::Node;
use crate::eventually;
use crate::netns::Netns;
use crate::process::Program;

/// How long a pod may take to be ready.
const TIME_LIMIT: Duration = Duration::from_secs(60);

/// How long it may take to be gone: the kubelet looks at a pod that ends once in a while only, and several times.
const GONE_LIMIT: Duration = Duration::from_secs(180);

/// Where the container runtime names the namespaces of pods.
const NAMESPACES: &str = "/run/netns";

/// A pod to be made: of the test's image, on a node.
#[derive(Debug)]
#[must_use = "nothing is made before `add`"]
pub struct PodRequest<'a> {
    node: Node<'a>,
    kubectl: Kubectl,
    manifest: Value,
}

impl<'a> PodRequest<'a> {
    pub(super) fn new(node: Node<'a>, kubectl: Kubectl, name: &str) -> Self {
        let manifest = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": "default", "labels": {"name": name}},
            "spec": {
                "nodeName": node.name(),
                // Not 0: the API server then forgets the pod before the kubelet has ended it.
                "terminationGracePeriodSeconds": 1,
                "containers": [{"name": "main", "image": IMAGE, "imagePullPolicy": "IfNotPresent"}],
            },
        });
        Self { node, kubectl, manifest }
    }

    /// In this namespace rather than in `default`.
    pub fn in_namespace(self, namespace: &str) -> Self {
        self.change(|pod| pod["metadata"]["namespace"] = namespace.into())
    }

    /// With a label.
    pub fn label(self, key: &str, value: &str) -> Self {
        self.change(|pod| pod["metadata"]["labels"][key] = value.into())
    }

    /// With an annotation.
    pub fn annotation(self, key: &str, value: &str) -> Self {
        self.change(|pod| pod["metadata"]["annotations"][key] = value.into())
    }

    /// Running this command.
    pub fn command(self, command: &[&str]) -> Self {
        self.change(|pod| pod["spec"]["containers"][0]["command"] = command.into())
    }

    /// With any change to its manifest.
    pub fn change(mut self, change: impl FnOnce(&mut Value)) -> Self {
        change(&mut self.manifest);
        self
    }

    /// Makes it without waiting for anything.
    ///
    /// # Errors
    /// When the API server refuses.
    pub fn create(self) -> Result<()> {
        let (kubectl, manifest) = (self.kubectl, self.manifest.to_string());
        // A namespace gets its service account a moment after it was made, and no pod without.
        eventually("the namespace's service account", TIME_LIMIT, || {
            let said = kubectl.program().args(["create", "-f", "-"]).stdin(&manifest).run()?;
            let early = said.stderr.contains("error looking up service account");
            ensure!(said.status.success() || early, "creating a pod: {}", said.stderr.trim());
            Ok(said.status.success())
        })
    }

    /// Makes it and waits until it is ready.
    ///
    /// # Errors
    /// When the API server refuses, or it is not ready in time; the error carries what is known of it.
    pub fn add(self) -> Result<KubernetesPod> {
        let (node, kubectl, metadata) = (self.node, self.kubectl.clone(), self.manifest["metadata"].clone());
        let text = |key: &str| metadata[key].as_str().unwrap_or_default().to_owned();
        let (name, namespace) = (text("name"), text("namespace"));
        self.create()?;
        KubernetesPod::find(node, kubectl, &namespace, &name)
    }
}

/// A pod that is ready. It stays when this is dropped; see [`KubernetesPod::delete`].
#[derive(Debug)]
pub struct KubernetesPod {
    name: String,
    namespace: String,
    uid: String,
    addresses: Vec<IpAddr>,
    netns: Netns,
    /// The name of its network namespace, as seen from outside; none on the node's network.
    sandbox: Option<PathBuf>,
    kubectl: Kubectl,
}

impl KubernetesPod {
    /// Waits until a pod is ready, and finds its network namespace.
    pub(super) fn find(node: Node<'_>, kubectl: Kubectl, namespace: &str, name: &str) -> Result<Self> {
        let pod = format!("pod/{name}");
        kubectl.wait(TIME_LIMIT, ["wait", "--for=condition=Ready", "--namespace", namespace, &pod]).with_context(
            || {
                let described = kubectl.output(["describe", "--namespace", namespace, &pod]);
                let described = described.map(|output| output.stdout).unwrap_or_default();
                format!("{pod} on {} is not ready:\n{described}", node.name())
            },
        )?;
        let status = kubectl.json(["get", "--namespace", namespace, &pod])?;
        let addresses = status["status"]["podIPs"].as_array().into_iter().flatten();
        let addresses: Result<Vec<IpAddr>, _> = addresses.filter_map(|it| it["ip"].as_str()).map(str::parse).collect();
        let uid = status["metadata"]["uid"].as_str().context("a pod without uid")?.to_owned();
        let process = first_process(&uid).with_context(|| format!("no process of {pod} was found"))?;
        let netns = process.join("ns/net");
        let netns = File::open(&netns).with_context(|| format!("opening {}", netns.display()))?;
        let sandbox = sandbox(&node, &netns)?;
        let netns = Netns::of_others(name, netns);
        let (name, namespace) = (name.to_owned(), namespace.to_owned());
        Ok(Self { name, namespace, uid, addresses: addresses?, netns, sandbox, kubectl })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its namespace, in the sense of Kubernetes.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// What the API server calls it for good.
    #[must_use]
    pub fn uid(&self) -> &str {
        &self.uid
    }

    /// Its addresses as the API server shows them (`status.podIPs`).
    #[must_use]
    pub fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }

    /// Its address of a family.
    ///
    /// # Errors
    /// When it has none.
    pub fn address(&self, family: Family) -> Result<IpAddr> {
        let found = self.addresses.iter().copied().find(|address| Family::of(*address) == family);
        found.with_context(|| format!("pod {} has no {family} address: {:?}", self.name, self.addresses))
    }

    /// Its network namespace, to ask questions from.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// A program of this machine, to be run in the pod's network namespace: far faster than [`KubernetesPod::exec`].
    #[must_use]
    pub fn program(&self, program: &str) -> Program<'_> {
        self.netns.program(program)
    }

    /// Runs a command in its container through the API server, `kubectl exec`, and returns its standard output.
    ///
    /// # Errors
    /// When it fails.
    pub fn exec<'a>(&self, command: impl IntoIterator<Item = &'a str>) -> Result<String> {
        let common = ["exec", "--namespace", &self.namespace, &self.name, "--"];
        self.kubectl.program().args(common).args(command).check()
    }

    /// Deletes it, and waits until the API server has forgotten it and the runtime has removed its network namespace. A kubelet
    /// looks every ten seconds only whether it may report that; where this is not the point, see
    /// [`KubernetesPod::delete_at_once`].
    ///
    /// # Errors
    /// When one of both takes too long.
    pub fn delete(self) -> Result<()> {
        let (namespace, name) = (self.namespace.as_str(), self.name.as_str());
        self.kubectl.wait(GONE_LIMIT, ["delete", "--namespace", namespace, "pod", name])?;
        self.wait_gone()
    }

    /// Has the API server forget it, whereupon the kubelet ends it, and waits until the runtime has removed its network namespace.
    ///
    /// # Errors
    /// When that takes too long.
    pub fn delete_at_once(self) -> Result<()> {
        let (namespace, name) = (self.namespace.as_str(), self.name.as_str());
        self.kubectl.run(["delete", "--namespace", namespace, "pod", name, "--force", "--grace-period=0"])?;
        self.wait_gone()
    }

    /// Waits until the runtime has removed its network namespace, whoever deleted it.
    ///
    /// # Errors
    /// When it takes too long.
    pub fn wait_gone(&self) -> Result<()> {
        eventually(&format!("pod {} to be gone", self.name), GONE_LIMIT, || {
            Ok(self.sandbox.as_ref().is_none_or(|sandbox| !sandbox.exists()) && first_process(&self.uid).is_none())
        })
    }
}

/// The directory in `/proc` of a process of a pod: the kubelet gives each pod a control group that is named after it.
fn first_process(uid: &str) -> Option<PathBuf> {
    let group = format!("/pod{uid}/");
    let belongs = |path: &PathBuf| fs::read_to_string(path.join("cgroup")).is_ok_and(|text| text.contains(&group));
    fs::read_dir("/proc").ok()?.flatten().map(|entry| entry.path()).find(belongs)
}

/// The name that the runtime of a node gave to a network namespace: the path, from outside, of what it is mounted on.
fn sandbox(node: &Node<'_>, netns: &File) -> Result<Option<PathBuf>> {
    use std::os::unix::fs::MetadataExt as _;
    let wanted = netns.metadata().context("asking for a namespace's number")?.ino();
    let seen = node.seen(NAMESPACES);
    for entry in fs::read_dir(&seen).with_context(|| format!("listing {}", seen.display()))? {
        let entry = entry?;
        // Not the entry's own metadata: what is mounted on it counts.
        if fs::metadata(entry.path()).is_ok_and(|it| it.ino() == wanted) {
            return Ok(Some(node.file(NAMESPACES).join(entry.file_name())));
        }
    }
    Ok(None)
}
