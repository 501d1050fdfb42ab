//! What attachments left at a moment, read fast: it is asked after every interruption.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result, ensure};
use husk_overlay::marks;

use crate::host::{Host, LEASE_DIRECTORY};
use crate::pod::Pod;

/// Files of the store that stay: its lock, what spreads addresses, and addresses that rest.
fn stays(name: &str) -> bool {
    name == "lock" || name == "cursors" || name.contains(".released-")
}

/// What attachments left at a moment. Neighbours and addresses go with their interface, in the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remains {
    /// Pods' interfaces on the host.
    pub interfaces: BTreeSet<String>,
    /// The host's routes, as interface and destination.
    pub routes: BTreeSet<String>,
    /// Interfaces in the pod's namespace, without loopback.
    pub inside: BTreeSet<String>,
    /// Lease files and whatever else lies in the store and should not stay.
    pub files: BTreeSet<String>,
    /// Files in the host's run directory.
    pub run: BTreeSet<String>,
}

impl Remains {
    pub(super) fn of(host: &Host, pod: Option<&Pod>) -> Result<Self> {
        let (mut interfaces, routes) = host.netns().run(|| Ok::<_, anyhow::Error>((links()?, routes()?)))??;
        let mut inside = pod.map_or_else(|| Ok(Ok(BTreeSet::new())), |pod| pod.netns().run(links))??;
        inside.remove("lo");
        let mut files = names(host, LEASE_DIRECTORY)?;
        files.retain(|name| !stays(name));
        interfaces.retain(|name| marks::is_pod_interface(name));
        Ok(Self { interfaces, routes, inside, files, run: names(host, "/run/husk")? })
    }

    /// Addresses that lease files hold, each once.
    ///
    /// # Errors
    /// When two files hold the same.
    pub fn leased(&self) -> Result<BTreeSet<String>> {
        let mut all = BTreeSet::new();
        for file in self.files.iter().filter_map(|name| name.strip_suffix(".json")) {
            for address in file.split('_').skip(1).filter(|address| *address != "-") {
                ensure!(all.insert(address.to_owned()), "{address} is leased twice: {:?}", self.files);
            }
        }
        Ok(all)
    }
}

/// Interfaces of the calling thread's namespace.
fn links() -> Result<BTreeSet<String>> {
    let text = fs::read_to_string("/proc/thread-self/net/dev").context("reading net/dev")?;
    Ok(text.lines().filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned())).collect())
}

/// Routes of the calling thread's namespace.
fn routes() -> Result<BTreeSet<String>> {
    let (mut all, read) = (BTreeSet::new(), |name: &str| fs::read_to_string(format!("/proc/thread-self/net/{name}")));
    for line in read("route").context("reading net/route")?.lines().skip(1) {
        let fields: Vec<_> = line.split_ascii_whitespace().collect();
        all.insert(format!("{} {}/{}", fields[0], fields[1], fields[7]));
    }
    for line in read("ipv6_route").context("reading net/ipv6_route")?.lines() {
        let fields: Vec<_> = line.split_ascii_whitespace().collect();
        all.insert(format!("{} {}/{}", fields[9], fields[0], fields[1]));
    }
    Ok(all)
}

fn names(host: &Host, directory: &str) -> Result<BTreeSet<String>> {
    let directory = directory.to_owned();
    host.run(move || match fs::read_dir(&directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(BTreeSet::new()),
        other => other
            .with_context(|| format!("listing {directory}"))?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect(),
    })?
}
