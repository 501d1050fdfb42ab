//! What the daemon complains about itself. Each kind belongs to the check that looks at the same thing, so that it is told once;
//! the rest is told by the check `issues`.

use husk_overlay::config::SourceConfig;
use husk_overlay::issue::{Issue, IssueKind, Severity};

use super::words::MOST_FINDINGS;
use super::{Action, Check, Evidence, Finding, Fix, Looked, Outcome, Unknown};

/// Claims of two nodes to one thing.
pub(super) const DUPLICATES: Check =
    Check { id: "duplicates", title: "no two nodes claim one name, address, key or block", look: duplicates };

/// Offload.
pub(super) const OFFLOAD: Check =
    Check { id: "offload", title: "checksum and segmentation offload of the VXLAN device works", look: offload };

/// The rest.
pub(super) const REST: Check =
    Check { id: "issues", title: "the daemon complains of nothing that no other check looks at", look: rest };

/// A check that tells issues of the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Teller {
    /// [`DUPLICATES`]
    Duplicates,
    /// [`OFFLOAD`]
    Offload,
    /// [`super::overlap::CHECK`]
    Overlap,
    /// [`super::paths::MTU`]
    Mtu,
    /// [`super::paths::PATHS`]
    Paths,
    /// [`super::peers::CHECK`]
    Peers,
    /// [`super::leases::CHECK`]
    Leases,
    /// [`super::pools::CHECK`]
    Pools,
    /// [`super::keys::CHECK`]
    Keys,
    /// A check that looks for itself at what the issue is about.
    Itself,
    /// [`REST`]
    Rest,
}

/// Who tells issues of a kind.
fn teller(kind: IssueKind) -> Teller {
    match kind {
        IssueKind::DuplicateNode
        | IssueKind::DuplicateBlock
        | IssueKind::DuplicateKey
        | IssueKind::DuplicateAddress
        | IssueKind::ForeignBlock
        | IssueKind::BlockLost => Teller::Duplicates,
        IssueKind::BrokenOffload => Teller::Offload,
        IssueKind::UnderlayOverlap => Teller::Overlap,
        IssueKind::MtuTooSmall | IssueKind::MtuTooLarge => Teller::Mtu,
        IssueKind::PathMtu => Teller::Paths,
        IssueKind::NoRouteToPeer => Teller::Peers,
        IssueKind::BadLease => Teller::Leases,
        IssueKind::PoolExhausted | IssueKind::NoNodeCidr => Teller::Pools,
        IssueKind::KeyMismatch => Teller::Keys,
        IssueKind::BadConfig | IssueKind::ForeignFirewall | IssueKind::PeerSilent => Teller::Itself,
        IssueKind::NoUnderlayAddress
        | IssueKind::EncapsulationUnavailable
        | IssueKind::FamilyUnavailable
        | IssueKind::IncompletePeer
        | IssueKind::NodeMissing
        | IssueKind::BadManifest
        | IssueKind::BadPolicy
        | IssueKind::ApplyFailed
        | IssueKind::SourceUnavailable
        | IssueKind::ListenFailed
        | IssueKind::LogUnwritable
        | IssueKind::ProbesDropped
        | IssueKind::Defect => Teller::Rest,
    }
}

/// What the daemon complains of, as far as this check is to tell it.
pub(super) fn told_by(evidence: &Evidence, who: Teller) -> Result<Vec<&Issue>, Unknown> {
    Ok(evidence.status()?.issues.iter().filter(|issue| teller(issue.kind) == who).collect())
}

/// The same as findings, with the remedy that the daemon knows.
pub(super) fn findings(evidence: &Evidence, who: Teller) -> Result<Vec<Finding>, Unknown> {
    Ok(as_findings(&told_by(evidence, who)?, |issue| Fix::words(issue.remedy.clone())))
}

