//! `huskd run`: puts the parts together and keeps them going.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use husk_dataplane::events::Subject;
use husk_dataplane::linux::Linux;
use husk_dataplane::sysctl;
use husk_ipam::lease::{DEFAULT_LOCK_WAIT, LeaseStore};
use husk_overlay::config::{Config, SourceConfig};
use husk_overlay::digest;
use husk_overlay::ipc::{LEASE_DIRECTORY, SOCKET_FILE};
use husk_overlay::issue::Issue;
use husk_overlay::marks;
use husk_overlay::name::NodeName;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{oneshot, watch as state_watch};

use crate::companion::Companions;
use crate::engine::{Engine, Parts, State, Waker, channel};
use crate::follow::{self, Chosen, Follower};
use crate::host::Host;
use crate::http::sites::Sites;
use crate::identity::Identity;
use crate::kubernetes::{self, Reporter};
use crate::line_log::{Event, Logs};
use crate::metrics::Fixed;
use crate::metrics::gather::Gathering;
use crate::offload::OffloadTesting;
use crate::probing::Probing;
use crate::source::bounded::Limits;
use crate::source::directory::DirectorySource;
use crate::source::{self, Opening};
use crate::{boot, files, logging, node_file, server, watch};

/// File in the state directory that holds the last snapshot.
pub const SNAPSHOT_FILE: &str = "snapshot.json";

/// Where the daemon looks for its configuration.
pub const CONFIG_FILE: &str = "/etc/husk/config.yaml";

/// How long the loop may take to finish the pass it is in when the daemon is told to stop.
const STOP_PATIENCE: Duration = Duration::from_secs(3);

/// Pause between attempts to log on to an API server.
const LOG_ON_PAUSE: Duration = Duration::from_secs(5);

/// What failed, where the kernel gives no thread.
const THREAD: &str = "cannot start a thread";

/// Paths of a daemon.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Configuration file
    #[arg(long, default_value = CONFIG_FILE)]
    pub config: PathBuf,
    /// Directory of the socket, of leases and of private keys; must not survive a reboot
    #[arg(long, default_value = marks::RUN_DIRECTORY)]
    pub run_directory: PathBuf,
    /// Directory of what survives a reboot
    #[arg(long, default_value = marks::STATE_DIRECTORY)]
    pub state_directory: PathBuf,
    /// Name of this node, whatever the configuration says, which all nodes of a cluster may share
    #[arg(long, env = "HUSK_NODE_NAME")]
    pub node_name: Option<NodeName>,
    /// Where kernel parameters are set: in a container, whose /proc/sys is read-only, the host's as it was mounted
    #[arg(long, env = "HUSK_PROC_SYS", default_value = sysctl::PROC_SYS)]
    pub proc_sys: PathBuf,
}

/// What `huskd run` is told.
#[derive(Debug, Clone, clap::Args)]
pub struct RunOptions {
    /// Paths and name.
    #[command(flatten)]
    pub common: Options,
    /// Socket of `huskd tunnels`, which then starts the processes that have to outlive the daemon's container
    #[arg(long, env = "HUSK_TUNNELS")]
    pub tunnels: Option<PathBuf>,
    /// Address at which metrics are served, whatever metrics.listen says, which all nodes of a cluster may share; the port is the
    /// configured one
    #[arg(long, env = "HUSK_METRICS_ADDRESS")]
    pub metrics_address: Option<IpAddr>,
    /// Take a configuration that changed into use at once, and go on with the last good one where it is bad
    #[arg(long)]
    pub follow_config: bool,
}

impl Options {
    /// Reads and checks the configuration.
    ///
    /// # Errors
    /// When it cannot be read, or with everything that is wrong in it.
    pub fn read_config(&self) -> Result<Config> {
        self.parse_config(&self.read_config_text()?)
    }

