//! Being the only process for a job.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::process::{Process, private_directory};

/// Who looks for the holder of the lock holds it for some microseconds.
const LOOKER_PATIENCE: Duration = Duration::from_millis(100);

/// Who was killed holds the lock until the kernel has taken its TUN device apart, which waits for other work on interfaces.
const ENDING_PATIENCE: Duration = Duration::from_secs(4);

/// Pause between two attempts.
const POLL: Duration = Duration::from_millis(1);

/// Proof that this process is the only one for its job. The lock goes with the process, however it ends.
pub(crate) struct Ownership {
    ready_line: String,
    path: PathBuf,
    file: File,
}

impl Ownership {
    /// Takes the job's lock.
    pub(crate) fn take(process: &Process) -> Result<Self> {
        private_directory(process.directory())?;
        let path = process.lock_path();
        let context = || format!("cannot lock {}", path.display());
        let started = Instant::now();
        // A holder that ends cleanly removes the file; who locks it in that moment holds a file nobody else will find, and
        // looks again.
        loop {
            let mut file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .read(true)
                .write(true)
                .mode(0o600)
                .open(&path)
                .with_context(context)?;
            match file.try_lock() {
                Ok(()) if is_at(&file, &path) => {
                    file.set_len(0).with_context(context)?;
                    file.seek(SeekFrom::Start(0)).with_context(context)?;
                    writeln!(file, "{}", std::process::id()).with_context(context)?;
                    return Ok(Self { ready_line: process.job().ready_line(), path, file });
                }
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let mut holder = String::new();
                    let _ = file.read_to_string(&mut holder);
                    let holder = holder.lines().next().unwrap_or_default().trim();
                    let patience = if is_ending(holder) { ENDING_PATIENCE } else { LOOKER_PATIENCE };
                    if started.elapsed() >= patience {
                        bail!(
                            "another process (pid {}) already serves {}; stop it first",
                            if holder.is_empty() { "unknown" } else { holder },
                            process.job().subject()
                        );
                    }
                    std::thread::sleep(POLL);
                }
                Err(TryLockError::Error(error)) => return Err(error).with_context(context),
            }
        }
    }

    /// Says that the job is being done, for those who cannot ask.
    pub(crate) fn ready(&mut self) -> Result<()> {
        writeln!(self.file, "{}", self.ready_line).with_context(|| format!("cannot write {}", self.path.display()))
    }
}

impl Drop for Ownership {
    fn drop(&mut self) {
        if is_at(&self.file, &self.path) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// True for a process that is gone or about to be: it has no memory any more, hence no arguments.
fn is_ending(pid: &str) -> bool {
    let is_number = !pid.is_empty() && pid.bytes().all(|byte| byte.is_ascii_digit());
    is_number && std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default().is_empty()
}

/// True if `path` still names this file.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(held), Ok(found)) => (held.dev(), held.ino()) == (found.dev(), found.ino()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::companion::Job;

    fn job() -> Job {
        Job::WireguardUserspace { interface: "husk-wg0".parse().unwrap() }
    }

    #[test]
    fn who_only_looks_keeps_nobody_from_starting() {
        let directory = tempfile::tempdir().unwrap();
        let process = Process::new(&job(), directory.path());
        private_directory(process.directory()).unwrap();
        let looker = File::create(process.lock_path()).unwrap();
        looker.try_lock_shared().unwrap();
        std::thread::scope(|scope| {
            let starting = scope.spawn(|| Ownership::take(&process).map(drop));
            std::thread::sleep(Duration::from_millis(10));
            drop(looker);
            starting.join().unwrap().unwrap();
        });
        let _owner = Ownership::take(&process).unwrap();
        let error = Ownership::take(&process).err().unwrap().to_string();
        assert!(error.contains(&format!("pid {}", std::process::id())), "{error}");
    }

    #[test]
    fn who_was_killed_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let process = Process::new(&job(), directory.path());
        private_directory(process.directory()).unwrap();
        let mut killed = File::create(process.lock_path()).unwrap();
        killed.lock().unwrap();
        let mut gone = std::process::Command::new("true").spawn().unwrap();
        gone.wait().unwrap();
        writeln!(killed, "{}", gone.id()).unwrap();
        std::thread::scope(|scope| {
            let starting = scope.spawn(|| Ownership::take(&process).map(drop));
            std::thread::sleep(LOOKER_PATIENCE * 2);
            drop(killed);
            starting.join().unwrap().unwrap();
        });
    }
}
