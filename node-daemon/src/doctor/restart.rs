//! How a daemon is started anew, which depends on who keeps it running.

use husk_overlay::config::{Config, SourceConfig};
use husk_overlay::name::NodeName;

use super::{Action, Evidence, Fix};

/// Namespace and labels of the daemon's pods (manifests/base).
const PODS: [&str; 4] = ["-n", "husk-system", "-l", "app.kubernetes.io/name=husk,app.kubernetes.io/component=daemon"];

/// A daemon that logs on to Kubernetes as pods do is one, and the DaemonSet makes another when it is deleted. Any other is the unit of
/// manifests/systemd.
fn is_pod(config: &Config) -> bool {
    matches!(config.source, SourceConfig::Kubernetes { kubeconfig: None })
}

fn pod_of(verb: &str, node: &str) -> Action {
    let node = format!("spec.nodeName={node}");
    let words = [verb, "pod"].into_iter().chain(PODS).chain(["--field-selector", &node]);
    Action::run_on_host("kubectl", words)
}

/// Starts the daemon of a node anew; pods and their traffic go on meanwhile.
pub(super) fn of_node(config: &Config, node: &str) -> Action {
    if is_pod(config) { pod_of("delete", node) } else { Action::run_on_host("systemctl", ["restart", "huskd"]) }
}

/// Shows whether the daemon of another node runs.
pub(super) fn state_of_node(config: &Config, node: &NodeName) -> Action {
    if is_pod(config) { pod_of("get", node.as_str()) } else { Action::run_on_host("systemctl", ["status", "huskd"]) }
}

/// Starts this node's daemon anew.
pub(super) fn own(evidence: &Evidence, config: &Config) -> Action {
    let asked = || Some(evidence.status().ok()?.node.to_string());
    let configured = config.node_name.as_ref().map(ToString::to_string);
    let host = || nix::unistd::gethostname().ok().map(|name| name.to_string_lossy().to_lowercase());
    of_node(config, &configured.or_else(asked).or_else(host).unwrap_or_else(|| "THIS-NODE".into()))
}

/// The same as a fix: a program can start a unit, and a person with rights in the cluster deletes pods.
pub(super) fn fix(evidence: &Evidence, config: &Config, words: &str) -> Fix {
    let action = own(evidence, config);
    if is_pod(config) {
        Fix::by_hand(words, [action], "it takes kubectl, and rights in the cluster that a node does not have")
    } else {
        Fix::safe(words, [action])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Places;

    fn config(source: SourceConfig) -> Config {
        let node_name = Some("node-a".parse().unwrap());
        Config { source, node_name, ..Config::new(vec!["10.42.0.0/16".parse().unwrap()]) }
    }

    #[test]
    fn a_daemon_that_is_a_pod_is_deleted_by_a_person_and_a_unit_is_restarted() {
        let evidence = Evidence::new(Places::of_tests());
        let pod = config(SourceConfig::Kubernetes { kubeconfig: None });
        let told = fix(&evidence, &pod, "restart it");
        let labels = "app.kubernetes.io/name=husk,app.kubernetes.io/component=daemon";
        let delete = format!("kubectl delete pod -n husk-system -l {labels} --field-selector spec.nodeName=node-a");
        assert_eq!((told.is_safe(), told.commands), (false, vec![delete]));
        let get = format!("kubectl get pod -n husk-system -l {labels} --field-selector spec.nodeName=node-b");
        assert_eq!(state_of_node(&pod, &"node-b".parse().unwrap()).to_string(), get);
        for source in [
            SourceConfig::Kubernetes { kubeconfig: Some("/etc/husk/kubeconfig".into()) },
            SourceConfig::Directory { path: "/srv/husk".into() },
        ] {
            let told = fix(&evidence, &config(source), "restart it");
            assert_eq!((told.is_safe(), told.commands), (true, vec!["systemctl restart huskd".to_owned()]));
        }
    }

    #[test]
    fn the_labels_are_those_of_the_manifests() {
        let [_, namespace, _, labels] = PODS;
        let (name, component) = labels.split_once(',').unwrap();
        let text = include_str!("../../../manifests/base/daemonset.yaml");
        assert!(text.contains(&format!("namespace: {namespace}\n")));
        for label in [name, component] {
            let line = format!("{}\n", label.replace('=', ": "));
            assert!(text.contains(&line), "{line}");
        }
    }
}
