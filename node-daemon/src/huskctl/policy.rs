//! `huskctl policy` and `huskctl quarantine`.

use std::path::Path;

use clap::{Args, Subcommand};
use husk_overlay::ipc::Request;

use super::{Show, ask, tables};
use crate::report::{PodPolicyReport, PodPolicyState, PolicyReport, QuarantineReport};

/// What to do with policies.
#[derive(Subcommand)]
pub(super) enum PolicyCommand {
    /// The policies of the cluster and which pods of this node they select, what was denied, how long programming takes
    List,
    /// The rules of a pod, in the order in which they are asked
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
