//! What tells that a file is still the same.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, SystemTime};

/// A file that was changed this short a time before it was read may change again without a new time stamp: file systems
/// count in ticks of some milliseconds, network file systems in seconds.
const UNSETTLED: Duration = Duration::from_secs(2);

/// What tells that a file is still the one that was parsed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    inode: u64,
    size: u64,
    modified: SystemTime,
}

impl Stamp {
    pub(super) fn of(metadata: &fs::Metadata) -> Self {
        let modified = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
        Self { inode: metadata.ino(), size: metadata.size(), modified }
    }

    /// True if a change made after `now` gives another stamp. A time in the future, by whatever clock, proves nothing.
    pub(super) fn is_settled(&self, now: SystemTime) -> bool {
        now.duration_since(self.modified).is_ok_and(|age| age > UNSETTLED)
    }
}
