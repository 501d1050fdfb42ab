//! The endpoint of metrics and health: `/metrics`, `/healthz`, `/readyz`.

use std::sync::Arc;
use std::time::Duration;

use hyper::StatusCode;
use hyper::header::ACCEPT;
use hyper::http::request::Parts;
use tokio::sync::Semaphore;

use super::{Answer, Site, of_type, text};
use crate::metrics::gather::Gathering;
use crate::metrics::{Form, exposition};

/// How long no pass may have come to its end until the loop counts as stuck. There is one every five seconds, and one of a
/// cluster of 5,000 nodes takes seconds; the loop's first may wait that long for its cluster source.
const STUCK: Duration = Duration::from_secs(60);

/// Expositions that are made at once. They take threads that ADD needs, too, and go on when their client has gone.
const SCRAPES: usize = 2;

/// What is at `/`.
const INDEX: &str =
    "Husk's node daemon\n\n/metrics  for Prometheus\n/healthz  is the daemon alive?\n/readyz   can pods be added?\n";

/// The site.
#[derive(Debug, Clone)]
pub struct Endpoint {
    gathering: Gathering,
    scrapes: Arc<Semaphore>,
}

impl Endpoint {
    /// Tells what is gathered.
    #[must_use]
    pub fn new(gathering: Gathering) -> Self {
        Self { gathering, scrapes: Arc::new(Semaphore::new(SCRAPES)) }
    }

    async fn metrics(&self, form: Form) -> Answer {
        let gathering = self.gathering.clone();
        let permit = match Arc::clone(&self.scrapes).acquire_owned().await {
            Ok(permit) => permit,
            Err(error) => return text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        };
        let make = move || {
            let _permit = permit;
            exposition(gathering.gather(), form)
        };
        let made = tokio::task::spawn_blocking(make).await;
        match made {
            Ok(Ok(written)) => of_type(StatusCode::OK, form.media_type(), written),
            Ok(Err(error)) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        }
    }

    fn health(&self) -> Answer {
        let since = self.gathering.live.since_pass();
        if since <= STUCK {
            return text(StatusCode::OK, "alive\n");
        }
        let seconds = since.as_secs();
        let reason = format!(
            "the reconcile loop has finished no pass for {seconds} s; the daemon's log tells with what it is busy\n"
        );
        text(StatusCode::SERVICE_UNAVAILABLE, reason)
    }

    fn readiness(&self) -> Answer {
        let state = self.gathering.states.borrow();
        if state.ready {
            return text(StatusCode::OK, "ready: pods can be added\n");
        }
        let reason = state.reason.as_deref().unwrap_or("the daemon has just started");
        text(StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {reason}\n"))
    }
}

impl Site for Endpoint {
    async fn get(&self, request: &Parts) -> Answer {
        match request.uri.path() {
            "/metrics" => {
                let accept = request.headers.get(ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
                self.metrics(Form::accepted(accept)).await
            }
            "/healthz" => self.health(),
            "/readyz" => self.readiness(),
            "/" => text(StatusCode::OK, INDEX),
            _ => text(StatusCode::NOT_FOUND, "there is /metrics, /healthz and /readyz\n"),
        }
    }
}
