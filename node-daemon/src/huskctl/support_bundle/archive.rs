//! The file that is given away: entries under one folder, gzip, mode 0600, nothing overwritten.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, IsTerminal as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use flate2::Compression;
use flate2::write::GzEncoder;
use tar::{Builder, EntryType, Header};

/// Stands for standard output.
pub(super) const OUTPUT: &str = "-";

/// An archive that is being written; a file is removed if it is not finished.
pub(super) struct Archive {
    path: PathBuf,
    folder: String,
    /// Seconds since the epoch, of every entry.
    time: u64,
    builder: Option<Builder<GzEncoder<BufWriter<Place>>>>,
}

/// Where it goes.
struct Place {
    to: To,
    bytes: u64,
}

enum To {
    File(File),
    Output(io::Stdout),
}

impl io::Write for Place {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = match &mut self.to {
            To::File(file) => file.write(bytes),
            To::Output(output) => output.write(bytes),
        }?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.to {
            To::File(file) => file.sync_all(),
            To::Output(output) => output.flush(),
        }
    }
}

impl Archive {
    /// Begins a new file, or for [`OUTPUT`] on standard output.
    ///
    /// # Errors
    /// When the file exists, or cannot be made, or standard output is a terminal.
    pub(super) fn create(path: &Path, folder: &str, time: u64) -> Result<Self> {
        let to = if path == Path::new(OUTPUT) {
            let output = io::stdout();
            anyhow::ensure!(
                !output.is_terminal(),
                "standard output is a terminal, which has no use for an archive: lead it into a file, or name one with --file"
            );
            To::Output(output)
        } else {
            To::File(new_file(path)?)
        };
        let encoder = GzEncoder::new(BufWriter::new(Place { to, bytes: 0 }), Compression::default());
        Ok(Self { path: path.to_owned(), folder: folder.to_owned(), time, builder: Some(Builder::new(encoder)) })
    }

    /// Adds an entry.
    ///
    /// # Errors
    /// Of the file system: the disk may be full.
    pub(super) fn add(&mut self, name: &str, content: &[u8]) -> Result<()> {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Regular);
        header.set_size(content.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(self.time);
        let path = format!("{}/{name}", self.folder);
        let builder = self.builder.as_mut().expect("it is there until the archive is finished");
        let added = builder.append_data(&mut header, &path, content);
        added.with_context(|| format!("cannot write {name} to {}", self.name()))
    }

    /// Writes the end, and returns the bytes of the file.
    ///
    /// # Errors
    /// Of the file system.
    pub(super) fn finish(mut self) -> Result<u64> {
        let builder = self.builder.take().expect("it is there until the archive is finished");
        let finished = (|| {
            let mut file = builder.into_inner()?.finish()?;
            file.flush()?;
            Ok(file.get_ref().bytes)
        })();
        if finished.is_err() {
            self.remove();
        }
        finished.map_err(|error: io::Error| anyhow::Error::new(error).context(format!("cannot write {}", self.name())))
    }

    fn name(&self) -> String {
        if self.path == Path::new(OUTPUT) { "standard output".into() } else { self.path.display().to_string() }
    }

    /// Half an archive helps nobody.
    fn remove(&self) {
        if self.path != Path::new(OUTPUT) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn new_file(path: &Path) -> Result<File> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    file.map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => {
            anyhow::anyhow!("{} exists, and nothing is overwritten; name another with --file", path.display())
        }
        _ => anyhow::Error::new(error).context(format!(
            "cannot create {}; go to a directory with room, or name a file with --file, - for standard output",
            path.display()
        )),
    })
}

impl Drop for Archive {
    fn drop(&mut self) {
        if self.builder.take().is_some() {
            self.remove();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn an_archive_is_private_and_overwrites_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.tar.gz");
        let long = format!("deep/{}", "n".repeat(150));
        let mut archive = Archive::create(&path, "husk-support", 1_800_000_000).unwrap();
        archive.add("one.txt", b"first").unwrap();
        archive.add(&long, b"second").unwrap();
        assert_eq!(archive.finish().unwrap(), fs::metadata(&path).unwrap().len());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let mut read = tar::Archive::new(flate2::read::GzDecoder::new(File::open(&path).unwrap()));
        let entries: Vec<(String, String, u32)> = read
            .entries()
            .unwrap()
            .map(|entry| {
                let mut entry = entry.unwrap();
                let mut text = String::new();
                entry.read_to_string(&mut text).unwrap();
                (entry.path().unwrap().display().to_string(), text, entry.header().mode().unwrap())
            })
            .collect();
        let expected = [("husk-support/one.txt", "first"), (&format!("husk-support/{long}"), "second")];
        assert_eq!(entries, expected.map(|(name, text)| (name.to_owned(), text.to_owned(), 0o600)));
        let error = format!("{:#}", Archive::create(&path, "husk-support", 0).err().unwrap());
        assert!(error.contains("nothing is overwritten"), "{error}");
    }

    #[test]
    fn half_an_archive_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.tar.gz");
        let mut archive = Archive::create(&path, "husk-support", 0).unwrap();
        archive.add("one.txt", b"first").unwrap();
        drop(archive);
        assert!(!path.exists());
        let nowhere = format!("{:#}", Archive::create(Path::new("/nonexistent/a"), "f", 0).err().unwrap());
        assert!(nowhere.contains("--file"), "{nowhere}");
    }
}
