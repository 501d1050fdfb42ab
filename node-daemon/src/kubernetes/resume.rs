//! Watches that go on where they were, though the API server has gone back in time.
//!
//! The watch goes on by itself from the last version it saw, whether the API server ended it or the connection broke. An API server
//! that was restored from an older state meanwhile counts from there. As long as it has not come to that version it takes such a
//! watch and says nothing; and once it has, which takes seconds in a busy cluster, it goes on as if nothing had happened, and what
//! was lost is never told. So there are three checks:
//!
//! - A watch that ended before its time was cut off, as all are when the API is restored. It does not go on.
//! - Before a watch goes on, the API server is asked what its version is. Where it is lower the watch fails.
//! - Now and then the own record is read. Where it is another than the watch told, and stays so, the watches are deaf.
//!
//! Each time everything is listed anew. An API server that was merely started anew makes clients list
//! anyway: it remembers nothing of what was before its start (`too old resource version`).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use http::header::ACCEPT;
use http::{Method, Request, Uri};
use kube::client::Body;
use kube::core::ListMeta;
use kube::{Api, Client};
use serde::Deserialize;
use tower::BoxError;

use super::client::bounded;
use super::objects::OverlayNode;
use super::store::{Store, Watched};
use super::watches::chance;

/// How often the own record is read, and how long a watch may take to tell what was read.
const LOOK: Duration = Duration::from_secs(20);
const LATENCY: Duration = Duration::from_secs(5);

/// As little as the API server can say of objects.
const METADATA_ONLY: &str = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1";

/// A list of which nothing but its version is of interest.
#[derive(Deserialize)]
struct Listed {
    metadata: ListMeta,
}

/// When the watches began that are under way, by the path of what they list.
#[derive(Debug, Default)]
pub(super) struct Begun(Mutex<BTreeMap<String, Instant>>);

/// How far from its time a watch ends that was not cut off.
const PUNCTUAL: Duration = Duration::from_secs(15);

/// What a request means to the watches of a client.
#[derive(Debug, PartialEq, Eq)]
enum Step<'a> {
    /// A list, after which a watch begins; or a single object, which nobody watches.
    List { path: &'a str },
    /// A watch from this version on, for so long.
    Watch { path: &'a str, version: u64, time: Duration },
}

impl Begun {
    /// Takes note of what is about to be asked. True for a watch that would go on where another one was cut off.
    fn is_cut_off(&self, step: &Step<'_>, now: Instant) -> bool {
        let mut begun = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match step {
            Step::List { path } => {
                begun.remove(*path);
                false
            }
            Step::Watch { path, time, .. } => {
                let before = begun.insert((*path).to_owned(), now);
                before.is_some_and(|before| now.duration_since(before).abs_diff(*time) > PUNCTUAL)
            }
        }
    }
}

/// Lets a request pass, unless it is for a watch that was cut off, or from a version that the API server has yet to reach.
pub(super) async fn check(
    client: Client,
    begun: Arc<Begun>,
    request: Request<Body>,
) -> Result<Request<Body>, BoxError> {
    let Some(step) = step(request.method(), request.uri()) else { return Ok(request) };
    if begun.is_cut_off(&step, Instant::now()) {
        return Err("the connection was cut off; everything is listed anew".into());
    }
    if let Step::Watch { path, version: seen, .. } = step {
        // Without a version in the question, the answer is the newest state there is.
        let one = Request::get(format!("{path}?limit=1")).header(ACCEPT, METADATA_ONLY).body(Vec::new())?;
        let listed: Listed = bounded(client.request(one)).await?;
        let now = listed.metadata.resource_version.and_then(|version| version.parse::<u64>().ok());
        if let Some(now) = now.filter(|now| *now < seen) {
            return Err(
                format!("it is at version {now}, after {seen} once: it was restored from an older state").into()
            );
        }
    }
    Ok(request)
}

/// What the watches of a client may have to do with a request; nothing with one that changes something.
fn step<'a>(method: &Method, uri: &'a Uri) -> Option<Step<'a>> {
    let (path, query) = (uri.path(), uri.query().unwrap_or_default());
    let value = |key: &str| query.split('&').find_map(|pair| pair.strip_prefix(key)?.strip_prefix('='));
    if *method != Method::GET {
        return None;
    }
    if value("watch") != Some("true") {
        return Some(Step::List { path });
    }
    let version = value("resourceVersion")?.parse().ok().filter(|version| *version > 0)?;
    Some(Step::Watch { path, version, time: Duration::from_secs(value("timeoutSeconds")?.parse().ok()?) })
}

/// Looks for ever whether the watches hear what happens to the own record.
pub(super) async fn look_for_deafness(client: Client, store: Arc<Store>) {
    let records: Api<OverlayNode> = Api::all(client);
    let own = store.own().to_string();
    let told = || store.identity(Watched::Records, &own).map(|kept| kept.version);
    loop {
        tokio::time::sleep(LOOK.mul_f64(0.75 + chance() / 2.0)).await;
        let before = told();
        let Ok(found) = bounded(records.get_metadata_opt(&own)).await else { continue };
        let found = found.and_then(|record| record.metadata.resource_version);
        if found == before {
            continue;
        }
        tokio::time::sleep(LATENCY).await;
        // What was told meanwhile shows that something is heard.
        let now = told();
        if now == before && now != found {
            tracing::warn!(?found, told = ?now, "the watches do not hear the API server; everything is listed anew");
            store.distrust_watches();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: &str = "/apis/husk.dev/v1alpha1/overlaynodes";

    #[test]
    fn lists_and_watches_from_some_version_are_told_from_everything_else() {
        let of = |method: Method, text: &str| step(&method, &text.parse().unwrap()).map(|step| format!("{step:?}"));
        let watch = format!("{PATH}?&watch=true&timeoutSeconds=290&allowWatchBookmarks=true&resourceVersion=12");
        let expected = Step::Watch { path: PATH, version: 12, time: Duration::from_secs(290) };
        assert_eq!(of(Method::GET, &watch), Some(format!("{expected:?}")));
        assert_eq!(of(Method::GET, &watch.replace("=12", "=0")), None);
        for list in [format!("{PATH}?&limit=500"), format!("{PATH}?&resourceVersion=0"), PATH.to_owned()] {
            assert_eq!(of(Method::GET, &list), Some(format!("{:?}", Step::List { path: PATH })), "{list}");
            assert_eq!(of(Method::POST, &list), None, "{list}");
        }
    }

    #[test]
    fn a_watch_that_ended_before_its_time_does_not_go_on() {
        let (begun, start) = (Begun::default(), Instant::now());
        let watch = |path| Step::Watch { path, version: 12, time: Duration::from_secs(290) };
        let asked = |step: &Step<'_>, seconds| begun.is_cut_off(step, start + Duration::from_secs(seconds));
        assert!(!asked(&watch(PATH), 0), "the first one");
        assert!(!asked(&watch(PATH), 290), "the next one, when that ended as it should");
        assert!(!asked(&watch("/api/v1/pods"), 291), "one of something else");
        assert!(asked(&watch(PATH), 300), "cut off after ten seconds");
        assert!(!asked(&Step::List { path: PATH }, 301) && !asked(&watch(PATH), 301), "listed anew");
        assert!(asked(&watch(PATH), 3000), "a machine that slept does not know what it missed");
    }
}
