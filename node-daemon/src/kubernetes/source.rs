//! The cluster source.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use husk_overlay::config::{BlockOrigin, IpamConfig};
use husk_overlay::manifest::{self, Manifest};
use husk_overlay::name::NodeName;
use husk_overlay::prefix::Prefix;
use husk_overlay::record::{NodeRecord, Snapshot};
use husk_policy::object::Objects;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::core::{ApiResource, DynamicObject};
use kube::runtime::watcher::Event;
use kube::{Api, Client};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use super::client::{Failure, bounded, connect};
use super::departed;
use super::objects::{AddressBlock, Kept, OverlayNode};
use super::policy::{self, PolicyStore};
use super::resume;
use super::store::{Missing, Store, Watched};
use super::watches;
use crate::source::{Claim, ClusterSource, SourceError};

/// Who Husk is to server-side apply.
pub(super) const FIELD_MANAGER: &str = "husk";

/// What the source is called in messages.
pub const SUBJECT: &str = "Kubernetes API";

/// How the API is used.
#[derive(Debug, Clone)]
pub struct Options {
    /// Kubeconfig; none for the service account of the pod.
    pub kubeconfig: Option<PathBuf>,
    /// Own node.
    pub node: NodeName,
    /// Addresses.
    pub ipam: IpamConfig,
    /// The cluster CIDRs, within which pools have to lie.
    pub cluster_cidrs: Vec<Prefix>,
    /// How long a snapshot may wait for the first lists.
    pub patience: Duration,
}

/// Called when something is new.
pub type Wake = Arc<dyn Fn() + Send + Sync>;

