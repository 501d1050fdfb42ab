//! What lets our packets pass a firewall, in the words of the program that keeps it: a rule put in behind its back is gone with its
//! next reload.

use super::Kind;
use super::ruleset::{Place, Ruleset};
use crate::report::{Action, Fix};
use husk_overlay::marks::{INTERFACE_PREFIX, PROBE_PORT};

/// Who keeps a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Keeper {
    Firewalld,
    Ufw,
    /// iptables, with the chain that Docker leaves to others.
    Docker,
    Iptables,
    /// Somebody who speaks nftables.
    Nftables,
}

/// Tables and chains whose names iptables chooses.
const IPTABLES_TABLES: [&str; 4] = ["filter", "mangle", "raw", "security"];

fn keeper(place: &Place, ruleset: &Ruleset) -> Keeper {
    let beside = |name: &str| {
        ruleset.chains().any(|(family, table, chain)| {
            (family, table) == (place.family.as_str(), place.table.as_str()) && chain.starts_with(name)
        })
    };
    if place.table == "firewalld" {
        return Keeper::Firewalld;
    }
    if place.family == "inet" || !IPTABLES_TABLES.contains(&place.table.as_str()) {
        return Keeper::Nftables;
    }
    if beside("ufw-") || beside("ufw6-") {
        return Keeper::Ufw;
    }
    // iptables calls its base chains in capitals, people rarely do.
    match place.chain.bytes().any(|byte| byte.is_ascii_lowercase()) && !beside("FORWARD") && !beside("INPUT") {
        true => Keeper::Nftables,
        false if place.hook == "forward" && beside("DOCKER-USER") => Keeper::Docker,
        false => Keeper::Iptables,
    }
}

pub(crate) fn remedy(place: &Place, kinds: &[Kind], ruleset: &Ruleset, cidrs: &[String]) -> Fix {
    let keeper = keeper(place, ruleset);
    let because = "it opens a firewall that is somebody else's";
    let (words, actions): (String, Vec<Action>) = match keeper {
        Keeper::Firewalld => {
            let zone = zone(place, ruleset);
            let mut actions: Vec<Action> = kinds.iter().flat_map(|kind| firewalld(*kind, cidrs, zone)).collect();
            actions.push(Action::run_on_host("firewall-cmd", ["--reload"]));
            let tunnels = kinds.iter().any(|kind| matches!(kind, Kind::Udp(_) | Kind::Esp));
            let words = match zone {
                None if tunnels => {
                    "let firewalld accept them; without --zone that is the default zone: name the one of the underlay's \
                     interface if that is in another (firewall-cmd --get-active-zones)"
                }
                _ => "let firewalld accept them",
            };
            (words.into(), unique(actions))
        }
        Keeper::Ufw => {
            ("let ufw accept them".into(), unique(kinds.iter().flat_map(|kind| ufw(*kind, cidrs)).collect()))
        }
        Keeper::Docker | Keeper::Iptables => {
            let program = if place.family == "ip6" { "ip6tables" } else { "iptables" };
            let chain = if keeper == Keeper::Docker { "DOCKER-USER" } else { &place.chain };
            let table = place.table.as_str();
            let rule = |matches: &str| {
                let head = format!("-t {table} -I {chain} {matches} -j ACCEPT");
                Action::run(program, head.split(' '))
            };
            let actions = kinds.iter().flat_map(|kind| iptables(*kind, &place.hook)).map(|it| rule(&it)).collect();
            (format!("accept them in {chain}, and where that firewall is kept, so that it stays"), actions)
        }
        Keeper::Nftables => {
            let Place { family, table, chain, hook, .. } = place;
            let rule = |matches: String| {
                let head = format!("insert rule {family} {table} {chain} {matches} accept");
                Action::run("nft", head.split(' '))
            };
            let actions = kinds.iter().flat_map(|kind| nftables(*kind, hook)).map(rule).collect();
            (format!("accept them in {chain}, and in the file that table is made from, so that it stays"), actions)
        }
    };
    Fix::by_hand(words, actions, because)
}

fn unique(actions: Vec<Action>) -> Vec<Action> {
    let mut kept: Vec<Action> = Vec::new();
    for action in actions {
        if !kept.contains(&action) {
            kept.push(action);
        }
    }
    kept
}

/// True for hooks that a packet passes after it was routed.
fn leaves(hook: &str) -> bool {
    matches!(hook, "output" | "postrouting")
}

fn nftables(kind: Kind, hook: &str) -> Vec<String> {
    let interface = |key: &str, pattern: &str| format!("{key} \"{pattern}\"");
    let (pods, tunnels) = (format!("{INTERFACE_PREFIX}*"), format!("{INTERFACE_PREFIX}-*"));
    match kind {
        Kind::Udp(port) => vec![format!("udp dport {port}")],
        Kind::Esp => vec!["meta l4proto esp".into()],
        Kind::Pods if hook == "prerouting" => vec![interface("iifname", &pods)],
        Kind::Pods if hook == "postrouting" => vec![interface("oifname", &pods)],
        Kind::Pods => vec![interface("iifname", &pods), interface("oifname", &pods)],
        Kind::HostToPod => vec![interface("oifname", &pods)],
        Kind::PodToHost => vec![interface("iifname", &pods)],
        Kind::Probe => {
            let tunnel = interface(if leaves(hook) { "oifname" } else { "iifname" }, &tunnels);
            // UDP are probes, TCP are the transfers that test offload.
            vec![format!("{tunnel} meta l4proto {{ tcp, udp }} th dport {PROBE_PORT}")]
        }
    }
}

