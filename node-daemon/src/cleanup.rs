//! `huskd cleanup`: the host as it was before Husk. Everything that goes is recognised by its mark.

use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, bail};
use husk_dataplane::Sweep;
use husk_dataplane::linux::Linux;
use husk_dataplane::netlink::{Protocol, Socket};
use husk_dataplane::reconcile::reconcile;
use husk_dataplane::wireguard::KeyRing;
use husk_dataplane::{sysctl, underlay};
use husk_overlay::config::Config;
use husk_overlay::kernel::Desired;
use husk_overlay::marks;
use husk_overlay::name::InterfaceName;
use husk_overlay::prefix::Family;
use tokio::runtime::Handle;

use crate::companion::{Job, Process, stop_signal};
use crate::daemon::SNAPSHOT_FILE;
use crate::identity::{INSTANCE_FILE, Identity};
use crate::kubernetes::source::Wake;
use crate::node_file::Writer;
use crate::source::bounded::Limits;
use crate::source::{ClusterSource as _, Opening};
use crate::wireguard_userspace::socket_path;
use crate::{daemon, doctor, files, follow, host, keys, source};

/// What to clean up.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    #[command(flatten)]
    daemon: daemon::Options,
    /// Go on although pods still have interfaces; they lose their network
    #[arg(long)]
    force: bool,
    /// Stay until told to stop when everything is clean, for a pod that is to be ready exactly then
    #[arg(long)]
    linger: bool,
    /// Keep the node's record and address blocks in the cluster source, for a node that will be back
    #[arg(long)]
    keep_record: bool,
}

/// Removes what Husk made. Goes on past what fails, and says at the end what is left.
///
/// # Errors
/// When a daemon still runs, pods are still attached, or something could not be removed.
pub async fn run(options: &Options) -> Result<()> {
    let runtime = Handle::current();
    tokio::task::block_in_place(|| clean(options, &runtime))?;
    if options.linger {
        stop_signal()?.await;
    }
    Ok(())
}

fn clean(options: &Options, runtime: &Handle) -> Result<()> {
    sysctl::set_through(&options.daemon.proc_sys);
    let lock = daemon::lock(&options.daemon.run_directory)?;
    let mut steps = Steps::default();
    let pods = pod_interfaces()?;
    if !pods.is_empty() && !options.force {
        bail!(
            "{} pods still have interfaces on this node ({}, …); drain the node first, or add --force",
            pods.len(),
            pods[0]
        );
    }
    let config = match options.daemon.config.exists() {
        // With one that was spoilt meanwhile, what the daemon last ran with still tells what there is to clean.
        true => Some(follow::choose(&options.daemon, true)?.config),
        false => None,
    };
    let state = &options.daemon.state_directory;
    let joined = options.daemon.snapshot_file().exists();
    match &config {
        _ if options.keep_record => {}
        Some(config) => steps.note("record and blocks in the cluster source", leave(options, config, runtime)),
        None if joined => steps.0.push(format!(
            "record and blocks in the cluster source: {} does not exist; name the node's configuration with --config",
            options.daemon.config.display()
        )),
        None => {}
    }
    // What is left in the source can only be removed by who still knows which host this is.
    let left = options.keep_record || !steps.0.is_empty();
    companions(&options.daemon.run_directory, &mut steps)?;
    kernel(&pods, &mut steps)?;
    // Overwritten, not merely removed.
    steps.note("private keys", keys::discard(&options.daemon.run_directory).map_err(Into::into));
    restore_sysctls(&options.daemon.sysctl_file(), &mut steps);
    let config = config.unwrap_or_else(|| Config::new(Vec::new()));
    let writer = Writer::new(&config, &options.daemon.run_directory);
    steps.note("network configuration", writer.remove().map_err(Into::into));
    steps.note("plugin", files::remove(&config.cni.bin_directory.join(marks::CNI_TYPE)).map_err(Into::into));
    for path in doctor::WRITTEN {
        steps.note(path, files::remove(Path::new(path)).map_err(Into::into));
    }
    let kept: &[&str] = if left { &[INSTANCE_FILE, SNAPSHOT_FILE] } else { &[] };
    for (directory, kept) in [(state, kept), (&options.daemon.run_directory, &[])] {
        steps.note(&directory.display().to_string(), remove_content(directory, kept));
    }
    drop(lock);
    if steps.0.is_empty() {
        writeln!(std::io::stdout(), "Nothing of Husk is left on this host.")?;
        return Ok(());
    }
    bail!("some things are left:\n  {}", steps.0.join("\n  "))
}

/// What could not be removed.
#[derive(Default)]
struct Steps(Vec<String>);

impl Steps {
    fn note(&mut self, subject: &str, result: Result<()>) {
        if let Err(error) = result {
            self.0.push(format!("{subject}: {error:#}"));
        }
    }
}

