//! The connection to the API server.

use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use hyper_timeout::TimeoutConnector;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use kube::client::{Body, ConfigExt as _};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use tower::ServiceBuilder;
use tower::filter::AsyncFilterLayer;

use super::resume;

/// How long connecting may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// How long a request that is no watch may take.
const REQUEST_LIMIT: Duration = Duration::from_secs(4);

/// How long a connection is quiet before the kernel asks whether the other side is still there, and how long it may go without an
/// answer. A connection that began at an address which the node has no more, or whose server or load balancer has vanished, says
/// nothing by itself: a watch on it would wait for the end of its time, some five minutes.
const PROBE_AFTER: Duration = Duration::from_secs(5);
const LOST_AFTER: Duration = Duration::from_secs(15);

/// How long a connection is kept for another request. Requests are rare, and one that went out on a connection that is lost would
/// wait in vain.
const KEEP_IDLE: Duration = Duration::from_secs(1);

/// A client of the API server: of a kubeconfig, else of the pod that this process runs in. Nothing is sent yet. Has to be
/// called in a runtime.
///
/// # Errors
/// When the kubeconfig cannot be read or makes no sense, or this is no pod.
pub async fn connect(kubeconfig: Option<&Path>) -> Result<Client> {
    let mut config = match kubeconfig {
        Some(path) => {
            let context = || format!("cannot use the kubeconfig {} (source.kubernetes.kubeconfig)", path.display());
            let read = Kubeconfig::read_from(path).with_context(context)?;
            Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await.with_context(context)?
        }
        None => Config::incluster().context(
            "there is no service account here: outside a pod, source.kubernetes.kubeconfig has to name a kubeconfig",
        )?,
    };
    if let Some(proxy) = &config.proxy_url {
        bail!(
            "the kubeconfig, or HTTPS_PROXY, says that {proxy} stands before the API server, and Husk talks to no proxy: it has to \
             reach the API server itself"
        );
    }
    config.connect_timeout = Some(CONNECT_LIMIT);
    client(config).context("cannot make a client for the API server")
}

/// As `Client::try_from` makes it, but for connections that notice when they are lost. Nothing is tried again in here: the loop does
/// that itself, and must not wait for a server that says "later"; nor is a failure logged, which is an issue later.
fn client(config: Config) -> kube::Result<Client> {
    let mut http = HttpConnector::new();
    http.enforce_http(false);
    http.set_keepalive(Some(PROBE_AFTER));
    http.set_keepalive_interval(Some(PROBE_AFTER));
    http.set_tcp_user_timeout(Some(LOST_AFTER));
    let mut connector = TimeoutConnector::new(config.rustls_https_connector_with_connector(http)?);
    connector.set_connect_timeout(config.connect_timeout);
    connector.set_read_timeout(config.read_timeout);
    connector.set_write_timeout(config.write_timeout);
    let http: hyper_util::client::legacy::Client<_, Body> =
        hyper_util::client::legacy::Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(KEEP_IDLE)
            .build(connector);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(tower::BoxError::from)
        .service(http);
    let namespace = config.default_namespace;
    let asking = Client::new(service.clone(), namespace.clone());
    let begun = Arc::new(resume::Begun::default());
    let check = AsyncFilterLayer::new(move |request| resume::check(asking.clone(), Arc::clone(&begun), request));
    Ok(Client::new(ServiceBuilder::new().layer(check).service(service), namespace))
}

/// Waits for an answer, but not for ever.
///
/// # Errors
/// In words that stay the same as long as the reason does.
pub(super) async fn bounded<T>(request: impl Future<Output = kube::Result<T>>) -> Result<T, Failure> {
    match tokio::time::timeout(REQUEST_LIMIT, request).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(Failure::of(&error)),
        Err(_) => Err(Failure { code: None, reason: format!("no answer within {} s", REQUEST_LIMIT.as_secs()) }),
    }
}

/// Why the API server did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Failure {
    /// HTTP status, if there was an answer.
    pub code: Option<u16>,
    /// In words.
    pub reason: String,
}

impl Failure {
    /// With what a person can do about it, where that is known.
    pub(super) fn of(error: &kube::Error) -> Self {
        let (code, mut reason) = match error {
            kube::Error::Api(status) => (Some(status.code), status.message.clone()),
            other => (None, with_causes(other)),
        };
        match code {
            Some(403) => reason += "; apply Husk's RBAC manifests again",
            Some(404) => reason += "; are Husk's CustomResourceDefinitions applied?",
            _ => {}
        }
        Self { code, reason }
    }

    /// The object exists already, or is another by now.
    pub(super) fn is_conflict(&self) -> bool {
        self.code == Some(409)
    }

    /// The API server knows who asks, and does not let it.
    pub(super) fn is_forbidden(&self) -> bool {
        self.code == Some(403)
    }

    /// There is no such object.
    pub(super) fn is_not_found(&self) -> bool {
        self.code == Some(404)
    }
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        // Many errors repeat their cause.
        if !text.contains(&next) {
            text += &format!(": {next}");
        }
        cause = error.source();
    }
    text
}