fn iptables(kind: Kind, hook: &str) -> Vec<String> {
    let side = if leaves(hook) { "-o" } else { "-i" };
    match kind {
        Kind::Udp(port) => vec![format!("-p udp --dport {port}")],
        Kind::Esp => vec!["-p esp".into()],
        Kind::Pods if hook == "prerouting" => vec![format!("-i {INTERFACE_PREFIX}+")],
        Kind::Pods if hook == "postrouting" => vec![format!("-o {INTERFACE_PREFIX}+")],
        Kind::Pods => vec![format!("-i {INTERFACE_PREFIX}+"), format!("-o {INTERFACE_PREFIX}+")],
        Kind::HostToPod => vec![format!("-o {INTERFACE_PREFIX}+")],
        Kind::PodToHost => vec![format!("-i {INTERFACE_PREFIX}+")],
        Kind::Probe => ["udp", "tcp"]
            .map(|protocol| format!("{side} {INTERFACE_PREFIX}-+ -p {protocol} --dport {PROBE_PORT}"))
            .into(),
    }
}

/// The zone whose chain it is: `filter_IN_ZONE` and parts of it, which have a suffix (firewalld's src/firewall/core/nftables.py).
/// Policies have chains of the same form.
fn zone<'a>(place: &'a Place, ruleset: &Ruleset) -> Option<&'a str> {
    let name = place.chain.strip_prefix("filter_IN_").filter(|name| !name.starts_with("policy_"))?;
    let whole = ["_pre", "_log", "_deny", "_allow", "_post"].iter().find_map(|part| name.strip_suffix(part));
    // A zone's name may end alike.
    let is_chain = |zone: &str| ruleset.chains().any(|(_, _, chain)| chain.strip_prefix("filter_IN_") == Some(zone));
    Some(whole.filter(|zone| is_chain(zone)).unwrap_or(name))
}

fn firewalld(kind: Kind, cidrs: &[String], zone: Option<&str>) -> Vec<Action> {
    let zone = zone.map(|zone| format!("--zone={zone}"));
    let permanent = |what: String| {
        let words = ["--permanent".to_owned()].into_iter().chain(zone.clone()).chain([what]);
        vec![Action::run_on_host("firewall-cmd", words)]
    };
    match kind {
        Kind::Udp(port) => permanent(format!("--add-port={port}/udp")),
        Kind::Esp => permanent("--add-protocol=esp".into()),
        Kind::Pods | Kind::HostToPod | Kind::PodToHost | Kind::Probe => cidrs
            .iter()
            .map(|cidr| {
                Action::run_on_host("firewall-cmd", ["--permanent", "--zone=trusted", &format!("--add-source={cidr}")])
            })
            .collect(),
    }
}

fn ufw(kind: Kind, cidrs: &[String]) -> Vec<Action> {
    let run = |words: String| Action::run_on_host("ufw", words.split(' '));
    match kind {
        Kind::Udp(port) => vec![run(format!("allow {port}/udp"))],
        Kind::Esp => vec![run("allow proto esp from any".into())],
        Kind::Pods => {
            let rules =
                cidrs.iter().flat_map(|cidr| [format!("route allow from {cidr}"), format!("route allow to {cidr}")]);
            rules.map(run).collect()
        }
        Kind::HostToPod => cidrs.iter().map(|cidr| run(format!("allow out to {cidr}"))).collect(),
        Kind::PodToHost | Kind::Probe => cidrs.iter().map(|cidr| run(format!("allow from {cidr}"))).collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use serde_json::json;

    use super::*;

    /// The words that a shell makes of a command.
    fn words(command: &str) -> Vec<String> {
        let script = format!("set -- {command}\nfor word; do printf '%s\\n' \"$word\"; done");
        let ran = Command::new("sh").args(["-c", &script]).output().unwrap();
        assert!(ran.status.success() && ran.stderr.is_empty(), "{command}: {ran:?}");
        String::from_utf8(ran.stdout).unwrap().lines().map(str::to_owned).collect()
    }

    #[test]
    fn every_remedy_reaches_its_program_as_it_is_meant_when_somebody_pastes_it() {
        let all = [Kind::Udp(4789), Kind::Esp, Kind::Pods, Kind::HostToPod, Kind::PodToHost, Kind::Probe];
        let cidrs = ["10.42.0.0/16".to_owned(), "fd42::/48".to_owned()];
        let keepers = [
            ("inet", "firewalld", "filter_INPUT", "filter_INPUT"),
            ("ip", "filter", "INPUT", "ufw-user-input"),
            ("ip", "filter", "FORWARD", "DOCKER-USER"),
            ("ip6", "filter", "INPUT", "FORWARD"),
            ("inet", "company", "arriving", "arriving"),
        ];
        for (family, table, chain, beside) in keepers {
            let listing = json!({"nftables": [
                {"chain": {"family": family, "table": table, "name": chain}},
                {"chain": {"family": family, "table": table, "name": beside}},
            ]});
            let ruleset = Ruleset::parse(&listing);
            for hook in ["prerouting", "input", "forward", "output", "postrouting"] {
                let [family, table, chain, hook] = [family, table, chain, hook].map(str::to_owned);
                let place = Place { family, table, chain, hook, rule: None, perhaps: false };
                let fix = remedy(&place, &all, &ruleset, &cidrs);
                assert_eq!(fix.commands.len(), fix.actions.len());
                for (action, command) in fix.actions.iter().zip(&fix.commands) {
                    let (Action::Run { program, arguments } | Action::RunOnHost { program, arguments }) = action else {
                        panic!("{action:?}")
                    };
                    let meant: Vec<&String> = std::iter::once(program).chain(arguments).collect();
                    assert_eq!(words(command).iter().collect::<Vec<_>>(), meant, "{command}");
                }
            }
        }
    }
}
