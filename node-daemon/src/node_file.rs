//! The daemon's word to the plugin (`/run/husk/node.json`) and to the container runtime (the CNI network configuration).

use std::io;
use std::path::{Path, PathBuf};

use husk_overlay::config::Config;
use husk_overlay::ipc::{NODE_FILE, NodeFile};
use husk_overlay::marks;

use crate::files;

/// The CNI network configuration list. It names 1.0.0, which containerd 1.6 knows; a newer runtime takes the newest
/// version it knows from `cniVersions`.
#[must_use]
pub fn conflist(config: &Config, run_directory: &Path) -> String {
    // What a runtime passes on of what pods want; it leaves out what is not declared.
    let capabilities =
        serde_json::json!({ "bandwidth": true, "dns": true, "ips": true, "mac": true, "portMappings": true });
    let mut plugin = serde_json::json!({ "type": marks::CNI_TYPE, "capabilities": capabilities });
    if run_directory != Path::new(marks::RUN_DIRECTORY) {
        plugin["runDirectory"] = run_directory.display().to_string().into();
    }
    let list = serde_json::json!({
        "cniVersion": "1.0.0",
        "cniVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"],
        "name": config.cni.network,
        "plugins": [plugin],
    });
    format!("{list:#}\n")
}

/// Writes both files where they differ from what is there.
pub struct Writer {
    node_file: PathBuf,
    conflist_file: PathBuf,
    conflist: String,
}

impl Writer {
    /// Files below the run directory and the configured CNI directory.
    #[must_use]
    pub fn new(config: &Config, run_directory: &Path) -> Self {
        Self {
            node_file: run_directory.join(NODE_FILE),
            conflist_file: config.cni.config_directory.join(marks::CNI_CONFLIST),
            conflist: conflist(config, run_directory),
        }
    }

    /// Publishes that pods can be added.
    ///
    /// # Errors
    /// Of the file system.
    pub fn ready(&self, node: &NodeFile) -> io::Result<()> {
        let mut text = serde_json::to_vec_pretty(node)?;
        text.push(b'\n');
        if std::fs::read(&self.node_file).ok().as_deref() != Some(&text) {
            files::replace(&self.node_file, &text, 0o644)?;
        }
        if std::fs::read(&self.conflist_file).ok().as_deref() != Some(self.conflist.as_bytes()) {
            if let Some(parent) = self.conflist_file.parent() {
                files::create_directory(parent, 0o755)?;
            }
            files::replace(&self.conflist_file, self.conflist.as_bytes(), 0o644)?;
        }
        Ok(())
    }

    /// Takes back the word: ADD answers "try again later". The network configuration stays, so that the runtime goes on
    /// asking STATUS and does not fall back to another network.
    ///
    /// # Errors
    /// Of the file system.
    pub fn not_ready(&self) -> io::Result<()> {
        files::remove(&self.node_file)
    }

    /// Removes both files: Husk leaves the host.
    ///
    /// # Errors
    /// Of the file system.
    pub fn remove(&self) -> io::Result<()> {
        files::remove(&self.conflist_file)?;
        files::remove(&self.node_file)
    }
}

/// Identifies this boot: files of an earlier one in a run directory that is no tmpfs mean nothing.
///
/// # Errors
/// When procfs is not mounted.
pub fn boot_id() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}