    /// Reads the text of the configuration.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read_config_text(&self) -> Result<String> {
        let name = self.config.display();
        files::read_text(&self.config, 1 << 20)?.ok_or_else(|| {
            anyhow!("{name} does not exist; write one (huskd example-config prints it with comments), or name another with --config")
        })
    }

    /// Checks the text of a configuration, as that of the configuration file.
    ///
    /// # Errors
    /// Everything that is wrong in it.
    pub fn parse_config(&self, text: &str) -> Result<Config> {
        Ok(Config::parse(&self.config.display().to_string(), text)?)
    }

    /// File of the last snapshot.
    #[must_use]
    pub fn snapshot_file(&self) -> PathBuf {
        self.state_directory.join(SNAPSHOT_FILE)
    }

    /// File of the kernel parameters found before Husk changed them.
    #[must_use]
    pub fn sysctl_file(&self) -> PathBuf {
        self.state_directory.join("sysctls.json")
    }

    /// The lease store.
    #[must_use]
    pub fn leases(&self) -> LeaseStore {
        LeaseStore::new(self.run_directory.join(LEASE_DIRECTORY), DEFAULT_LOCK_WAIT)
    }
}

/// The own name: the one of the command line, else the configured one, else the host name.
///
/// # Errors
/// When the host name is no node name.
pub fn node_name(options: &Options, config: &Config) -> Result<NodeName> {
    if let Some(name) = options.node_name.as_ref().or(config.node_name.as_ref()) {
        return Ok(name.clone());
    }
    let host = nix::unistd::gethostname().context("the host name cannot be read")?;
    name_of_host(&host.to_string_lossy())
}

/// Host names do not distinguish case (RFC 4343), and may end with the root's dot. A host that was given no name has that of
/// the loopback address, as all others like it.
fn name_of_host(host: &str) -> Result<NodeName> {
    let name = host.to_lowercase();
    let name = name.strip_suffix('.').unwrap_or(&name);
    if name.split('.').next().is_some_and(|first| first == "localhost") {
        bail!(
            "the host name {host:?} says nothing about which node this is; name the host (hostnamectl set-hostname), \
             or set node.name in the configuration"
        );
    }
    NodeName::new(name).with_context(|| {
        format!("the host name {host:?} cannot be the node's name; set node.name in the configuration")
    })
}

/// One daemon per run directory; the lock goes with the process, however it ends.
///
/// # Errors
/// When another daemon holds it.
pub fn lock(run_directory: &Path) -> Result<File> {
    files::create_directory(run_directory, 0o755)?;
    let path = run_directory.join("daemon.lock");
    let open = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
    let file = open.with_context(|| format!("cannot open {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => bail!(
            "another huskd runs on this node (it holds {}); stop it first, for example with systemctl stop huskd",
            path.display()
        ),
        Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
    }
}

/// Wakes the loop when something changed. Threads of their own for what may hang and what may not.
fn start_watching(config: &Config, leases: PathBuf, waker: &Waker) -> Result<()> {
    let wake = || {
        let waker = waker.clone();
        move || waker.wake()
    };
    watch::folders("husk-leases", vec![leases], watch::RENEWAL, wake()).context(THREAD)?;
    if let SourceConfig::Directory { path } = &config.source {
        watch::folders("husk-cluster", DirectorySource::folders(path).into(), watch::RENEWAL, wake())
            .context(THREAD)?;
    }
    let mut subjects = vec![Subject::Network, Subject::Nftables];
    if config.mode.uses_esp() {
        subjects.push(Subject::Ipsec);
    }
    watch::kernel(&subjects, wake()).context(THREAD)
}

