//! Leases and the interfaces that belong to them: each lease is a pod's, whose host interface and network namespace exist, and both ends
//! of which are as they were wired.
//!
//! The files and the kernel are looked at directly, so that this works without the daemon too, which alone knows the MTU that pods should
//! have: without it, it is not looked at how they are wired. A pod that comes or goes just now has
//! one without the other for a moment: only what is found twice is told.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::thread;
use std::time::Duration;

use husk_ipam::lease::{self, LeaseStore, NetnsEvidence};
use husk_overlay::endpoint::Endpoint;
use husk_overlay::ipc::Request;
use husk_overlay::name::InterfaceName;

use super::issues::{self, Teller};
use super::words::MOST_FINDINGS;
use super::{Action, Check, Evidence, Finding, Fix, Looked, Outcome, Places, Unknown};
use crate::host::deviations;
use crate::leases::{pod_interfaces, store};
use crate::report::Status;

/// The check.
pub(super) const CHECK: Check = Check {
    id: "leases",
    title: "every lease is of a pod that exists and is wired as it was, and every pod interface has a lease",
    look,
};

/// Pause before what was found is looked at again.
const AGAIN: Duration = Duration::from_millis(700);

/// What is wrong with a lease or an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Wrong {
    /// The pod's interface is gone, the pod is not: it has no network.
    Cut { pod: Pod, interface: InterfaceName },
    /// Somebody has changed what was wired, on the host or in the pod.
    Changed { pod: Pod, deviations: Vec<String> },
    /// The pod is provably gone.
    Stale { pod: Pod, interface: InterfaceName, file: String, address: IpAddr },
    /// An interface of a pod without a lease.
    Orphan { interface: InterfaceName },
}

/// A pod as people name it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Pod {
    name: String,
    /// Kubernetes namespace and name.
    object: Option<(String, String)>,
    addresses: String,
}

fn look(evidence: &Evidence) -> Looked {
    let store = store(&evidence.places.run_directory);
    let mtu = || evidence.ask::<Status>(&Request::Status).ok().and_then(|status| status.pod_mtu);
    let (mut found, leases) = survey(&store, mtu())?;
    if !found.is_empty() {
        thread::sleep(AGAIN);
        let again = survey(&store, mtu())?.0;
        found.retain(|wrong| again.contains(wrong));
    }
    // The daemon tells of files that cannot be read, too, and of addresses it would not route.
    let mut findings = issues::findings(evidence, Teller::Leases).unwrap_or_default();
    let more = found.len().saturating_sub(MOST_FINDINGS);
    findings.extend(found.iter().take(MOST_FINDINGS).map(|wrong| finding(wrong, more, &evidence.places)));
    let seen = match leases {
        1 => "1 lease, with its interface".to_owned(),
        many => format!("{many} leases, each with its interface"),
    };
    Ok(Outcome::of(findings, seen))
}

/// What is wrong now where pods should have this MTU in bytes, and how many leases there are.
fn survey(store: &LeaseStore, mtu: Option<u32>) -> Result<(Vec<Wrong>, usize), Unknown> {
    let problem = |error: husk_ipam::Error| Unknown(error.to_string());
    // In this order: a lease is made before its interface, so that an interface that was seen here has its lease below.
    let interfaces = pod_interfaces()?;
    let leases = store.load().map_err(problem)?;
    let mut wrong = Vec::new();
    for endpoint in leases.endpoints.values().filter(|it| !interfaces.contains(&it.host_interface)) {
        let netns = NetnsEvidence::observe(&endpoint.netns);
        let being_wired = store.is_being_wired(&endpoint.id).map_err(problem)?;
        let is_stale = lease::stale(&lease::Evidence { netns, host_interface_exists: false, being_wired });
        let (pod, interface) = (pod_of(endpoint), endpoint.host_interface.clone());
        let file = endpoint.addresses.iter().find_map(|address| Some((leases.leased.get(&address)?, address)));
        match file {
            _ if being_wired => {}
            Some((file, address)) if is_stale => {
                wrong.push(Wrong::Stale { pod, interface, file: file.display().to_string(), address });
            }
            _ => wrong.push(Wrong::Cut { pod, interface }),
        }
    }
    for endpoint in leases.endpoints.values().filter(|it| interfaces.contains(&it.host_interface)) {
        // A namespace that cannot be entered from here is left to the daemon, which `huskctl trace` asks.
        let deviations = deviations(endpoint, mtu).ok().unwrap_or_default();
        if !deviations.is_empty() && !store.is_being_wired(&endpoint.id).map_err(problem)? {
            wrong.push(Wrong::Changed { pod: pod_of(endpoint), deviations });
        }
    }
    let leased: BTreeSet<&InterfaceName> = leases.endpoints.values().map(|it| &it.host_interface).collect();
    let orphans = interfaces.iter().filter(|interface| !leased.contains(interface));
    wrong.extend(orphans.map(|interface| Wrong::Orphan { interface: interface.clone() }));
    Ok((wrong, leases.endpoints.len()))
}

fn pod_of(endpoint: &Endpoint) -> Pod {
    let addresses: Vec<String> = endpoint.addresses.iter().map(|it| it.to_string()).collect();
    Pod {
        name: endpoint.display_name(),
        object: endpoint.pod_namespace.clone().zip(endpoint.pod_name.clone()),
        addresses: addresses.join(", "),
    }
}

fn finding(wrong: &Wrong, more: usize, places: &Places) -> Finding {
    let told = |line: String| {
        let more = (more > 0).then(|| format!("{more} more of these are told by huskctl ipam check"));
        [line].into_iter().chain(more).collect()
    };
    match wrong {
        Wrong::Cut { pod, interface } => {
            let cause = format!(
                "the pod {} has no network any more: its host interface is gone, though the pod is not",
                pod.name
            );
            Finding::error(
                cause,
                told(format!("lease of {}, interface {interface} does not exist", pod.addresses)),
                replaced(pod, "delete the pod, its replacement gets a network of its own"),
            )
        }
        Wrong::Changed { pod, deviations } => Finding::error(
            format!(
                "the network of the pod {} is not as it was wired: {}",
                pod.name,
                deviations.first().map_or("", String::as_str)
            ),
            told(format!("lease of {}; deviations: {}", pod.addresses, deviations.join("; "))),
            replaced(
                pod,
                "delete the pod, its replacement is wired anew; who changes it, `ip monitor` in its network namespace shows",
            ),
        ),
        Wrong::Stale { pod, interface, file, address } => Finding::warning(
            format!(
                "the lease of {} outlived its pod: {} stay taken until the daemon runs, or the runtime's next GC",
                pod.name, pod.addresses
            ),
            told(format!("{file}: neither the pod's network namespace nor {interface} exists")),
            Fix::safe("release it; if its pod is there after all, this refuses", [places.release_lease(*address)]),
        ),
        Wrong::Orphan { interface } => Finding::warning(
            format!(
                "the pod interface {interface} has no lease: its pod, if there is one, has an address that another may get"
            ),
            told(format!("ip link: {interface}")),
            Fix::by_hand(
                "remove it, or have the runtime do it (CNI GC); a pod that still uses it has to be made anew",
                [Action::run("ip", ["link", "del", interface.as_str()])],
                "a pod may still use it",
            ),
        ),
    }
}

/// A pod that has to be made anew.
fn replaced(pod: &Pod, words: &str) -> Fix {
    let delete = pod.object.as_ref().map(|(namespace, name)| {
        Action::run_on_host("kubectl", ["delete", "pod", "-n", namespace.as_str(), name.as_str()])
    });
    Fix::by_hand(words, delete, "the pod ends")
}
