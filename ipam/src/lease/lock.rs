//! The store's lock (flock(2)): exclusive, with a bounded wait, gone with its holder.

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::{Duration, Instant};

use super::file_name::LOCK;
use crate::Error;

/// Pause between two attempts. The lock is held for about a millisecond, and flock(2) cannot wait for a limited time.
const PAUSE: Duration = Duration::from_micros(500);

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
        match file.try_lock() {
            // Somebody may have removed the store and begun a new one while we waited.
            Ok(()) if is_file_at(&file, &path) => return Ok(file),
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                if started.elapsed() >= wait {
                    let holder = holder(&file);
                    return Err(Error::Locked { path: directory.to_owned(), waited: started.elapsed(), holder });
                }
                std::thread::sleep(PAUSE);
            }
            Err(TryLockError::Error(error)) => return Err(Error::io("lock", &path)(error)),
        }
    }
}

/// True if some process holds a lock on the file; false for a missing file.
pub(super) fn is_held(path: &Path) -> Result<bool, Error> {
    let file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        other => other.map_err(Error::io("open", path))?,
    };
    match file.try_lock_shared() {
        Ok(()) => Ok(false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(Error::io("lock", path)(error)),
    }
}

fn is_file_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(ours), Ok(theirs)) => (ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino()),
        _ => false,
    }
}

/// Who holds the lock, from `/proc/locks` (proc_locks(5)), for people.
fn holder(file: &File) -> String {
    let found = || -> io::Result<Option<String>> {
        let inode = file.metadata()?.ino();
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
    fn a_store_made_anew_is_locked_anew() {
        let directory = tempfile::tempdir().unwrap();
        let _old = acquire(directory.path(), Duration::ZERO).unwrap();
        fs::remove_file(directory.path().join(LOCK)).unwrap();
        let _new = acquire(directory.path(), Duration::ZERO).unwrap();
        assert!(matches!(acquire(directory.path(), Duration::ZERO), Err(Error::Locked { .. })));
    }
}
