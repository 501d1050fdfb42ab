//! The container runtime's side of CNI: environment, configuration and answer, as libcni does it.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_overlay::marks;
use serde_json::{Value, json};

use crate::host::Place;
use crate::patience;
use crate::process::Output;
use crate::syscalls::{Interference, Traced};

/// How long a plugin may take, error 11 after waiting for the daemon included.
const TIME_LIMIT: Duration = Duration::from_secs(30);

/// The newest specification version this runtime speaks.
const NEWEST_VERSION: &str = "1.1.0";

/// One attachment, as a runtime names it.
#[derive(Debug, Clone)]
pub struct PodSpec {
    /// `K8S_POD_NAME`.
    pub name: String,
    /// `K8S_POD_NAMESPACE`.
    pub namespace: String,
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_IFNAME`.
    pub ifname: String,
    /// `CNI_NETNS`; none for a DEL after the namespace is gone.
    pub netns: Option<PathBuf>,
    /// Result of the ADD, which runtimes cache for CHECK and DEL.
    pub prev_result: Option<Value>,
    /// `runtimeConfig`, if any.
    pub runtime_config: Option<Value>,
}

impl PodSpec {
    /// The attachment `eth0` of a pod in the namespace `default`.
    #[must_use]
    pub fn new(name: &str, container_id: &str, netns: &Path) -> Self {
        Self {
            name: name.to_owned(),
            namespace: "default".to_owned(),
            container_id: container_id.to_owned(),
            ifname: "eth0".to_owned(),
            netns: Some(netns.to_owned()),
            prev_result: None,
            runtime_config: None,
        }
    }

    pub(crate) fn attachment(&self) -> Value {
        json!({"containerID": self.container_id, "ifname": self.ifname})
    }

    fn environment(&self) -> Vec<(String, OsString)> {
        let arguments = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={}",
            self.namespace, self.name, self.container_id, self.container_id
        );
        let mut variables = vec![
            ("CNI_CONTAINERID".to_owned(), self.container_id.clone().into()),
            ("CNI_IFNAME".to_owned(), self.ifname.clone().into()),
            ("CNI_ARGS".to_owned(), arguments.into()),
        ];
        variables.extend(self.netns.iter().map(|path| ("CNI_NETNS".to_owned(), path.clone().into_os_string())));
        variables
    }
}

/// What a plugin answered.
#[derive(Debug, Clone)]
pub struct CniOutcome {
    /// Its exit status; none when a signal ended it.
    pub status: Option<i32>,
    /// Its standard output as it is.
    pub stdout: String,
    /// Its standard output as JSON; `Null` when it is empty or no JSON.
    pub json: Value,
    /// Its standard error.
    pub stderr: String,
    /// How long the call took, process start included.
    pub elapsed: Duration,
}

impl CniOutcome {
    fn new(output: Output, elapsed: Duration) -> Self {
        Self {
            status: output.status.code(),
            json: serde_json::from_str(&output.stdout).unwrap_or_default(),
            stdout: output.stdout,
            stderr: output.stderr,
            elapsed,
        }
    }

    /// True when the exit status is 0.
    #[must_use]
    pub fn success(&self) -> bool {
        self.status == Some(0)
    }

    /// The CNI error code, if the plugin failed and said one.
    #[must_use]
    pub fn error_code(&self) -> Option<u64> {
        if self.success() { None } else { self.json["code"].as_u64() }
    }

    /// Demands a success.
    ///
    /// # Errors
    /// When the plugin failed; the error carries all it said.
    pub fn succeeded(&self) -> Result<()> {
        let (said, told) = (self.stdout.trim(), self.stderr.trim());
        ensure!(self.success(), "the plugin failed (exit status {:?}): {said}{told}", self.status);
        Ok(())
    }

    /// The JSON result of a success.
    ///
    /// # Errors
    /// As [`CniOutcome::succeeded`].
    pub fn into_result(self) -> Result<Value> {
        self.succeeded()?;
        Ok(self.json)
    }
}

impl Place {
    pub(crate) fn conflist_path(&self) -> PathBuf {
        self.file("/etc/cni/net.d").join(marks::CNI_CONFLIST)
    }

    /// The plugin's configuration out of the conflist, with what libcni injects.
    pub(crate) fn plugin_config(&self, spec: Option<&PodSpec>) -> Result<Value> {
        let path = self.conflist_path();
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let list: Value = serde_json::from_str(&text).with_context(|| format!("parsing {}", path.display()))?;
        let plugins = list["plugins"].as_array().context("the conflist has no plugins")?;
        let own = plugins.iter().find(|plugin| plugin["type"] == marks::CNI_TYPE);
        let mut config =
            own.with_context(|| format!("the conflist has no plugin of type {}", marks::CNI_TYPE))?.clone();
        let newest = list["cniVersions"].as_array().is_some_and(|all| all.iter().any(|it| it == NEWEST_VERSION));
        config["cniVersion"] = if newest { json!(NEWEST_VERSION) } else { list["cniVersion"].clone() };
        config["name"] = list["name"].clone();
        if let Some(previous) = spec.and_then(|spec| spec.prev_result.as_ref()) {
            config["prevResult"] = previous.clone();
        }
        if let Some(runtime) = spec.and_then(|spec| spec.runtime_config.as_ref()) {
            config["runtimeConfig"] = runtime.clone();
        }
        Ok(config)
    }

    /// The configuration of a GC that keeps these attachments.
    pub(crate) fn gc_config(&self, valid: &[&PodSpec]) -> Result<Value> {
        let mut config = self.plugin_config(None)?;
        config["cni.dev/valid-attachments"] = valid.iter().map(|spec| spec.attachment()).collect();
        Ok(config)
    }

    pub(crate) fn cni(&self, command: &str, spec: Option<&PodSpec>, config: Value) -> Result<CniOutcome> {
        let started = Instant::now();
        let plugin = self.program(&Path::new("/opt/cni/bin").join(marks::CNI_TYPE));
        let plugin = plugin.environment(environment(command, spec)).stdin(config.to_string());
        let output = plugin.limit(patience(TIME_LIMIT)).run();
        let output = output.with_context(|| format!("calling the CNI plugin on {} for {command}", self.name))?;
        Ok(CniOutcome::new(output, started.elapsed()))
    }

    /// As [`Place::cni`], under ptrace; also returns which system calls were made.
    pub(crate) fn cni_traced(
        &self,
        command: &str,
        spec: Option<&PodSpec>,
        config: &Value,
        interference: Option<Interference>,
    ) -> Result<(CniOutcome, Traced)> {
        let started = Instant::now();
        let plugin = self.stopped_program(&Path::new("/opt/cni/bin").join(marks::CNI_TYPE));
        let plugin = plugin.environment(environment(command, spec)).stdin(config.to_string());
        let traced = plugin.limit(patience(TIME_LIMIT)).trace(interference);
        let traced = traced.with_context(|| format!("tracing the CNI plugin on {} for {command}", self.name))?;
        Ok((CniOutcome::new(traced.output.clone(), started.elapsed()), traced))
    }
}

fn environment(command: &str, spec: Option<&PodSpec>) -> Vec<(String, OsString)> {
    let mut variables = spec.map(PodSpec::environment).unwrap_or_default();
    variables.extend([
        ("CNI_COMMAND".to_owned(), command.into()),
        ("CNI_PATH".to_owned(), "/opt/cni/bin".into()),
        ("PATH".to_owned(), std::env::var_os("PATH").unwrap_or_default()),
    ]);
    variables
}
