//! The troubleshooting command `huskctl`: asks the daemon, prints tables for people or JSON for scripts.
//!
//! Exit status: 0 all is well, 1 something was found (a difference, an issue, a contradiction), is denied or is not finished,
//! 2 wrong usage, 3 the daemon does not answer or refused.

mod flows;
mod mtu;
mod policy;
mod rotate;
mod tables;
mod ui;

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Parser, Subcommand, ValueEnum};
use husk_overlay::ipc::{self, Request, Response};
use husk_overlay::issue::Severity;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::report::{DiffReport, IpamReport, KeysReport, PeerReport, Status};

/// How long the daemon may take to answer.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Looks into the Husk daemon of this node.
///
/// Exit status: 0 all is well; 1 something was found (a difference, an issue, a contradiction), is denied or is not finished;
/// 2 wrong usage; 3 the daemon does not answer or refuses.
#[derive(Parser)]
#[command(name = "huskctl", version, verbatim_doc_comment)]
pub struct Arguments {
    /// Form of the output
    #[arg(long, short, global = true, value_enum, default_value_t = Output::Table)]
    output: Output,
    /// Directory of the daemon's socket
    #[arg(long, global = true, env = "HUSK_RUN_DIRECTORY", default_value = husk_overlay::marks::RUN_DIRECTORY)]
    run_directory: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// Tables for people
    Table,
    /// JSON for scripts
    Json,
}

#[derive(Subcommand)]
enum Command {
    /// Is this node ready, and what is wrong
    Status,
    /// How every peer is reached: endpoint, handshake age, bytes, MTU, and what probing found of the path
    Peers,
    /// Where the bytes of a full-sized packet go, for every peer, and where their number comes from; exit status 1 if something
    /// is too small, or a path swallows what it should carry
    Mtu(mtu::Options),
    /// What the daemon would change in the kernel now; exit status 1 if anything
    Diff,
    /// Address pools, blocks and leases
    #[command(subcommand)]
    Ipam(IpamCommand),
    /// The keys of this node: their age, who uses them, and their rotation
    #[command(subcommand)]
    Keys(KeysCommand),
    /// Network policy: what is enforced on this node, and the rules of a pod
    #[command(subcommand)]
    Policy(policy::PolicyCommand),
    /// Is a connection allowed, who decides, by which rule, and do the rules in the kernel say the same; exit status 1 if it is
    /// denied
    ///
    /// Every rule that was asked is told. What another node decides is told as that node should see it; its own rules in the
    /// kernel it tells itself.
    Trace(policy::TraceOptions),
    /// What policy has denied lately, with the pods and the policy behind it; -o json gives one line per flow
    Flows(flows::Options),
    /// Where to see this node's page: the map of the cluster, denied flows and issues
    ///
    /// The address holds the key that the page asks for. The page is served on this host only.
    Ui,
    /// Cuts a pod of this node off from everything but policy.quarantineAllowed, at once and for connections that exist too
    ///
    /// It stays so until it is released, also when the daemon starts anew. The label husk.dev/quarantine=true on a pod does the
    /// same on whichever node it is.
    Quarantine(policy::QuarantineOptions),
}

#[derive(Subcommand)]
enum KeysCommand {
    /// Epochs (for WireGuard: generations) with their age, who has confirmed them, and what is used with every peer; no
    /// secrets
    Status {
        /// Also every IPsec association: SPI, epochs, packets and bytes
        #[arg(long)]
        verbose: bool,
    },
    /// Makes a new key now. No packet is lost: the old key goes when all peers use the new one and nothing came under the old
    /// one for keys.grace seconds
    ///
    /// In mode wireguard all nodes follow with new keys of their own. While a rotation is under way the next one waits for
    /// it.
    Rotate(rotate::Options),
}

#[derive(Subcommand)]
enum IpamCommand {
    /// Pools, own blocks and leases
    Show,
    /// Looks for contradictions between leases, blocks and interfaces; exit status 1 if any
    Check,
}

