//! The troubleshooting command `huskctl`: asks the daemon, prints tables for people or JSON for scripts.
//!
//! Exit status: 0 all is well, 1 something was found (a difference, an issue that is more than a warning, a contradiction), is denied
//! or is not finished, 2 wrong usage, 3 the daemon does not answer or refused.

mod capture;
mod doctor;
mod flows;
mod following;
mod mtu;
mod policy;
mod reference;
mod rotate;
mod schemas;
mod standpoint;
mod style;
mod support_bundle;
mod tables;
mod top;
mod trace;
mod ui;

pub(crate) use self::standpoint::daemon_process;
pub(crate) use self::tables::bytes;

use std::io::{ErrorKind, Write as _};
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::{FromArgMatches as _, Parser, Subcommand, ValueEnum};
use husk_overlay::ipc::{self, Request, Response};
use husk_overlay::issue::Severity;
use serde::Serialize;
use serde::de::DeserializeOwned;

use self::style::Colour;
use crate::leases;
use crate::manual::{self, Shell};
use crate::report::{DiffReport, IpamReport, KeysReport, PeerReport, ReleaseReport, Status};

/// How long the daemon may take to answer.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Looks into the Husk daemon of this node.
#[derive(Parser)]
#[command(name = "huskctl", version, verbatim_doc_comment)]
pub struct Arguments {
    /// Form of the output
    #[arg(long, short, global = true, value_enum, default_value_t = Output::Table)]
    output: Output,
    /// Colours in tables
    #[arg(long, global = true, value_enum, value_name = "WHEN", default_value_t)]
    color: Colour,
    /// Directory of the daemon's socket
    #[arg(
        long,
        global = true,
        env = "HUSK_RUN_DIRECTORY",
        default_value = husk_overlay::marks::RUN_DIRECTORY,
        value_hint = clap::ValueHint::DirPath
    )]
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
    /// Where the bytes of a full-sized packet go, for every peer, and where their number comes from
    Mtu(mtu::Options),
    /// What the daemon would change in the kernel now
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
    /// What becomes of a connection, hop by hop: pod, antispoofing, policy, route, MTU, firewalls, tunnel and keys, underlay, address
    /// translation, live probe; the first that is broken or denies it is told with cause and remedy
    ///
    /// Nothing is sent but a knock at the other node where its daemon answers no probes, and probes with --probe. What another node
    /// decides this one cannot know: it is left open ("??"), which is no finding. Run it there, too.
    Trace(trace::Options),
    /// The packets of a pod, of another node or of this one, as pods see them or as the network between the nodes does: one line
    /// each, or a pcap file
    ///
    /// Needs root, in the network namespace of the host. Stops after 10,000 packets or 60 seconds if not told otherwise. Packets
    /// are seen as the interface handles them: with segmentation offload larger than on the wire.
    Capture(capture::Options),
    /// What policy has denied lately, with the policy behind it, and which connections of pods begin and end; -o json gives one
    /// line per flow
    Flows(flows::Options),
    /// What goes through the tunnels and to the pods of this node, from second to second, with round-trip times and losses; -o
    /// json gives one line per interval
    Top(top::Options),
    /// Where to see this node's page: the map of the cluster, denied flows and issues
    ///
    /// The address holds the key that the page asks for. The page is served on this host only.
    Ui,
    /// Cuts a pod of this node off from everything but policy.quarantineAllowed, at once and for connections that exist too
    ///
    /// It stays so until it is released, also when the daemon starts anew. The label husk.dev/quarantine=true on a pod does the
    /// same on whichever node it is.
    Quarantine(policy::QuarantineOptions),
    /// Looks at everything around the overlay that is known to break it: what is wrong, where that is seen, and what mends it
    ///
    /// Works without the daemon, too. --fix applies what is safe to apply, and asks before each.
    Doctor(doctor::Options),
    /// Collects all that somebody needs who is to help, in one file: reports, configuration, kernel state, logs; no secrets
    ///
    /// Works without a daemon. Nothing is sent anywhere.
    SupportBundle(support_bundle::Options),
    /// JSON Schemas of what --output json prints
    Schema(schemas::Options),
    /// Prints a script that completes commands and options in a shell
    Completion {
        /// Shell
        shell: Shell,
    },
    /// Writes the manual pages into a directory; man -l shows one from there
    Man {
        /// Directory, which is made if there is none
        #[arg(value_hint = clap::ValueHint::DirPath)]
        directory: PathBuf,
    },
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
    /// Looks for contradictions between leases, blocks and interfaces
    Check,
    /// Releases the lease of a pod that is gone and was never deleted, as the doctor tells of; refuses if the pod may be there yet
    ///
    /// Works without the daemon. The address rests for ipam.coolDown, as after every release.
    Release {
        /// An address of the pod
        address: IpAddr,
    },
}

impl Arguments {
    /// Those of this process; what is not understood, or asks for help, ends it.
    #[must_use]
    pub fn of_process() -> Self {
        let matches = reference::command().get_matches();
        let arguments = Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
        if let Command::Trace(options) = &arguments.command
            && let Err((kind, message)) = options.check()
        {
            let mut command = reference::command();
            command.build();
            let trace = command.find_subcommand_mut("trace").expect("it was given");
            trace.error(kind, message).exit();
        }
        arguments
    }
}

