//! Who may talk to the API server: users with tokens, and a kubeconfig file for each of them.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::json;

/// The user who may do everything.
const ADMIN: &str = "admin";

/// What each node's kube-proxy is; Kubernetes itself grants this name what it needs.
pub(super) const KUBE_PROXY: &str = "system:kube-proxy";

/// What the controller manager is, likewise.
pub(super) const CONTROLLER_MANAGER: &str = "system:kube-controller-manager";

/// What the scheduler is, likewise.
pub(super) const SCHEDULER: &str = "system:kube-scheduler";

/// Users that may be added to a cluster as nodes: the API server reads the file of tokens only when it starts.
const NODES: usize = 16;

/// Users, their tokens and their kubeconfig files, in a directory.
#[derive(Debug)]
pub(super) struct Credentials {
    directory: PathBuf,
}

impl Credentials {
    /// Makes a token and a kubeconfig file for the parts of Kubernetes, the admin, and `others` with their groups.
    pub(super) fn create(
        directory: PathBuf,
        server: &str,
        authority: &Path,
        others: &[(String, String)],
    ) -> Result<Self> {
        fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
        let credentials = Self { directory };
        let groups = |name: &str, group: &str| (name.to_owned(), group.to_owned());
        let mut users = vec![
            groups(ADMIN, "system:masters"),
            groups(CONTROLLER_MANAGER, ""),
            groups(SCHEDULER, ""),
            groups(KUBE_PROXY, ""),
        ];
        users.extend((1..=NODES).map(|number| groups(&node(&format!("host{number}")), "system:nodes")));
        users.extend_from_slice(others);
        let mut lines = String::new();
        for (name, groups) in users {
            let token = fs::read_to_string("/proc/sys/kernel/random/uuid").context("asking for a random token")?;
            let token = token.trim();
            // User, id and groups (https://kubernetes.io/docs/reference/access-authn-authz/authentication/#static-token-file).
            lines += &format!("{token},{name},{name},\"{groups}\"\n");
            let config = json!({
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "husk", "cluster": {"server": server, "certificate-authority": authority}}],
                "users": [{"name": name, "user": {"token": token}}],
                "contexts": [{"name": "husk", "context": {"cluster": "husk", "user": name}}],
                "current-context": "husk",
            });
            write_secret(&credentials.directory.join(file_name(&name)), &config.to_string())?;
        }
        write_secret(&credentials.tokens(), &lines)?;
        Ok(credentials)
    }

    /// The file for the API server's `--token-auth-file`.
    pub(super) fn tokens(&self) -> PathBuf {
        self.directory.join("tokens.csv")
    }

    /// The kubeconfig file of the user who may do everything.
    pub(super) fn admin(&self) -> PathBuf {
        self.directory.join(file_name(ADMIN))
    }

    /// The kubeconfig file of a user.
    pub(super) fn kubeconfig(&self, user: &str) -> Result<PathBuf> {
        let path = self.directory.join(file_name(user));
        ensure!(path.exists(), "the cluster has no user {user}: name it when building the cluster");
        Ok(path)
    }
}

/// What the kubelet of a node is.
pub(super) fn node(name: &str) -> String {
    format!("system:node:{name}")
}

fn file_name(user: &str) -> String {
    format!("{user}.kubeconfig")
}

/// For root alone, as administrators keep them.
fn write_secret(path: &Path, text: &str) -> Result<()> {
    let file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(path);
    let written = file.and_then(|mut file| file.write_all(text.as_bytes()));
    written.with_context(|| format!("writing {}", path.display()))
}