/// One finding per issue; of many only the first ones, which say how many there are.
fn as_findings(issues: &[&Issue], fix: impl Fn(&Issue) -> Fix) -> Vec<Finding> {
    let more = issues.len().saturating_sub(MOST_FINDINGS);
    let finding = |issue: &&Issue| {
        let mut evidence = vec![format!("huskctl status: {:?}", issue.kind)];
        if more > 0 {
            evidence.push(format!("{more} more of these are told by huskctl status"));
        }
        Finding {
            severity: issue.severity,
            cause: format!("{}: {}", issue.subject, issue.message),
            evidence,
            fix: fix(issue),
        }
    };
    issues.iter().take(MOST_FINDINGS).map(finding).collect()
}

fn duplicates(evidence: &Evidence) -> Looked {
    let issues = told_by(evidence, Teller::Duplicates)?;
    let source = evidence.config().ok().map(|config| &config.source);
    let own = &evidence.status()?.node;
    let fix = |issue: &Issue| {
        // Of these kinds the subject is the node whose claim was refused.
        let is_record = matches!(issue.kind, IssueKind::DuplicateAddress | IssueKind::DuplicateKey);
        match source.filter(|_| is_record) {
            Some(source) => Fix::by_hand(
                format!("{}; a node that lives publishes itself anew after this", issue.remedy),
                [forget(source, &issue.subject)],
                "only you know which of the two is to stay",
            ),
            None => Fix::words(issue.remedy.clone()),
        }
    };
    let seen = format!("{} of {} peers are routed", evidence.status()?.peers.0, evidence.status()?.peers.1);
    Ok(Outcome::of(as_findings(&issues, fix), format!("{own} and its peers claim different things; {seen}")))
}

/// Takes a node's record out of the cluster source.
fn forget(source: &SourceConfig, node: &str) -> Action {
    match source {
        SourceConfig::Directory { path } => {
            let file = path.join("nodes").join(format!("{node}.yaml"));
            Action::run_on_host("rm", [file.display().to_string()])
        }
        SourceConfig::Kubernetes { .. } => Action::run_on_host("kubectl", ["delete", "overlaynode", node]),
    }
}

fn offload(evidence: &Evidence) -> Looked {
    let mode = evidence.status()?.mode;
    if !mode.uses_vxlan() {
        return Ok(Outcome::does_not_apply(format!("mode {mode} has no VXLAN device")));
    }
    Ok(Outcome::of(findings(evidence, Teller::Offload)?, "the daemon's test transfers found nothing broken"))
}

fn rest(evidence: &Evidence) -> Looked {
    let status = evidence.status()?;
    let mut told = told_by(evidence, Teller::Rest)?;
    // What keeps the node from being ready is told with that.
    told.retain(|issue| status.ready || issue.severity != Severity::Blocking);
    let findings = as_findings(&told, |issue| Fix::words(issue.remedy.clone()));
    Ok(Outcome::of(findings, "huskctl status has no other issues"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_many_issues_the_first_are_told_and_how_many_there_are() {
        let issue = |number: usize| Issue {
            severity: Severity::Error,
            kind: IssueKind::DuplicateAddress,
            subject: format!("host{number}"),
            message: "m".into(),
            remedy: "r".into(),
        };
        let issues: Vec<Issue> = (0..5000).map(issue).collect();
        let told = as_findings(&issues.iter().collect::<Vec<_>>(), |_| Fix::words("w"));
        assert_eq!(told.len(), MOST_FINDINGS);
        assert_eq!(told[0].evidence[1], "4990 more of these are told by huskctl status");
    }

    #[test]
    fn records_are_forgotten_where_they_are_kept() {
        let directory = SourceConfig::Directory { path: "/etc/husk/cluster".into() };
        assert_eq!(forget(&directory, "a").to_string(), "rm /etc/husk/cluster/nodes/a.yaml");
        let kubernetes = SourceConfig::Kubernetes { kubeconfig: None };
        assert_eq!(forget(&kubernetes, "a").to_string(), "kubectl delete overlaynode a");
    }
}
