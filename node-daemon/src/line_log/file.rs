//! A file of lines that others may rename, remove or truncate at any time.
//!
//! - Every line is one write at the end of the file (`O_APPEND`), so that lines never mix, and a file that was truncated
//!   (logrotate's `copytruncate`) goes on at its new end, without a hole.
//! - Before each line the path is looked at: if it is another file's by now, or nobody's, the file is opened anew. A line
//!   that is under way meanwhile goes to the file that was renamed: it is in one of the two.
//! - A write that was cut short, because the disk is full, is taken back, so that no reader sees half a line. Where a crash
//!   left half a line, the next one begins on a line of its own.
//! - A file that has grown too large is renamed here. So there is a bound, whatever else rotates.
//!
//! What `copytruncate` loses is what is written between its copy and its truncation, as its manual says.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use husk_overlay::config::LogLimits;
use nix::fcntl::OFlag;

use crate::files;

/// Readable for the group of the directory's owner, as logs are; it names who talks with whom.
const MODE: u32 = 0o640;

/// Mode of directories that have to be made.
const DIRECTORY_MODE: u32 = 0o750;

/// The file.
#[derive(Debug)]
pub(super) struct LineFile {
    path: PathBuf,
    limits: LogLimits,
    open: Option<File>,
}

impl LineFile {
    /// Nothing is opened before the first line.
    pub(super) fn new(path: &Path, limits: LogLimits) -> Self {
        Self { path: path.to_owned(), limits, open: None }
    }

    /// Writes a line, which has its end, or nothing of it.
    pub(super) fn write(&mut self, line: &[u8]) -> io::Result<()> {
        let named =
            |path: &Path, error: &io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        let written = self.try_write(line);
        if written.is_err() {
            // Whatever is wrong with it, the next line starts from what is there then.
            self.open = None;
        }
        written.map_err(|error| named(&self.path, &error))
    }

    fn try_write(&mut self, line: &[u8]) -> io::Result<()> {
        let mut file = self.current()?;
        let mut length = file.metadata()?.len();
        if length > 0 && length + line.len() as u64 > self.limits.bytes {
            drop(file);
            self.rotate()?;
            file = self.current()?;
            length = file.metadata()?.len();
        }
        let whole = if ends_within_a_line(&file, length)? { [b"\n", line].concat() } else { line.to_vec() };
        let written = file.write(&whole);
        self.open = Some(file);
        let file = self.open.as_ref().expect("it was put there just now");
        match written {
            Ok(count) if count == whole.len() => Ok(()),
            Ok(count) => {
                // Not if somebody has truncated it since.
                if file.metadata()?.len() == length + count as u64 {
                    file.set_len(length)?;
                }
                Err(io::ErrorKind::StorageFull.into())
            }
            Err(error) => Err(error),
        }
    }

    /// The file that has the path now.
    fn current(&mut self) -> io::Result<File> {
        if let Some(file) = self.open.take() {
            let (ours, found) = (file.metadata()?, fs::symlink_metadata(&self.path));
            if found.is_ok_and(|found| (found.dev(), found.ino()) == (ours.dev(), ours.ino())) {
                return Ok(file);
            }
        }
        if let Some(directory) = self.path.parent() {
            files::create_directory(directory, DIRECTORY_MODE)?;
        }
        // Neither a link that somebody laid there is followed, nor is a reader of a pipe waited for.
        let file = OpenOptions::new()
            .append(true)
            .read(true)
            .create(true)
            .mode(MODE)
            .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits())
            .open(&self.path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("it is no regular file"));
        }
        Ok(file)
    }

    /// Makes room: the file becomes `FILE.1`, and those before it move on by one; the oldest goes.
    fn rotate(&self) -> io::Result<()> {
        let numbered = |number: u8| {
            let mut name = self.path.clone().into_os_string();
            name.push(format!(".{number}"));
            PathBuf::from(name)
        };
        let moved = |from: &Path, to: &Path| match fs::rename(from, to) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
        if self.limits.keep == 0 {
            return files::remove(&self.path);
        }
        for number in (1..self.limits.keep).rev() {
            moved(&numbered(number), &numbered(number + 1))?;
        }
        moved(&self.path, &numbered(1))
    }
}

