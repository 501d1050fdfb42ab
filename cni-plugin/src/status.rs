//! STATUS: could an ADD work now?

use std::collections::BTreeSet;

use husk_overlay::ipc::{NODE_FILE, NodeFile, Request, Response, SOCKET_FILE};
use husk_overlay::issue::{Issue, IssueKind, Severity};
use husk_overlay::prefix::{Family, Prefix};
use serde::Deserialize;
use serde_json::Value;

use crate::daemon::{self, Daemon};
use crate::deadline::Deadline;
use crate::error::{Code, Failure};
use crate::netconf::NetConf;
use crate::version::Version;
use crate::{attachment, node};

/// Asks the daemon, and looks whether an address is left.
pub(crate) fn status(conf: &NetConf, deadline: Deadline) -> Result<(), Failure> {
    conf.version.require(Version::V1_1_0, "STATUS")?;
    conf.refuse_unknown_fields()?;
    let not_available = |failure| Failure { code: Code::NotAvailable, ..failure };
    let ask = |request| Daemon::connect(&conf.run_file(SOCKET_FILE), deadline)?.answer_to(request);
    let answer = ask(&Request::Ready).map_err(not_available)?;
    let code = code_of(&answer);
    daemon::accepted(answer).map_err(|failure| Failure { code, ..failure })?;
    let node = node::read(&conf.run_file(NODE_FILE)).map_err(not_available)?;
    let full = full_families(conf, &node, deadline).map_err(not_available)?;
    if full.is_empty() {
        return Ok(());
    }
    // ADD would ask for another block; nothing is claimed merely because somebody asks how we are.
    let pools = ask(&Request::Ipam).and_then(daemon::accepted).map_err(not_available)?.unwrap_or_default();
    let pools = Pools::parse(&pools).map_err(not_available)?;
    match full.into_iter().find(|family| !pools.have_room(*family)) {
        None => Ok(()),
        Some(family) => Err(Failure::new(
            Code::NotAvailable,
            format!(
                "no {family} pod address is left: all of this node's blocks are leased, and no pool has a free block ({}); \
                 enlarge a pool or add one, or remove the manifests of nodes that are gone",
                pools.of(family)
            ),
        )),
    }
}

/// Pods that exist depend on the daemon only where what carries their traffic to other nodes is missing.
fn code_of(answer: &Response) -> Code {
    let cuts_off = |issue: &Issue| {
        issue.severity == Severity::Blocking
            && matches!(issue.kind, IssueKind::EncapsulationUnavailable | IssueKind::NoUnderlayAddress)
    };
    match answer {
        Response::NotReady { issues, .. } if issues.iter().any(cuts_off) => Code::LimitedConnectivity,
        _ => Code::NotAvailable,
    }
}

/// Families of which every address of the node is leased. One that rests counts as left, as ADD takes it when there is no
/// other.
fn full_families(conf: &NetConf, node: &NodeFile, deadline: Deadline) -> Result<Vec<Family>, Failure> {
    // Those of damaged leases too, which ADD does not take either.
    let leases = attachment::leases(conf, deadline).load()?;
    let mut taken: BTreeSet<_> = leases.leased.keys().copied().collect();
    taken.extend(node.router.iter());
    let is_full = |block: &Prefix| taken.iter().filter(|it| block.contains(**it)).count() as u128 >= block.size();
    let full = |family: &Family| node.blocks.iter().filter(|block| block.family() == *family).all(is_full);
    Ok(node.families.iter().copied().filter(full).collect())
}

/// The pools of the cluster, as the daemon reports them for `huskctl ipam`.
#[derive(Debug, Deserialize)]
struct Pools {
    pools: Vec<PoolFill>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct PoolFill {
    pool: Pool,
    used_blocks: u64,
    total_blocks: u64,
}

#[derive(Debug, Deserialize)]
struct Pool {
    name: String,
    cidr: Prefix,
    #[serde(default)]
    disabled: bool,
}

impl Pools {
    fn parse(report: &Value) -> Result<Self, Failure> {
        Self::deserialize(report).map_err(|error| {
            Failure::new(
                Code::TryAgainLater,
                format!(
                    "what huskd says of its pools is not understood ({error}); install the plugin of huskd's release"
                ),
            )
        })
    }

    fn have_room(&self, family: Family) -> bool {
        self.pools
            .iter()
            .any(|it| it.pool.cidr.family() == family && !it.pool.disabled && it.used_blocks < it.total_blocks)
    }

    /// The pools of a family, for people.
    fn of(&self, family: Family) -> String {
        let described = self.pools.iter().filter(|it| it.pool.cidr.family() == family).map(|it| {
            let (used, total) = (it.used_blocks, it.total_blocks);
            let disabled = if it.pool.disabled { ", disabled" } else { "" };
            format!("{} {}: {used} of {total} blocks taken{disabled}", it.pool.name, it.pool.cidr)
        });
        let described: Vec<String> = described.collect();
        if described.is_empty() { format!("there is none for {family}") } else { described.join("; ") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn issue(severity: Severity, kind: IssueKind) -> Issue {
        Issue { severity, kind, subject: String::new(), message: String::new(), remedy: String::new() }
    }

    #[test]
    fn only_what_cuts_pods_off_is_limited_connectivity() {
        let code = |issues| code_of(&Response::NotReady { reason: String::new(), issues });
        assert_eq!(
            code(vec![issue(Severity::Blocking, IssueKind::EncapsulationUnavailable)]),
            Code::LimitedConnectivity
        );
        assert_eq!(code(vec![issue(Severity::Warning, IssueKind::EncapsulationUnavailable)]), Code::NotAvailable);
        assert_eq!(code(vec![issue(Severity::Blocking, IssueKind::PoolExhausted)]), Code::NotAvailable);
        assert_eq!(code_of(&Response::Refused { reason: String::new() }), Code::NotAvailable);
    }

    #[test]
    fn a_pool_with_a_free_block_has_room_unless_it_is_disabled() {
        let pools = |used: u64, disabled: bool| {
            let pool = json!({"name": "blue", "cidr": "10.42.0.0/28", "blockLength": 30, "disabled": disabled});
            Pools::parse(&json!({"pools": [{"pool": pool, "usedBlocks": used, "totalBlocks": 4}]})).unwrap()
        };
        assert!(pools(3, false).have_room(Family::Ipv4));
        assert!(!pools(3, false).have_room(Family::Ipv6));
        assert!(!pools(3, true).have_room(Family::Ipv4));
        assert!(!pools(4, false).have_room(Family::Ipv4));
        assert_eq!(pools(4, true).of(Family::Ipv4), "blue 10.42.0.0/28: 4 of 4 blocks taken, disabled");
        assert_eq!(Pools::parse(&json!(7)).unwrap_err().code, Code::TryAgainLater);
    }
}
