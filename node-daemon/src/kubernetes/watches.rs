//! Watching: one task per kind, which never ends by itself.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use husk_overlay::config::BlockOrigin;
use kube::core::{ApiResource, DynamicObject};
use kube::runtime::watcher::{self, Config, Event, watcher};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use tokio::task::JoinHandle;

use super::client::Failure;
use super::objects::{AddressBlock, AddressPool, Kept, NodeCidrs, OverlayNode};
use super::store::{Store, Watched};

/// Watches what is needed.
pub(super) fn start(client: &Client, store: &Arc<Store>, runtime: &tokio::runtime::Handle) -> Vec<JoinHandle<()>> {
    let objects = |watched: Watched, resource: ApiResource| {
        let (api, store) = (Api::<DynamicObject>::all_with(client.clone(), &resource), Arc::clone(store));
        let keep = Arc::clone(&store);
        let take = move |event| translate(event, Kept::of).into_iter().for_each(|event| keep.object(watched, event));
        runtime.spawn(follow(api, Config::default(), store, watched, take))
    };
    let nodes = || {
        let (api, store) = (Api::<NodeCidrs>::all(client.clone()), Arc::clone(store));
        let config = match store.origin() {
            BlockOrigin::Pools => Config::default().fields(&format!("metadata.name={}", store.own())),
            BlockOrigin::NodeCidrs => Config::default(),
        };
        let keep = Arc::clone(&store);
        let take = move |event| translate(event, NodeCidrs::kept).into_iter().for_each(|event| keep.node(event));
        runtime.spawn(follow(api, config, store, Watched::Nodes, take))
    };
    let start = |watched: &Watched| match watched {
        Watched::Records => objects(*watched, ApiResource::erase::<OverlayNode>(&())),
        Watched::Pools => objects(*watched, ApiResource::erase::<AddressPool>(&())),
        Watched::Blocks => objects(*watched, ApiResource::erase::<AddressBlock>(&())),
        Watched::Nodes => nodes(),
    };
    Watched::needed(store.origin()).iter().map(start).collect()
}

/// Lists and watches for ever. The watcher goes on by itself where a watch came to its regular end; after a failure everything
/// is listed anew, out of the API server's cache as the clients of Kubernetes itself do.
async fn follow<K>(api: Api<K>, config: Config, store: Arc<Store>, watched: Watched, take: impl Fn(Event<K>))
where
    K: Resource + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let config = config.any_semantic();
    let (mut pause, mut distrusted) = (Pause::default(), store.distrusted());
    loop {
        let started = Instant::now();
        let mut events = watcher(api.clone(), config.clone()).boxed();
        distrusted.mark_unchanged();
        loop {
            let event = tokio::select! {
                event = events.next() => event,
                _ = distrusted.changed() => {
                    store.failed(watched, "everything is listed anew".into(), Instant::now());
                    break;
                }
            };
            let Some(event) = event else { break };
            match event {
                Ok(event) => take(event),
                Err(error) => {
                    let failure = explain(&error);
                    tracing::debug!(?watched, error = failure.reason, "a watch failed");
                    store.failed(watched, failure.reason, Instant::now());
                    break;
                }
            }
        }
        drop(events);
        // A server that lists and refuses to watch is not to be asked for lists without end.
        if started.elapsed() > Pause::LONGEST {
            pause = Pause::default();
        }
        tokio::time::sleep(pause.next()).await;
    }
}

/// True for what the API server said; that a list is about to be asked for says the watcher itself.
pub(super) fn heard<T>(event: &Event<T>) -> bool {
    !matches!(event, Event::Init)
}

fn translate<K, T>(event: Event<K>, keep: fn(K) -> Option<(String, T)>) -> Option<Event<(String, T)>> {
    Some(match event {
        Event::Init => Event::Init,
        Event::InitDone => Event::InitDone,
        Event::InitApply(object) => Event::InitApply(keep(object)?),
        Event::Apply(object) => Event::Apply(keep(object)?),
        Event::Delete(object) => Event::Delete(keep(object)?),
    })
}

fn explain(error: &watcher::Error) -> Failure {
    match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => Failure::of(error),
        watcher::Error::WatchError(status) => Failure { code: Some(status.code), reason: status.message.clone() },
        watcher::Error::NoResourceVersion => Failure { code: None, reason: error.to_string() },
    }
}

/// Pauses between attempts: doubling from the first to the longest, each somewhere between a half and one and a half of that by
/// chance, so that the daemons of a cluster do not come back as one.
struct Pause {
    length: Duration,
}

impl Pause {
    const FIRST: Duration = Duration::from_millis(500);
    const LONGEST: Duration = Duration::from_secs(15);

    fn next(&mut self) -> Duration {
        let length = self.length;
        self.length = (length * 2).min(Self::LONGEST);
        length.mul_f64(0.5 + chance())
    }
}

impl Default for Pause {
    fn default() -> Self {
        Self { length: Self::FIRST }
    }
}

/// A number from 0 to 1; always the same where the kernel gives no randomness.
pub(super) fn chance() -> f64 {
    let mut bytes = [0; 4];
    match getrandom::fill(&mut bytes) {
        Ok(()) => f64::from(u32::from_ne_bytes(bytes)) / f64::from(u32::MAX),
        Err(_) => 0.5,
    }
}
