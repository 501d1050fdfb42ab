//! Kernel parameters below `/proc/sys/net`, in the network namespace of the calling thread.
//!
//! Parameters are named by their path with slashes, `net/ipv4/conf/eth0.100/rp_filter`: the form with dots is ambiguous,
//! since interface names may contain dots. Only parameters below `net/` are touched. They belong to the network namespace;
//! all others belong to the whole host.
//!
//! Nothing is remembered here. Before it changes a parameter for the first time, the daemon keeps what [`read`] found, so
//! that `cleanup` can restore it.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use husk_overlay::marks;
use serde::Serialize;

use crate::error::Error;

/// Where the kernel shows its parameters.
pub const PROC_SYS: &str = "/proc/sys";

/// Where they are set, if somewhere else.
static SET_THROUGH: OnceLock<PathBuf> = OnceLock::new();

/// From now on parameters are set through this directory: another mount of [`PROC_SYS`], for a container whose own one is
/// read-only. They are those of the caller's network namespace there as well (`net/sysctl_net.c` `net_ctl_header_lookup`).
/// The first call counts.
pub fn set_through(directory: &Path) {
    // The second daemon in one process is a test's.
    let _ = SET_THROUGH.set(directory.to_owned());
}

/// One parameter that has to change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SysctlChange {
    /// Path below `/proc/sys`.
    pub path: String,
    /// Present value; none when the kernel has no such parameter, which makes [`apply`] fail.
    pub from: Option<String>,
    /// Desired value.
    pub to: String,
}

impl fmt::Display for SysctlChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.from {
            Some(from) => write!(f, "set {} from {from:?} to {:?}", self.path, self.to),
            None => write!(f, "set {} to {:?} (the kernel has no such parameter)", self.path, self.to),
        }
    }
}

/// Present values by path; parameters that the kernel does not have are absent. Values are normalised: white space at the
/// ends is cut, any within is a single space.
///
/// # Errors
/// [`Error::Unsupported`] for a path that is not below `net/`, [`Error::File`] when a parameter exists and cannot be read.
pub fn read<P: AsRef<str>>(paths: impl IntoIterator<Item = P>) -> Result<BTreeMap<String, String>, Error> {
    let mut values = BTreeMap::new();
    for path in paths {
        let path = path.as_ref();
        let file = file_of("read", path)?;
        match fs::read_to_string(&file) {
            Ok(text) => {
                values.insert(path.to_owned(), normalised(&text));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(Error::File { operation: "read", path: file, source }),
        }
    }
    Ok(values)
}

/// What has to change from `actual` to `desired`. Parameters that nobody desires are left alone.
#[must_use]
pub fn diff(desired: &BTreeMap<String, String>, actual: &BTreeMap<String, String>) -> Vec<SysctlChange> {
    let mut changes = Vec::new();
    for (path, to) in desired {
        let (from, to) = (actual.get(path), normalised(to));
        if from != Some(&to) {
            changes.push(SysctlChange { path: path.clone(), from: from.cloned(), to });
        }
    }
    changes
}

/// Makes a change.
///
/// # Errors
/// As [`write()`].
pub fn apply(change: &SysctlChange) -> Result<(), Error> {
    match write(&change.path, &change.to) {
        // The pod has just gone, and its parameters with it.
        Err(Error::Unsupported { .. }) if marks::is_pod_parameter(&change.path) && !exists(&change.path) => Ok(()),
        other => other,
    }
}

fn exists(path: &str) -> bool {
    Path::new(PROC_SYS).join(path).exists()
}

impl SysctlChange {
    /// True if it lets the host forward packets from one interface to another.
    #[must_use]
    pub fn turns_forwarding_on(&self) -> bool {
        is_forwarding(&self.path) && self.to != "0"
    }

    /// Does to `values` what the kernel would do, for fakes.
    pub fn apply_to(&self, values: &mut BTreeMap<String, String>) {
        values.insert(self.path.clone(), self.to.clone());
    }
}

/// Sets one parameter.
///
/// # Errors
/// [`Error::Unsupported`] when the kernel has no such parameter, the path is not below `net/`, or `/proc/sys` is mounted
/// read-only; [`Error::File`] when the value is refused.
pub fn write(path: &str, value: &str) -> Result<(), Error> {
    let file = file_of("set", path)?;
    let through = SET_THROUGH.get().zip(file.strip_prefix(PROC_SYS).ok());
    let file = through.map_or_else(|| file.clone(), |(root, below)| root.join(below));
    // Nothing is created: below /proc that would fail with a misleading error.
    let outcome = fs::OpenOptions::new().write(true).open(&file).and_then(|mut open| {
        // The kernel takes a value from a single write only.
        io::Write::write_all(&mut open, value.as_bytes())
    });
    outcome.map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => unsupported(
            "set",
            path,
            "the kernel has no such parameter: the feature is not built in, or the interface is gone",
            "nothing if the interface is gone; otherwise load the module of the feature (ipv6 for net/ipv6)",
        ),
        io::ErrorKind::ReadOnlyFilesystem => {
            let remedy =
                "mount /proc/sys/net of the host into the container, and name the mount's parent in HUSK_PROC_SYS";
            unsupported("set", path, "/proc/sys is mounted read-only", remedy)
        }
        _ => Error::File { operation: "write", path: file, source },
    })
}

