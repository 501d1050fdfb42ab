//! `huskctl policy`, `huskctl trace` and `huskctl quarantine`.

use std::path::Path;

use clap::{Args, Subcommand, ValueEnum};
use husk_overlay::ipc::Request;
use husk_policy::verdict::Verdict;

use super::{Show, ask, tables};
use crate::report::{Live, PodPolicyReport, PodPolicyState, PolicyReport, QuarantineReport, TraceReport};

/// What to do with policies.
#[derive(Subcommand)]
pub(super) enum PolicyCommand {
    /// The policies of the cluster and which pods of this node they select, what was denied, how long programming takes
    List,
    /// The rules of a pod, in the order in which they are asked; exit status 1 if they are not in the kernel
    Show {
        /// NAMESPACE/NAME, NAME in the namespace default, or an address
        pod: String,
    },
}

pub(super) fn run(socket: &Path, command: &PolicyCommand, show: &Show) -> anyhow::Result<(String, bool)> {
    match command {
        PolicyCommand::List => {
            let report: PolicyReport = ask(socket, &Request::Policy)?;
            let wrong =
                report.enabled && (!report.known || !report.unknown_pods.is_empty() || !report.issues.is_empty());
            Ok((show.text(&report, tables::policy)?, wrong))
        }
        PolicyCommand::Show { pod } => {
            let report: PodPolicyReport = ask(socket, &Request::PolicyOf { pod: pod.clone() })?;
            let wrong = matches!(report.state, PodPolicyState::Pending | PodPolicyState::Unknown);
            Ok((show.text(&report, tables::policy_of)?, wrong))
        }
    }
}

/// A connection.
#[derive(Debug, Clone, Args)]
pub(super) struct TraceOptions {
    /// Who begins it: a pod as NAMESPACE/NAME or NAME, or any address
    source: String,
    /// Whom it is for, alike; of a service the address of a pod behind it, since policy sees that
    destination: String,
    /// Port of the destination; TCP, UDP and SCTP need it
    #[arg(long)]
    port: Option<u16>,
    /// Protocol
    #[arg(long, value_enum, default_value_t = TraceProtocol::Tcp)]
    protocol: TraceProtocol,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum TraceProtocol {
    Tcp,
    Udp,
    Sctp,
    /// ICMP; ICMPv6 between addresses of IPv6
    Icmp,
}

impl TraceProtocol {
    /// IANA protocol number. Policy knows no difference between ICMP and ICMPv6, as neither has ports.
    fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
            Self::Icmp => 1,
        }
    }
}

pub(super) fn trace(socket: &Path, options: &TraceOptions, show: &Show) -> anyhow::Result<(String, bool)> {
    let TraceOptions { source, destination, port, protocol } = options;
    let request = Request::Trace {
        source: source.clone(),
        destination: destination.clone(),
        protocol: protocol.number(),
        port: *port,
    };
    let report: TraceReport = ask(socket, &request)?;
    let wrong =
        report.verdict == Verdict::Deny || report.sides.iter().any(|it| matches!(it.live, Live::Differs { .. }));
    Ok((show.text(&report, tables::trace)?, wrong))
}

/// Whom to cut off.
#[derive(Debug, Clone, Args)]
pub(super) struct QuarantineOptions {
    /// A pod of this node: NAMESPACE/NAME, NAME in the namespace default, or an address
    #[arg(required_unless_present = "list", conflicts_with = "list")]
    pod: Option<String>,
    /// Let it onto the network again
    #[arg(long, conflicts_with = "list")]
    release: bool,
    /// Name the pods of this node that are cut off
    #[arg(long)]
    list: bool,
}

pub(super) fn quarantine(socket: &Path, options: &QuarantineOptions, show: &Show) -> anyhow::Result<(String, bool)> {
    let Some(pod) = &options.pod else {
        let report: PolicyReport = ask(socket, &Request::Policy)?;
        return Ok((show.text(&report.quarantined, |pods| tables::quarantined(pods))?, false));
    };
    let on = !options.release;
    let report: QuarantineReport = ask(socket, &Request::Quarantine { pod: pod.clone(), on })?;
    let wrong = report.quarantined != on || !report.enforced;
    Ok((show.text(&report, tables::quarantine)?, wrong))
}
