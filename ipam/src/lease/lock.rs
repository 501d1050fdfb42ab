//! The store's lock (flock(2)): exclusive, with a bounded wait, gone with its holder.

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use super::file_name::LOCK;
use super::record;
use crate::Error;

/// How often `/proc/locks` is read before the holder counts as unseen.
const READINGS: usize = 10;

/// Locks the store in a directory.
pub(super) fn acquire(directory: &Path, wait: Duration) -> Result<File, Error> {
    let path = directory.join(LOCK);
    let started = Instant::now();
    loop {
        let file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(Error::io("open", &path))?;
        let locked = match file.try_lock() {
            Ok(()) => file,
            Err(TryLockError::WouldBlock) => {
                let inode = file.metadata().map_err(Error::io("examine", &path))?.ino();
                match queue(file, wait.saturating_sub(started.elapsed())).map_err(Error::io("lock", &path))? {
                    Some(locked) => locked,
                    None => {
                        let (path, waited) = (directory.to_owned(), started.elapsed());
                        return Err(Error::Locked { path, waited, holder: holder(inode) });
                    }
                }
            }
            Err(TryLockError::Error(error)) => return Err(Error::io("lock", &path)(error)),
        };
        // Somebody may have removed the store and begun a new one while we waited.
        if is_file_at(&locked, &path)? {
            return Ok(locked);
        }
    }
}

/// Threads of this process that stand in the queue, those included for which nobody waits any more.
static QUEUED: AtomicUsize = AtomicUsize::new(0);

/// Most of them: behind a holder that hangs for hours a daemon would collect them.
const MOST_QUEUED: usize = 16;

/// Pause between two attempts of those who find no place in the queue.
const PAUSE: Duration = Duration::from_millis(1);

/// Waits in the kernel's queue; none if the turn does not come in time.
///
/// To look every now and then would be simpler, but not fair: of a hundred pods that come at once, some would look at the
/// wrong moment for seconds. As flock(2) waits without limit, a thread does, which lets go of what nobody wants any more.
fn queue(file: File, wait: Duration) -> io::Result<Option<File>> {
    // The lock belongs to the open file, whichever descriptor of it takes it.
    let queued = file.try_clone()?;
    if QUEUED.fetch_add(1, Ordering::Relaxed) >= MOST_QUEUED {
        QUEUED.fetch_sub(1, Ordering::Relaxed);
        return poll(file, wait);
    }
    let (sender, turn) = mpsc::channel();
    let started = thread::Builder::new().name("husk-lease-lock".into()).spawn(move || {
        let locked = queued.lock().map(|()| queued);
        QUEUED.fetch_sub(1, Ordering::Relaxed);
        // A lock that comes too late is dropped, and gone, here or with the channel.
        let _ = sender.send(locked);
    });
    if started.is_err() {
        QUEUED.fetch_sub(1, Ordering::Relaxed);
        return poll(file, wait);
    }
    drop(file);
    match turn.recv_timeout(wait) {
        Ok(locked) => locked.map(Some),
        Err(RecvTimeoutError::Timeout) => Ok(None),
        Err(RecvTimeoutError::Disconnected) => Err(io::Error::other("the thread that waits for the lock ended")),
    }
}

/// Waits without a place in the queue.
fn poll(file: File, wait: Duration) -> io::Result<Option<File>> {
    let started = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(Some(file)),
            Err(TryLockError::WouldBlock) if started.elapsed() >= wait => return Ok(None),
            Err(TryLockError::WouldBlock) => thread::sleep(PAUSE),
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
}

/// True if some process holds a lock on the lease file; false for a missing file, and for what is none.
pub(super) fn is_held(path: &Path) -> Result<bool, Error> {
    let file = match record::open(path) {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::InvalidData) => return Ok(false),
        other => other.map_err(Error::io("open", path))?,
    };
    match file.try_lock_shared() {
        Ok(()) => Ok(false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(Error::io("lock", path)(error)),
    }
}

/// True if the path leads to this file; what cannot be examined is not known to be another.
pub(super) fn is_file_at(file: &File, path: &Path) -> Result<bool, Error> {
    let theirs = match fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        other => other.map_err(Error::io("examine", path))?,
    };
    let ours = file.metadata().map_err(Error::io("examine", path))?;
    Ok((ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino()))
}

