//! What the loop leaves for others to read, and what it keeps for the next daemon.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use husk_overlay::endpoint::Endpoints;
use husk_overlay::ipc::NodeFile;
use husk_overlay::issue::Issue;
use husk_overlay::kernel::Map;
use husk_overlay::name::InterfaceName;
use husk_policy::cluster::Cluster;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::files;

/// Largest snapshot file in bytes that is read back.
const LARGEST_SNAPSHOT: u64 = 64 << 20;

/// Least time between two writes of the last snapshot; a write that took long is followed by ten times that.
const PACE: Duration = Duration::from_millis(20);

/// The same for the objects of policy, which have megabytes in a large cluster.
const SLOW_PACE: Duration = Duration::from_secs(1);

/// State after a pass.
#[derive(Debug, Clone, Default)]
pub struct State {
    /// Pods can be added.
    pub ready: bool,
    /// Why not.
    pub reason: Option<String>,
    /// The daemon's word to the plugin, as it stands in `node.json`.
    pub node_file: Option<NodeFile>,
    /// What is wrong.
    pub issues: Vec<Issue>,
    /// What the kernel's maps held of port mappings when the pass ended, by name; nothing if that is not known.
    pub host_ports: Arc<BTreeMap<String, Map>>,
    /// Host interfaces of pods that the pass saw before it looked at the leases, with their indices.
    pub pod_interfaces: Arc<BTreeMap<InterfaceName, u32>>,
    /// Policy is enforced, so that pods have to wait for it.
    pub enforces_policy: bool,
    /// Pods whose policy is in the kernel, with the leases it was made for; none while that is not known.
    pub enforced: Option<Arc<Endpoints>>,
    /// The cluster as that policy was made from it.
    pub cluster: Arc<Cluster>,
    /// Passes so far; zero means that the daemon has just started.
    pub passes: u64,
}

/// Reads what was kept; what cannot be read is as good as nothing.
pub(super) fn load<T: DeserializeOwned>(path: &Path) -> Option<T> {
    match files::read_text(path, LARGEST_SNAPSHOT) {
        Ok(text) => {
            let value = serde_json::from_str(&text?);
            value
                .inspect_err(|error| tracing::warn!(file = %path.display(), %error, "the last snapshot is ignored"))
                .ok()
        }
        Err(error) => {
            tracing::warn!(%error, "the last snapshot is ignored");
            None
        }
    }
}

/// Keeps what the source said last for a start without it, on a thread of its own: writing it to a disk takes longer than a
/// pass of the loop. Of many changes in a row the newest is written, with [`PACE`] between two writes.
pub(super) struct Keeper<T> {
    shared: Arc<Shared<T>>,
}

struct Shared<T> {
    slot: Mutex<Slot<T>>,
    changed: Condvar,
}

struct Slot<T> {
    /// What is to be written.
    newest: Option<T>,
    /// Snapshots given so far, and how many of them were written, tried in vain, or outdone by a newer one.
    given: u64,
    done: u64,
    /// Somebody waits: the pace does not count.
    urgent: bool,
    stopping: bool,
}

impl<T> Default for Shared<T> {
    fn default() -> Self {
        let slot = Slot { newest: None, given: 0, done: 0, urgent: false, stopping: false };
        Self { slot: Mutex::new(slot), changed: Condvar::new() }
    }
}

impl<T> Shared<T> {
    fn slot(&self) -> MutexGuard<'_, Slot<T>> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Serialize + Send + 'static> Keeper<T> {
    /// Starts to keep values in a file; none if there is no thread to be had.
    pub(super) fn start(path: PathBuf) -> Option<Self> {
        let write = move |value: &T| files::replace(&path, &serde_json::to_vec(value)?, 0o600);
        let started = Self::with(PACE, write);
        started
            .inspect_err(|error| tracing::warn!(%error, "the last snapshot is not kept: there is no thread to be had"))
            .ok()
    }

    /// As [`Self::start`], for what is large and changes all the time. Where it cannot be written, what was written before is
    /// removed: nothing is better than what is not true any more.
    pub(super) fn start_slowly(path: PathBuf) -> Option<Self> {
        let write = move |value: &T| {
            let written = files::replace(&path, &serde_json::to_vec(value)?, 0o600);
            if written.is_err() {
                // It works on a full disk, too; what stays is read by nobody until the next start.
                drop(files::remove(&path));
            }
            written
        };
        Self::with(SLOW_PACE, write)
            .inspect_err(
                |error| tracing::warn!(%error, "the objects of policy are not kept: there is no thread to be had"),
            )
            .ok()
    }

    fn with(pace: Duration, write: impl FnMut(&T) -> io::Result<()> + Send + 'static) -> io::Result<Self> {
        let shared = Arc::<Shared<T>>::default();
        let theirs = Arc::clone(&shared);
        thread::Builder::new().name("husk-snapshot".into()).spawn(move || write_all(&theirs, pace, write))?;
        Ok(Self { shared })
    }
}

impl<T> Keeper<T> {
    /// Has a value written soon, unless a newer one comes first.
    pub(super) fn keep(&self, value: T) {
        let mut slot = self.shared.slot();
        slot.newest = Some(value);
        slot.given += 1;
        self.shared.changed.notify_all();
    }

    /// Waits until the newest snapshot was written, or could not be.
    pub(super) fn flush(&self) {
        self.flush_within(Duration::MAX);
    }

