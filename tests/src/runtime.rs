//! A container runtime's treatment of a network configuration list, as libcni does it (CNI specification 1.1, section 3):
//! versions negotiated, plugins called one after the other, each with the result of the one before, capabilities handed to
//! those that declare them, results cached for CHECK and DEL.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};

use crate::cni::CniOutcome;
use crate::host::Host;
use crate::netns::Netns;
use crate::patience;

/// How long a plugin may take.
const TIME_LIMIT: Duration = Duration::from_secs(40);

/// Where plugins are: Husk's, and the reference plugins of Debian's `containernetworking-plugins`.
pub const PLUGIN_DIRECTORIES: [&str; 2] = ["/opt/cni/bin", "/usr/lib/cni"];

/// Every version of the specification that Husk knows, oldest first.
pub const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// One attachment, as a runtime remembers it.
#[derive(Debug, Clone)]
pub struct Attachment {
    /// `CNI_CONTAINERID`
    pub container_id: String,
    /// `CNI_IFNAME`
    pub ifname: String,
    /// `CNI_NETNS`; empty once the runtime has removed the namespace.
    pub netns: String,
    /// `CNI_ARGS`
    pub args: String,
    /// What the runtime offers, by capability.
    pub capabilities: Map<String, Value>,
    /// The result of ADD, once there is one.
    pub cached: Option<Value>,
}

impl Attachment {
    /// The interface `ifname` of a container whose namespace this is.
    #[must_use]
    pub fn new(container_id: &str, ifname: &str, netns: &Netns) -> Self {
        Self {
            container_id: container_id.to_owned(),
            ifname: ifname.to_owned(),
            netns: netns.path().display().to_string(),
            args: "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=pod".to_owned(),
            capabilities: Map::new(),
            cached: None,
        }
    }

    /// The variables that name it, as in the environment of ADD.
    #[must_use]
    pub fn environment(&self) -> BTreeMap<&'static str, String> {
        BTreeMap::from([
            ("CNI_CONTAINERID", self.container_id.clone()),
            ("CNI_IFNAME", self.ifname.clone()),
            ("CNI_NETNS", self.netns.clone()),
            ("CNI_ARGS", self.args.clone()),
        ])
    }

    /// The interface as the cached result reports it.
    ///
    /// # Errors
    /// When it does not.
    pub fn reported(&self) -> Result<(usize, &Value)> {
        let cached = self.cached.as_ref().context("nothing was added")?;
        let interfaces = cached["interfaces"].as_array().with_context(|| format!("no interfaces in {cached}"))?;
        let found =
            interfaces.iter().enumerate().find(|(_, it)| it["name"] == *self.ifname && it["sandbox"] == *self.netns);
        found.with_context(|| format!("no interface {} with the sandbox {} in {cached}", self.ifname, self.netns))
    }

    /// The addresses of the interface, with their lengths, as the cached result reports them.
    ///
    /// # Errors
    /// When there is no such result.
    pub fn addresses(&self) -> Result<Vec<String>> {
        let (index, _) = self.reported()?;
        let ips = self.cached.as_ref().and_then(|cached| cached["ips"].as_array()).into_iter().flatten();
        let own = ips.filter(|ip| ip["interface"].as_u64() == u64::try_from(index).ok());
        Ok(own.filter_map(|ip| ip["address"].as_str()).map(str::to_owned).collect())
    }
}

/// A refusal: which plugin, and how it said so.
#[derive(Debug)]
pub struct Refusal {
    /// Its type.
    pub plugin: String,
    /// What it said.
    pub outcome: CniOutcome,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let CniOutcome { status, stdout, stderr, .. } = &self.outcome;
        write!(f, "plugin {} failed (exit status {status:?}): {}{}", self.plugin, stdout.trim(), stderr.trim())
    }
}

impl std::error::Error for Refusal {}

/// A network configuration list in the hands of a runtime on a host.
#[derive(Debug, Clone)]
pub struct Network<'a> {
    host: &'a Host,
    name: String,
    version: String,
    plugins: Vec<Value>,
}

