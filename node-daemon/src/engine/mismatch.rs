//! Peers of which nothing can be decrypted. Who knows all public keys and addresses computes the same keys as the peer, unless
//! the two mix different secrets into them: the preshared key is the one ingredient that nobody publishes.

use husk_overlay::config::IpsecConfig;
use husk_overlay::facts::{AssociationUse, Facts};
use husk_overlay::issue::{Issue, IssueKind, Severity};
use husk_overlay::name::NodeName;
use husk_overlay::plan::Plan;

/// An issue for each peer with an association under which packets came and none could be decrypted. Where one was, the keys
/// are alike, and what fails is damaged or forged.
pub(super) fn issues(config: &IpsecConfig, facts: &Facts, plan: &Plan) -> Vec<Issue> {
    let Some(esp) = &facts.esp else { return Vec::new() };
    let fails = |used: &&AssociationUse| used.packets == 0 && used.undecryptable > 0;
    let failed = plan.peers.iter().filter_map(|(name, peer)| {
        let address = peer.address?;
        let of_peer = esp.installed.values().filter(|used| used.source == address);
        let packets: u64 = of_peer.filter(fails).map(|used| u64::from(used.undecryptable)).sum();
        (packets > 0).then_some((name, packets))
    });
    failed.map(|(name, packets)| issue(config, name, packets)).collect()
}

fn issue(config: &IpsecConfig, peer: &NodeName, packets: u64) -> Issue {
    let remedy = match &config.preshared_key_file {
        Some(path) => format!(
            "put the same secret into {}, which ipsec.presharedKeyFile names, on both nodes, and restart their daemons",
            path.display()
        ),
        None => format!(
            "ipsec.presharedKeyFile is not set on this node: set it as on {peer}, or on neither, and restart the daemon"
        ),
    };
    Issue {
        severity: Severity::Error,
        kind: IssueKind::KeyMismatch,
        subject: peer.to_string(),
        message: format!(
            "none of the packets that it sent since its last key could be decrypted, {packets} failed (XfrmInStateProtoError): \
             the two nodes seem to have different preshared keys"
        ),
        remedy,
    }
}
