//! Where the programs of Kubernetes are: `hack/cluster.d/kubernetes` obtains them.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// The version that everything here is tried with.
pub const VERSION: &str = "1.20.2";

/// The variable that names a directory with other ones.
const VARIABLE: &str = "HUSK_KUBERNETES_DIR";

/// What has to be there.
const PROGRAMS: [&str; 6] =
    ["kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl"];

/// The directory of the programs: `HUSK_KUBERNETES_DIR`, or the one in the cache.
///
/// # Errors
/// When one is missing; the error says how to get it.
pub(super) fn find() -> Result<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let cache = || -> Result<OsString> {
        let home = || set("HOME").map(|home| Path::new(&home).join(".cache").into_os_string());
        set("XDG_CACHE_HOME").or_else(home).context("neither HOME nor XDG_CACHE_HOME is set")
    };
    let directory = match set(VARIABLE) {
        Some(directory) => PathBuf::from(directory),
        None => Path::new(&cache()?).join("husk").join(format!("kubernetes-{VERSION}")),
    };
    check(directory)
}

/// The same directory, if all of the programs are there.
pub(super) fn check(directory: PathBuf) -> Result<PathBuf> {
    let missing: Vec<_> = PROGRAMS.into_iter().filter(|name| !directory.join(name).is_file()).collect();
    ensure!(
        missing.is_empty(),
        "{} lacks {}: run hack/cluster.d/kubernetes, which obtains Kubernetes {VERSION}, or set {VARIABLE} to a directory \
         that has them",
        directory.display(),
        missing.join(", ")
    );
    Ok(directory)
}
