//! Names and the directory of one cluster under test, and the sweep of what a killed run left behind.
//!
//! Every namespace and directory is called `huskt-<pid>-<counter>...`. A name whose process is gone belongs to nobody:
//! the next run removes it, with the processes that still live in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};

use crate::control_groups;
use crate::netns;
use crate::process;

const PREFIX: &str = "huskt-";

/// The file in a scope's directory that says: left in place on purpose.
const KEPT: &str = "kept";

/// Owner of the names and of the directory of one cluster; the directory goes when the scope is dropped.
#[derive(Debug)]
pub struct Scope {
    name: String,
    directory: PathBuf,
}

impl Scope {
    /// A scope with a name that no other test process and no other cluster of this process uses.
    ///
    /// The first scope of a process sweeps the leftovers of dead runs.
    ///
    /// # Errors
    /// When the process may not make namespaces, or the directory cannot be made.
    pub fn new() -> Result<Self> {
        static SWEEP: Once = Once::new();
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        netns::check_privileges()?;
        SWEEP.call_once(|| {
            if let Err(error) = sweep() {
                eprintln!("sweeping what earlier runs left: {error:#}");
            }
        });
        let name = format!("{PREFIX}{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        let directory = std::env::temp_dir().join(&name);
        fs::create_dir(&directory).with_context(|| format!("creating {}", directory.display()))?;
        Ok(Self { name, directory })
    }

    /// The prefix of every name in this scope, and the name of its directory.
    #[must_use]
    pub fn prefix(&self) -> &str {
        &self.name
    }

    /// The name of a namespace in this scope.
    #[must_use]
    pub fn name(&self, part: &str) -> String {
        format!("{}-{part}", self.name)
    }

    /// Spares what carries this name from the sweep of later runs, until [`sweep_kept`].
    ///
    /// # Errors
    /// When the mark cannot be written.
    pub fn keep(&self) -> Result<()> {
        fs::write(self.directory.join(KEPT), "").with_context(|| format!("marking {} as kept", self.name))
    }

    /// The directory that holds the hosts' private directories, their logs and the cluster's manifests.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.directory) {
            eprintln!("removing {}: {error}", self.directory.display());
        }
    }
}

/// Removes the namespaces, processes, directories and control groups of runs whose process is gone; returns the names of the
/// first and the third.
///
/// # Errors
/// When a leftover cannot be removed; the others are removed all the same.
pub fn sweep() -> Result<Vec<String>> {
    remove_all(|name| is_stale(name) && !is_kept(name))
}

/// Removes what a finished run left in place on purpose, `prefix` being that of its scope; returns the names.
///
/// # Errors
/// As [`sweep`].
pub fn sweep_kept(prefix: &str) -> Result<Vec<String>> {
    remove_all(|name| is_kept(name) && scope_of(name) == prefix)
}

/// Prefixes of the runs that were left in place on purpose.
#[must_use]
pub fn kept() -> Vec<String> {
    names(&std::env::temp_dir()).into_iter().filter(|name| is_kept(name)).collect()
}

fn remove_all(choose: impl Fn(&str) -> bool) -> Result<Vec<String>> {
    let temporary = std::env::temp_dir();
    // Both lists before the first removal: the mark that spares a namespace lies in the directory.
    let chosen = |directory| names(directory).into_iter().filter(|name| choose(name)).collect::<Vec<_>>();
    let (namespaces, directories) = (chosen(Path::new(netns::DIRECTORY)), chosen(&temporary));
    let groups = control_groups::find(&choose);
    let mut swept = Vec::new();
    let mut failure = None;
    for name in namespaces {
        match netns::remove(&name) {
            Ok(()) => swept.push(name),
            Err(error) => failure = Some(error),
        }
    }
    for name in directories {
        // Another process may sweep at the same time: what is gone already is no failure.
        match fs::remove_dir_all(temporary.join(&name)) {
            Ok(()) => swept.push(name),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => failure = Some(anyhow::Error::new(error).context(format!("removing {name}"))),
        }
    }
    // Last: the processes in them ended with the namespaces.
    if let Err(error) = control_groups::remove(&groups) {
        failure = Some(error);
    }
    failure.map_or(Ok(swept), Err)
}

/// Namespaces whose name begins with `prefix`: what a dropped cluster must not leave.
#[must_use]
pub fn namespaces(prefix: &str) -> Vec<String> {
    names(Path::new(netns::DIRECTORY)).into_iter().filter(|name| name.starts_with(prefix)).collect()
}

fn names(directory: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

fn is_stale(name: &str) -> bool {
    name.strip_prefix(PREFIX)
        .and_then(|rest| rest.split('-').next())
        .and_then(|pid| pid.parse::<u32>().ok())
        .is_some_and(|pid| !process::exists(pid))
}

/// Marked, whatever process has the owner's number by now: a kept run may be older than the numbers go round.
fn is_kept(name: &str) -> bool {
    name.starts_with(PREFIX) && std::env::temp_dir().join(scope_of(name)).join(KEPT).exists()
}

/// The prefix that a name begins with: `huskt-<pid>-<counter>`.
fn scope_of(name: &str) -> String {
    name.splitn(4, '-').take(3).collect::<Vec<_>>().join("-")
}
