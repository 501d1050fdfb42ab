//! What an earlier boot left in a run directory that is no tmpfs.

use std::path::Path;

use anyhow::{Context as _, Result};
use husk_ipam::lease::LeaseStore;

use crate::{files, keys};

/// File in the run directory that names the boot its content belongs to.
pub const BOOT_FILE: &str = "boot-id";

/// Discards the leases and the private keys of an earlier boot: the pods ended with it, and nobody would ever delete their
/// leases; what the keys protected is not known to the kernel any more, which would begin anew. Comes before the first pass,
/// when the plugin still refuses the earlier boot's `node.json` and makes no leases.
///
/// # Errors
/// Of the file system, or when the store stays locked; then the next start tries again.
pub fn enter(run_directory: &Path, boot_id: &str, leases: &LeaseStore) -> Result<()> {
    let path = run_directory.join(BOOT_FILE);
    // Damaged content is that of no boot.
    let last = match files::read_text(&path, 256) {
        Err(error) if error.kind() == std::io::ErrorKind::InvalidData => Some(String::new()),
        other => other?,
    };
    match last.as_deref().map(str::trim) {
        Some(last) if last == boot_id => return Ok(()),
        Some(_) => {
            leases.lock().and_then(|store| store.clear()).context("cannot discard the leases of an earlier boot")?;
            keys::discard(run_directory).context("cannot discard the keys of an earlier boot")?;
            tracing::info!("the host was booted: leases and keys from before are discarded");
        }
        // A run directory that is new, or one in which somebody removed this file: of keys found there nobody knows the boot.
        None => keys::discard(run_directory).context("cannot discard keys of an unknown boot")?,
    }
    Ok(files::replace(&path, format!("{boot_id}\n").as_bytes(), 0o644)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn leases_go_with_the_boot_they_were_made_in() {
        let directory = tempfile::tempdir().unwrap();
        let store = LeaseStore::new(directory.path().join("leases"), Duration::from_secs(5));
        drop(store.lock().unwrap());
        let lease = store.directory().join("0123456789abcdef_10.42.0.5_-.json");
        let key = directory.path().join("keys/esp-1.key");
        std::fs::create_dir(directory.path().join("keys")).unwrap();
        let enter = |boot_id| enter(directory.path(), boot_id, &store).unwrap();
        let leased = || {
            std::fs::write(&lease, "{").unwrap();
            std::fs::write(&key, "secret").unwrap();
        };
        leased();
        enter("first");
        assert!(lease.exists(), "nobody knows of another boot");
        assert!(!key.exists(), "nobody knows what it was used for");
        leased();
        enter("first");
        assert!(lease.exists() && key.exists(), "the daemon was restarted");
        enter("second");
        assert!(!lease.exists() && !key.exists(), "the host was booted");
        leased();
        enter("second");
        assert!(lease.exists() && key.exists());
        std::fs::write(directory.path().join(BOOT_FILE), [0xff]).unwrap();
        enter("second");
        assert!(!lease.exists());
    }
}
