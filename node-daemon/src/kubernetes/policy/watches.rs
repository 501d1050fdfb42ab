//! Watching what policy is made of: one task per kind, which never ends by itself.

use std::sync::Arc;
use std::time::{Duration, Instant};

use husk_policy::read::CLUSTER_POLICY_VERSIONS;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use kube::runtime::watcher::Config;
use kube::{Api, Client};
use tokio::runtime::Handle;
use tokio::sync::watch::Receiver;
use tokio::task::JoinHandle;

use super::objects::{WatchedNamespace, WatchedPod, policy};
use super::{PolicyKind, PolicyStore};
use crate::kubernetes::client::Failure;
use crate::kubernetes::store::Store;
use crate::kubernetes::watches::{Pause, chance, follow, session, translate};

/// How often an API server without ClusterNetworkPolicies is asked whether it has any.
const LOOK: Duration = Duration::from_secs(30);

/// Watches everything. `cluster` knows when watches have to begin anew.
pub(in crate::kubernetes) fn start(
    client: &Client,
    store: &Arc<PolicyStore>,
    cluster: &Store,
    runtime: &Handle,
) -> Vec<JoinHandle<()>> {
    let pods = {
        let (keep, failed) = (Arc::clone(store), note(store, PolicyKind::Pods));
        let take = move |event| translate(event, WatchedPod::kept).into_iter().for_each(|event| keep.pod(event));
        follow(Api::all(client.clone()), Config::default(), cluster.distrusted(), failed, take)
    };
    let namespaces = {
        let (keep, failed) = (Arc::clone(store), note(store, PolicyKind::Namespaces));
        let take =
            move |event| translate(event, WatchedNamespace::kept).into_iter().for_each(|event| keep.namespace(event));
        follow(Api::all(client.clone()), Config::default(), cluster.distrusted(), failed, take)
    };
    let policies = {
        let (keep, failed) = (Arc::clone(store), note(store, PolicyKind::NetworkPolicies));
        let resource = ApiResource::erase::<NetworkPolicy>(&());
        let api = Api::<DynamicObject>::all_with(client.clone(), &resource);
        let take = move |event| {
            let event = translate(event, |object| policy(object, &resource));
            event.into_iter().for_each(|event| keep.network_policy(event));
        };
        follow(api, Config::default(), cluster.distrusted(), failed, take)
    };
    let cluster_policies = follow_cluster_policies(client.clone(), Arc::clone(store), cluster.distrusted());
    vec![runtime.spawn(pods), runtime.spawn(namespaces), runtime.spawn(policies), runtime.spawn(cluster_policies)]
}

/// Takes note of failures.
fn note(store: &Arc<PolicyStore>, kind: PolicyKind) -> impl Fn(Failure) + use<> {
    let store = Arc::clone(store);
    move |failure| {
        tracing::debug!(?kind, error = failure.reason, "a watch failed");
        store.failed(kind, failure.reason, Instant::now());
    }
}

/// Whether there are ClusterNetworkPolicies, and of which version, may change at any time.
async fn follow_cluster_policies(client: Client, store: Arc<PolicyStore>, mut distrusted: Receiver<()>) {
    let failed = note(&store, PolicyKind::ClusterPolicies);
    let mut pause = Pause::default();
    loop {
        let started = Instant::now();
        let mut absent = true;
        for version in CLUSTER_POLICY_VERSIONS {
            let failure = watch(&client, version, &store, &mut distrusted).await;
            absent = failure.as_ref().is_some_and(Failure::is_not_found);
            if !absent {
                failure.into_iter().for_each(&failed);
                break;
            }
        }
        if absent && store.no_cluster_policies(Instant::now()) {
            tokio::time::sleep(LOOK.mul_f64(0.75 + chance() / 2.0)).await;
        } else {
            pause.wait_after(started).await;
        }
    }
}

async fn watch(client: &Client, version: &str, store: &PolicyStore, distrusted: &mut Receiver<()>) -> Option<Failure> {
    let kind = GroupVersionKind::gvk("policy.networking.k8s.io", version, "ClusterNetworkPolicy");
    let resource = ApiResource::from_gvk_with_plural(&kind, "clusternetworkpolicies");
    let api = Api::<DynamicObject>::all_with(client.clone(), &resource);
    let take = |event| {
        let event = translate(event, |object| policy(object, &resource).map(|(name, reading)| (name.name, reading)));
        event.into_iter().for_each(|event| store.cluster_policy(event));
    };
    session(api, Config::default(), distrusted, take).await
}
