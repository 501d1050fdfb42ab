//! What the manual says of `huskd` besides its options.

use super::{Paragraph, Section};

/// Meaning of the exit status.
const STATUSES: &[(&str, &str)] = &[
    ("0", "Done; of run: it was told to stop."),
    ("1", "It cannot be done; standard error says why, and what would help. Of health: not alive, or not ready."),
    ("2", "Wrong usage."),
];

const ENVIRONMENT: &[(&str, &str)] = &[
    ("HUSK_NODE_NAME", "Name of this node, as --node-name."),
    ("HUSK_RUN_DIRECTORY", "Of health: directory of the daemon's socket, as --run-directory."),
    ("HUSK_PROC_SYS", "Where kernel parameters are set, as --proc-sys."),
    ("HUSK_TUNNELS", "Socket of huskd tunnels, as --tunnels."),
    ("NO_COLOR", "If it is set, no colours in the log (https://no-color.org)."),
];

const FILES: &[(&str, &str)] = &[
    ("/etc/husk/config.yaml", "Configuration. huskd example-config prints one with all defaults and what they mean."),
    (
        "/etc/husk/cluster",
        "Where nodes find each other, in a cluster without Kubernetes; see source in the configuration.",
    ),
    ("/run/husk", "The daemon's socket, node.json for the CNI plugin, leases of addresses, private keys (mode 0600)."),
    ("/var/lib/husk", "What survives a reboot: the last snapshot of the cluster, the last good configuration."),
    ("/etc/cni/net.d/05-husk.conflist", "CNI configuration, which the daemon writes when pods can be added."),
];

/// What is done for, and the command; by the words of the command.
const EXAMPLES: &[(&str, &str, &str)] = &[
    ("run", "In the foreground, with another configuration:", "huskd run --config ./config.yaml"),
    ("check-config", "Everything that is wrong with it, at once:", "huskd check-config --config ./config.yaml"),
    ("example-config", "A configuration to begin with:", "huskd example-config > /etc/husk/config.yaml"),
    ("health", "Can pods be added?", "huskd health --ready"),
    ("crds", "Definitions of Husk's objects in Kubernetes:", "huskd crds | kubectl apply -f -"),
    ("cleanup", "Leave the host as it was:", "systemctl stop huskd && huskd cleanup"),
    ("completion", "In this shell:", "source <(huskd completion bash)"),
    ("man", "For all of this host:", "huskd man /usr/local/share/man/man8"),
];

/// The sections of a page.
#[must_use]
pub fn besides(words: &str) -> Vec<Section> {
    let terms = |terms: &[(&str, &str)]| {
        terms.iter().map(|(term, meaning)| Paragraph::Term((*term).into(), (*meaning).into())).collect()
    };
    let mut sections = vec![Section { heading: "EXIT STATUS", content: terms(STATUSES) }];
    if words.is_empty() {
        sections.push(Section { heading: "ENVIRONMENT", content: terms(ENVIRONMENT) });
        sections.push(Section { heading: "FILES", content: terms(FILES) });
    }
    let examples = EXAMPLES.iter().filter(|(command, ..)| words.is_empty() || *command == words);
    let examples: Vec<Paragraph> = examples
        .flat_map(|(_, what, line)| [Paragraph::Text((*what).into()), Paragraph::Literal((*line).into())])
        .collect();
    if !examples.is_empty() {
        sections.push(Section { heading: "EXAMPLES", content: examples });
    }
    sections
}