impl<'a> Network<'a> {
    /// Reads a list; the runtime knows the versions of the specification up to `newest`, and takes the newest that the list
    /// offers and it knows.
    ///
    /// # Errors
    /// When the list is none, or offers no version that the runtime knows.
    pub fn read(host: &'a Host, list: &Value, newest: &str) -> Result<Self> {
        let known =
            |version: &&str| VERSIONS.iter().take_while(|it| **it != newest).chain([&newest]).any(|it| it == version);
        let offered = list["cniVersions"].as_array().into_iter().flatten().chain([&list["cniVersion"]]);
        let version = offered.filter_map(Value::as_str).filter(known).max();
        Ok(Self {
            host,
            name: list["name"].as_str().context("the list has no name")?.to_owned(),
            version: version.with_context(|| format!("no version up to {newest} in {list}"))?.to_owned(),
            plugins: list["plugins"].as_array().context("the list has no plugins")?.clone(),
        })
    }

    /// The version that is spoken.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.version
    }

    /// The network's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// True if the version that is spoken is this one or a later one.
    #[must_use]
    pub fn speaks(&self, version: &str) -> bool {
        self.version.as_str() >= version
    }

    /// The same network with another name, its plugins and their settings unchanged.
    #[must_use]
    pub fn named(&self, name: &str) -> Self {
        Self { name: name.to_owned(), ..self.clone() }
    }

    /// The same network with more plugins behind the last.
    #[must_use]
    pub fn chained(&self, plugins: impl IntoIterator<Item = Value>) -> Self {
        let mut chained = self.clone();
        chained.plugins.extend(plugins);
        chained
    }

    /// The same network with another plugin before the first.
    #[must_use]
    pub fn behind(&self, plugin: Value) -> Self {
        let mut chained = self.clone();
        chained.plugins.insert(0, plugin);
        chained
    }

    /// Adds an attachment: every plugin in order, each with the result of the one before. The last result is cached.
    ///
    /// # Errors
    /// A [`Refusal`] when a plugin fails; the plugins behind are not called then, and the runtime is expected to say
    /// [`Network::del`].
    pub fn add(&self, attachment: &mut Attachment) -> Result<Value> {
        let mut previous = None;
        for plugin in &self.plugins {
            let config = self.config(plugin, attachment, previous.as_ref());
            let outcome = self.call("ADD", plugin, Some(attachment), &config)?;
            previous = Some(self.accepted(plugin, outcome)?.json);
        }
        attachment.cached.clone_from(&previous);
        previous.context("the list has no plugin")
    }

    /// Deletes an attachment: every plugin in reverse order, with the cached result, as long as none fails.
    ///
    /// # Errors
    /// As [`Network::add`].
    pub fn del(&self, attachment: &Attachment) -> Result<()> {
        // Before 0.4.0 results were not cached.
        let previous = attachment.cached.as_ref().filter(|_| self.speaks("0.4.0"));
        for plugin in self.plugins.iter().rev() {
            let outcome = self.call("DEL", plugin, Some(attachment), &self.config(plugin, attachment, previous))?;
            self.silent("DEL", plugin, outcome)?;
        }
        Ok(())
    }

    /// Checks an attachment: every plugin in order, with the cached result.
    ///
    /// # Errors
    /// As [`Network::add`].
    pub fn check(&self, attachment: &Attachment) -> Result<()> {
        for plugin in &self.plugins {
            let config = self.config(plugin, attachment, attachment.cached.as_ref());
            let outcome = self.call("CHECK", plugin, Some(attachment), &config)?;
            self.silent("CHECK", plugin, outcome)?;
        }
        Ok(())
    }

    /// Asks every plugin whether it can serve ADD.
    ///
    /// # Errors
    /// As [`Network::add`].
    pub fn status(&self) -> Result<()> {
        for plugin in &self.plugins {
            let outcome = self.call("STATUS", plugin, None, &self.base(plugin))?;
            self.silent("STATUS", plugin, outcome)?;
        }
        Ok(())
    }

    /// Tells every plugin which attachments are valid, with both keys that libcni writes.
    ///
    /// # Errors
    /// As [`Network::add`].
    pub fn gc(&self, valid: &[&Attachment]) -> Result<()> {
        let valid: Value =
            valid.iter().map(|it| json!({"containerID": it.container_id, "ifname": it.ifname})).collect();
        for plugin in &self.plugins {
            let mut config = self.base(plugin);
            config["cni.dev/valid-attachments"] = valid.clone();
            config["cni.dev/attachments"] = valid.clone();
            let outcome = self.call("GC", plugin, None, &config)?;
            self.silent("GC", plugin, outcome)?;
        }
        Ok(())
    }

    /// Husk's own configuration for a command about an attachment, as [`Network::call_husk`] takes it.
    #[must_use]
    pub fn husk_config(&self, attachment: &Attachment) -> Value {
        self.config(self.husk(), attachment, attachment.cached.as_ref())
    }

    /// Husk's own configuration for a command about no attachment.
    #[must_use]
    pub fn husk_base(&self) -> Value {
        self.base(self.husk())
    }

    /// Calls Husk's plugin with an environment and an input of the caller's.
    ///
    /// # Errors
    /// When it cannot be run; what it says is in the outcome.
    pub fn call_husk(&self, variables: &BTreeMap<&'static str, String>, input: &str) -> Result<CniOutcome> {
        self.run("husk", variables, input)
    }

    fn husk(&self) -> &Value {
        self.plugins.iter().find(|plugin| plugin["type"] == "husk").unwrap_or(&Value::Null)
    }

    fn base(&self, plugin: &Value) -> Value {
        let mut config = plugin.clone();
        config["name"] = self.name.clone().into();
        config["cniVersion"] = self.version.clone().into();
        config
    }

    /// What libcni makes of a plugin's part of the list.
    fn config(&self, plugin: &Value, attachment: &Attachment, previous: Option<&Value>) -> Value {
        let mut config = self.base(plugin);
        if let Some(previous) = previous {
            config["prevResult"] = previous.clone();
        }
        let declares = |capability: &String| plugin["capabilities"][capability] == true;
        let offered = attachment.capabilities.iter().filter(|(capability, _)| declares(capability));
        let runtime: Map<String, Value> = offered.map(|(key, value)| (key.clone(), value.clone())).collect();
        if !runtime.is_empty() {
            config["runtimeConfig"] = runtime.into();
        }
        config
    }

    fn call(&self, command: &str, plugin: &Value, of: Option<&Attachment>, config: &Value) -> Result<CniOutcome> {
        let mut variables = of.map(Attachment::environment).unwrap_or_default();
        variables.insert("CNI_COMMAND", command.to_owned());
        variables.insert("CNI_PATH", PLUGIN_DIRECTORIES.join(":"));
        let name = plugin["type"].as_str().context("a plugin has no type")?;
        self.run(name, &variables, &config.to_string())
    }

    fn run(&self, name: &str, variables: &BTreeMap<&'static str, String>, input: &str) -> Result<CniOutcome> {
        let path = if self.host.file("/opt/cni/bin").join(name).exists() {
            Path::new(PLUGIN_DIRECTORIES[0]).join(name)
        } else {
            Path::new(PLUGIN_DIRECTORIES[1]).join(name)
        };
        if path.starts_with(PLUGIN_DIRECTORIES[1]) && !path.exists() {
            bail!("{} is missing: install the package containernetworking-plugins", path.display());
        }
        let environment = variables.iter().map(|(key, value)| ((*key).to_owned(), value.clone().into()));
        let path_variable = ("PATH".to_owned(), std::env::var_os("PATH").unwrap_or_default());
        let started = Instant::now();
        let program = self.host.program(&path).environment(environment.chain([path_variable]));
        let output = program.stdin(input).limit(patience(TIME_LIMIT)).run()?;
        Ok(CniOutcome {
            status: output.status.code(),
            json: serde_json::from_str(&output.stdout).unwrap_or_default(),
            stdout: output.stdout,
            stderr: output.stderr,
            elapsed: started.elapsed(),
        })
    }

    fn accepted(&self, plugin: &Value, outcome: CniOutcome) -> Result<CniOutcome> {
        if outcome.success() {
            return Ok(outcome);
        }
        Err(Refusal { plugin: plugin["type"].as_str().unwrap_or_default().to_owned(), outcome }.into())
    }

    /// Commands other than ADD and VERSION say nothing when they succeed.
    fn silent(&self, command: &str, plugin: &Value, outcome: CniOutcome) -> Result<()> {
        let outcome = self.accepted(plugin, outcome)?;
        if !outcome.stdout.trim().is_empty() {
            bail!("{command} of {} prints {}", plugin["type"], outcome.stdout);
        }
        Ok(())
    }
}

/// The code of a [`Refusal`]; an error when it was something else that failed, or nothing.
///
/// # Errors
/// See above.
pub fn refusal<T>(result: Result<T>) -> Result<Refusal> {
    match result {
        Ok(_) => bail!("it was not refused"),
        Err(error) => error.downcast::<Refusal>(),
    }
}
