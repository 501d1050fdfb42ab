//! The connection to the API server.

use std::future::Future;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

/// How long connecting may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// How long a request that is no watch may take.
const REQUEST_LIMIT: Duration = Duration::from_secs(4);

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
    config.connect_timeout = Some(CONNECT_LIMIT);
    // The loop asks again itself, and must not wait for a server that says "later".
    config.default_retry = false;
    Client::try_from(config).context("cannot make a client for the API server")
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
