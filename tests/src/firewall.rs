//! A firewall of somebody else's that is in the way: one chain, in a table of its own.

use anyhow::Result;

use crate::netns::Netns;

/// Family and name of the table.
const TABLE: &str = "inet between";

/// Where it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// Before anything else sees what arrives: it stands for the way between two hosts.
    Path,
    /// At what is for the host itself.
    Input,
    /// At what the host itself sends.
    Output,
}

impl At {
    fn hook(self) -> &'static str {
        match self {
            // The priority of `raw`, before which nothing tracks connections (enum nf_ip_hook_priorities), and a bit before that.
            Self::Path => "prerouting priority -400",
            Self::Input => "input priority 0",
            Self::Output => "output priority 0",
        }
    }
}

/// Puts one up with these rules, in nft's words.
///
/// # Errors
/// When nft refuses.
pub fn raise(netns: &Netns, at: At, rules: &[&str]) -> Result<()> {
    let (hook, rules) = (at.hook(), rules.join("; "));
    let table = format!("table {TABLE} {{ chain c {{ type filter hook {hook}; {rules}; }}; }}");
    netns.command("nft", [table.as_str()]).map(drop)
}

/// Takes it away.
///
/// # Errors
/// When there is none.
pub fn lift(netns: &Netns) -> Result<()> {
    netns.command("nft", [format!("delete table {TABLE}").as_str()]).map(drop)
}
