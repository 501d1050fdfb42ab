//! Whether a node can serve pods at all, and what is in the way if it cannot, whatever its peers are like.

use super::Context;
use crate::issue::{Issue, IssueKind, Severity};
use crate::mtu::{self, Ledger};
use crate::prefix::Family;

/// False, with issues that block, if the node cannot serve pods.
pub(super) fn check(context: &Context<'_>, ledger: &Ledger, issues: &mut Vec<Issue>) -> bool {
    let mut good = true;
    if context.own_underlay().is_none() {
        issues.push(no_underlay_address(context));
        good = false;
    }
    if super::name_taken(context.snapshot, context.facts) {
        issues.push(Issue {
            severity: Severity::Blocking,
            kind: IssueKind::DuplicateNode,
            subject: context.facts.node.to_string(),
            message: "another host has published itself under this node's name".into(),
            remedy: "give this host a name of its own (node.name); if it was reinstalled, remove the node's old OverlayNode \
                     manifest first"
                .into(),
        });
        good = false;
    }
    if !context.facts.ipv6 && context.families().any(|family| family == Family::Ipv6) {
        issues.push(Issue {
            severity: Severity::Blocking,
            kind: IssueKind::FamilyUnavailable,
            subject: context.facts.node.to_string(),
            message: "this host's kernel has no IPv6, and clusterCIDRs has an IPv6 prefix".into(),
            remedy: "boot without ipv6.disable=1, or remove the IPv6 prefix from clusterCIDRs on all nodes".into(),
        });
        good = false;
    }
    for family in context.families() {
        // Without an address there is no underlay to speak of.
        if context.own_underlay().is_none() {
            continue;
        }
        let Err(error) = ledger.inner_mtu().and_then(|inner| mtu::check(family, inner)) else { continue };
        issues.push(Issue {
            severity: Severity::Blocking,
            kind: IssueKind::MtuTooSmall,
            subject: format!("{family} in mode {}", context.config.mode),
            message: format!("an underlay MTU of {} bytes is too small: {error} ({ledger})", context.underlay_mtu),
            remedy: format!("raise the underlay's MTU, or remove the {family} prefix from clusterCIDRs"),
        });
        good = false;
    }
    if underlay_is_inside_cluster(context) {
        issues.push(Issue {
            severity: Severity::Blocking,
            kind: IssueKind::UnderlayOverlap,
            subject: context.facts.node.to_string(),
            message: "this host's own underlay address lies inside the cluster CIDR".into(),
            remedy: "choose clusterCIDRs that no host and no network around the hosts uses".into(),
        });
        good = false;
    }
    overlaps(context, issues);
    good
}

fn no_underlay_address(context: &Context<'_>) -> Issue {
    let family = context.config.underlay.family;
    let underlay = &context.config.underlay;
    let (message, remedy) = match (underlay.addresses.get(family), &underlay.interface) {
        (Some(configured), _) => (
            format!("the configured underlay address {configured} is on no interface of this host"),
            "correct underlay.addresses, or remove it to have the address found".to_owned(),
        ),
        (None, Some(interface)) => (
            format!("the interface {interface}, which underlay.interface names, is missing or has no {family} address"),
            format!("name one that has (`ip address` lists them), or give {interface} an {family} address"),
        ),
        (None, None) => (
            format!("no {family} address to build tunnels from was found on this host"),
            format!(
                "give the host an {family} address and a default route, name the interface with underlay.interface, or \
                 choose the other underlay.family"
            ),
        ),
    };
    Issue {
        severity: Severity::Blocking,
        kind: IssueKind::NoUnderlayAddress,
        subject: context.facts.node.to_string(),
        message,
        remedy,
    }
}

/// The guard would cut the node off from its own network.
pub(super) fn underlay_is_inside_cluster(context: &Context<'_>) -> bool {
    let inside = |address| context.config.cluster_cidrs.iter().any(|cidr| cidr.contains(address));
    context.facts.addresses.iter().any(inside)
}

/// Networks of the host that share addresses with the cluster: they lose, being treated as the cluster's.
fn overlaps(context: &Context<'_>, issues: &mut Vec<Issue>) {
    for cidr in &context.config.cluster_cidrs {
        for foreign in context.facts.foreign_prefixes.iter().filter(|foreign| foreign.overlaps(cidr)) {
            issues.push(Issue {
                severity: Severity::Error,
                kind: IssueKind::UnderlayOverlap,
                subject: cidr.to_string(),
                message: format!("the cluster CIDR overlaps with {foreign}, which an interface of this host carries"),
                remedy: "choose clusterCIDRs that no network around the hosts uses".into(),
            });
        }
    }
}
