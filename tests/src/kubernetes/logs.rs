//! What a cluster's programs and pods have logged, brought to safety before the cluster goes.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::Kubernetes;

impl Kubernetes {
    /// The same result; an error says where the logs are.
    ///
    /// # Errors
    /// When it was one.
    pub fn with_logs<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|error| match self.save_logs() {
            Ok(directory) => error.context(format!("logs in {}", directory.display())),
            Err(other) => error.context(format!("the logs could not be saved: {other:#}")),
        })
    }

    /// Copies all logs, of programs and of pods, to a directory that stays.
    ///
    /// # Errors
    /// When a file cannot be copied.
    pub fn save_logs(&self) -> Result<PathBuf> {
        let name = self.scope().prefix().replacen("huskt", "husk-cluster-logs", 1);
        let (from, to) = (self.scope().directory(), std::env::temp_dir().join(name));
        copy_logs(from, &to).with_context(|| format!("copying logs from {} to {}", from.display(), to.display()))?;
        Ok(to)
    }
}

/// Copies the files that end in `.log` and are in a directory for logs, whatever is above them.
fn copy_logs(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from)? {
        let (entry, kind) = entry.and_then(|entry| entry.file_type().map(|kind| (entry, kind)))?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        // Containers' file systems have logs of their own, and what is in them is not ours to read.
        if kind.is_dir() && !source.ends_with("var/lib") && !source.ends_with("run") {
            copy_logs(&source, &target)?;
        } else if kind.is_file() && source.extension().is_some_and(|it| it == "log") {
            fs::create_dir_all(to)?;
            fs::copy(&source, &target)?;
        }
    }
    Ok(())
}
