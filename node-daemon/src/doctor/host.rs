//! Files of the host, which a container does not see unless they are mounted into it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::Unknown;
use crate::files;

/// Largest file that is read: configuration files are small.
const LIMIT: u64 = 1 << 20;

/// Entries of a directory that are looked at.
const MOST_ENTRIES: usize = 10_000;

/// Set in every container of a pod (Kubernetes documentation, "Discovering services"), and on no host.
const IN_POD: &str = "KUBERNETES_SERVICE_HOST";

/// The host's files below a root.
#[derive(Debug, Clone)]
pub struct HostFiles {
    root: PathBuf,
    /// The root is that of a container, and nobody said where the host's is.
    hidden: bool,
}

impl HostFiles {
    /// Files below this root. The root `/` of a pod's container is not the host's.
    #[must_use]
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_owned(), hidden: root == Path::new("/") && std::env::var_os(IN_POD).is_some() }
    }

    /// Those of a pod's container that nobody has told where the host's are.
    #[cfg(test)]
    pub(super) fn hidden() -> Self {
        Self { root: "/".into(), hidden: true }
    }

    /// The host's own, whatever the tests run in.
    #[cfg(test)]
    pub(super) fn here() -> Self {
        Self { root: "/".into(), hidden: false }
    }

    /// The host's own programs work on what these files say: the root is the host's, and this process runs in it.
    #[must_use]
    pub fn is_here(&self) -> bool {
        self.root == Path::new("/") && !self.hidden
    }

    /// Where a file of the host is found from here.
    #[must_use]
    pub fn path(&self, path: &Path) -> PathBuf {
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Where a directory is found that the daemon's container has mounted at its place, too.
    #[must_use]
    pub fn shared(&self, path: &Path) -> PathBuf {
        if self.hidden { path.to_owned() } else { self.path(path) }
    }

    /// The host's files can be seen.
    ///
    /// # Errors
    /// When not, with what to do about it.
    pub fn seen(&self) -> Result<(), Unknown> {
        if self.hidden {
            return Err(Unknown::because(
                "this container does not see the host's files: run huskctl doctor on the host, or mount the host's / and name \
                 it with --host-root",
            ));
        }
        Ok(())
    }

    /// Text of a file; none if there is no such file.
    ///
    /// # Errors
    /// When the host's files cannot be seen, or the file cannot be read.
    pub fn read(&self, path: impl AsRef<Path>) -> Result<Option<String>, Unknown> {
        self.seen()?;
        Ok(files::read_text(&self.path(path.as_ref()), LIMIT)?)
    }

    /// Whether there is something of this name.
    ///
    /// # Errors
    /// When the host's files cannot be seen, or the kernel does not say.
    pub fn exists(&self, path: impl AsRef<Path>) -> Result<bool, Unknown> {
        self.seen()?;
        Ok(self.path(path.as_ref()).try_exists()?)
    }

    /// Names of a directory's entries, sorted; none if there is no such directory.
    ///
    /// # Errors
    /// As [`Self::exists`].
    pub fn list(&self, directory: impl AsRef<Path>) -> Result<Option<Vec<String>>, Unknown> {
        self.seen()?;
        let entries = match fs::read_dir(self.path(directory.as_ref())) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(Unknown(format!("cannot list {}: {error}", directory.as_ref().display())));
            }
        };
        let mut names = Vec::new();
        for entry in entries.take(MOST_ENTRIES) {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(Some(names))
    }
}
