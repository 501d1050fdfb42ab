//! `kubectl` as one user, with a time limit.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::patience;
use crate::process::{Output, Program};

/// How long a command may take unless told otherwise.
const TIME_LIMIT: Duration = Duration::from_secs(30);

/// What a command that waits by itself has beyond its own limit.
const MARGIN: Duration = Duration::from_secs(10);

/// A user at the API server.
#[derive(Debug, Clone)]
pub struct Kubectl {
    pub(super) program: PathBuf,
    pub(super) kubeconfig: PathBuf,
    /// What `kubectl` remembers of the API.
    pub(super) cache: PathBuf,
    /// The network namespace it runs in.
    pub(super) net: Arc<File>,
}

impl Kubectl {
    /// Runs a command to success and returns its standard output.
    ///
    /// # Errors
    /// When it fails, or takes longer than half a minute.
    pub fn run<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Result<String> {
        self.program().args(arguments).check()
    }

    /// Runs a command to its end, whatever its exit status.
    ///
    /// # Errors
    /// When it takes longer than half a minute.
    pub fn output<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Result<Output> {
        self.program().args(arguments).run()
    }

    /// Runs a command with a standard input, as `["apply", "-f", "-"]` wants.
    ///
    /// # Errors
    /// As [`Kubectl::run`].
    pub fn run_with<'a>(&self, arguments: impl IntoIterator<Item = &'a str>, input: &str) -> Result<String> {
        self.program().args(arguments).stdin(input).check()
    }

    /// Applies manifests, YAML or JSON.
    ///
    /// # Errors
    /// As [`Kubectl::run`].
    pub fn apply(&self, manifests: &str) -> Result<String> {
        self.run_with(["apply", "-f", "-"], manifests)
    }

    /// What a command says with `--output json`.
    ///
    /// # Errors
    /// As [`Kubectl::run`], and when it prints no JSON.
    pub fn json<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Result<Value> {
        let text = self.program().args(arguments).args(["--output", "json"]).check()?;
        serde_json::from_str(&text).with_context(|| format!("kubectl printed no JSON: {text}"))
    }

    /// All objects of a kind, `resource` being its plural, in all namespaces.
    ///
    /// # Errors
    /// As [`Kubectl::json`].
    pub fn list(&self, resource: &str) -> Result<Vec<Value>> {
        let mut list = self.json(["get", resource, "--all-namespaces"])?;
        match list["items"].take() {
            Value::Array(items) => Ok(items),
            other => bail!("a list of {resource} without items: {other}"),
        }
    }

    /// Runs a command that waits by itself, `wait`, `rollout status` or `delete`; it is told the limit.
    ///
    /// # Errors
    /// When it fails, which is how it says that the time is over.
    pub fn wait<'a>(&self, limit: Duration, arguments: impl IntoIterator<Item = &'a str>) -> Result<String> {
        let limit = patience(limit);
        let timeout = format!("--timeout={}s", limit.as_secs());
        self.program().args(arguments).args([timeout]).limit(limit + MARGIN).check()
    }

    /// The program itself, for scripts that are told how to ask the cluster.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.program
    }

    /// The file by which this user logs on.
    #[must_use]
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// The program, with what every command needs; the caller adds arguments.
    #[must_use]
    pub fn program(&self) -> Program<'_> {
        let path = ("PATH".to_owned(), std::env::var_os("PATH").unwrap_or_default());
        let kubeconfig = ("KUBECONFIG".to_owned(), self.kubeconfig.clone().into_os_string());
        // Whatever else the caller's environment says about proxies or other clusters has no meaning here.
        Program::new(&self.program)
            .environment([path, kubeconfig])
            .args([format!("--cache-dir={}", self.cache.display())])
            .in_netns(&self.net)
            .limit(patience(TIME_LIMIT))
    }
}
