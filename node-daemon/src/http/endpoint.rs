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

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;
    use husk_overlay::config::Config;
    use husk_overlay::name::NodeName;
    use hyper::Request;
    use tokio::sync::watch;

    use super::*;
    use crate::engine::State;
    use crate::flows::Flows;
    use crate::metrics::{Fixed, Live};

    struct Asked {
        endpoint: Endpoint,
        states: watch::Sender<State>,
    }

    impl Asked {
        fn new() -> Self {
            let config = Config::parse("c", "clusterCIDRs: [10.42.0.0/16]\nmode: direct").unwrap();
            let fixed = Arc::new(Fixed::of(&config, &NodeName::new("host1").unwrap()));
            let (states, told) = watch::channel(State::default());
            let (_, configuration) = watch::channel(None);
            let live = Live::default();
            let gathering = Gathering { fixed, live, states: told, configuration, flows: Flows::default() };
            Self { endpoint: Endpoint::new(gathering), states }
        }

        async fn get(&self, path: &str) -> (u16, String) {
            let request = Request::builder().uri(path).body(()).unwrap().into_parts().0;
            let answer = self.endpoint.get(&request).await;
            let status = answer.status().as_u16();
            let body = answer.into_body().collect().await.unwrap().to_bytes();
            (status, String::from_utf8(body.to_vec()).unwrap())
        }
    }

    #[tokio::test]
    async fn a_loop_that_hangs_is_not_healthy_until_it_goes_round_again() {
        let asked = Asked::new();
        assert_eq!(asked.get("/healthz").await, (200, "alive\n".into()), "it may wait for its cluster source at first");
        asked.endpoint.gathering.live.set_back(STUCK);
        let (status, reason) = asked.get("/healthz").await;
        assert!(status == 503 && reason.contains("no pass for 60 s"), "{status} {reason}");
        asked.endpoint.gathering.live.gave_up();
        assert_eq!(asked.get("/healthz").await.0, 200, "a pass that was given up is no loop that hangs");
    }

    #[tokio::test]
    async fn readiness_is_that_of_the_last_pass_with_its_reason() {
        let asked = Asked::new();
        assert_eq!(asked.get("/readyz").await, (503, "not ready: the daemon has just started\n".into()));
        asked.states.send_modify(|state| state.reason = Some("no IPv6 below 1280".into()));
        assert_eq!(asked.get("/readyz").await, (503, "not ready: no IPv6 below 1280\n".into()));
        asked.states.send_modify(|state| (state.ready, state.reason) = (true, None));
        assert_eq!(asked.get("/readyz").await.0, 200);
        assert_eq!(asked.get("/healthz").await.0, 200, "ready or not, it is alive");
    }

    #[tokio::test]
    async fn the_form_of_metrics_is_the_one_that_is_accepted() {
        let asked = Asked::new();
        let (status, text) = asked.get("/metrics").await;
        assert!(status == 200 && text.contains("husk_ready 0.0\n") && !text.contains("# EOF"), "{text}");
        assert_eq!(asked.get("/passwords").await.0, 404);
        assert!(asked.get("/").await.1.contains("/readyz"));
    }
}
