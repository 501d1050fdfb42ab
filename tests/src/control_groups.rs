//! Control groups that an engine's containers are in, in whichever hierarchies this machine has.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::eventually;

/// Where hierarchies are mounted: version 2 alone here itself, those of version 1 each in a directory (cgroups(7)).
const ROOT: &str = "/sys/fs/cgroup";

/// How long it takes at most until processes that were killed have left their group.
const SOON: Duration = Duration::from_secs(5);

/// The groups at the top of a hierarchy whose name is chosen.
pub(crate) fn find(choose: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let tops = entries(Path::new(ROOT)).chain([PathBuf::from(ROOT)]);
    let groups = tops.flat_map(|top| entries(&top));
    groups.filter(|path| path.file_name().and_then(|name| name.to_str()).is_some_and(&choose)).collect()
}

/// Removes groups and those below them as soon as they are empty.
///
/// # Errors
/// When they do not become empty.
pub(crate) fn remove(groups: &[PathBuf]) -> Result<()> {
    let removed = eventually("control groups to be empty", SOON, || {
        groups.iter().for_each(|group| remove_empty(group));
        Ok(!groups.iter().any(|group| group.exists()))
    });
    removed.with_context(|| format!("removing {groups:?}"))
}

fn remove_empty(group: &Path) {
    for below in entries(group) {
        remove_empty(&below);
    }
    let _ = fs::remove_dir(group);
}

/// The directories in a directory.
fn entries(directory: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|it| it.is_dir())).map(|entry| entry.path())
}
