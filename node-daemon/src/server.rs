//! The daemon's socket: answers plugin and `huskctl`. A connection is one request and one answer.

use std::io;
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use husk_dataplane::netns::Netns;
use husk_overlay::ipc::{Request, Response, write_message};
use nix::sys::socket;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

use crate::engine::{Handle, answer};
use crate::line_log::Client;

/// How long a client may take to say what it wants. The plugin connects before it wires a pod and speaks after.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a client may take to take its answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Largest request in bytes; only answers are large.
const LARGEST_REQUEST: u32 = 64 << 10;

/// Connections served at once; more wait.
const CONNECTIONS: usize = 256;

/// Connections that wait in the kernel.
const BACKLOG: i32 = 128;

/// Listens on the socket; a socket left by an earlier daemon is replaced (the daemon's lock file says that it is gone).
///
/// # Errors
/// When the socket cannot be made.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    crate::files::remove(path)?;
    let (family, kind) = (socket::AddressFamily::Unix, socket::SockType::Stream);
    let flags = socket::SockFlag::SOCK_CLOEXEC | socket::SockFlag::SOCK_NONBLOCK;
    let unbound = socket::socket(family, kind, flags, None)?;
    // The file gets the socket's mode when it is bound (net/unix/af_unix.c `unix_bind_bsd`): there is no moment at which
    // others could connect.
    nix::sys::stat::fchmod(&unbound, nix::sys::stat::Mode::from_bits_truncate(0o600))?;
    socket::bind(unbound.as_raw_fd(), &socket::UnixAddr::new(path)?)?;
    socket::listen(&unbound, socket::Backlog::new(BACKLOG)?)?;
    UnixListener::from_std(unbound.into())
}

/// Serves until the task is dropped.
pub async fn serve(listener: UnixListener, handle: Handle) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let handle = handle.clone();
                tokio::spawn(async move {
                    if let Err(error) = converse(stream, &handle).await {
                        tracing::debug!(%error, "a client of the daemon's socket went away");
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept on the daemon's socket");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn converse(mut stream: UnixStream, handle: &Handle) -> io::Result<()> {
    let silent = |_| io::Error::new(io::ErrorKind::TimedOut, "the client sent no request");
    let response = match tokio::time::timeout(REQUEST_TIMEOUT, read_request(&mut stream)).await.map_err(silent)? {
        Ok(Request::NetworkNamespace) => network_namespace(),
        Ok(request) => {
            let credentials = stream.peer_cred().ok();
            let client = || credentials.map(|it| Client::of(it.uid(), it.pid())).unwrap_or_default();
            handle.answer_client(request, client).await
        }
        Err(error) => Response::Refused { reason: error.to_string() },
    };
    let message = framed(&response)?;
    let send = async {
        stream.write_all(&message).await?;
        stream.shutdown().await
    };
    let deaf = |_| io::Error::new(io::ErrorKind::TimedOut, "the client does not take its answer");
    tokio::time::timeout(ANSWER_TIMEOUT, send).await.map_err(deaf)?
}

/// The network namespace of the calling thread, which is that of every thread of the daemon.
fn network_namespace() -> Response {
    match Netns::current().and_then(|netns| netns.identity()) {
        Ok(identity) => answer(&identity),
        Err(error) => Response::Refused { reason: error.to_string() },
    }
}

/// The bytes of an answer; of one that is too large, those of a refusal that says so.
fn framed(response: &Response) -> io::Result<Vec<u8>> {
    let mut message = Vec::new();
    if let Err(error) = write_message(&mut message, response) {
        write_message(&mut message, &Response::Refused { reason: format!("the answer cannot be sent: {error}") })?;
    }
    Ok(message)
}

async fn read_request(stream: &mut UnixStream) -> io::Result<Request> {
    let invalid = |reason: String| io::Error::new(io::ErrorKind::InvalidData, reason);
    let length = stream.read_u32().await.map_err(|_| invalid("the client closed before it sent a request".into()))?;
    if length > LARGEST_REQUEST {
        return Err(invalid(format!("a request of {length} bytes is too large, the limit is {LARGEST_REQUEST}")));
    }
    let mut body = Vec::new();
    stream.take(u64::from(length)).read_to_end(&mut body).await?;
    if body.len() < length as usize {
        return Err(invalid(format!("the client closed within its request, {} of {length} bytes came", body.len())));
    }
    serde_json::from_slice(&body).map_err(|error| invalid(format!("the request is not understood: {error}")))
}

#[cfg(test)]
mod tests;
