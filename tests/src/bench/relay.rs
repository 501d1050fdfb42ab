//! Between plugin and daemon: passes requests and answers on and takes the time of each.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use husk_overlay::ipc::{LEASE_DIRECTORY, NODE_FILE, SOCKET_FILE, read_message, write_message};
use serde_json::Value;

use crate::Host;
use crate::host::lock;

/// The run directory, as the host sees it, of plugins that go through the relay.
const RUN_DIRECTORY: &str = "/run/husk/relay";

/// What was asked, and how long the answer took.
type Answers = Arc<Mutex<Vec<(String, Duration)>>>;

/// A relay that runs until the program ends.
#[derive(Debug)]
pub(super) struct Relay {
    answers: Answers,
}

impl Relay {
    /// Starts a relay to the host's daemon. Leases and node file are the daemon's own.
    pub(super) fn start(host: &Host) -> Result<Self> {
        let directory = host.file(RUN_DIRECTORY);
        fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
        for name in [LEASE_DIRECTORY, NODE_FILE] {
            symlink(Path::new("..").join(name), directory.join(name)).with_context(|| format!("linking {name}"))?;
        }
        let socket = directory.join(SOCKET_FILE);
        let listener = UnixListener::bind(&socket).with_context(|| format!("listening at {}", socket.display()))?;
        let daemon = host.file("/run/husk").join(SOCKET_FILE);
        let answers = Answers::default();
        thread::spawn({
            let answers = Arc::clone(&answers);
            move || {
                for client in listener.incoming().flatten() {
                    let (answers, daemon) = (Arc::clone(&answers), daemon.clone());
                    thread::spawn(move || pass_on(client, &daemon, &answers));
                }
            }
        });
        Ok(Self { answers })
    }

    #[allow(clippy::unused_self)]
    pub(super) fn run_directory(&self) -> &'static str {
        RUN_DIRECTORY
    }

    /// Forgets what was asked so far.
    pub(super) fn forget(&self) {
        lock(&self.answers).clear();
    }

    /// How long the answers to a kind of request took.
    pub(super) fn answers(&self, kind: &str) -> Vec<Duration> {
        lock(&self.answers).iter().filter(|(asked, _)| asked == kind).map(|(_, took)| *took).collect()
    }
}

fn pass_on(mut client: UnixStream, daemon: &PathBuf, answers: &Answers) -> std::io::Result<()> {
    let request: Value = read_message(&mut client)?;
    let started = Instant::now();
    let mut upstream = UnixStream::connect(daemon)?;
    write_message(&mut upstream, &request)?;
    let answer: Value = read_message(&mut upstream)?;
    let took = started.elapsed();
    lock(answers).push((request["request"].as_str().unwrap_or_default().to_owned(), took));
    write_message(&mut client, &answer)
}
