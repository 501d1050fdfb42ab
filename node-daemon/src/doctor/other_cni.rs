//! What another network for pods has left behind, or is still doing: two of them in one node take each other's packets.

use std::collections::BTreeMap;

use husk_dataplane::netlink::{Protocol, Socket};
use husk_dataplane::underlay;

use super::drop_ins::glob;
use super::{Action, Check, Evidence, Finding, Fix, Looked, Outcome, Unknown};

/// Interfaces, chains and files of other networks.
pub(super) const CHECK: Check = Check { id: "other-cni", title: "no other pod network has left anything behind", look };

/// What a network for pods is known by.
struct Network {
    name: &'static str,
    /// Patterns of interfaces that it makes.
    interfaces: &'static [&'static str],
    /// Patterns of chains and tables that it makes.
    chains: &'static [&'static str],
    /// Files and directories that it makes.
    files: &'static [&'static str],
}

/// From the sources and the uninstall instructions of each. `tunl0` and `docker0` are none: the kernel makes the one by itself, and
/// Docker is no network for pods.
const NETWORKS: [Network; 9] = [
    Network {
        name: "Flannel",
        interfaces: &["flannel.*", "flannel-v6.*", "flannel-wg*"],
        chains: &["FLANNEL-*", "flannel-*"],
        files: &["/run/flannel/subnet.env", "/etc/cni/net.d/10-flannel.conflist"],
    },
    Network {
        name: "the CNI bridge plugin (also Flannel's)",
        interfaces: &["cni0", "cni-podman0"],
        chains: &["CNI-FORWARD", "CNI-ADMIN"],
        files: &[],
    },
    Network {
        name: "Calico",
        interfaces: &["cali*", "vxlan.calico", "vxlan-v6.calico", "wireguard.cali", "wg-v6.cali"],
        chains: &["cali-*"],
        files: &["/etc/cni/net.d/10-calico.conflist", "/etc/cni/net.d/calico-kubeconfig", "/var/lib/calico/nodename"],
    },
    Network {
        name: "Cilium",
        interfaces: &["cilium_host", "cilium_net", "cilium_vxlan", "cilium_geneve", "cilium_wg0", "lxc_health"],
        chains: &["CILIUM_*", "OLD_CILIUM_*"],
        files: &["/etc/cni/net.d/05-cilium.conflist", "/etc/cni/net.d/05-cilium.conf", "/run/cilium/cilium.pid"],
    },
    Network {
        name: "Weave Net",
        interfaces: &["weave", "vethwe-*", "vxlan-6784"],
        chains: &["WEAVE", "WEAVE-*"],
        files: &["/etc/cni/net.d/10-weave.conflist"],
    },
    Network {
        name: "kube-router",
        interfaces: &["kube-bridge", "kube-dummy-if"],
        chains: &["KUBE-ROUTER-*", "KUBE-POD-FW-*", "KUBE-NWPLCY-*"],
        files: &["/etc/cni/net.d/10-kuberouter.conf", "/etc/cni/net.d/10-kuberouter.conflist"],
    },
    Network {
        name: "Antrea",
        interfaces: &["antrea-gw0", "antrea-tun0", "antrea-wg0"],
        chains: &["ANTREA-*"],
        files: &["/etc/cni/net.d/10-antrea.conflist", "/run/antrea/wait-status"],
    },
    Network {
        name: "OVN-Kubernetes",
        interfaces: &["ovn-k8s-mp*", "br-int", "ovs-system"],
        chains: &["OVN-KUBE-*", "ovn-kubernetes"],
        files: &["/etc/cni/net.d/10-ovn-kubernetes.conf"],
    },
    Network {
        name: "kindnet",
        interfaces: &[],
        chains: &["KIND-MASQ-AGENT", "kindnet-*"],
        files: &["/etc/cni/net.d/10-kindnet.conflist"],
    },
];

/// Things of one network that are named.
const MOST_LINES: usize = 12;

