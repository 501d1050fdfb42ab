//! When the wiring of an attachment ended: the modification time of its lease file.
//!
//! It is a time since boot like all others of the store, not one of the wall clock, which may jump. A file whose wiring never
//! ended has the wall clock's time of its making, which lies far in a future that no machine runs to.

use std::fs::{self, File, FileTimes};
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::since_boot;

/// A wiring under way: holds the lock on the lease file.
#[derive(Debug)]
pub(super) struct Wiring(File);

impl Wiring {
    /// The wiring whose lease file this is, locked.
    pub(super) fn new(lease: File) -> Self {
        Self(lease)
    }

    /// The lease file.
    pub(super) fn file(&self) -> &File {
        &self.0
    }
}

impl Drop for Wiring {
    /// Notes that the wiring ended; the lock goes afterwards, with the file.
    fn drop(&mut self) {
        let now = SystemTime::UNIX_EPOCH + since_boot();
        // Without the note the lease is as old as its making; only a collection that overlaps its ADD could take it for stale.
        let _ = self.0.set_times(FileTimes::new().set_modified(now));
    }
}

/// True if the wiring ended at `start` or later. A time after `now` is no note.
pub(super) fn ended_since(lease: &Path, start: Duration, now: Duration) -> bool {
    let modified = fs::metadata(lease).and_then(|it| it.modified()).ok();
    let ended = modified.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
    ended.is_some_and(|ended| start <= ended && ended <= now)
}
