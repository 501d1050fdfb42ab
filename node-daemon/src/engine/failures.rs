//! What the kernel refused, as issues: one for each thing that is wrong, not one for each change that suffers from it.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use husk_dataplane::Error;
use husk_dataplane::kernel::{Change, Table};
use husk_dataplane::reconcile::{Failure, Outcome};
use husk_overlay::issue::{Issue, IssueKind, Severity};
use husk_overlay::kernel::RouteTarget;
use husk_overlay::marks;
use husk_overlay::name::InterfaceName;
use nix::errno::Errno;

/// Adds an issue for each failure that is not the consequence of another.
pub(super) fn report(outcome: &Outcome, issues: &mut Vec<Issue>) {
    let of_devices: BTreeSet<&InterfaceName> =
        outcome.failures.iter().filter(|it| it.table == Table::Links).filter_map(interface).collect();
    let mut missing: BTreeMap<&InterfaceName, Vec<&Failure>> = BTreeMap::new();
    for failure in &outcome.failures {
        match interface(failure) {
            // The device's own failure says it all; that of a pod has just gone, and what concerned it with it.
            Some(name) if failure.table != Table::Links && lacks_interface(&failure.error) => {
                if !of_devices.contains(name) && !marks::is_pod_interface(name.as_str()) {
                    missing.entry(name).or_default().push(failure);
                }
            }
            _ if is_consequence(failure, outcome) => {}
            _ => issues.push(issue(failure)),
        }
    }
    issues.extend(missing.into_iter().filter_map(|(name, failures)| missing_interface(name, &failures)));
    issues.extend(outcome.lingering.as_ref().map(|error| Issue {
        severity: Severity::Error,
        kind: IssueKind::ApplyFailed,
        subject: "connections to host ports".into(),
        message: format!(
            "connections through port mappings that have changed may go on to pods that lost them: {error}"
        ),
        remedy: error.remedy().into(),
    }));
}

/// Digest of what was changed and what failed; none when there was nothing to do.
pub(super) fn digest(outcome: &Outcome) -> Option<u64> {
    if outcome.changes() == 0 && outcome.is_clean() {
        return None;
    }
    let mut hasher = DefaultHasher::new();
    outcome.applied.hash(&mut hasher);
    outcome.failures.iter().for_each(|failure| failure.to_string().hash(&mut hasher));
    outcome.lingering.as_ref().map(ToString::to_string).hash(&mut hasher);
    Some(hasher.finish())
}

/// Digest of why a pass was given up.
pub(super) fn digest_of_reason(reason: &str) -> Option<u64> {
    let mut hasher = DefaultHasher::new();
    reason.hash(&mut hasher);
    Some(hasher.finish())
}

/// True if a change did not find its interface.
pub(super) fn lacks_interface(error: &Error) -> bool {
    error.errno() == Some(Errno::ENODEV) || matches!(error, Error::WaitingForUserspaceDevice { .. })
}

fn issue(failure: &Failure) -> Issue {
    Issue {
        severity: severity(failure),
        kind: IssueKind::ApplyFailed,
        subject: failure.change.as_ref().map_or_else(|| failure.table.to_string(), ToString::to_string),
        message: failure.error.to_string(),
        remedy: failure.error.remedy().into(),
    }
}

fn missing_interface(name: &InterfaceName, failures: &[&Failure]) -> Option<Issue> {
    let first = failures.first()?;
    let others = match failures.len() - 1 {
        0 => String::new(),
        others => format!(", and {others} more changes need it"),
    };
    Some(Issue {
        severity: failures.iter().map(|failure| severity(failure)).max()?,
        kind: IssueKind::ApplyFailed,
        subject: name.to_string(),
        message: format!("the interface is missing: {}{others}", first.error),
        remedy: first.error.remedy().into(),
    })
}

/// A change that was to be made in one step with another that is reported.
fn is_consequence(failure: &Failure, outcome: &Outcome) -> bool {
    let reported = |other: &Failure| other.table == failure.table && !matches!(other.error, Error::WithTheOthers);
    matches!(failure.error, Error::WithTheOthers) && outcome.failures.iter().any(reported)
}

/// Interface that a change needs.
fn interface(failure: &Failure) -> Option<&InterfaceName> {
    match failure.change.as_ref()? {
        Change::Link(change) => Some(change.interface()),
        Change::Wireguard(change) => Some(&change.interface),
        Change::Napi(change) => Some(&change.interface),
        Change::Offload(change) => Some(&change.interface),
        Change::Address(change) => Some(&change.address().interface),
        Change::Neighbour(change) => Some(&change.key().interface),
        Change::Fdb(change) => Some(&change.key().interface),
        Change::Route(change) => match &change.route()?.target {
            RouteTarget::Interface { interface, .. } => Some(interface),
            RouteTarget::Unreachable => None,
        },
        Change::Sysctl(_) | Change::Nft(_) | Change::Policy(_) | Change::XfrmState(_) | Change::XfrmPolicy(_) => None,
    }
}

/// Without guard, tunnel or the floor of unreachable routes no pod may start.
fn severity(failure: &Failure) -> Severity {
    let essential = match failure.table {
        Table::Sysctls | Table::Nft | Table::Policy | Table::Links | Table::Wireguard | Table::Addresses => true,
        Table::Offload | Table::Napi | Table::Neighbours | Table::Fdb => false,
        Table::Routes => failure.change.as_ref().is_none_or(Change::makes_unreachable),
        // One peer's associations are one peer's business.
        Table::XfrmStates => failure.change.is_none(),
        Table::XfrmPolicies => failure.change.as_ref().is_none_or(Change::blocks),
    };
    if essential { Severity::Blocking } else { Severity::Error }
}
