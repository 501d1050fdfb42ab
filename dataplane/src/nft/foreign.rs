//! Rules of others that may keep pods' packets from being forwarded. They are only looked at.
//!
//! nftables asks every base chain of a hook in turn, and one refusal is final: what another table's forward chain drops by
//! its policy, no rule of ours can save. Docker sets such a policy, and so do firewalls. Rules made by iptables-nft are
//! nftables rules and show here; those of iptables-legacy live elsewhere in the kernel, and of those only the names of tables
//! can be told without its own program.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io;
use std::path::Path;

use husk_overlay::marks;
use husk_overlay::prefix::Family;
use serde::Serialize;
use serde_json::Value;

use super::{parse, program};
use crate::error::Error;

/// The calling thread's network namespace; `/proc/net` would be that of the first thread.
const PROC_NET: &str = "/proc/thread-self/net";

/// Tables of iptables that have a forward chain.
const LEGACY_FORWARD_TABLES: [&str; 3] = ["filter", "mangle", "security"];

/// Somebody else's part in whether packets are forwarded.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum ForeignChain {
    /// A base chain that drops what none of its rules lets pass.
    Drops {
        /// Family of its table as nft names it: `ip`, `ip6` or `inet`.
        family: String,
        /// Its table.
        table: String,
        /// Its name.
        chain: String,
    },
    /// Tables of iptables-legacy, which cannot be seen into.
    Legacy {
        /// Family.
        family: Family,
        /// Names of the tables that have a forward chain.
        tables: BTreeSet<String>,
    },
}

impl fmt::Display for ForeignChain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Drops { family, table, chain } => {
                write!(f, "chain {chain} of nftables table {family} {table} drops what its rules do not let pass")
            }
            Self::Legacy { family, tables } => {
                let tables = tables.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
                write!(f, "iptables-legacy has {family} tables that cannot be seen into: {tables}")
            }
        }
    }
}

/// Looks for what may keep packets from being forwarded, in the calling thread's network namespace; sorted.
///
/// # Errors
/// [`Error::NoProgram`] and [`Error::Program`] when `nft` is missing, fails or does not end; [`Error::Malformed`] when its
/// answer is not understood; [`Error::File`] when `/proc` cannot be read.
pub fn foreign_forward_drops() -> Result<Vec<ForeignChain>, Error> {
    let mut found = drops(&program::query("list", "the chains of all tables", &["list", "chains"])?)?;
    found.extend(legacy(Path::new(PROC_NET))?);
    found.sort();
    Ok(found)
}

/// Everything nft knows, in the calling thread's network namespace, as it prints it (libnftables-json(5)): for people who look for
/// the rule that drops their packets. On a host of many services that takes seconds, and is nothing for a daemon.
///
/// # Errors
/// [`Error::NoProgram`] and [`Error::Program`] when `nft` is missing, fails or does not end.
pub fn ruleset() -> Result<Value, Error> {
    program::query("list", "the rules of all tables", &["list", "ruleset"])
}

fn drops(listing: &Value) -> Result<Vec<ForeignChain>, Error> {
    let mut found = Vec::new();
    for (kind, body) in parse::objects(listing)? {
        let text = |key: &str| body[key].as_str().unwrap_or_default();
        let (family, table) = (text("family"), text("table"));
        // Bridges and devices have hooks of the same name, which routed packets do not meet.
        let routed = matches!(family, "ip" | "ip6" | "inet");
        let ours = family == "inet" && [marks::NFT_TABLE, marks::NFT_POLICY_TABLE].contains(&table);
        if kind == "chain" && text("hook") == "forward" && text("policy") == "drop" && routed && !ours {
            let [family, table, chain] = [family, table, text("name")].map(str::to_owned);
            found.push(ForeignChain::Drops { family, table, chain });
        }
    }
    Ok(found)
}

/// The files list the tables that iptables-legacy has made, one to a line; they are there while its module is loaded
/// (net/netfilter/x_tables.c `xt_proto_init`).
fn legacy(proc_net: &Path) -> Result<Vec<ForeignChain>, Error> {
    let mut found = Vec::new();
    for (family, file) in [(Family::Ipv4, "ip_tables_names"), (Family::Ipv6, "ip6_tables_names")] {
        let path = proc_net.join(file);
        let names = match fs::read_to_string(&path) {
            Ok(names) => names,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(source) => return Err(Error::File { operation: "read", path, source }),
        };
        let forwards = |name: &&str| LEGACY_FORWARD_TABLES.contains(name);
        let tables: BTreeSet<String> = names.lines().map(str::trim).filter(forwards).map(str::to_owned).collect();
        if !tables.is_empty() {
            found.push(ForeignChain::Legacy { family, tables });
        }
    }
    Ok(found)
}

#[cfg(test)]
#[path = "foreign_tests.rs"]
mod tests;