/// Runs the command and says how the process should exit.
#[must_use]
pub fn run(arguments: &Arguments) -> ExitCode {
    match answer(arguments) {
        Ok((text, found)) => {
            // A reader that closed the pipe has read enough.
            let _ = std::io::stdout().write_all(text.as_bytes());
            if found { ExitCode::from(1) } else { ExitCode::SUCCESS }
        }
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "huskctl: {error:#}");
            ExitCode::from(3)
        }
    }
}

/// The text to print, and whether something was found.
fn answer(arguments: &Arguments) -> anyhow::Result<(String, bool)> {
    let socket = arguments.run_directory.join(ipc::SOCKET_FILE);
    let show = Show { output: arguments.output };
    match &arguments.command {
        Command::Status => {
            let status: Status = ask(&socket, &Request::Status)?;
            let wrong = !status.ready || status.issues.iter().any(|issue| issue.severity >= Severity::Error);
            Ok((show.text(&status, tables::status)?, wrong))
        }
        Command::Peers => {
            let peers: Vec<PeerReport> = ask(&socket, &Request::Peers)?;
            let wrong = peers.iter().any(|peer| peer.reason.is_some());
            Ok((show.text(&peers, |peers| tables::peers(peers))?, wrong))
        }
        Command::Mtu(options) => mtu::run(&socket, options, &show),
        Command::Diff => {
            let diff: DiffReport = ask(&socket, &Request::Diff)?;
            Ok((show.text(&diff, tables::diff)?, !diff.changes.is_empty()))
        }
        Command::Keys(KeysCommand::Status { verbose }) => {
            let keys: KeysReport = ask(&socket, &Request::Keys)?;
            Ok((show.text(&keys, |keys| tables::keys(keys, *verbose))?, false))
        }
        Command::Policy(command) => policy::run(&socket, command, &show),
        Command::Trace(options) => policy::trace(&socket, options, &show),
        Command::Quarantine(options) => policy::quarantine(&socket, options, &show),
        Command::Ui => ui::run(&socket, &show),
        Command::Flows(options) => flows::run(&socket, options, &show),
        Command::Keys(KeysCommand::Rotate(options)) => rotate::run(&socket, options, &show),
        Command::Ipam(command) => {
            let ipam: IpamReport = ask(&socket, &Request::Ipam)?;
            match command {
                IpamCommand::Show => Ok((show.text(&ipam, tables::ipam)?, false)),
                IpamCommand::Check => {
                    Ok((show.text(&ipam.findings, |f| tables::findings(f))?, !ipam.findings.is_empty()))
                }
            }
        }
    }
}

struct Show {
    output: Output,
}

impl Show {
    fn text<T: Serialize>(&self, report: &T, table: impl Fn(&T) -> String) -> anyhow::Result<String> {
        match self.output {
            Output::Table => Ok(table(report)),
            Output::Json => Ok(serde_json::to_string_pretty(report)? + "\n"),
        }
    }
}

fn ask<T: DeserializeOwned>(socket: &Path, request: &Request) -> anyhow::Result<T> {
    match exchange(socket, request)? {
        Response::Report { report } => serde_json::from_value(report).context(FOREIGN),
        Response::Refused { reason } | Response::NotReady { reason, .. } => anyhow::bail!("{reason}"),
        Response::Done => anyhow::bail!(FOREIGN),
    }
}

/// What an answer means that makes no sense.
const FOREIGN: &str = "the daemon's answer is not understood; huskctl and huskd should be of one version";

/// Asks the daemon, with a time limit.
pub(crate) fn exchange(socket: &Path, request: &Request) -> anyhow::Result<Response> {
    let connected = UnixStream::connect(socket);
    let denied = connected.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::PermissionDenied);
    let mut stream = connected.with_context(|| {
        let socket = socket.display();
        if denied {
            format!("huskctl may not open {socket}: it needs root; try sudo huskctl")
        } else {
            format!("no daemon answers on {socket}; is huskd running? Try: systemctl status huskd, or huskd run")
        }
    })?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    ipc::write_message(&mut stream, request).context("cannot send the request to the daemon")?;
    ipc::read_message(&mut stream).context("cannot read the daemon's answer")
}
