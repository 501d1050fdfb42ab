//! Files written so that a reader sees the old content or the new, never a part of it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::OFlag;

/// Files with this prefix are halves of a write; readers of a directory pass over them.
pub const TEMPORARY_PREFIX: &str = ".husk-tmp-";

/// A temporary file of this age belongs to nobody: writing takes milliseconds, clocks of hosts differ by less.
const LEFTOVER: Duration = Duration::from_secs(86400);

/// Creates a directory and its parents; new ones get `mode`.
///
/// # Errors
/// Of the file system, with the path.
pub fn create_directory(path: &Path, mode: u32) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(mode).create(path).map_err(|error| named(path, "create", &error))
}

/// Replaces a file's content by rename.
///
/// # Errors
/// Of the file system, with the path; a disk that is full leaves the old content.
pub fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let temporary = write_temporary(path, content, mode)?;
    fs::rename(&temporary, path).map_err(|error| {
        let _ = fs::remove_file(&temporary);
        named(path, "replace", &error)
    })
}

/// Creates a file with its full content, or says that it exists. Hard links are atomic on network file systems too.
///
/// # Errors
/// Of the file system, with the path.
pub fn create_exclusively(path: &Path, content: &[u8], mode: u32) -> io::Result<bool> {
    let temporary = write_temporary(path, content, mode)?;
    let linked = fs::hard_link(&temporary, path);
    let _ = fs::remove_file(&temporary);
    match linked {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(named(path, "create", &error)),
    }
}

/// Removes a file; one that is not there is fine.
///
/// # Errors
/// Of the file system, with the path.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(named(path, "remove", &error)),
        _ => Ok(()),
    }
}

/// Opens a regular file to be read, and nothing else: a pipe or a device in its place would be waited for without end.
///
/// # Errors
/// Of the file system, or when it is no regular file; without the path.
pub fn open_regular(path: &Path) -> io::Result<File> {
    // Without this flag the opening itself waits for somebody who writes to the pipe (fifo(7)). Regular files know no waiting.
    let file = OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("it is no regular file")) }
}

/// Bytes that have to be free for the standard library to read into a text directly, rather than by way of its own buffer.
const READ_AHEAD: usize = 64;

/// Reads a regular text file of at most `limit` bytes; none if there is no such file.
///
/// # Errors
/// Of the file system, or when the file is larger, with the path.
pub fn read_text(path: &Path, limit: u64) -> io::Result<Option<String>> {
    use std::io::Read as _;
    let file = match open_regular(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(named(path, "read", &error)),
    };
    // Room for all of it and for the last read, which finds the end: a text that grows leaves copies behind, and some files
    // hold keys.
    let length = file.metadata().map_err(|error| named(path, "look at", &error))?.len().min(limit);
    let mut text = String::with_capacity(usize::try_from(length).unwrap_or_default() + READ_AHEAD);
    let read = file.take(limit + 1).read_to_string(&mut text).map_err(|error| named(path, "read", &error))?;
    if read as u64 > limit {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{} is larger than {limit} bytes", path.display()),
        ));
    }
    Ok(Some(text))
}

/// Removes what writers that were killed left in a folder; what is younger than a day may still be somebody's.
///
/// # Errors
/// When the folder cannot be listed, with the path. A file that cannot be removed stays.
pub fn remove_leftovers(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder).map_err(|error| named(folder, "list", &error))? {
        let entry = entry.map_err(|error| named(folder, "list", &error))?;
        let age = entry.metadata().and_then(|metadata| metadata.modified()).ok().and_then(|at| at.elapsed().ok());
        if entry.file_name().to_string_lossy().starts_with(TEMPORARY_PREFIX) && age.is_some_and(|age| age > LEFTOVER) {
            let _ = fs::remove_file(entry.path());
        }
    }
    Ok(())
}

/// Writes a file of a name nobody else uses: writers on other hosts may share the folder, the process id and the target.
fn write_temporary(path: &Path, content: &[u8], mode: u32) -> io::Result<PathBuf> {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(io::Error::other)?;
    let temporary = path.with_file_name(format!("{TEMPORARY_PREFIX}{:016x}-{name}", u64::from_ne_bytes(random)));
    let write = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        file.write_all(content)?;
        file.sync_all()
    };
    write().map_err(|error| {
        let _ = fs::remove_file(&temporary);
        named(path, "write", &error)
    })?;
    Ok(temporary)
}

fn named(path: &Path, operation: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("cannot {operation} {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exclusive_file_is_created_once_and_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        assert!(create_exclusively(&path, b"first", 0o644).unwrap());
        assert!(!create_exclusively(&path, b"second", 0o644).unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"first");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_is_no_regular_file_is_refused_and_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let pipe = directory.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRUSR).unwrap();
        for path in [pipe.as_path(), directory.path(), Path::new("/dev/null")] {
            let error = read_text(path, 100).unwrap_err().to_string();
            assert_eq!(error, format!("cannot read {}: it is no regular file", path.display()));
        }
        assert!(read_text(Path::new("/proc/self/status"), 1 << 16).unwrap().is_some());
    }

    #[test]
    fn a_replaced_file_has_its_mode_and_leaves_no_half() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        replace(&path, b"one", 0o600).unwrap();
        replace(&path, b"two", 0o600).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        assert!(read_text(&path, 2).is_err());
        assert_eq!(read_text(&directory.path().join("none"), 2).unwrap(), None);
    }
}
