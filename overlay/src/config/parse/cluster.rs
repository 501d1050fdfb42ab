//! Keys about the cluster as a whole: where its state comes from, and the addresses of its pods.

use super::super::reader::{Complaint, Fields};
use super::super::{BlockOrigin, IpamConfig, PolicyConfig, SourceConfig};
use super::{read_path, read_prefix};

/// Longest rest of an address, in seconds: with a day, a pool of any sensible size would look exhausted.
const MAX_COOL_DOWN: u32 = 24 * 60 * 60;

/// A node that is away for shorter than this, in seconds, may just be restarting.
const MIN_RELEASE: u32 = 10;

/// Longest time for which blocks of nodes that are gone are kept, in seconds: a week.
const MAX_RELEASE: u32 = 7 * 24 * 60 * 60;

pub(super) fn read_source(top: &mut Fields<'_, '_>) -> SourceConfig {
    let mut section = top.section("source");
    let kubernetes_given = section.value("kubernetes").is_some();
    if kubernetes_given && section.value("directory").is_some() {
        let reason = "the cluster's state comes from one source, and two are given";
        section.complain("directory", Complaint::conflict(reason, "keep kubernetes or directory"));
    }
    let mut kubernetes = section.section("kubernetes");
    let kubeconfig = read_path(&mut kubernetes, "kubeconfig");
    kubernetes.finish();
    let mut directory = section.section("directory");
    let path = read_path(&mut directory, "path");
    directory.finish();
    section.finish();
    match (kubernetes_given, path) {
        (true, _) => SourceConfig::Kubernetes { kubeconfig },
        (false, Some(path)) => SourceConfig::Directory { path },
        (false, None) => SourceConfig::default(),
    }
}

pub(super) fn read_policy(top: &mut Fields<'_, '_>) -> PolicyConfig {
    let default = PolicyConfig::default();
    let mut section = top.section("policy");
    let enabled = section.flag("enabled").unwrap_or(default.enabled);
    let example = "quarantineAllowed: [192.0.2.0/24]";
    let allowed = section.list("quarantineAllowed", "a list of CIDRs", example, |item| read_prefix(item, example));
    section.finish();
    PolicyConfig { enabled, quarantine_allowed: allowed.unwrap_or_default().into_iter().collect() }
}

pub(super) fn read_ipam(top: &mut Fields<'_, '_>, source: &SourceConfig) -> IpamConfig {
    let default = IpamConfig::default();
    let mut section = top.section("ipam");
    let origins = [("pools", BlockOrigin::Pools), ("node-cidrs", BlockOrigin::NodeCidrs)];
    let blocks = section.choice("blocks", &origins).unwrap_or_default();
    if blocks == BlockOrigin::NodeCidrs && !matches!(source, SourceConfig::Kubernetes { .. }) {
        let reason = "only Kubernetes gives CIDRs to nodes, and the source is another";
        section.complain("blocks", Complaint::conflict(reason, "write pools, or set source.kubernetes"));
    }
    let cool_down = section
        .number("coolDown", 0..=MAX_COOL_DOWN, "an address rests for at most a day (in seconds)")
        .unwrap_or(default.cool_down);
    let why = "blocks of nodes that are gone are kept for ten seconds to a week (in seconds)";
    let release_after = section.number("releaseAfter", MIN_RELEASE..=MAX_RELEASE, why).unwrap_or(default.release_after);
    section.finish();
    IpamConfig { blocks, cool_down, release_after }
}
