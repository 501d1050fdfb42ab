//! What a pass does for pods that live, and for the leases of those that are gone.

use std::collections::BTreeMap;
use std::time::Duration;

use husk_dataplane::kernel::Kernel;
use husk_ipam::lease::BootTime;
use husk_overlay::endpoint::Endpoint;
use husk_overlay::issue::{Issue, IssueKind, Severity};
use husk_overlay::name::InterfaceName;
use husk_overlay::plan::Plan;

use super::{Engine, Node, failures};
use crate::source::ClusterSource;

/// A pod whose MTU is not the planned one.
pub(super) struct Mistuned {
    endpoint: Endpoint,
    /// MTU in bytes of its host interface.
    actual: u32,
    /// MTU in bytes as planned.
    planned: u32,
}

impl Mistuned {
    fn shrinks(&self) -> bool {
        self.planned < self.actual
    }
}

/// Least time between two times that all pods are made to forget what they know of paths: nodes of a large cluster may get a
/// larger MTU one after the other.
const FORGET_INTERVAL: Duration = Duration::from_secs(2);

/// What pods know of paths is older than the routes.
#[derive(Debug, Default)]
pub(super) struct Outgrown {
    due: bool,
    /// When they were made to forget last, as time since boot.
    last: Option<Duration>,
}

/// A route to some peer takes more than it did.
fn grows(before: &Plan, after: &Plan) -> bool {
    let mtu_before = |name| before.peers.get(name).and_then(|peer| peer.mtu);
    after.peers.iter().any(|(name, peer)| mtu_before(name).zip(peer.mtu).is_some_and(|(before, after)| before < after))
}

impl<K: Kernel, S: ClusterSource, N: Node> Engine<K, S, N> {
    /// Pods to be given another MTU: those that get a smaller one, which comes before the tunnel gets it, so that no pod
    /// sends what the tunnel does not take; and those that get a larger one, which comes after.
    pub(super) fn mistuned_pods(&mut self, plan: &Plan) -> (Vec<Mistuned>, Vec<Mistuned>) {
        let Some(planned) = plan.pod_mtu.filter(|_| !self.leases.endpoints.is_empty()) else { return <_>::default() };
        let Some(interfaces) = self.pod_interfaces() else { return <_>::default() };
        let untuned = &mut self.untuned;
        untuned.retain(|interface| interfaces.contains_key(interface));
        let mistuned = self.leases.endpoints.values().filter_map(|endpoint| {
            let actual = *interfaces.get(&endpoint.host_interface)?;
            // Of a pod that failed last time, only one end may be as it should.
            (actual != planned || untuned.contains(&endpoint.host_interface)).then(|| Mistuned {
                endpoint: endpoint.clone(),
                actual,
                planned,
            })
        });
        mistuned.partition(Mistuned::shrinks)
    }

    /// Gives pods their MTU.
    pub(super) fn tune_pods(&mut self, pods: &[Mistuned], issues: &mut Vec<Issue>) {
        let mut tuned = 0_usize;
        for Mistuned { endpoint, planned, .. } in pods {
            match self.parts.node.set_pod_mtu(endpoint, *planned) {
                Ok(()) => {
                    self.untuned.remove(&endpoint.host_interface);
                    tuned += 1;
                }
                // The pod has just gone.
                Err(error) if failures::lacks_interface(&error) => {}
                Err(error) => {
                    self.untuned.insert(endpoint.host_interface.clone());
                    issues.push(Issue {
                        severity: Severity::Error,
                        kind: IssueKind::ApplyFailed,
                        subject: endpoint.display_name(),
                        message: format!("the pod could not be given its MTU of {planned} bytes: {error}"),
                        remedy: error.remedy().into(),
                    });
                }
            }
        }
        if tuned > 0 {
            tracing::info!(pods = tuned, mtu = pods.first().map(|pod| pod.planned), "adapted the MTU of pods");
        }
    }

    /// After routes and pods have their MTU: where a route takes more than before, or pods send more, what their kernels were
    /// told of paths holds them back for nothing, for up to ten minutes.
    pub(super) fn forget_paths(&mut self, plan: &Plan, pods_grow: bool) {
        self.outgrown.due |= pods_grow || self.last.as_ref().is_some_and(|last| grows(&last.plan, plan));
        let now = self.parts.node.uptime();
        let rests = self.outgrown.last.is_some_and(|last| now < last + FORGET_INTERVAL);
        if !self.outgrown.due || rests {
            return;
        }
        self.outgrown = Outgrown { due: false, last: Some(now) };
        for endpoint in self.leases.endpoints.values() {
            match self.parts.node.forget_paths(endpoint) {
                Ok(()) => {}
                // It has just gone, or is not there yet.
                Err(error) if failures::lacks_interface(&error) => {}
                Err(error) => tracing::debug!(
                    pod = endpoint.display_name(), %error,
                    "the pod may send smaller packets than it could for up to ten minutes"
                ),
            }
        }
    }

    /// Releases leases of pods that are provably gone and that nobody deleted: without a host interface, without a network
    /// namespace, and not being wired. The runtime's GC does this too, where there is one. Also removes what a killed plugin left
    /// half-written.
    pub(super) fn reclaim_leases(&mut self) {
        if let Err(error) = self.parts.leases.sweep() {
            tracing::warn!(%error, "what a killed plugin left half-written stays");
        }
        // A store that cannot be read is an issue of the next pass.
        let Ok(leases) = self.parts.leases.load() else { return };
        if leases.endpoints.is_empty() {
            return;
        }
        let Some(interfaces) = self.pod_interfaces() else { return };
        let mut suspects = leases.endpoints;
        suspects.retain(|_, endpoint| !interfaces.contains_key(&endpoint.host_interface));
        if suspects.is_empty() {
            return;
        }
        let store = self.parts.leases.clone();
        let locked = match store.lock() {
            Ok(locked) => locked,
            Err(error) => {
                tracing::warn!(%error, "leases of pods that are gone are not released yet");
                return;
            }
        };
        // Looked at again: under the lock nothing about a lease can change.
        let Some(interfaces) = self.pod_interfaces() else { return };
        for endpoint in suspects.values() {
            match locked.reclaim(endpoint, interfaces.contains_key(&endpoint.host_interface), BootTime::now()) {
                Ok(true) => {
                    let addresses: Vec<String> = endpoint.addresses.iter().map(|address| address.to_string()).collect();
                    tracing::info!(
                        pod = endpoint.display_name(),
                        addresses = addresses.join(" "),
                        "released the lease of a pod that is gone without having been deleted"
                    );
                }
                Ok(false) => {}
                Err(error) => tracing::warn!(pod = endpoint.display_name(), %error, "a lease cannot be examined"),
            }
        }
    }

    fn pod_interfaces(&mut self) -> Option<BTreeMap<InterfaceName, u32>> {
        let interfaces = self.parts.node.pod_interfaces();
        interfaces
            .inspect_err(|error| tracing::warn!(error = format!("{error:#}"), "pod interfaces cannot be listed"))
            .ok()
    }
}
