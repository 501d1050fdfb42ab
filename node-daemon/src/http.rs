//! A small HTTP server: a few pages, all of them read, none of them waited for.
//!
//! Whoever reaches the address may be anybody, so everything is bounded: connections in all and from one address, the size of a
//! request's head, and the time for all of it. A connection is one request: whoever holds it longer holds up somebody else. An address that is not to be had,
//! as a port that another program has, is an issue and is tried again; the daemon goes on without.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use husk_overlay::issue::{Issue, IssueKind, Severity};
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue, X_CONTENT_TYPE_OPTIONS};
use hyper::http::request::Parts;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};

use self::visitors::Visitors;

pub mod endpoint;
pub mod sites;
mod visitors;

/// Connections served at once; more wait in the kernel's queue.
const CONNECTIONS: usize = 32;

/// Connections from one address; more are closed at once, so that who says nothing does not take the places of others. A browser
/// opens six.
const FROM_ONE: usize = 8;

/// How long things may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// For a client to say what it wants.
    pub head: Duration,
    /// For all of a connection.
    pub connection: Duration,
    /// Until an address that was not to be had is tried again.
    pub retry: Duration,
}

impl Default for Limits {
    /// A scrape may take ten seconds by Prometheus' default.
    fn default() -> Self {
        Self { head: Duration::from_secs(5), connection: Duration::from_secs(15), retry: Duration::from_secs(5) }
    }
}

/// Most headers of a request.
const MOST_HEADERS: usize = 64;

/// Most bytes of a request's head; hyper wants 8 KiB at least.
const LARGEST_HEAD: usize = 16 << 10;

/// An answer.
pub type Answer = Response<Full<Bytes>>;

/// Something that answers.
pub trait Site: Send + Sync + 'static {
    /// Answers a GET; of a HEAD, what is returned is cut off.
    fn get(&self, request: &Parts) -> impl Future<Output = Answer> + Send;
}

/// Where a site is served, and what tells that it is not.
#[derive(Debug)]
pub struct Listening {
    /// Where.
    pub address: SocketAddr,
    /// The key of the configuration that says so.
    pub key: &'static str,
    /// Why it is not, as long as it is not.
    pub issue: watch::Sender<Option<Issue>>,
    /// How long things may take.
    pub limits: Limits,
}

/// Serves until the task is dropped. `changed` is called when the issue came or went.
pub async fn serve(listening: Listening, site: impl Site, changed: impl Fn() + Send) {
    let (site, permits) = (Arc::new(site), Arc::new(Semaphore::new(CONNECTIONS)));
    let visitors = Visitors::new(FROM_ONE);
    loop {
        let listener = match TcpListener::bind(listening.address).await {
            Ok(listener) => listener,
            Err(error) => {
                let issue = listening.refused(&error);
                if listening.issue.send_replace(Some(issue.clone())).as_ref() != Some(&issue) {
                    changed();
                }
                tokio::time::sleep(listening.limits.retry).await;
                continue;
            }
        };
        tracing::info!(address = %listening.address, key = listening.key, "listening");
        if listening.issue.send_replace(None).is_some() {
            changed();
        }
        loop {
            let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, from)) => {
                    let Some(visit) = visitors.admit(from.ip()) else {
                        tracing::debug!(%from, key = listening.key, "an address has too many connections");
                        continue;
                    };
                    let (site, limits) = (Arc::clone(&site), listening.limits);
                    tokio::spawn(async move {
                        converse(stream, site, limits).await;
                        drop((visit, permit));
                    });
                }
                Err(error) => {
                    tracing::debug!(%error, key = listening.key, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

impl Listening {
    fn refused(&self, error: &io::Error) -> Issue {
        let (address, key) = (self.address, self.key);
        let remedy = match error.kind() {
            io::ErrorKind::AddrInUse => format!(
                "end the program that has the port ('ss -lntp sport = :{}' names it), or give {key} another",
                address.port()
            ),
            io::ErrorKind::AddrNotAvailable => format!("give {key} an address that the host has"),
            _ => format!("correct {key}, or set it to off; it is tried again every {} s", self.limits.retry.as_secs()),
        };
        Issue {
            severity: Severity::Warning,
            kind: IssueKind::ListenFailed,
            subject: key.to_owned(),
            message: format!("nothing is served at {address}: {error}"),
            remedy,
        }
    }
}

async fn converse(stream: TcpStream, site: Arc<impl Site>, limits: Limits) {
    let answer = |request: Request<Incoming>| {
        let site = Arc::clone(&site);
        async move { Ok::<_, Infallible>(answer(request.into_parts().0, &*site).await) }
    };
    let mut protocol = http1::Builder::new();
    protocol.keep_alive(false).timer(TokioTimer::new()).header_read_timeout(limits.head);
    protocol.max_headers(MOST_HEADERS).max_buf_size(LARGEST_HEAD);
    let connection = protocol.serve_connection(TokioIo::new(stream), service_fn(answer));
    match tokio::time::timeout(limits.connection, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "an HTTP client went away"),
        Err(_) => tracing::debug!("an HTTP client took too long"),
    }
}

async fn answer(request: Parts, site: &impl Site) -> Answer {
    let mut answer = if [Method::GET, Method::HEAD].contains(&request.method) {
        site.get(&request).await
    } else {
        let mut answer = text(StatusCode::METHOD_NOT_ALLOWED, "only GET is answered\n");
        answer.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        answer
    };
    let headers = answer.headers_mut();
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    answer
}

/// An answer of plain text.
#[must_use]
pub fn text(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    of_type(status, "text/plain; charset=utf-8", body)
}

/// An answer of some type.
#[must_use]
pub fn of_type(status: StatusCode, media_type: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(media_type));
    answer
}

#[cfg(test)]
mod tests;