/// The cluster source. Dropping it ends its watches.
pub struct KubernetesSource {
    store: Arc<Store>,
    policy: Arc<PolicyStore>,
    records: Api<DynamicObject>,
    blocks: Api<DynamicObject>,
    runtime: Handle,
    patience: Duration,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for KubernetesSource {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl KubernetesSource {
    /// Connects and starts to watch; the first of the two is called for what is new of nodes, the second of policy. Must not be called
    /// on a thread of the runtime.
    ///
    /// # Errors
    /// When there is no usable way to log on; a later call may find one.
    pub fn open(options: &Options, runtime: &Handle, wakes: &[Wake; 2]) -> Result<Self, SourceError> {
        let client = runtime
            .block_on(connect(options.kubeconfig.as_deref()))
            .map_err(|error| unavailable(format!("{error:#}")))?;
        Ok(Self::with_client(client, options, runtime, wakes))
    }

    /// As [`Self::open`], with a connection that is there already.
    #[must_use]
    pub fn with_client(client: Client, options: &Options, runtime: &Handle, wakes: &[Wake; 2]) -> Self {
        let [store, policy] = [&wakes[0], &wakes[1]].map(|wake| {
            let wake = Arc::clone(wake);
            Box::new(move || wake())
        });
        let store = Arc::new(Store::new(options.node.clone(), options.ipam.blocks, store));
        let policy = Arc::new(PolicyStore::new(policy));
        let cidrs = options.cluster_cidrs.clone();
        let mut tasks = watches::start(&client, &store, runtime);
        tasks.extend(policy::start(&client, &policy, &store, runtime));
        let release_after = Duration::from_secs(options.ipam.release_after.into());
        tasks.push(runtime.spawn(departed::patrol(client.clone(), Arc::clone(&store), release_after, cidrs)));
        tasks.push(runtime.spawn(resume::look_for_deafness(client.clone(), Arc::clone(&store))));
        tasks.push(runtime.spawn(departed::give_signs_of_life(client.clone(), Arc::clone(&store), release_after)));
        Self {
            store,
            policy,
            records: Api::all_with(client.clone(), &ApiResource::erase::<OverlayNode>(&())),
            blocks: Api::all_with(client, &ApiResource::erase::<AddressBlock>(&())),
            runtime: runtime.clone(),
            patience: options.patience,
            tasks,
        }
    }

    fn check_tasks(&self) -> Result<(), SourceError> {
        if self.tasks.iter().any(JoinHandle::is_finished) {
            return Err(unavailable(
                "a task that watches it has ended, which is a bug of Husk; the log tells where".into(),
            ));
        }
        Ok(())
    }

    /// What the watches deliver in a moment anyway, so that the next snapshot has it.
    fn note(&self, watched: Watched, object: DynamicObject) {
        if let Some(kept) = Kept::of(object) {
            self.store.object(watched, Event::Apply(kept));
        }
    }

    /// Deletes an object if it is still the one that was seen.
    fn delete(&self, api: &Api<DynamicObject>, watched: Watched, name: &str) -> Result<(), SourceError> {
        let Some(kept) = self.store.identity(watched, name) else { return Ok(()) };
        match self.runtime.block_on(bounded(delete_seen(api, name, &kept))) {
            Ok(()) => {
                self.store.object(watched, Event::Delete((name.to_owned(), kept)));
                Ok(())
            }
            Err(failure) if failure.is_not_found() => Ok(()),
            Err(failure) => Err(failed(failure)),
        }
    }
}

/// Deletes an object that is still in the state that was seen.
pub(super) async fn delete_seen(api: &Api<DynamicObject>, name: &str, kept: &Kept) -> kube::Result<()> {
    let seen = Preconditions { uid: Some(kept.uid.clone()), resource_version: Some(kept.version.clone()) };
    api.delete(name, &DeleteParams::default().preconditions(seen)).await.map(drop)
}

fn unavailable(reason: String) -> SourceError {
    SourceError::Unavailable { subject: SUBJECT.into(), reason }
}

fn missing(missing: Missing) -> SourceError {
    match missing {
        Missing::NotYet => unavailable("it has not delivered its first lists yet".into()),
        Missing::Failing(reason) => unavailable(reason),
    }
}

fn failed(failure: Failure) -> SourceError {
    unavailable(failure.reason)
}

/// A manifest as a request's body.
fn body(manifest: &Manifest) -> DynamicObject {
    serde_json::from_value(manifest.to_json()).expect("a manifest has kind, metadata and spec as every object")
}

impl ClusterSource for KubernetesSource {
    fn snapshot(&mut self) -> Result<Snapshot, SourceError> {
        self.check_tasks()?;
        self.store.snapshot_within(self.patience).map_err(missing)
    }

    fn policy_objects(&mut self) -> Result<Arc<Objects>, SourceError> {
        self.check_tasks()?;
        self.policy.objects(Instant::now()).map_err(missing)
    }

    fn publish(&mut self, record: &NodeRecord) -> Result<(), SourceError> {
        let known = self.store.identity(Watched::Records, record.name.as_str()).map(|kept| kept.read);
        if matches!(known, Some(Ok(Manifest::Node(known))) if known.addresses != record.addresses) {
            // Their connections began at an address that may be no more.
            self.store.distrust_watches();
        }
        let object = Patch::Apply(body(&Manifest::Node(record.clone())));
        // Whoever else wrote into the record was wrong.
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        let request = self.records.patch(record.name.as_str(), &parameters, &object);
        let applied = self.runtime.block_on(bounded(request)).map_err(failed)?;
        self.note(Watched::Records, applied);
        Ok(())
    }

    fn claim(&mut self, block: Prefix, node: &NodeName) -> Result<Claim, SourceError> {
        if self.store.origin() == BlockOrigin::NodeCidrs {
            return Ok(Claim::Taken);
        }
        if self.store.own_node_is_missing() {
            // Nobody could tell such a node from one that is gone, and its blocks would be given away.
            return Err(unavailable(format!(
                "it has no Node object {node}, and a node that it does not know takes no block"
            )));
        }
        let object = body(&manifest::block(block, node));
        let parameters = PostParams { field_manager: Some(FIELD_MANAGER.into()), ..PostParams::default() };
        match self.runtime.block_on(bounded(self.blocks.create(&parameters, &object))) {
            Ok(created) => {
                self.note(Watched::Blocks, created);
                Ok(Claim::Granted)
            }
            Err(failure) if failure.is_conflict() => Ok(Claim::Taken),
            Err(failure) => Err(failed(failure)),
        }
    }

    fn release(&mut self, block: Prefix, node: &NodeName) -> Result<(), SourceError> {
        let name = manifest::block_name(block);
        let ours = self.store.identity(Watched::Blocks, &name);
        if ours.is_some_and(|kept| kept.read == Ok(manifest::block(block, node))) {
            self.delete(&self.blocks, Watched::Blocks, &name)?;
        }
        Ok(())
    }

    fn withdraw(&mut self, node: &NodeName) -> Result<(), SourceError> {
        self.delete(&self.records, Watched::Records, node.as_str())
    }
}
