//! The node daemon `huskd`.

use std::io::Write as _;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use husk_node_daemon::{cleanup, daemon, udp_encapsulation, wireguard_userspace};

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
    Run(daemon::Options),
    /// Check a configuration file and say everything that is wrong with it
    CheckConfig(daemon::Options),
    /// Print a configuration with comments, all defaults written out
    ExampleConfig,
    /// Remove everything Husk made on this host; the daemon must be stopped
    Cleanup(cleanup::Options),
    /// Run the bundled userspace WireGuard device; the daemon starts this itself where the kernel has none
    WireguardUserspace(wireguard_userspace::Options),
    /// Keep open the UDP port at which ESP in UDP arrives; the daemon starts this itself where ipsec.udpEncapsulation is set
    UdpEncapsulation(udp_encapsulation::Options),
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
        Command::Run(options) => daemon::run(options).await,
        Command::CheckConfig(options) => {
            options.read_config()?;
            Ok(writeln!(std::io::stdout(), "{}: no problems found", options.config.display())?)
        }
        Command::ExampleConfig => Ok(std::io::stdout().write_all(husk_overlay::config::EXAMPLE.as_bytes())?),
        Command::Cleanup(options) => cleanup::run(&options),
        Command::WireguardUserspace(options) => {
            log(wireguard_userspace::LOG_FILTER);
            wireguard_userspace::run(options).await
        }
        Command::UdpEncapsulation(options) => {
            log("info");
            udp_encapsulation::run(options).await
        }
    }
}

/// Logs of a companion, which go to a file.
fn log(filter: &str) {
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
}