/// Runs until SIGTERM or SIGINT; the data plane stays as it is.
///
/// # Errors
/// When the daemon cannot start; what goes wrong later is an issue, never an end.
pub async fn run(options: RunOptions) -> Result<End> {
    let RunOptions { common: options, tunnels, metrics_address, follow_config } = options;
    files::create_directory(&options.state_directory, 0o700)?;
    let mut chosen = follow::choose(&options, follow_config)?;
    logging::start(&chosen.config.log);
    sysctl::set_through(&options.proc_sys);
    let node_name = node_name(&options, &chosen.config)?;
    let _lock = lock(&options.run_directory)?;
    let identity = Identity::load(node_name.clone(), &options.state_directory)?;
    let leases = options.run_directory.join(LEASE_DIRECTORY);
    files::create_directory(&leases, 0o700)?;
    let boot_id = node_file::boot_id().context("cannot read the boot id; is /proc mounted?")?;
    boot::enter(&options.run_directory, &boot_id, &options.leases())?;

    let (state, states) = state_watch::channel(State::default());
    let (handle, inbox) = channel(states.clone(), options.leases());
    let watched = states.clone();
    let waker = handle.waker();
    let runtime = tokio::runtime::Handle::current();
    let (wake, policy) = (waker.clone(), waker.clone());
    let opening = Opening {
        node: &node_name,
        joined: options.snapshot_file().exists(),
        limits: Limits::LOOP,
        runtime: &runtime,
        wake: Arc::new(move || wake.wake()),
        policy_wake: Arc::new(move || policy.policy()),
    };
    let companions = Companions { run_directory: options.run_directory.clone(), runtime: runtime.clone(), tunnels };
    let found = waker.clone();
    let offload = OffloadTesting::start(&options.run_directory, &boot_id, move || found.wake()).context(THREAD)?;
    let found = waker.clone();
    let probing = Probing::start(&options.run_directory, &boot_id, move || found.wake()).context(THREAD)?;
    let (metrics_issue, metrics_noticed) = state_watch::channel(None);
    let (ui_issue, ui_noticed) = state_watch::channel(None);
    // Waits for an answer of the source, whose thread waits for the runtime.
    let open = |config: &Config| {
        let mut host = Host::new(config, identity.clone(), companions.clone(), options.sysctl_file())?;
        host.probe_with(probing.clone());
        host.test_offload_with(offload.clone());
        host.notice(metrics_noticed.clone());
        host.notice(ui_noticed.clone());
        let source = tokio::task::block_in_place(|| source::open(config, &opening))?;
        Ok((host, source))
    };
    let (node, source) = match open(&chosen.config) {
        // It reads well and asks for what is not there, such as a key.
        Err(error) if follow_config && chosen.issue.is_none() => {
            chosen = follow::instead(&options, error)?;
            open(&chosen.config)?
        }
        opened => opened?,
    };
    let Chosen { config, text, issue } = chosen;
    if let Some(issue) = &issue {
        tracing::error!("{issue}");
    }
    let logs = Logs::start(&config.logs, &node_name).context(THREAD)?;
    logs.decision(|| Event::DaemonStarted {
        version: env!("CARGO_PKG_VERSION").into(),
        pid: std::process::id(),
        mode: config.mode,
        configuration: digest::hex(&[&text]),
    });
    let handle = handle.logging_to(logs.clone());
    let parts = Parts {
        node,
        kernel: Linux::open(Path::new(marks::WIREGUARD_SOCKET_DIRECTORY))
            .context("cannot talk to the kernel over netlink; huskd needs root (CAP_NET_ADMIN)")?,
        source,
        leases: options.leases(),
        writer: node_file::Writer::new(&config, &options.run_directory),
        state_file: Some(options.snapshot_file()),
        boot_id,
        block_offset: random_offset()?,
        node_name: node_name.clone(),
        config,
    };
    tracing::info!(node = %node_name, mode = %parts.config.mode, version = env!("CARGO_PKG_VERSION"), "huskd starts");

    let listener =
        server::listen(&options.run_directory.join(SOCKET_FILE)).context("cannot listen on the daemon's socket")?;
    start_watching(&parts.config, leases, &waker)?;
    if parts.config.policy.enabled {
        handle.flows().record_denied(states.clone()).context(THREAD)?;
    }
    handle.flows().record_connections(states.clone()).context(THREAD)?;
    tokio::spawn(server::serve(listener, handle.clone()));
    let mut follower = Follower::start(&options, text, issue, follow_config)?;
    if let SourceConfig::Kubernetes { kubeconfig } = &parts.config.source {
        let (kubeconfig, issues) = (kubeconfig.clone(), follower.issues());
        tokio::spawn(report(kubeconfig, node_name, states, issues));
    }
    tokio::spawn(follow::log_refusals(follower.issues(), logs.clone()));
    let gathering = Gathering {
        fixed: Arc::new(Fixed::of(&parts.config, &parts.node_name)),
        live: handle.live().clone(),
        states: watched,
        configuration: follower.issues(),
        flows: handle.flows().clone(),
    };
    let sites =
        Sites { gathering, metrics_address, page: handle.page().clone(), run_directory: &options.run_directory };
    sites.serve(&parts.config, [metrics_issue, ui_issue], &waker);
    let mut engine = Engine::new(parts, state, jiff::Timestamp::now());
    engine.measure_with(handle.live().clone());
    engine.log_to(logs.clone());
    let stop = stop_signal()?;
    let told = async {
        tokio::select! {
            signal = stop => (signal, End::Stopped),
            () = follower.changed() => ("a new configuration", End::NewConfiguration),
        }
    };
    let end = supervise(move || engine.run(&inbox, &waker), || handle.stop(), told).await?;
    if end == End::NewConfiguration {
        logs.decision(|| Event::ConfigurationTaken { file: options.config.display().to_string() });
    }
    logs.decision(|| Event::DaemonStopped { reason: end.reason().into() });
    tokio::task::block_in_place(|| logs.flush());
    files::remove(&options.run_directory.join(SOCKET_FILE))?;
    Ok(end)
}