/// Runs the command and says how the process should exit.
#[must_use]
pub fn run(arguments: &Arguments) -> ExitCode {
    match answer(arguments).and_then(|(text, found)| style::print(&text).map(|_| found)) {
        Ok(found) => {
            if found {
                ExitCode::from(1)
            } else {
                ExitCode::SUCCESS
            }
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
    let show = Show { output: arguments.output, coloured: arguments.color.is_on() };
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
        Command::Trace(options) => trace::run(&socket, options, &show),
        Command::Capture(options) => capture::run(&socket, options, &show),
        Command::Quarantine(options) => policy::quarantine(&socket, options, &show),
        Command::Ui => ui::run(&socket, &show),
        Command::Doctor(options) => doctor::run(&arguments.run_directory, options, &show),
        Command::Flows(options) => flows::run(&socket, options, &show),
        Command::Top(options) => top::run(&socket, options, &show),
        Command::Keys(KeysCommand::Rotate(options)) => rotate::run(&socket, options, &show),
        Command::SupportBundle(options) => support_bundle::run(&arguments.run_directory, options, &show),
        Command::Schema(options) => Ok((schemas::run(options)?, false)),
        Command::Completion { shell } => Ok((manual::completion(*shell, reference::command()), false)),
        Command::Man { directory } => {
            let written = reference::manual().write(directory)?.len();
            Ok((format!("{written} pages are in {}.\n", directory.display()), false))
        }
        Command::Ipam(IpamCommand::Release { address }) => {
            standpoint::ensure_here(&socket)?;
            let released = leases::release(&arguments.run_directory, *address)?;
            Ok((show.text(&ReleaseReport { released }, tables::released)?, false))
        }
        Command::Ipam(command @ (IpamCommand::Show | IpamCommand::Check)) => {
            let ipam: IpamReport = ask(&socket, &Request::Ipam)?;
            if matches!(command, IpamCommand::Show) {
                return Ok((show.text(&ipam, tables::ipam)?, false));
            }
            Ok((show.text(&ipam.findings, |f| tables::findings(f))?, !ipam.findings.is_empty()))
        }
    }
}

struct Show {
    output: Output,
    coloured: bool,
}

impl Show {
    /// The report as a table or as JSON, ready to be written.
    fn text<T: Serialize>(&self, report: &T, table: impl Fn(&T) -> String) -> anyhow::Result<String> {
        match self.output {
            Output::Table => Ok(self.finish(&table(report))),
            Output::Json => Ok(serde_json::to_string_pretty(report)? + "\n"),
        }
    }

    /// Makes what a table marked coloured, or not ([`style`]).
    fn finish(&self, text: &str) -> String {
        style::finish(text, self.coloured)
    }
}

fn ask<T: DeserializeOwned>(socket: &Path, request: &Request) -> anyhow::Result<T> {
    match exchange(socket, request)? {
        Response::Report { report } => serde_json::from_value(report).context(FOREIGN),
        Response::Refused { reason } | Response::NotReady { reason, .. } => anyhow::bail!("{reason}"),
        Response::Done => anyhow::bail!(FOREIGN),
    }
}

/// Nobody takes questions at the daemon's socket.
#[derive(Debug, thiserror::Error)]
#[error("{words}")]
struct Unreachable {
    /// What it means, and what to do; the system's reason is among them.
    words: String,
    /// The system's reason.
    kind: ErrorKind,
}

/// What an answer means that makes no sense.
const FOREIGN: &str = "the daemon's answer is not understood; huskctl and huskd should be of one version";

/// Asks the daemon, with a time limit.
pub(crate) fn exchange(socket: &Path, request: &Request) -> anyhow::Result<Response> {
    exchange_within(TIMEOUT, socket, request)
}

fn exchange_within(limit: Duration, socket: &Path, request: &Request) -> anyhow::Result<Response> {
    let connected = UnixStream::connect(socket);
    let mut stream = connected.map_err(|error| {
        let kind = error.kind();
        let socket = socket.display();
        let words = if kind == ErrorKind::PermissionDenied {
            format!("huskctl may not open {socket}: it needs root; try sudo huskctl")
        } else {
            format!(
                "no daemon answers on {socket} ({error}); is huskd running? Try: systemctl status huskd, or huskd run. huskctl doctor \
                 and huskctl support-bundle work without it"
            )
        };
        Unreachable { words, kind }
    })?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    ipc::write_message(&mut stream, request).context("cannot send the request to the daemon")?;
    ipc::read_message(&mut stream).map_err(|error| {
        let late = matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut);
        let context = if late {
            format!(
                "the daemon is there and does not answer within {} s: it hangs, or the machine is overloaded. Its log tells what \
                 it was at; restarting it interrupts no traffic",
                limit.as_secs()
            )
        } else {
            "cannot read the daemon's answer; was it restarted just now? Try again".to_owned()
        };
        anyhow::Error::new(error).context(context)
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_daemon_that_hangs_is_told_from_one_that_is_not_there() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("husk.sock");
        let ask =
            || format!("{:#}", exchange_within(Duration::from_millis(50), &socket, &Request::Status).unwrap_err());
        assert!(ask().starts_with("no daemon answers on "), "{}", ask());
        let listener = UnixListener::bind(&socket).unwrap();
        let hung = ask();
        assert!(hung.contains("it hangs, or the machine is overloaded"), "{hung}");
        drop(listener);
    }
}
