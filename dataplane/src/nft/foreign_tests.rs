use std::process::Command;

use super::*;
use crate::netns::Netns;

fn nft(add: &str) {
    let output = Command::new("nft").arg(format!("add {add}")).output().expect("nft is installed");
    assert!(output.status.success(), "nft add {add}: {}", String::from_utf8_lossy(&output.stderr));
}

fn base_chain(table: &str, chain: &str, hook: &str, policy: &str) {
    nft(&format!("table {table}"));
    nft(&format!("chain {table} {chain} {{ type filter hook {hook} priority 0 ; policy {policy} ; }}"));
}

fn drops_of(family: &str, table: &str, chain: &str) -> ForeignChain {
    let [family, table, chain] = [family, table, chain].map(str::to_owned);
    ForeignChain::Drops { family, table, chain }
}

#[test]
fn only_forward_chains_of_others_that_drop_by_policy_are_found() {
    let found = Netns::new_unnamed().unwrap().run_in(|| {
        assert_eq!(foreign_forward_drops().unwrap(), []);
        base_chain("ip filter", "FORWARD", "forward", "drop");
        base_chain("ip filter", "INPUT", "input", "drop");
        base_chain("ip6 filter", "FORWARD", "forward", "accept");
        base_chain("inet firewalld", "filter_FORWARD", "forward", "drop");
        base_chain("inet husk", "forward", "forward", "drop");
        base_chain("bridge filter", "FORWARD", "forward", "drop");
        nft("chain ip filter DOCKER");
        foreign_forward_drops().unwrap()
    });
    assert_eq!(found.unwrap(), [drops_of("inet", "firewalld", "filter_FORWARD"), drops_of("ip", "filter", "FORWARD")]);
}

#[test]
fn tables_of_iptables_legacy_are_named() {
    let directory = std::env::temp_dir().join(format!("husk-legacy-{}", std::process::id()));
    fs::create_dir(&directory).unwrap();
    assert_eq!(legacy(&directory).unwrap(), [], "no such module");
    fs::write(directory.join("ip_tables_names"), "nat\nfilter\n").unwrap();
    fs::write(directory.join("ip6_tables_names"), "raw\nnat\n").unwrap();
    let found = legacy(&directory);
    fs::remove_dir_all(&directory).unwrap();
    let tables = BTreeSet::from(["filter".to_owned()]);
    let found = found.unwrap();
    assert_eq!(found, [ForeignChain::Legacy { family: Family::Ipv4, tables }], "raw and nat tables forward nothing");
    assert_eq!(found[0].to_string(), "iptables-legacy has IPv4 tables that cannot be seen into: filter");
}