/// Who holds the lock on a file, from `/proc/locks` (proc_locks(5)), for people.
fn holder(inode: u64) -> String {
    let found = || -> io::Result<Option<String>> {
        // The file is read in pieces while others lock and unlock, and may skip a line.
        let seen = (0..READINGS).find_map(|_| holder_pid(&fs::read_to_string("/proc/locks").ok()?, inode));
        let Some(pid) = seen else { return Ok(None) };
        let command = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        Ok(Some(format!("process {pid} ({})", command.trim())))
    };
    found().ok().flatten().unwrap_or_else(|| "a process that cannot be seen from here".to_owned())
}

/// The process id in a line such as `1: FLOCK  ADVISORY  WRITE 708 00:1a:8473 0 EOF`. The device is not compared: for
/// some file systems it differs from what stat(2) tells.
fn holder_pid(locks: &str, inode: u64) -> Option<u32> {
    locks.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        match fields[..] {
            [_, "FLOCK", _, "WRITE", pid, file, ..] => {
                let same = file.rsplit(':').next().and_then(|it| it.parse().ok()) == Some(inode);
                pid.parse().ok().filter(|_| same)
            }
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_holder_is_found_in_proc_locks() {
        let locks = "1: POSIX  ADVISORY  WRITE 11 00:1a:42 0 EOF\n2: FLOCK  ADVISORY  WRITE 12 00:1a:42 0 EOF\n\
                     2: -> FLOCK  ADVISORY  WRITE 13 00:1a:42 0 EOF\n";
        assert_eq!(holder_pid(locks, 42), Some(12));
        assert_eq!(holder_pid(locks, 43), None);
        assert_eq!(holder_pid("garbage\n\n1:", 42), None);
    }

    #[test]
    fn a_held_lock_is_waited_for_and_its_holder_named() {
        let directory = tempfile::tempdir().unwrap();
        let first = acquire(directory.path(), Duration::ZERO).unwrap();
        let error = acquire(directory.path(), Duration::from_millis(20)).unwrap_err();
        let Error::Locked { waited, holder, .. } = &error else { panic!("{error}") };
        assert!(*waited >= Duration::from_millis(20));
        assert!(holder.contains(&std::process::id().to_string()), "{holder}");

        let waiter = std::thread::scope(|scope| {
            let waiter = scope.spawn(|| acquire(directory.path(), Duration::from_secs(30)));
            drop(first);
            waiter.join().unwrap()
        });
        assert!(waiter.is_ok());
    }

    #[test]
    fn who_gave_up_waiting_does_not_keep_the_lock() {
        let directory = tempfile::tempdir().unwrap();
        let first = acquire(directory.path(), Duration::ZERO).unwrap();
        // More than find a place in the queue.
        for _ in 0..2 * MOST_QUEUED {
            assert!(acquire(directory.path(), Duration::from_millis(2)).is_err());
        }
        drop(first);
        // Those that gave up stand in the queue before this one, and let go when their turn comes.
        drop(acquire(directory.path(), Duration::from_secs(30)).unwrap());
        drop(acquire(directory.path(), Duration::from_secs(30)).unwrap());
    }

    #[test]
    fn everybody_gets_a_turn() {
        let directory = tempfile::tempdir().unwrap();
        let turns = || {
            for _ in 0..50 {
                drop(acquire(directory.path(), Duration::from_secs(30)).unwrap());
            }
        };
        thread::scope(|scope| (0..8).for_each(|_| drop(scope.spawn(turns))));
    }

    #[test]
    fn a_store_made_anew_is_locked_anew() {
        let directory = tempfile::tempdir().unwrap();
        let _old = acquire(directory.path(), Duration::ZERO).unwrap();
        fs::remove_file(directory.path().join(LOCK)).unwrap();
        let _new = acquire(directory.path(), Duration::ZERO).unwrap();
        assert!(matches!(acquire(directory.path(), Duration::ZERO), Err(Error::Locked { .. })));
    }
}
