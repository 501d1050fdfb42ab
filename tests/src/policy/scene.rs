//! A stage for policy: pods on two hosts that all serve, manifests that say what may be, and the question who reaches whom.

use std::fmt;
use std::fs;
use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_overlay::mode::Mode;
use husk_overlay::prefix::Family;
use serde_json::{Value, json};

use crate::cluster::{Cluster, ClusterBuilder};
use crate::eventually;
use crate::netns::Netns;
use crate::pod::Pod;
use crate::probe::{Datagram, Echo, EchoServer, tcp};

/// Ports at which every pod serves, over TCP and UDP.
pub const PORTS: [u16; 2] = [80, 8080];

/// How long what will not come is waited for.
const BRIEFLY: Duration = Duration::from_millis(400);

/// How long a change of a manifest may take to be in force everywhere.
const IN_FORCE: Duration = Duration::from_secs(15);

/// Two hosts with two pods each.
pub struct Scene {
    /// The hosts.
    pub cluster: Cluster,
    /// The pods with the host they are on, from 1.
    pub pods: Vec<(Pod, usize)>,
    _servers: Vec<EchoServer>,
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    /// A TCP connection to a port.
    Tcp(u16),
    /// A UDP datagram to a port, and its answer.
    Udp(u16),
    /// An ICMP echo request, and its answer.
    Ping,
}

/// Who asks whom for what.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Question<'a> {
    /// Name of the pod that asks.
    pub from: &'a str,
    /// Name of the pod that is asked.
    pub to: &'a str,
    /// Family of the addresses.
    pub family: Family,
    /// What for.
    pub service: Service,
}

impl fmt::Debug for Question<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {} {:?} {}", self.from, self.to, self.service, self.family)
    }
}

