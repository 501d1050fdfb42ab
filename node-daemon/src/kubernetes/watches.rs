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
use tokio::sync::watch::Receiver;
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
        let distrusted = store.distrusted();
        runtime.spawn(follow(api, Config::default(), distrusted, note(store, watched), take))
    };
    let nodes = || {
        let (api, store) = (Api::<NodeCidrs>::all(client.clone()), Arc::clone(store));
        let config = match store.origin() {
            BlockOrigin::Pools => Config::default().fields(&format!("metadata.name={}", store.own())),
            BlockOrigin::NodeCidrs => Config::default(),
        };
        let keep = Arc::clone(&store);
        let take = move |event| translate(event, NodeCidrs::kept).into_iter().for_each(|event| keep.node(event));
        let distrusted = store.distrusted();
        runtime.spawn(follow(api, config, distrusted, note(store, Watched::Nodes), take))
    };
    let start = |watched: &Watched| match watched {
        Watched::Records => objects(*watched, ApiResource::erase::<OverlayNode>(&())),
        Watched::Pools => objects(*watched, ApiResource::erase::<AddressPool>(&())),
        Watched::Blocks => objects(*watched, ApiResource::erase::<AddressBlock>(&())),
        Watched::Nodes => nodes(),
    };
    Watched::needed(store.origin()).iter().map(start).collect()
}

/// Takes note of failures.
fn note(store: Arc<Store>, watched: Watched) -> impl Fn(Failure) {
    move |failure| {
        tracing::debug!(?watched, error = failure.reason, "a watch failed");
        store.failed(watched, failure.reason, Instant::now());
    }
}

/// Lists and watches for ever. The watcher goes on by itself where a watch came to its regular end; after a failure everything
/// is listed anew, in pages, which the API server reads from etcd and not from its cache.
pub(super) async fn follow<K>(
    api: Api<K>,
    config: Config,
    mut distrusted: Receiver<()>,
    failed: impl Fn(Failure),
    take: impl Fn(Event<K>),
) where
    K: Resource + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let mut pause = Pause::default();
    loop {
        let started = Instant::now();
        if let Some(failure) = session(api.clone(), config.clone(), &mut distrusted, &take).await {
            failed(failure);
        }
        pause.wait_after(started).await;
    }
}

/// Lists and watches until that fails, or comes to an end.
pub(super) async fn session<K>(
    api: Api<K>,
    config: Config,
    distrusted: &mut Receiver<()>,
    take: impl Fn(Event<K>),
) -> Option<Failure>
where
    K: Resource + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let mut events = watcher(api, config).boxed();
    distrusted.mark_unchanged();
    loop {
        let event = tokio::select! {
            event = events.next() => event?,
            _ = distrusted.changed() => {
                return Some(Failure { code: None, reason: "everything is listed anew".into() });
            }
        };
        match event {
            Ok(event) => take(event),
            Err(error) => return Some(explain(&error)),
        }
    }
}

/// True for what the API server said; that a list is about to be asked for says the watcher itself.
pub(super) fn heard<T>(event: &Event<T>) -> bool {
    !matches!(event, Event::Init)
}

/// The event with what is kept of its object.
pub(super) fn translate<K, T>(event: Event<K>, keep: impl Fn(K) -> Option<T>) -> Option<Event<T>> {
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
pub(super) struct Pause {
    length: Duration,
}

impl Pause {
    const FIRST: Duration = Duration::from_millis(500);
    const LONGEST: Duration = Duration::from_secs(15);

    /// Waits, after an attempt that began at `started`.
    pub(super) async fn wait_after(&mut self, started: Instant) {
        // A server that lists and refuses to watch is not to be asked for lists without end.
        if started.elapsed() > Self::LONGEST {
            *self = Self::default();
        }
        tokio::time::sleep(self.next()).await;
    }

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
