//! The control socket.

use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use husk_overlay::name::InterfaceName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use zeroize::Zeroizing;

use super::device::Device;
use super::protocol::{Refusal, Request, parse};
use super::{socket_directory, socket_path};

/// Clients served at once; the next waits. Only root reaches the socket, so this bounds mistakes, not attacks.
const CLIENTS: usize = 16;

/// The longest request: some 100,000 peers.
const LONGEST_REQUEST: usize = 32 << 20;

/// The listening socket; its file goes when this is dropped.
pub(super) struct ControlSocket {
    listener: UnixListener,
    path: PathBuf,
    inode: u64,
}

impl ControlSocket {
    /// Puts the socket in place. Who calls this owns the interface, so a file found there was left by a dead process.
    pub(super) fn bind(interface: &InterfaceName) -> Result<Self> {
        socket_directory()?;
        let path = socket_path(interface);
        // Bound under another name, made private, then renamed: whoever finds the socket finds it listening and 0600.
        // Tools look for names that end in `.sock`.
        let new = path.with_extension("new");
        let bind = || -> io::Result<(UnixListener, u64)> {
            match std::fs::remove_file(&new) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let listener = UnixListener::bind(&new)?;
            std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o600))?;
            let inode = std::fs::symlink_metadata(&new)?.ino();
            std::fs::rename(&new, &path)?;
            Ok((listener, inode))
        };
        let (listener, inode) = bind().with_context(|| format!("cannot create the socket {}", path.display()))?;
        Ok(Self { listener, path, inode })
    }

    /// Serves clients; returns only with an error.
    pub(super) async fn serve(&self, device: &Arc<Device>) -> io::Error {
        let mut clients = JoinSet::new();
        loop {
            tokio::select! {
                accepted = self.listener.accept(), if clients.len() < CLIENTS => match accepted {
                    Ok((stream, _)) => {
                        clients.spawn(converse(stream, Arc::clone(device)));
                    }
                    Err(error) => return error,
                },
                Some(ended) = clients.join_next() => {
                    if let Ok(Err(error)) = ended {
                        tracing::debug!(%error, "a control client went away");
                    }
                }
            }
        }
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        if std::fs::symlink_metadata(&self.path).is_ok_and(|found| found.ino() == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Answers a client's requests until it closes.
async fn converse(mut stream: UnixStream, device: Arc<Device>) -> io::Result<()> {
    let mut received = Zeroizing::new(Vec::with_capacity(64 * 1024));
    let mut scanned = 0;
    loop {
        while let Some(length) = request_length(&received, &mut scanned) {
            let answer = answer(&received[..length], &device).await;
            stream.write_all(answer.as_bytes()).await?;
            received.drain(..length);
            scanned = 0;
        }
        // Blank lines between requests mean nothing.
        let blank = received.iter().take_while(|byte| **byte == b'\n').count();
        received.drain(..blank);
        scanned -= blank.min(scanned);
        if received.len() > LONGEST_REQUEST {
            return Err(io::Error::other("request too long"));
        }
        if stream.read_buf(&mut *received).await? == 0 {
            return Ok(());
        }
    }
}

/// Length of the first complete request, with its blank line. `scanned` remembers how far the search came, so that a
/// long request that arrives in pieces is searched once.
fn request_length(received: &[u8], scanned: &mut usize) -> Option<usize> {
    let start = scanned.saturating_sub(1);
    let found = received[start..].windows(2).position(|pair| pair == b"\n\n").map(|at| start + at + 2);
    *scanned = received.len();
    found
}

async fn answer(request: &[u8], device: &Device) -> Zeroizing<String> {
    let parsed = std::str::from_utf8(request)
        .map_err(|_| Refusal::new(nix::errno::Errno::EINVAL, "the request is not text"))
        .and_then(|text| parse(text.trim_end_matches('\n')));
    let done = match parsed {
        Ok(Request::Get) => {
            let mut text = device.describe().await;
            text.push_str("errno=0\n\n");
            return text;
        }
        Ok(Request::Set(set)) => device.set(set).await,
        Err(refusal) => Err(refusal),
    };
    let status = match done {
        Ok(()) => 0,
        Err(refusal) => {
            tracing::warn!(%refusal, errno = %refusal.errno, "refused a control request");
            -(refusal.errno as i32)
        }
    };
    Zeroizing::new(format!("errno={status}\n\n"))
}