fn look(evidence: &Evidence) -> Looked {
    let interfaces = underlay::interfaces(&mut Socket::open(Protocol::Route)?)?;
    // nft may be missing, or take too long: what else there is shows without it.
    let ruleset = evidence.ruleset();
    let unseen = ruleset.as_ref().err().map(|why| format!("chains were not looked at: {why}"));
    let config_directory = evidence.config()?.cni.config_directory.clone();
    let mut findings = Vec::new();
    for network in &NETWORKS {
        let is_one = |name: &str| network.interfaces.iter().any(|pattern| glob(pattern, name));
        let links: Vec<&str> = interfaces.iter().map(|it| it.name.as_str()).filter(|name| is_one(name)).collect();
        let mut chains: BTreeMap<(&str, &str), Vec<&str>> = BTreeMap::new();
        for (family, table, chain) in ruleset.iter().flat_map(|ruleset| ruleset.chains()) {
            if network.chains.iter().any(|pattern| glob(pattern, chain) || glob(pattern, table)) {
                chains.entry((family, table)).or_default().push(chain);
            }
        }
        let files = network.files.iter().copied().filter(|path| {
            // The directory that the runtime reads is also the daemon's, so that its container sees it.
            let configured = path.strip_prefix("/etc/cni/net.d/").map(|name| config_directory.join(name));
            match configured {
                Some(path) => evidence.host.shared(&path).exists(),
                None => evidence.host.exists(path).unwrap_or(false),
            }
        });
        let files: Vec<&str> = files.collect();
        if let Some(finding) = finding(network, &links, &chains, &files) {
            findings.push(finding);
        }
    }
    judge(findings, unseen)
}

fn judge(mut findings: Vec<Finding>, unseen: Option<String>) -> Looked {
    let seen = format!("nothing of {} others that were looked for", NETWORKS.len());
    match unseen {
        Some(why) if findings.is_empty() => Err(Unknown(format!("{seen} among interfaces and files; {why}"))),
        why => {
            findings.iter_mut().for_each(|finding| finding.evidence.extend(why.clone()));
            Ok(Outcome::of(findings, seen))
        }
    }
}

fn finding(
    network: &Network,
    links: &[&str],
    chains: &BTreeMap<(&str, &str), Vec<&str>>,
    files: &[&str],
) -> Option<Finding> {
    if links.is_empty() && chains.is_empty() && files.is_empty() {
        return None;
    }
    let few = |names: &[&str]| {
        let more =
            if names.len() > MOST_LINES { format!(" and {} more", names.len() - MOST_LINES) } else { String::new() };
        format!("{}{more}", names.iter().take(MOST_LINES).copied().collect::<Vec<_>>().join(", "))
    };
    let mut told = Vec::new();
    if !links.is_empty() {
        told.push(format!("interfaces: {}", few(links)));
    }
    for ((family, table), names) in chains {
        told.push(format!("chains in nftables table {family} {table}: {}", few(names)));
    }
    if !files.is_empty() {
        told.push(format!("files: {}", few(files)));
    }
    let mut actions: Vec<Action> = links.iter().map(|name| Action::run("ip", ["link", "delete", name])).collect();
    actions.extend(files.iter().map(|path| Action::run_on_host("rm", [*path])));
    let words = if chains.is_empty() {
        "if no pod uses it any more, remove them"
    } else {
        "if no pod uses it any more, remove them; its chains go with the next reboot"
    };
    let cause = format!(
        "{} is here, or has left things behind: its routes, rules and interfaces may take packets of Husk's pods",
        network.name
    );
    let because = "pods that use it would lose their network";
    Some(Finding::warning(cause, told, Fix::by_hand(words, actions, because)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_named_with_the_commands_that_remove_it() {
        let flannel = &NETWORKS[0];
        let chains = [(("ip", "filter"), vec!["FLANNEL-FWD"])].into();
        let found = finding(flannel, &["flannel.1"], &chains, &["/run/flannel/subnet.env"]).unwrap();
        assert!(found.cause.contains("Flannel") && found.evidence.len() == 3, "{found:?}");
        assert_eq!(found.fix.commands, ["ip link delete flannel.1", "rm /run/flannel/subnet.env"]);
        assert!(!found.fix.is_safe());
        assert_eq!(finding(flannel, &[], &BTreeMap::new(), &[]), None);
    }

    #[test]
    fn without_nft_interfaces_and_files_are_told_and_chains_are_not_forgotten() {
        let unseen = || Some("chains were not looked at: nft is missing".to_owned());
        let found = finding(&NETWORKS[0], &["flannel.1"], &BTreeMap::new(), &[]).unwrap();
        let Ok(Outcome::Found { findings }) = judge(vec![found.clone()], unseen()) else { panic!("it was found") };
        assert_eq!(findings[0].evidence, ["interfaces: flannel.1", "chains were not looked at: nft is missing"]);
        // What was not looked at is not well.
        assert!(
            judge(vec![], unseen()).unwrap_err().to_string().ends_with("chains were not looked at: nft is missing")
        );
        assert_eq!(judge(vec![found.clone()], None), Ok(Outcome::Found { findings: vec![found] }));
    }
}