/// A pod of the scene: namespace, name, host from 1, labels, named ports.
type Role =
    (&'static str, &'static str, usize, &'static [(&'static str, &'static str)], &'static [(&'static str, u16)]);

const CAST: [Role; 4] = [
    ("default", "web", 1, &[("app", "web")], &[("http", 80)]),
    ("default", "near", 1, &[("app", "client")], &[("http", 8080)]),
    ("default", "far", 2, &[("app", "client"), ("role", "far")], &[("http", 8080)]),
    ("dev", "dev", 2, &[("app", "client"), ("stage", "dev")], &[("http", 80)]),
];

impl Scene {
    /// Starts the hosts and the pods, and describes them to the cluster.
    ///
    /// # Errors
    /// When a host or pod cannot be made.
    pub fn start(mode: Mode) -> Result<Self> {
        Self::start_on(Cluster::builder().mode(mode).dual_stack())
    }

    /// The same on an underlay of the caller's, of two hosts.
    ///
    /// # Errors
    /// As [`Scene::start`].
    pub fn start_on(cluster: ClusterBuilder) -> Result<Self> {
        let cluster = cluster.hosts(2).start()?;
        let mut scene = Self { cluster, pods: Vec::new(), _servers: Vec::new() };
        for (name, labels) in [("default", json!({"stage": "prod"})), ("dev", json!({"stage": "dev"}))] {
            let namespace =
                json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}});
            scene.write(&namespace)?;
        }
        for (namespace, name, host, labels, ports) in CAST {
            let mut pod = scene.cluster.host(host).sandbox(name)?;
            pod.spec_mut().namespace = namespace.to_owned();
            pod.add()?.into_result().with_context(|| format!("ADD of {name}"))?;
            for family in Family::ALL {
                for port in PORTS {
                    let at = SocketAddr::new(pod.address(family)?, port);
                    scene._servers.push(EchoServer::start_on(pod.netns(), at)?);
                }
            }
            let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), json!(value))).collect();
            scene.describe(&pod, Value::Object(labels), ports)?;
            scene.pods.push((pod, host));
        }
        scene.assert("without any policy", |_| true)?;
        Ok(scene)
    }

    /// Writes the manifest of a pod: its labels, its addresses, the names of its ports.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn describe(&self, pod: &Pod, labels: Value, ports: &[(&str, u16)]) -> Result<()> {
        let addresses: Vec<Value> = pod.addresses().iter().map(|ip| json!({"ip": ip})).collect();
        let ports: Vec<Value> = ports.iter().map(|(name, port)| json!({"name": name, "containerPort": port})).collect();
        self.write(&json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"namespace": pod.spec().namespace, "name": pod.name(), "labels": labels},
            "spec": {"containers": [{"name": "c", "ports": ports}]},
            "status": {"phase": "Running", "podIPs": addresses},
        }))
    }

    /// Writes a NetworkPolicy.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn policy(&self, namespace: &str, name: &str, spec: &Value) -> Result<()> {
        self.write(&json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"namespace": namespace, "name": name}, "spec": spec,
        }))
    }

    /// Writes a ClusterNetworkPolicy.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn cluster_policy(&self, name: &str, spec: &Value) -> Result<()> {
        self.write(&json!({
            "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy",
            "metadata": {"name": name}, "spec": spec,
        }))
    }

    /// Removes every policy.
    ///
    /// # Errors
    /// When a file cannot be removed.
    pub fn clear(&self) -> Result<()> {
        for entry in fs::read_dir(self.cluster.manifests())? {
            let path = entry?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().contains("NetworkPolicy-")) {
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }

    /// Removes a manifest.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn remove(&self, kind: &str, namespace: &str, name: &str) -> Result<()> {
        Ok(fs::remove_file(self.cluster.manifests().join(format!("{kind}-{namespace}-{name}.yaml")))?)
    }

    /// Writes a manifest, whole or not at all.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, manifest: &Value) -> Result<()> {
        let text = |pointer: &str| manifest.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
        let name = format!("{}-{}-{}", text("/kind"), text("/metadata/namespace"), text("/metadata/name"));
        let folder = self.cluster.manifests();
        let draft = folder.join(format!(".{name}"));
        fs::write(&draft, manifest.to_string()).with_context(|| format!("writing {}", draft.display()))?;
        Ok(fs::rename(&draft, folder.join(format!("{name}.yaml")))?)
    }

    /// The pod of this name.
    #[must_use]
    pub fn pod(&self, name: &str) -> &Pod {
        let found = self.pods.iter().find(|(pod, _)| pod.name() == name);
        &found.expect("the cast is fixed").0
    }

    /// Every question there is.
    #[must_use]
    pub fn questions(&self) -> Vec<Question<'_>> {
        let mut all = Vec::new();
        for (from, _) in &self.pods {
            for (to, _) in self.pods.iter().filter(|(to, _)| to.name() != from.name()) {
                for family in Family::ALL {
                    let services = PORTS.iter().flat_map(|port| [Service::Tcp(*port), Service::Udp(*port)]);
                    for service in services.chain([Service::Ping]) {
                        all.push(Question { from: from.name(), to: to.name(), family, service });
                    }
                }
            }
        }
        all
    }

    fn answers(&self, question: &Question<'_>) -> Result<bool> {
        let to = self.pod(question.to).address(question.family)?;
        let from = self.pod(question.from).netns();
        answers(from, question.service, to)
    }

    /// The questions whose answers are not as they should be.
    ///
    /// # Errors
    /// When a question cannot be asked.
    pub fn surprises<'a>(
        &self,
        questions: &[Question<'a>],
        allowed: &impl Fn(&Question<'_>) -> bool,
    ) -> Result<Vec<Question<'a>>> {
        thread::scope(|scope| {
            let asked: Vec<_> = questions.iter().map(|question| scope.spawn(move || self.answers(question))).collect();
            let mut surprises = Vec::new();
            for (question, answer) in questions.iter().zip(asked) {
                let answer = answer.join().map_err(|_| anyhow::anyhow!("a question panicked"))??;
                if answer != allowed(question) {
                    surprises.push(*question);
                }
            }
            Ok(surprises)
        })
    }

    /// Waits until every answer is as it should be, and asks once more.
    ///
    /// # Errors
    /// When some answer stays another.
    pub fn assert(&self, what: &str, allowed: impl Fn(&Question<'_>) -> bool) -> Result<()> {
        let questions = self.questions();
        let mut surprises = Vec::new();
        let settled = eventually(what, IN_FORCE, || {
            surprises = self.surprises(&questions, &allowed)?;
            Ok(surprises.is_empty())
        });
        settled.with_context(|| format!("{what}: not as it should be: {surprises:?}"))?;
        let surprises = self.surprises(&questions, &allowed)?;
        ensure!(surprises.is_empty(), "{what}: it was as it should be, and is not any more: {surprises:?}");
        Ok(())
    }
}

/// True if somebody answers.
///
/// # Errors
/// When the question cannot be asked.
pub fn answers(from: &Netns, service: Service, to: std::net::IpAddr) -> Result<bool> {
    match service {
        Service::Tcp(port) => Ok(tcp::connect(from, SocketAddr::new(to, port), BRIEFLY).is_ok()),
        Service::Udp(port) => Ok(Datagram::to(SocketAddr::new(to, port)).limit(BRIEFLY).run(from)?.arrived()),
        Service::Ping => Ok(Echo::to(to).limit(BRIEFLY).run(from)?.arrived()),
    }
}

/// Listens for datagrams that must not come.
pub struct Watch {
    socket: std::net::UdpSocket,
}

/// Listens at an address of a namespace.
///
/// # Errors
/// When it cannot be listened there.
pub fn watch(netns: &Netns, at: SocketAddr) -> Result<Watch> {
    let socket = netns.run(|| std::net::UdpSocket::bind(at))?.with_context(|| format!("listening at {at}"))?;
    socket.set_nonblocking(true)?;
    Ok(Watch { socket })
}

impl Watch {
    /// True if nothing has come since the last question.
    ///
    /// # Errors
    /// When the socket fails.
    pub fn is_silent(&self) -> Result<bool> {
        let mut silent = true;
        loop {
            match self.socket.recv(&mut [0; 64]) {
                Ok(_) => silent = false,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(silent),
                // What an ICMP error brought back is no datagram.
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {}
                Err(error) => return Err(error).context("listening"),
            }
        }
    }
}