/// Why the daemon ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It was told to.
    Stopped,
    /// It has to start again with another configuration.
    NewConfiguration,
}

impl End {
    fn reason(self) -> &'static str {
        match self {
            Self::Stopped => "it was told to",
            Self::NewConfiguration => "a new configuration",
        }
    }
}

/// Tells Kubernetes how the node is, once there is a way to log on.
async fn report(
    kubeconfig: Option<PathBuf>,
    node: NodeName,
    states: state_watch::Receiver<State>,
    issues: state_watch::Receiver<Option<Issue>>,
) {
    loop {
        match kubernetes::connect(kubeconfig.as_deref()).await {
            Ok(client) => return Reporter::new(client, node, states, issues).run().await,
            // The source says the same as an issue.
            Err(error) => tracing::debug!(error = format!("{error:#}"), "nothing is told to Kubernetes yet"),
        }
        tokio::time::sleep(LOG_ON_PAUSE).await;
    }
}

/// Runs the loop on a thread of its own until `told` completes, then stops it. A loop that is stuck is left behind, for the
/// end of the process to end it; a thread of the runtime would hold up that end.
async fn supervise<E>(
    work: impl FnOnce() + Send + 'static,
    stop: impl FnOnce(),
    told: impl Future<Output = (&'static str, E)>,
) -> Result<E> {
    let (ending, mut ended) = oneshot::channel::<()>();
    let run = move || {
        // Dropped however the loop ends.
        let _ending = ending;
        work();
    };
    thread::Builder::new().name("husk-loop".into()).spawn(run).context(THREAD)?;
    let (reason, end) = tokio::select! {
        told = told => told,
        _ = &mut ended => bail!("the reconcile loop ended by itself, which is a bug; the log tells where"),
    };
    tracing::info!(reason, "stopping; the data plane stays as it is");
    stop();
    if tokio::time::timeout(STOP_PATIENCE, ended).await.is_err() {
        tracing::warn!("the pass in progress did not end in time; it is given up");
    }
    Ok(end)
}

/// Nodes that start at once look for a free block at different places; among so few that addresses stay readable.
fn random_offset() -> Result<u128> {
    let mut bytes = [0; 2];
    getrandom::fill(&mut bytes).map_err(io::Error::other).context("the kernel gives no randomness")?;
    Ok(u16::from_ne_bytes(bytes).into())
}

/// Completes with the name of the signal that asks the daemon to end. SIGHUP is taken and dropped: it must not end the
/// daemon when the terminal it was started from closes.
async fn wait_for(
    mut terminate: tokio::signal::unix::Signal,
    mut interrupt: tokio::signal::unix::Signal,
    mut hangup: tokio::signal::unix::Signal,
) -> &'static str {
    loop {
        tokio::select! {
            _ = terminate.recv() => return "SIGTERM",
            _ = interrupt.recv() => return "SIGINT",
            _ = hangup.recv() => tracing::info!("SIGHUP does nothing; restart the daemon to read the configuration again"),
        }
    }
}

fn stop_signal() -> Result<impl Future<Output = &'static str>> {
    let of = |kind| signal(kind).context("cannot handle signals");
    Ok(wait_for(of(SignalKind::terminate())?, of(SignalKind::interrupt())?, of(SignalKind::hangup())?))
}

#[cfg(test)]
mod tests;