/// True if the last line has no end.
fn ends_within_a_line(file: &File, length: u64) -> io::Result<bool> {
    let Some(last) = length.checked_sub(1) else { return Ok(false) };
    let mut octet = [0];
    // One that was truncated meanwhile ends within no line.
    Ok(file.read_at(&mut octet, last)? == 1 && octet != *b"\n")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::os::unix::fs::PermissionsExt as _;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    const ROOMY: LogLimits = LogLimits { bytes: 1 << 30, keep: 3 };

    fn text(path: &Path) -> String {
        fs::read_to_string(path).unwrap()
    }

    #[test]
    fn a_file_that_was_renamed_or_removed_is_made_anew() {
        let directory = tempfile::tempdir().unwrap();
        let (path, old) = (directory.path().join("made/log"), directory.path().join("made/log.1"));
        let mut file = LineFile::new(&path, ROOMY);
        assert!(!path.exists(), "nothing is made before the first line");
        file.write(b"one\n").unwrap();
        file.write(b"two\n").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        fs::rename(&path, &old).unwrap();
        file.write(b"three\n").unwrap();
        assert_eq!((text(&old), text(&path)), ("one\ntwo\n".into(), "three\n".into()));
        fs::remove_file(&path).unwrap();
        file.write(b"four\n").unwrap();
        assert_eq!(text(&path), "four\n");
    }

    #[test]
    fn a_file_that_was_truncated_goes_on_without_a_hole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut file = LineFile::new(&path, ROOMY);
        file.write(b"one\n").unwrap();
        OpenOptions::new().write(true).open(&path).unwrap().set_len(0).unwrap();
        file.write(b"two\n").unwrap();
        assert_eq!(text(&path), "two\n");
    }

    #[test]
    fn its_room_is_bounded_and_the_oldest_goes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut file = LineFile::new(&path, LogLimits { bytes: 8, keep: 2 });
        for line in ["a1\n", "a2\n", "b1\n", "b2\n", "c1\n", "c2\n", "d1\n"] {
            file.write(line.as_bytes()).unwrap();
        }
        let old = |number: u8| directory.path().join(format!("log.{number}"));
        assert_eq!((text(&path), text(&old(1)), text(&old(2))), ("d1\n".into(), "c1\nc2\n".into(), "b1\nb2\n".into()));
        assert!(!old(3).exists());
        let mut none_kept = LineFile::new(&path, LogLimits { bytes: 8, keep: 0 });
        for line in ["e1\n", "e2\n", "e3\n"] {
            none_kept.write(line.as_bytes()).unwrap();
        }
        assert_eq!((text(&path), text(&old(1))), ("e2\ne3\n".into(), "c1\nc2\n".into()));
    }

    #[test]
    fn half_a_line_of_a_crash_gets_its_end() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        fs::write(&path, "whole\nha").unwrap();
        LineFile::new(&path, ROOMY).write(b"next\n").unwrap();
        assert_eq!(text(&path), "whole\nha\nnext\n");
    }

    #[test]
    fn what_is_no_file_is_refused_and_a_link_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
        LineFile::new(&path, ROOMY).write(b"x\n").unwrap_err();
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(directory.path().join("elsewhere"), &path).unwrap();
        let error = LineFile::new(&path, ROOMY).write(b"x\n").unwrap_err();
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        assert!(!directory.path().join("elsewhere").exists());
    }

    #[test]
    fn renaming_all_the_time_loses_no_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let written = AtomicBool::new(false);
        let renamed = std::thread::scope(|scope| {
            let rotation = scope.spawn(|| {
                let mut renamed = 0;
                while !written.load(Ordering::Acquire) {
                    renamed += usize::from(fs::rename(&path, directory.path().join(format!("old{renamed}"))).is_ok());
                }
                renamed
            });
            let mut file = LineFile::new(&path, ROOMY);
            (0..20_000).for_each(|number| file.write(format!("{number}\n").as_bytes()).unwrap());
            written.store(true, Ordering::Release);
            rotation.join().unwrap()
        });
        assert!(renamed > 10, "{renamed}");
        let mut found = BTreeSet::new();
        for entry in fs::read_dir(directory.path()).unwrap() {
            for line in text(&entry.unwrap().path()).lines() {
                assert!(found.insert(line.parse::<u32>().unwrap()), "{line} is there twice");
            }
        }
        assert_eq!(found.len(), 20_000);
    }
}
