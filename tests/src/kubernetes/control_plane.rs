//! etcd, the API server, the controller manager and the scheduler, in a network namespace beyond the nodes' gateway.

use std::fs::{self, File};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use husk_overlay::prefix::Prefix;
use nix::sys::signal::Signal;
use serde_json::Value;

use super::credentials::{CONTROLLER_MANAGER, Credentials, SCHEDULER};
use super::kubectl::Kubectl;
use super::service::{Namespaces, Service};
use crate::eventually;
use crate::process::Program;

/// How long the API server may take until it answers.
const TIME_LIMIT: Duration = Duration::from_secs(60);

const PORT: u16 = 6443;

const ETCD: &str = "http://127.0.0.1:2379";

/// A program of the control plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ControlService {
    /// The store.
    Etcd,
    /// What everybody talks to.
    ApiServer,
    /// What allocates node CIDRs and makes pods of DaemonSets, among much else.
    ControllerManager,
    /// What chooses a node for a pod that names none.
    Scheduler,
}

impl ControlService {
    /// All, in the order in which they start.
    pub const ALL: [Self; 4] = [Self::Etcd, Self::ApiServer, Self::ControllerManager, Self::Scheduler];

    /// Its name, which is also that of its log.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Etcd => "etcd",
            Self::ApiServer => "apiserver",
            Self::ControllerManager => "controller-manager",
            Self::Scheduler => "scheduler",
        }
    }
}

/// What the programs are told of the cluster.
#[derive(Debug, Clone)]
pub(super) struct Ranges {
    pub(super) pods: Vec<Prefix>,
    pub(super) services: Vec<Prefix>,
    /// Whether the controller manager gives every node a part of `pods`.
    pub(super) allocate: bool,
}

impl Ranges {
    /// The gate that both families need in this version.
    pub(super) fn feature_gates(&self) -> Option<&'static str> {
        (self.pods.len() > 1).then_some("--feature-gates=IPv6DualStack=true")
    }

    pub(super) fn list(prefixes: &[Prefix]) -> String {
        prefixes.iter().map(Prefix::to_string).collect::<Vec<_>>().join(",")
    }
}

/// The four programs.
#[derive(Debug)]
pub(super) struct ControlPlane {
    services: [Service; 4],
    directory: PathBuf,
    binaries: PathBuf,
    address: IpAddr,
    net: Arc<File>,
    ranges: Ranges,
    credentials: Credentials,
}

/// What a control plane is made of.
pub(super) struct Site<'a> {
    pub(super) directory: PathBuf,
    pub(super) binaries: PathBuf,
    pub(super) address: IpAddr,
    pub(super) net: Arc<File>,
    pub(super) ranges: Ranges,
    pub(super) users: &'a [(String, String)],
}

impl ControlPlane {
    /// Prepares its files; nothing runs.
    pub(super) fn create(site: Site<'_>) -> Result<Self> {
        let Site { directory, binaries, address, net, ranges, users } = site;
        fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
        let server = format!("https://{}", SocketAddr::new(address, PORT));
        let credentials = Credentials::create(directory.join("users"), &server, &authority(&directory), users)?;
        let key = directory.join("service-accounts.key");
        Program::new("openssl").args(["genrsa", "-out"]).args([&key]).args(["2048"]).check()?;
        let services = ControlService::ALL.map(|service| Service::new(service.name(), &directory));
        Ok(Self { services, directory, binaries, address, net, ranges, credentials })
    }

    /// Starts all, and waits until the API server is ready before what depends on it.
    pub(super) fn start_all(&self) -> Result<()> {
        self.start(ControlService::Etcd)?;
        self.start(ControlService::ApiServer)?;
        self.wait_ready()?;
        self.start(ControlService::ControllerManager)?;
        self.start(ControlService::Scheduler)
    }

    pub(super) fn start(&self, service: ControlService) -> Result<()> {
        let place = Namespaces { net: &self.net, mounts: None, pids: None };
        let (program, arguments) = match service {
            ControlService::Etcd => (PathBuf::from("etcd"), self.etcd()),
            ControlService::ApiServer => (self.binaries.join("kube-apiserver"), self.api_server()),
            ControlService::ControllerManager => {
                (self.binaries.join("kube-controller-manager"), self.controller_manager()?)
            }
            ControlService::Scheduler => (self.binaries.join("kube-scheduler"), self.scheduler()?),
        };
        self.service(service).start(&place, program, arguments)
    }

    pub(super) fn stop(&self, service: ControlService, signal: Signal) -> Result<()> {
        self.service(service).stop(signal)
    }

    /// Waits until the API server says that it is ready.
    pub(super) fn wait_ready(&self) -> Result<()> {
        let kubectl = self.admin();
        eventually("the API server to be ready", TIME_LIMIT, || {
            self.service(ControlService::Etcd).ensure_runs()?;
            self.service(ControlService::ApiServer).ensure_runs()?;
            Ok(kubectl.output(["get", "--raw", "/readyz"])?.status.success())
        })
        .with_context(|| self.service(ControlService::ApiServer).last_words())
    }

    /// Writes what etcd holds to a file, while it runs.
    pub(super) fn snapshot(&self, file: &Path) -> Result<()> {
        self.etcdctl().args(["snapshot", "save"]).args([file]).check().map(drop)
    }