fn unsupported(operation: &'static str, path: &str, reason: &str, remedy: &'static str) -> Error {
    Error::Unsupported { operation, object: format!("kernel parameter {path}"), reason: reason.to_owned(), remedy }
}

/// The file of a parameter, after checking that it lies where Husk may go.
fn file_of(operation: &'static str, path: &str) -> Result<PathBuf, Error> {
    let parts: Vec<&str> = path.split('/').collect();
    let plain = |part: &&str| !matches!(*part, "" | "." | "..") && part.bytes().all(|byte| byte.is_ascii_graphic());
    if parts.first() == Some(&"net") && parts.len() > 1 && parts.iter().all(plain) {
        Ok(Path::new(PROC_SYS).join(path))
    } else {
        let remedy = "name a parameter below net/, with slashes";
        Err(unsupported(operation, path, "only parameters below net/ are Husk's to touch", remedy))
    }
}

/// True for a parameter that decides whether packets are forwarded.
pub(crate) fn is_forwarding(path: &str) -> bool {
    matches!(path.rsplit('/').next(), Some("ip_forward" | "forwarding" | "mc_forwarding"))
}

fn normalised(value: &str) -> String {
    value.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netns::Netns;
    use std::process::Command;

    fn parameters(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(path, value)| ((*path).to_owned(), (*value).to_owned())).collect()
    }

    fn read_of(desired: &BTreeMap<String, String>) -> BTreeMap<String, String> {
        read(desired.keys()).unwrap()
    }

    #[test]
    fn parameters_round_trip_in_the_calling_threads_namespace() {
        let here = read(["net/ipv4/ip_forward"]).unwrap();
        Netns::new_unnamed()
            .unwrap()
            .run_in(|| {
                // An interface whose name has a dot in it.
                let made = Command::new("ip").args(["link", "add", "husk.1", "type", "bridge"]).status().unwrap();
                assert!(made.success());
                let desired = parameters(&[
                    ("net/ipv4/ip_forward", "1"),
                    ("net/ipv4/conf/husk.1/rp_filter", "2"),
                    ("net/ipv4/ip_local_port_range", "20000 30000"),
                ]);
                let changes = diff(&desired, &read_of(&desired));
                assert_eq!(changes.len(), 3, "{changes:?}");
                changes.iter().for_each(|change| apply(change).unwrap());
                assert_eq!(read_of(&desired), desired);
                assert_eq!(diff(&desired, &read_of(&desired)), []);
            })
            .unwrap();
        assert_eq!(read(["net/ipv4/ip_forward"]).unwrap(), here);
    }

    #[test]
    fn a_parameter_the_kernel_lacks_is_an_error_of_its_own() {
        let desired = parameters(&[("net/ipv4/conf/no-such-if/rp_filter", "0")]);
        let changes = diff(&desired, &read_of(&desired));
        assert_eq!(changes[0].from, None);
        let error = apply(&changes[0]).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains("net/ipv4/conf/no-such-if/rp_filter"), "{error}");
    }

    #[test]
    fn a_refused_value_names_the_file() {
        Netns::new_unnamed()
            .unwrap()
            .run_in(|| {
                let desired = parameters(&[("net/ipv4/conf/all/rp_filter", "x"), ("net/ipv4/ip_forward", "1")]);
                let changes = diff(&desired, &read_of(&desired));
                let results: Vec<_> = changes.iter().map(apply).collect();
                let error = results[0].as_ref().unwrap_err().to_string();
                assert!(error.contains("/proc/sys/net/ipv4/conf/all/rp_filter"), "{error}");
                assert!(results[1].is_ok());
                assert_eq!(read(["net/ipv4/ip_forward"]).unwrap()["net/ipv4/ip_forward"], "1");
            })
            .unwrap();
    }

    #[test]
    fn paths_elsewhere_are_refused() {
        for path in [
            "kernel/hostname",
            "net",
            "net/",
            "/net/ipv4/ip_forward",
            "net/../kernel/hostname",
            "net/./ipv4/ip_forward",
            "net//ipv4",
            "net/ipv4/a b",
            "",
        ] {
            assert!(matches!(read([path]), Err(Error::Unsupported { .. })), "{path}");
            assert!(matches!(write(path, "1"), Err(Error::Unsupported { .. })), "{path}");
        }
    }

    #[test]
    fn only_turning_forwarding_on_counts_as_such() {
        let change = |path: &str, to: &str| SysctlChange { path: path.to_owned(), from: None, to: to.to_owned() };
        for path in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding", "net/ipv4/conf/eth0/forwarding"] {
            assert!(change(path, "1").turns_forwarding_on(), "{path}");
            assert!(!change(path, "0").turns_forwarding_on(), "{path}");
        }
        assert!(!change("net/ipv6/conf/eth0/accept_ra", "2").turns_forwarding_on());
        assert!(!change("net/ipv4/ip_forward_use_pmtu", "1").turns_forwarding_on());
    }

    #[test]
    fn white_space_makes_no_difference() {
        let actual = parameters(&[("net/a", "1 2")]);
        assert_eq!(diff(&parameters(&[("net/a", " 1\t2\n")]), &actual), []);
    }
}
