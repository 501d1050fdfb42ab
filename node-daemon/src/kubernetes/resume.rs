//! Watches that go on where they were, though the API server has gone back in time.
//!
//! Of a connection that broke, the watch goes on by itself from the last version it saw. An API server that was restored from an
//! older state meanwhile counts from there, takes such a watch, and says nothing until it has counted beyond that version; and
//! once it has, nobody can tell. So there are two checks:
//!
//! - Before a watch goes on, the API server is asked what its version is. Where it is lower the watch fails.
//! - Now and then the own record is read. Where it is another than the watch told, and stays so, the watches are deaf.
//!
//! Either way everything is listed anew.

use std::sync::Arc;
use std::time::Duration;

use http::header::ACCEPT;
use http::{Request, Uri};
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

/// Lets a request pass, unless it is for a watch from a version that the API server has yet to reach.
pub(super) async fn check(client: Client, request: Request<Body>) -> Result<Request<Body>, BoxError> {
    if let Some((path, seen)) = resumed(request.uri()) {
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

/// Path of the list and version from which a watch is to go on, if the request is for one.
fn resumed(uri: &Uri) -> Option<(&str, u64)> {
    let query = uri.query()?;
    let value = |key: &str| query.split('&').find_map(|pair| pair.strip_prefix(key)?.strip_prefix('='));
    let version = value("resourceVersion").filter(|_| value("watch") == Some("true"))?;
    Some((uri.path(), version.parse().ok().filter(|version| *version > 0)?))
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

    #[test]
    fn a_watch_from_some_version_is_told_from_everything_else() {
        let of = |uri: &str| resumed(&uri.parse().unwrap()).map(|(path, version)| (path.to_owned(), version));
        let path = "/apis/husk.dev/v1alpha1/overlaynodes";
        let watch = format!("{path}?&watch=true&timeoutSeconds=290&allowWatchBookmarks=true&resourceVersion=12");
        assert_eq!(of(&watch), Some((path.to_owned(), 12)));
        assert_eq!(of(&watch.replace("=12", "=0")), None);
        assert_eq!(of(&watch.replace("&watch=true", "")), None);
        assert_eq!(of(path), None);
    }
}