    /// Has etcd forget everything but the present state, so that no watch can go on from an earlier one.
    pub(super) fn compact(&self) -> Result<()> {
        let status = self.etcdctl().args(["endpoint", "status", "--write-out=json"]).check()?;
        let status: Value = serde_json::from_str(&status).context("etcdctl printed no JSON")?;
        let revision = status[0]["Status"]["header"]["revision"].as_u64().context("a status without revision")?;
        self.etcdctl().args(["compact", &revision.to_string()]).check().map(drop)
    }

    /// Gives etcd what a file holds, as an administrator does after a disaster: with the API server stopped, and what keeps
    /// a view of it in memory started again.
    pub(super) fn restore(&self, file: &Path) -> Result<()> {
        for service in ControlService::ALL.into_iter().rev() {
            if self.service(service).was_started() {
                // Asked politely, the API server would wait for all watches to end.
                self.stop(service, Signal::SIGKILL)?;
            }
        }
        let data = self.data();
        fs::remove_dir_all(&data).with_context(|| format!("removing {}", data.display()))?;
        self.etcdctl().args(["snapshot", "restore"]).args([file]).args([Path::new("--data-dir"), &data]).check()?;
        self.start_all()
    }

    pub(super) fn admin(&self) -> Kubectl {
        self.kubectl(self.credentials.admin())
    }

    pub(super) fn user(&self, name: &str) -> Result<Kubectl> {
        Ok(self.kubectl(self.credentials.kubeconfig(name)?))
    }

    fn kubectl(&self, kubeconfig: PathBuf) -> Kubectl {
        let (program, cache) = (self.binaries.join("kubectl"), self.directory.join("kubectl-cache"));
        Kubectl { program, kubeconfig, cache, net: Arc::clone(&self.net) }
    }

    pub(super) fn credentials(&self) -> &Credentials {
        &self.credentials
    }

    pub(super) fn ranges(&self) -> &Ranges {
        &self.ranges
    }

    pub(super) fn binaries(&self) -> &Path {
        &self.binaries
    }

    pub(super) fn service(&self, service: ControlService) -> &Service {
        // The order of `ALL` is that of the declaration.
        &self.services[service as usize]
    }

    fn etcdctl(&self) -> Program<'_> {
        Program::new("etcdctl").args(["--endpoints", ETCD]).in_netns(&self.net)
    }

    fn data(&self) -> PathBuf {
        self.directory.join("etcd")
    }

    fn etcd(&self) -> Vec<String> {
        vec![
            format!("--data-dir={}", self.data().display()),
            format!("--listen-client-urls={ETCD}"),
            format!("--advertise-client-urls={ETCD}"),
            "--listen-peer-urls=http://127.0.0.1:2380".to_owned(),
            // A cluster for tests does not outlive its machine, and a shared disk is slow to say that it has written.
            "--unsafe-no-fsync".to_owned(),
        ]
    }

    fn api_server(&self) -> Vec<String> {
        let key = self.directory.join("service-accounts.key").display().to_string();
        let mut arguments = vec![
            format!("--etcd-servers={ETCD}"),
            format!("--advertise-address={}", self.address),
            "--bind-address=::".to_owned(),
            format!("--secure-port={PORT}"),
            // It makes a certificate there if there is none.
            format!("--cert-dir={}", self.directory.join("apiserver").display()),
            format!("--token-auth-file={}", self.credentials.tokens().display()),
            "--authorization-mode=Node,RBAC".to_owned(),
            "--enable-admission-plugins=NodeRestriction".to_owned(),
            format!("--service-cluster-ip-range={}", Ranges::list(&self.ranges.services)),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--service-account-key-file={key}"),
            format!("--service-account-signing-key-file={key}"),
            // No name of a node can be resolved.
            "--kubelet-preferred-address-types=InternalIP".to_owned(),
            "--allow-privileged".to_owned(),
            "--v=1".to_owned(),
        ];
        arguments.extend(self.ranges.feature_gates().map(str::to_owned));
        arguments
    }

    fn controller_manager(&self) -> Result<Vec<String>> {
        let mut arguments = vec![
            format!("--kubeconfig={}", self.credentials.kubeconfig(CONTROLLER_MANAGER)?.display()),
            format!("--root-ca-file={}", authority(&self.directory).display()),
            format!("--service-account-private-key-file={}", self.directory.join("service-accounts.key").display()),
            "--use-service-account-credentials".to_owned(),
            format!("--service-cluster-ip-range={}", Ranges::list(&self.ranges.services)),
            "--leader-elect=false".to_owned(),
            "--port=0".to_owned(),
            "--v=1".to_owned(),
        ];
        if self.ranges.allocate {
            arguments.push("--allocate-node-cidrs".to_owned());
            arguments.push(format!("--cluster-cidr={}", Ranges::list(&self.ranges.pods)));
        }
        arguments.extend(self.ranges.feature_gates().map(str::to_owned));
        Ok(arguments)
    }

    fn scheduler(&self) -> Result<Vec<String>> {
        let kubeconfig = self.credentials.kubeconfig(SCHEDULER)?;
        let kubeconfig = format!("--kubeconfig={}", kubeconfig.display());
        Ok(vec![kubeconfig, "--leader-elect=false".to_owned(), "--port=0".to_owned(), "--v=1".to_owned()])
    }
}

/// What vouches for the API server's certificate: the file holds the authority behind it too.
fn authority(directory: &Path) -> PathBuf {
    directory.join("apiserver/apiserver.crt")
}