    /// As [`Self::flush`], but not for ever; false if the newest snapshot is still neither.
    pub(super) fn flush_within(&self, limit: Duration) -> bool {
        let mut slot = self.shared.slot();
        let given = slot.given;
        slot.urgent = true;
        self.shared.changed.notify_all();
        let waited = self.shared.changed.wait_timeout_while(slot, limit, |slot| slot.done < given);
        let (mut slot, _) = waited.unwrap_or_else(PoisonError::into_inner);
        slot.urgent = false;
        slot.done >= given
    }
}

impl<T> Drop for Keeper<T> {
    fn drop(&mut self) {
        self.shared.slot().stopping = true;
        self.shared.changed.notify_all();
    }
}

fn write_all<T>(shared: &Shared<T>, pace: Duration, mut write: impl FnMut(&T) -> io::Result<()>) {
    let mut failed = false;
    loop {
        let idle = shared.changed.wait_while(shared.slot(), |slot| slot.newest.is_none() && !slot.stopping);
        let mut slot = idle.unwrap_or_else(PoisonError::into_inner);
        let Some(value) = slot.newest.take() else { return };
        let given = slot.given;
        drop(slot);
        let begun = Instant::now();
        let written = write(&value);
        let rest = pace.max(begun.elapsed().saturating_mul(10));
        if let (Err(error), false) = (&written, failed) {
            tracing::warn!(%error, "the last snapshot cannot be kept; a restart without the source will know an older one");
        }
        failed = written.is_err();
        let mut slot = shared.slot();
        slot.done = given;
        if failed && !slot.stopping {
            // The disk may have room again next time.
            slot.newest.get_or_insert(value);
        }
        shared.changed.notify_all();
        let hurry = |slot: &Slot<T>| slot.stopping || (slot.urgent && slot.done < slot.given);
        let rested = shared.changed.wait_timeout_while(slot, rest, |slot| !hurry(slot));
        drop(rested.unwrap_or_else(PoisonError::into_inner));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use husk_overlay::name::NodeName;
    use husk_overlay::record::Snapshot;

    use super::*;

    const LONG: Duration = Duration::from_secs(3600);
    const PATIENCE: Duration = Duration::from_secs(10);

    /// A keeper whose disk takes each write only when the test says how it ends; and what it was asked to write.
    fn slow_disk(pace: Duration) -> (Keeper<Snapshot>, Receiver<Snapshot>, Sender<io::Result<()>>) {
        let (asked, writes) = channel();
        let (outcome, outcomes) = channel::<io::Result<()>>();
        let write = move |snapshot: &Snapshot| {
            asked.send(snapshot.clone()).map_err(io::Error::other)?;
            outcomes.recv().map_err(io::Error::other)?
        };
        (Keeper::with(pace, write).unwrap(), writes, outcome)
    }

    fn snapshot(number: u128) -> Snapshot {
        let block = "10.0.0.0/8".parse::<husk_overlay::prefix::Prefix>().unwrap().subnet(26, number).unwrap();
        Snapshot { blocks: [(block, NodeName::new("a").unwrap())].into(), ..Snapshot::default() }
    }

    #[test]
    fn who_gives_snapshots_never_waits_and_only_the_newest_is_written_next() {
        let (keeper, writes, outcome) = slow_disk(Duration::ZERO);
        keeper.keep(snapshot(0));
        assert_eq!(writes.recv_timeout(PATIENCE).unwrap(), snapshot(0));
        // The disk hangs in the first write; were it waited for, this loop would not end.
        for number in 1..1000 {
            keeper.keep(snapshot(number));
        }
        outcome.send(Ok(())).unwrap();
        assert_eq!(writes.recv_timeout(PATIENCE).unwrap(), snapshot(999));
        outcome.send(Ok(())).unwrap();
        keeper.flush();
        drop(keeper);
        assert!(writes.recv_timeout(PATIENCE).is_err(), "the thread ends, and has written nothing more");
    }

    #[test]
    fn writes_keep_their_pace_unless_the_daemon_stops() {
        let (keeper, writes, outcome) = slow_disk(LONG);
        for _ in 0..4 {
            outcome.send(Ok(())).unwrap();
        }
        keeper.keep(snapshot(0));
        keeper.flush();
        assert_eq!(writes.try_iter().collect::<Vec<_>>(), [snapshot(0)]);
        keeper.keep(snapshot(1));
        keeper.keep(snapshot(2));
        assert!(writes.recv_timeout(Duration::from_millis(50)).is_err());
        keeper.flush();
        assert_eq!(writes.try_iter().collect::<Vec<_>>(), [snapshot(2)]);
        // What was not flushed is written when the keeper goes.
        keeper.keep(snapshot(3));
        drop(keeper);
        assert_eq!(writes.recv_timeout(PATIENCE).unwrap(), snapshot(3));
        assert!(writes.recv_timeout(PATIENCE).is_err());
    }

    #[test]
    fn a_write_that_fails_is_tried_again_and_holds_up_nobody() {
        let (keeper, writes, outcome) = slow_disk(Duration::ZERO);
        outcome.send(Err(io::ErrorKind::StorageFull.into())).unwrap();
        keeper.keep(snapshot(0));
        keeper.flush();
        outcome.send(Ok(())).unwrap();
        assert_eq!(writes.recv_timeout(PATIENCE).unwrap(), snapshot(0));
        assert_eq!(writes.recv_timeout(PATIENCE).unwrap(), snapshot(0));
        keeper.flush();
    }

    #[test]
    fn what_is_kept_is_read_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("snapshot.json");
        let keeper = Keeper::start(path.clone()).unwrap();
        keeper.keep(snapshot(1));
        keeper.keep(snapshot(2));
        keeper.flush();
        assert_eq!(load::<Snapshot>(&path), Some(snapshot(2)));
    }
}
