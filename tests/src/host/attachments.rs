//! What there is of pods on a host: leases, the host's ends of their interfaces, the routes to them.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use husk_overlay::marks::{ROUTE_PROTOCOL, is_pod_interface};
use husk_overlay::prefix::Prefix;
use nix::mount::{MntFlags, umount2};
use serde_json::Value;

use super::{Host, UNDERLAY_INTERFACE};
use crate::pod::Pod;

/// Where a host's leases are, as the host sees it.
pub const LEASE_DIRECTORY: &str = "/run/husk/leases";

/// The file a lease is written to before it has its name, in the directory of leases.
const HALF_WRITTEN: &str = "new";

impl Host {
    /// Path, from outside, of the directory of leases.
    #[must_use]
    pub fn lease_directory(&self) -> PathBuf {
        self.file(LEASE_DIRECTORY)
    }

    /// The files that are leases by their names, in order.
    ///
    /// # Errors
    /// When there is no directory of leases, which the daemon makes.
    pub fn leases(&self) -> Result<Vec<PathBuf>> {
        let directory = self.lease_directory();
        let mut leases = Vec::new();
        for entry in fs::read_dir(&directory).with_context(|| format!("listing {}", directory.display()))? {
            let path = entry?.path();
            if path.extension().is_some_and(|it| it == "json") {
                leases.push(path);
            }
        }
        leases.sort();
        Ok(leases)
    }

    /// The host's ends of pods' interfaces: every end of a veth pair but the underlay's, whatever its name.
    ///
    /// # Errors
    /// When the links cannot be listed.
    pub fn pod_interfaces(&self) -> Result<Vec<String>> {
        let links = self.netns().ip_json(["link", "show", "type", "veth"])?;
        let names = links.as_array().into_iter().flatten().filter_map(|link| link["ifname"].as_str());
        Ok(names.filter(|name| *name != UNDERLAY_INTERFACE).map(str::to_owned).collect())
    }

    /// Husk's routes over the host's ends of pods' interfaces, as `ip` prints them.
    ///
    /// # Errors
    /// When the routes cannot be listed.
    pub fn pod_routes(&self) -> Result<Vec<String>> {
        let protocol = ROUTE_PROTOCOL.to_string();
        let to_pod = |line: &&str| {
            let device = line.split_whitespace().skip_while(|word| *word != "dev").nth(1);
            device.is_some_and(is_pod_interface)
        };
        let mut routes = Vec::new();
        for family in ["-4", "-6"] {
            let text = self.ip([family, "route", "show", "table", "all", "proto", &protocol])?;
            routes.extend(text.lines().filter(to_pod).map(str::to_owned));
        }
        Ok(routes)
    }

    /// What of pods is on the host: leases, half-written ones, interfaces and routes.
    ///
    /// # Errors
    /// When one of them cannot be listed.
    pub fn residue(&self) -> Result<Vec<String>> {
        let half_written = self.lease_directory().join(HALF_WRITTEN);
        let files = self.leases()?.into_iter().chain(half_written.exists().then_some(half_written));
        let mut left: Vec<String> = files.map(|path| path.display().to_string()).collect();
        left.extend(self.pod_interfaces()?);
        left.extend(self.pod_routes()?);
        Ok(left)
    }

    /// The blocks that the host serves pods from, as the daemon tells the plugin.
    ///
    /// # Errors
    /// When the daemon has told nothing.
    pub fn blocks(&self) -> Result<BTreeSet<Prefix>> {
        let path = self.file("/run/husk/node.json");
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let node: Value = serde_json::from_str(&text).with_context(|| format!("parsing {}", path.display()))?;
        let blocks = node["blocks"].as_array().context("no blocks in node.json")?.iter();
        blocks.map(|block| Ok(block.as_str().unwrap_or_default().parse()?)).collect()
    }

    /// Name of the host's end of the pod that has an IPv4 address, as the daemon has it.
    ///
    /// # Errors
    /// When no pod has it, or the daemon does not answer.
    pub fn interface_of(&self, address: &str) -> Result<String> {
        let ipam = self.huskctl_json(["ipam", "show"])?;
        let lease = ipam["leases"].as_array().into_iter().flatten().find(|lease| lease["addresses"]["ipv4"] == address);
        let interface = lease.and_then(|lease| lease["hostInterface"].as_str());
        Ok(interface.with_context(|| format!("no lease of {address}: {ipam:#}"))?.to_owned())
    }

    /// What a runtime that crashed leaves: the pod's namespace is gone, as the host sees it, and nobody has said DEL.
    ///
    /// # Errors
    /// When it cannot be unmounted.
    pub fn forget_namespace(&self, pod: &Pod) -> Result<()> {
        let path = pod.netns().path();
        self.run(|| umount2(&path, MntFlags::MNT_DETACH))?.with_context(|| format!("unmounting {}", path.display()))
    }
}
