//! A cluster that was left up: found again by later processes, looked into, and removed.

use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::{ControlService, Kubectl, Kubernetes, NodeService, machine};
use crate::netns;
use crate::scope;

/// The file in the scope's directory that tells such a cluster from whatever else was left up.
const STATE: &str = "kubernetes.json";

/// What later processes have to know.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    nodes: Vec<String>,
    /// The overlay that was installed.
    overlay: Option<String>,
    kubectl: PathBuf,
    cache: PathBuf,
    admin: PathBuf,
}

impl Kubernetes {
    /// Leaves everything running; [`Kept::find`] finds it.
    ///
    /// # Errors
    /// When the mark cannot be written; everything is removed then.
    pub fn keep(self, overlay: Option<&str>) -> Result<Kept> {
        let Kubectl { program, kubeconfig, cache, .. } = self.admin();
        let nodes = self.nodes().iter().map(|node| node.name().to_owned()).collect();
        let overlay = overlay.map(str::to_owned);
        let state = State { nodes, overlay, kubectl: program, cache, admin: kubeconfig };
        let path = self.scope().directory().join(STATE);
        fs::write(&path, serde_json::to_string(&state)?).with_context(|| format!("writing {}", path.display()))?;
        let (directory, prefix) = (self.scope().directory().to_owned(), self.scope().prefix().to_owned());
        let Self { equipment, control_plane, underlay, .. } = self;
        underlay.keep()?;
        std::mem::forget((equipment, control_plane));
        Ok(Kept { prefix, directory, state })
    }
}

/// A cluster that was left up.
#[derive(Debug)]
pub struct Kept {
    prefix: String,
    directory: PathBuf,
    state: State,
}

/// A log of such a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Log {
    /// Of a program of a node.
    Node(String, NodeService),
    /// Of a program of the control plane.
    Control(ControlService),
}

impl Kept {
    /// The clusters that were left up.
    ///
    /// # Errors
    /// When what one says of itself cannot be read.
    pub fn find() -> Result<Vec<Self>> {
        let mut found = Vec::new();
        for prefix in scope::kept() {
            let directory = std::env::temp_dir().join(&prefix);
            let path = directory.join(STATE);
            if path.exists() {
                let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
                let state = serde_json::from_str(&text).with_context(|| format!("parsing {}", path.display()))?;
                found.push(Self { prefix, directory, state });
            }
        }
        Ok(found)
    }

    /// The prefix of all its names.
    #[must_use]
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Its nodes' names.
    #[must_use]
    pub fn nodes(&self) -> &[String] {
        &self.state.nodes
    }

    /// The overlay that was installed on it, if any.
    #[must_use]
    pub fn overlay(&self) -> Option<&str> {
        self.state.overlay.as_deref()
    }

    /// The kubeconfig file of its admin.
    #[must_use]
    pub fn kubeconfig(&self) -> &Path {
        &self.state.admin
    }

    /// The path of a network namespace of its: a node's, or `outside`, where the control plane is.
    #[must_use]
    pub fn netns(&self, part: &str) -> PathBuf {
        Path::new(netns::DIRECTORY).join(format!("{}-{part}", self.prefix))
    }

    /// `kubectl` as its admin.
    ///
    /// # Errors
    /// When its network is gone, for example after a reboot.
    pub fn kubectl(&self) -> Result<Kubectl> {
        let State { kubectl, cache, admin, .. } = &self.state;
        let path = self.netns("outside");
        let net = File::open(&path).with_context(|| {
            format!("opening {}; if the machine was rebooted, hack/cluster down removes the rest", path.display())
        })?;
        let net = Arc::new(net);
        Ok(Kubectl { program: kubectl.clone(), kubeconfig: admin.clone(), cache: cache.clone(), net })
    }

    /// Becomes `kubectl`, with the caller's terminal; returns only when it cannot.
    #[must_use]
    pub fn exec_kubectl(&self, arguments: &[String]) -> anyhow::Error {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.netns("outside").display())).arg("--").arg(&self.state.kubectl);
        command.args(arguments).env("KUBECONFIG", &self.state.admin);
        for proxy in ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"] {
            command.env_remove(proxy);
        }
        anyhow::Error::new(command.exec()).context("starting nsenter")
    }

    /// Where a log is.
    #[must_use]
    pub fn log(&self, log: &Log) -> PathBuf {
        let (directory, name) = match log {
            Log::Node(node, service) => (machine::path(&self.directory, node), service.name()),
            Log::Control(service) => (self.directory.join(super::CONTROL_PLANE), service.name()),
        };
        directory.join(format!("{name}.log"))
    }

    /// Removes it.
    ///
    /// # Errors
    /// When something of it cannot be removed.
    pub fn remove(&self) -> Result<()> {
        scope::sweep_kept(&self.prefix).map(drop)
    }
}
