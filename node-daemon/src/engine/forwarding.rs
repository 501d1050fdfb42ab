//! Firewalls of others that may drop pods' packets.

use husk_dataplane::nft::ForeignChain;
use husk_overlay::issue::{Issue, IssueKind, Severity};
use husk_overlay::marks::INTERFACE_PREFIX;

/// The issue of a chain that drops what it does not know; none for what cannot be seen into, as most such tables let all
/// packets pass.
pub(super) fn issue(chain: &ForeignChain) -> Option<Issue> {
    let ForeignChain::Drops { family, table, chain: name } = chain else { return None };
    Some(Issue {
        severity: Severity::Warning,
        kind: IssueKind::ForeignFirewall,
        subject: format!("chain {name} of nftables table {family} {table}"),
        message: "it drops forwarded packets that its rules do not let pass, which may be those of pods".into(),
        remedy: remedy(family, table, name),
    })
}

fn remedy(family: &str, table: &str, chain: &str) -> String {
    let program = match family {
        "ip" => "iptables",
        "ip6" => "ip6tables",
        _ => "",
    };
    if !program.is_empty() && (table, chain) == ("filter", "FORWARD") {
        let rule = |direction| format!("{program} -I FORWARD {direction} {INTERFACE_PREFIX}+ -j ACCEPT");
        return format!(
            "if pods are not reached, let their packets pass: `{}` and `{}`; with Docker, in its chain DOCKER-USER instead of FORWARD",
            rule("-i"),
            rule("-o")
        );
    }
    // The quotes are nft's, which a shell would keep for itself.
    let rule = |key| format!("nft insert rule {family} {table} {chain} {key} '\"{INTERFACE_PREFIX}*\"' accept");
    format!("if pods are not reached, let their packets pass: `{}` and `{}`", rule("iifname"), rule("oifname"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drops(family: &str, table: &str, chain: &str) -> ForeignChain {
        ForeignChain::Drops { family: family.into(), table: table.into(), chain: chain.into() }
    }

    #[test]
    fn the_remedy_is_a_command_for_the_program_that_made_the_chain() {
        let docker = issue(&drops("ip", "filter", "FORWARD")).unwrap();
        assert_eq!((docker.severity, docker.kind), (Severity::Warning, IssueKind::ForeignFirewall));
        assert!(docker.remedy.contains("`iptables -I FORWARD -i husk+ -j ACCEPT`"), "{}", docker.remedy);
        assert!(docker.remedy.contains("DOCKER-USER"));
        let six = issue(&drops("ip6", "filter", "FORWARD")).unwrap();
        assert!(six.remedy.contains("`ip6tables -I FORWARD -o husk+ -j ACCEPT`"), "{}", six.remedy);
        let other = issue(&drops("inet", "firewall", "forward")).unwrap();
        let command = "`nft insert rule inet firewall forward oifname '\"husk*\"' accept`";
        assert!(other.remedy.contains(command), "{}", other.remedy);
        assert!(other.subject.contains("forward") && other.subject.contains("inet firewall"));
    }
}