fn pod_interfaces() -> Result<Vec<InterfaceName>> {
    let interfaces = underlay::interfaces(&mut Socket::open(Protocol::Route)?)?;
    let names = interfaces.into_iter().map(|interface| interface.name);
    Ok(names.filter(|name| marks::is_pod_interface(name.as_str())).collect())
}

/// Removes what this host put into the cluster source; a record of that name that another host wrote stays, and its blocks.
fn leave(options: &Options, config: &Config, runtime: &Handle) -> Result<()> {
    let node = daemon::node_name(&options.daemon, config)?;
    // Opened as one that this node has joined: nothing is made on the way out.
    let wake: Wake = Arc::new(|| {});
    let policy_wake = Arc::clone(&wake);
    let opening = Opening { node: &node, joined: true, limits: Limits::COMMAND, runtime, wake, policy_wake };
    let mut source = source::open(config, &opening)?;
    let snapshot = match source.snapshot() {
        Ok(snapshot) => snapshot,
        // A node that never saw the cluster has left nothing there.
        Err(_) if !options.daemon.snapshot_file().exists() => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let own = Identity::find(&node, &options.daemon.state_directory)?;
    let published = snapshot.nodes.get(&node);
    if published.is_some_and(|record| own.is_none_or(|own| own.instance != record.instance)) {
        writeln!(std::io::stdout(), "The record of {node} was written by another host, and is left alone.")?;
        return Ok(());
    }
    let blocks = snapshot.blocks;
    source.withdraw(&node)?;
    for block in blocks.iter().filter(|(_, owner)| **owner == node).map(|(block, _)| block) {
        source.release(*block, &node)?;
    }
    Ok(())
}

fn companions(run_directory: &Path, steps: &mut Steps) -> Result<()> {
    for name in marks::WIREGUARD_INTERFACES {
        let interface = InterfaceName::new(name)?;
        let socket = socket_path(&interface);
        let stopped = Process::new(&Job::WireguardUserspace { interface }, run_directory).stop();
        steps.note(&format!("process of {name}"), stopped.map(drop));
        // One that was killed, as with its container, leaves it.
        steps.note(&socket.display().to_string(), files::remove(&socket).map_err(Into::into));
    }
    // Whatever its port and family.
    let encapsulation = Job::UdpEncapsulation { port: 0, family: Family::Ipv4 };
    steps.note("process for ESP in UDP", Process::new(&encapsulation, run_directory).stop().map(drop));
    steps.note(marks::WIREGUARD_SOCKET_DIRECTORY, remove_if_empty(Path::new(marks::WIREGUARD_SOCKET_DIRECTORY)));
    Ok(())
}

fn kernel(pods: &[InterfaceName], steps: &mut Steps) -> Result<()> {
    let mut kernel = Linux::open(Path::new(marks::WIREGUARD_SOCKET_DIRECTORY))?;
    for (interface, result) in pods.iter().zip(kernel.delete_interfaces(pods)) {
        steps.note(interface.as_str(), result.map_err(Into::into));
    }
    let outcome = reconcile(&mut kernel, &Desired::default(), &KeyRing::default(), Sweep::Allowed);
    for failure in outcome.failures {
        let subject = failure.change.map_or_else(|| failure.table.to_string(), |change| change.to_string());
        steps.0.push(format!("{subject}: {}", failure.error));
    }
    Ok(())
}

fn restore_sysctls(file: &Path, steps: &mut Steps) {
    let found = host::load_sysctls(file);
    let now = match sysctl::read(found.keys()) {
        Ok(now) => now,
        Err(error) => {
            steps.0.push(format!("kernel parameters: {error}"));
            return;
        }
    };
    // A parameter of an interface that is gone has nothing to be restored.
    for change in sysctl::diff(&found, &now).iter().filter(|change| change.from.is_some()) {
        steps.note(&change.to_string(), sysctl::apply(change).map_err(Into::into));
    }
}

/// Removes a directory that others may use too. One that is a mount point stays.
fn remove_if_empty(directory: &Path) -> Result<()> {
    use std::io::ErrorKind::{DirectoryNotEmpty, NotFound, ResourceBusy};
    // Somewhere on the way there may be a link, which is not the directory.
    match std::fs::canonicalize(directory).and_then(std::fs::remove_dir) {
        Err(error) if !matches!(error.kind(), DirectoryNotEmpty | NotFound | ResourceBusy) => Err(error.into()),
        _ => Ok(()),
    }
}

/// Empties a directory but for the files named, and removes it if nothing is left; one that is a mount point stays, empty.
fn remove_content(directory: &Path, kept: &[&str]) -> Result<()> {
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    let mut empty = true;
    for entry in entries {
        let entry = entry?;
        if kept.iter().any(|kept| entry.file_name() == *kept) {
            empty = false;
        } else if entry.file_type()?.is_dir() {
            std::fs::remove_dir_all(entry.path())?;
        } else {
            std::fs::remove_file(entry.path())?;
        }
    }
    if !empty {
        return Ok(());
    }
    match std::fs::remove_dir(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::ResourceBusy => Err(error.into()),
        _ => Ok(()),
    }
}
