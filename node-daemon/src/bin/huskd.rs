//! The node daemon `huskd`.

use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};
use husk_node_daemon::daemon::End;
use husk_node_daemon::manual::{self, Manual, Shell};
use husk_node_daemon::{cleanup, daemon, health, kubernetes, tunnels, udp_encapsulation, wireguard_userspace};

/// Husk's node daemon: builds encrypted tunnels to the other nodes and keeps this node's kernel as the cluster needs it
#[derive(Parser)]
#[command(name = "huskd", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the daemon in the foreground; SIGTERM stops it and leaves the data plane running
    Run(daemon::RunOptions),
    /// Check a configuration file and say everything that is wrong with it
    CheckConfig(daemon::Options),
    /// Print a configuration with comments, all defaults written out
    ExampleConfig,
    /// Ask the running daemon whether it is alive, or whether pods can be added; for probes of containers
    Health(health::Options),
    /// Print the CustomResourceDefinitions of Husk's Kubernetes objects
    Crds,
    /// Start the processes that carry tunnels when the daemon asks; for a container that outlives the daemon's
    Tunnels(tunnels::Options),
    /// Remove everything Husk made on this host; the daemon must be stopped
    Cleanup(cleanup::Options),
    /// Run the bundled userspace WireGuard device; the daemon starts this itself where the kernel has none
    WireguardUserspace(wireguard_userspace::Options),
    /// Keep open the UDP port at which ESP in UDP arrives; the daemon starts this itself where ipsec.udpEncapsulation is set
    UdpEncapsulation(udp_encapsulation::Options),
    /// Print a script that completes commands and options in a shell
    Completion {
        /// Shell
        shell: Shell,
    },
    /// Write the manual pages into a directory; man -l shows one from there
    Man {
        /// Directory, which is made if there is none
        directory: PathBuf,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // The memory holds private keys: an image of it, written after a crash, would outlive them on a disk.
    if let Err(error) = nix::sys::prctl::set_dumpable(false) {
        let _ = writeln!(std::io::stderr(), "huskd: cannot keep the kernel from writing images of the memory: {error}");
        return ExitCode::FAILURE;
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "huskd: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(run(arguments.command));
    // Dropping it would wait for its threads, one of which may hang in a file system.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "huskd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Run(options) => match daemon::run(options).await? {
            End::Stopped => Ok(()),
            End::NewConfiguration => Err(start_anew()),
        },
        Command::CheckConfig(options) => {
            options.read_config()?;
            Ok(writeln!(std::io::stdout(), "{}: no problems found", options.config.display())?)
        }
        Command::ExampleConfig => Ok(std::io::stdout().write_all(husk_overlay::config::EXAMPLE.as_bytes())?),
        Command::Health(options) => tokio::task::block_in_place(|| health::run(&options)),
        Command::Crds => Ok(std::io::stdout().write_all(kubernetes::definitions_yaml()?.as_bytes())?),
        Command::Tunnels(options) => {
            log("info");
            tunnels::run(options).await
        }
        Command::Cleanup(options) => cleanup::run(&options).await,
        Command::WireguardUserspace(options) => {
            log(wireguard_userspace::LOG_FILTER);
            wireguard_userspace::run(options).await
        }
        Command::UdpEncapsulation(options) => {
            log("info");
            udp_encapsulation::run(options).await
        }
        Command::Completion { shell } => {
            let script = manual::completion(shell, Arguments::command());
            Ok(std::io::stdout().write_all(script.as_bytes())?)
        }
        Command::Man { directory } => {
            let manual = Manual { command: Arguments::command(), section: 8, besides: manual::huskd::besides };
            let written = manual.write(&directory)?.len();
            Ok(writeln!(std::io::stdout(), "{written} pages are in {}.", directory.display())?)
        }
    }
}

/// Becomes a new daemon in the same process, with the same arguments. Returns only if that fails.
fn start_anew() -> anyhow::Error {
    let error = std::process::Command::new("/proc/self/exe").arg0("huskd").args(std::env::args_os().skip(1)).exec();
    anyhow::Error::new(error).context("cannot start anew with the new configuration")
}

/// Logs of a companion, which go to a file.
fn log(filter: &str) {
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
}
