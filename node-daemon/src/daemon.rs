//! `huskd run`: puts the parts together and keeps them going.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use husk_dataplane::events::Subject;
use husk_dataplane::linux::Linux;
use husk_ipam::lease::{DEFAULT_LOCK_WAIT, LeaseStore};
use husk_overlay::config::{Config, SourceConfig};
use husk_overlay::ipc::{LEASE_DIRECTORY, SOCKET_FILE};
use husk_overlay::marks;
use husk_overlay::name::NodeName;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{oneshot, watch as state_watch};

use crate::engine::{Engine, Parts, State, Waker, channel};
use crate::host::Host;
use crate::identity::Identity;
use crate::source::bounded::{Bounded, Limits};
use crate::source::directory::DirectorySource;
use crate::{boot, files, logging, node_file, server, watch};

/// File in the state directory that holds the last snapshot.
pub const SNAPSHOT_FILE: &str = "snapshot.json";

/// Where the daemon looks for its configuration.
pub const CONFIG_FILE: &str = "/etc/husk/config.yaml";

/// How long the loop may take to finish the pass it is in when the daemon is told to stop.
const STOP_PATIENCE: Duration = Duration::from_secs(3);

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
}

impl Options {
    /// Reads and checks the configuration.
    ///
    /// # Errors
    /// When it cannot be read, or with everything that is wrong in it.
    pub fn read_config(&self) -> Result<Config> {
        let name = self.config.display().to_string();
        let text = files::read_text(&self.config, 1 << 20)?.ok_or_else(|| {
            anyhow!("{name} does not exist; write one (huskd example-config prints it with comments), or name another with --config")
        })?;
        Ok(Config::parse(&name, &text)?)
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

/// The own name: configured, else the host name.
///
/// # Errors
/// When the host name is no node name.
pub fn node_name(config: &Config) -> Result<NodeName> {
    if let Some(name) = &config.node_name {
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

/// Opens the cluster source of the configuration. One that is not available is opened by a later call.
///
/// # Errors
/// When the configuration names what can be no source.
pub fn open_source(config: &Config, joined: bool, limits: Limits) -> Result<Bounded> {
    match &config.source {
        SourceConfig::Directory { path } => {
            let root = path.clone();
            Bounded::open(path.display().to_string(), limits, move || DirectorySource::open(&root, joined))
                .with_context(|| format!("cannot use {} (source.directory.path) as cluster directory", path.display()))
        }
    }
}

/// Wakes the loop when something changed. Threads of their own for what may hang and what may not.
fn start_watching(config: &Config, leases: PathBuf, waker: &Waker) -> Result<()> {
    let SourceConfig::Directory { path } = &config.source;
    let wake = || {
        let waker = waker.clone();
        move || waker.wake()
    };
    watch::folders("husk-leases", vec![leases], watch::RENEWAL, wake()).context(THREAD)?;
    watch::folders("husk-cluster", DirectorySource::folders(path).into(), watch::RENEWAL, wake()).context(THREAD)?;
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
pub async fn run(options: Options) -> Result<()> {
    let config = options.read_config()?;
    logging::start(&config.log);
    let node_name = node_name(&config)?;
    let _lock = lock(&options.run_directory)?;
    files::create_directory(&options.state_directory, 0o700)?;
    let identity = Identity::load(node_name.clone(), &options.state_directory)?;
    let joined = options.snapshot_file().exists();
    let source = open_source(&config, joined, Limits::LOOP)?;
    let leases = options.run_directory.join(LEASE_DIRECTORY);
    files::create_directory(&leases, 0o700)?;
    let boot_id = node_file::boot_id().context("cannot read the boot id; is /proc mounted?")?;
    boot::enter(&options.run_directory, &boot_id, &options.leases())?;

    let (state, states) = state_watch::channel(State::default());
    let (handle, inbox) = channel(states, options.leases());
    let runtime = tokio::runtime::Handle::current();
    let parts = Parts {
        node: Host::new(&config, identity, &options.run_directory, options.sysctl_file(), runtime)?,
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
    let waker = handle.waker();
    start_watching(&parts.config, leases, &waker)?;
    tokio::spawn(server::serve(listener, handle.clone()));
    let mut engine = Engine::new(parts, state, jiff::Timestamp::now());
    supervise(move || engine.run(&inbox, &waker), || handle.stop(), stop_signal()?).await?;
    files::remove(&options.run_directory.join(SOCKET_FILE))?;
    Ok(())
}

/// Runs the loop on a thread of its own until `told` completes, then stops it. A loop that is stuck is left behind, for the
/// end of the process to end it; a thread of the runtime would hold up that end.
async fn supervise(
    work: impl FnOnce() + Send + 'static,
    stop: impl FnOnce(),
    told: impl Future<Output = &'static str>,
) -> Result<()> {
    let (ending, mut ended) = oneshot::channel::<()>();
    let run = move || {
        // Dropped however the loop ends.
        let _ending = ending;
        work();
    };
    thread::Builder::new().name("husk-loop".into()).spawn(run).context(THREAD)?;
    tokio::select! {
        signal = told => tracing::info!(signal, "stopping; the data plane stays as it is"),
        _ = &mut ended => bail!("the reconcile loop ended by itself, which is a bug; the log tells where"),
    }
    stop();
    if tokio::time::timeout(STOP_PATIENCE, ended).await.is_err() {
        tracing::warn!("the pass in progress did not end in time; it is given up");
    }
    Ok(())
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
