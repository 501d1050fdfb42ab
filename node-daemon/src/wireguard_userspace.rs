//! The bundled userspace WireGuard device, for kernels without the module.
//!
//! It runs in a process of its own, `huskd wireguard-userspace --interface husk-wg0`: a TUN device, a UDP socket and a
//! control socket at `/var/run/wireguard/<interface>.sock` that speaks the cross-platform WireGuard protocol. The daemon
//! drives it over that socket as it drives the kernel device over netlink, so `wg show` works, and a crash, restart or
//! upgrade of the daemon touches neither sessions nor packets. The process starts without key and peers and forgets both
//! when it ends; the daemon puts them back.
//!
//! It is a [companion](crate::companion) of the daemon. Reading order: `device` applies changes to the running device
//! without disturbing what did not change; `transport` is what the device reads from and writes to; `protocol` and `server`
//! are the control socket.

mod device;
mod protocol;
mod server;
mod transport;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow, bail};
use husk_overlay::marks;
use husk_overlay::name::InterfaceName;
use nix::net::if_::if_nametoindex;

use self::device::Device;
use self::server::ControlSocket;
use crate::companion::process::private_directory;
use crate::companion::{Job, Ownership, Process, detach, stop_signal};

/// What this process may log.
///
/// The library writes one error per packet in some states, for example for each packet to a peer whose endpoint is
/// unknown; a pod could fill the node's memory with that. Whatever ends the device is logged here, by our own code.
pub const LOG_FILTER: &str = "info,gotatun=off,tun=off";

/// What the process needs to know to start.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Name of the TUN device to create in the current network namespace
    #[arg(long)]
    pub interface: InterfaceName,
    /// Run directory of the daemon, for the lock and the log; must not survive a reboot
    #[arg(long, default_value = marks::RUN_DIRECTORY)]
    pub run_directory: PathBuf,
}

/// Runs the device until SIGTERM or SIGINT, then removes it and its control socket.
///
/// # Errors
/// When another process serves the interface, its name is taken, the TUN device cannot be created or used, or the
/// device is deleted while it runs.
pub async fn run(options: Options) -> Result<()> {
    detach();
    abort_on_panic();
    let stopped = stop_signal()?;

    let interface = &options.interface;
    let job = Job::WireguardUserspace { interface: interface.clone() };
    let _ownership = Ownership::take(&Process::new(&job, &options.run_directory))?;
    refuse_taken_name(interface)?;
    let (device, mut failure) = Device::create(interface).await?;
    let device = Arc::new(device);
    let control = ControlSocket::bind(interface)?;
    tracing::info!(%interface, socket = %socket_path(interface).display(), "userspace WireGuard device is ready");

    let outcome = tokio::select! {
        name = stopped => {
            tracing::info!(%interface, signal = name, "stopping");
            Ok(())
        }
        reason = failure.occurred() => Err(anyhow!("the userspace WireGuard device {interface} cannot go on: {reason}")),
        error = control.serve(&device) => Err(error).context("the control socket stopped"),
    };
    // The socket goes first, so that nobody finds a device that is about to go; the TUN device goes with its last user.
    drop(control);
    outcome
}

/// The library runs its parts as tasks. One that panicked would leave a device that answers and moves no packet, so the
/// whole process ends and is started again.
fn abort_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        report(info);
        std::process::abort();
    }));
}

/// The control socket of the device of that name.
#[must_use]
pub fn socket_path(interface: &InterfaceName) -> PathBuf {
    Path::new(marks::WIREGUARD_SOCKET_DIRECTORY).join(format!("{interface}.sock"))
}

/// Makes the directory of the control sockets.
fn socket_directory() -> Result<()> {
    private_directory(Path::new(marks::WIREGUARD_SOCKET_DIRECTORY))
}

/// TUNSETIFF attaches to a persistent TUN device of that name without a word; Husk's are never persistent, so any device
/// found is another's.
fn refuse_taken_name(interface: &InterfaceName) -> Result<()> {
    let Ok(index) = if_nametoindex(interface.as_str()) else {
        return Ok(());
    };
    let kind = device_kind(interface, index);
    bail!(
        "interface {interface} exists already ({kind}) and was not made by this process; if nothing needs it, remove it \
         with `ip link delete {interface}`"
    )
}

/// What sysfs says of a device. It may show another network namespace than this process is in, so the index decides.
fn device_kind(interface: &InterfaceName, index: u32) -> String {
    let directory = Path::new("/sys/class/net").join(interface.as_str());
    let read = |file: &str| std::fs::read_to_string(directory.join(file)).unwrap_or_default();
    if read("ifindex").trim() != index.to_string() {
        return format!("index {index}");
    }
    if directory.join("tun_flags").exists() {
        return "a TUN device".to_owned();
    }
    let uevent = read("uevent");
    match uevent.lines().find_map(|line| line.strip_prefix("DEVTYPE=")) {
        Some(kind) => format!("a {kind} device"),
        None => format!("index {index}"),
    }
}
