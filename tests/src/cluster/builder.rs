//! What a cluster should look like, and how it is laid out.

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use husk_overlay::mode::Mode;
use husk_overlay::prefix::{Family, Prefix};
use serde_json::{Value, json};

use super::{BEHIND_ROUTER, Cluster, GATEWAY, router};
use crate::netns::Netns;
use crate::scope::Scope;

/// Directory, within the scope's, that the hosts share as their cluster source.
pub(super) const MANIFESTS: &str = "cluster";

/// What a cluster should look like.
#[derive(Debug, Clone)]
pub struct ClusterBuilder {
    pub(super) mode: Mode,
    underlay: Family,
    dual_stack: bool,
    pub(super) routed: bool,
    hosts: u8,
    pub(super) mtu: usize,
    pub(super) cluster_cidrs: Vec<Prefix>,
    settings: Vec<(String, Value)>,
    pub(super) disk: Option<PathBuf>,
}

impl ClusterBuilder {
    pub(super) fn new() -> Self {
        let cidr = |address, length| Prefix::containing(address, length).ok();
        Self {
            mode: Mode::Wireguard,
            underlay: Family::Ipv4,
            dual_stack: false,
            routed: false,
            hosts: 2,
            mtu: 1500,
            settings: Vec::new(),
            disk: None,
            cluster_cidrs: [
                cidr(Ipv4Addr::new(10, 42, 0, 0).into(), 16),
                cidr(Ipv6Addr::new(0xfd42, 0, 0, 0, 0, 0, 0, 0).into(), 48),
            ]
            .into_iter()
            .flatten()
            .collect(),
        }
    }

    /// The mode of every host; WireGuard by default.
    #[must_use]
    pub fn mode(mut self, mode: Mode) -> Self {
        self.mode = mode;
        self
    }

    /// The family that carries the tunnels, and the only one of the underlay except in direct mode; IPv4 by default.
    #[must_use]
    pub fn underlay(mut self, family: Family) -> Self {
        self.underlay = family;
        self
    }

    /// Gives the underlay both families, whatever the mode.
    #[must_use]
    pub fn dual_stack(mut self) -> Self {
        self.dual_stack = true;
        self
    }

    /// Joins the hosts by a router instead of a switch, see [`Router`](super::Router): each is alone on its link. Not for direct
    /// mode, which wants all of them on one.
    #[must_use]
    pub fn routed(mut self) -> Self {
        self.routed = true;
        self
    }

    /// The number of hosts; two by default.
    #[must_use]
    pub fn hosts(mut self, hosts: u8) -> Self {
        self.hosts = hosts;
        self
    }

    /// The MTU of the underlay; 1500 by default.
    #[must_use]
    pub fn mtu(mut self, mtu: usize) -> Self {
        self.mtu = mtu;
        self
    }

    /// The bundled WireGuard device also on a kernel that has its own.
    #[must_use]
    pub fn userspace_wireguard(self) -> Self {
        self.set("wireguard.device", "userspace")
    }

    /// A value of every host's configuration; the key has dots, `ipsec.cipher`.
    #[must_use]
    pub fn set(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.settings.push((key.to_owned(), value.into()));
        self
    }

    /// Puts what survives a reboot, the hosts' state directories and the manifests, into this directory, and leaves it there.
    #[must_use]
    pub fn disk(mut self, directory: &Path) -> Self {
        self.disk = Some(directory.to_owned());
        self
    }

    /// The pods' address space; `10.42.0.0/16` and `fd42::/48` by default.
    #[must_use]
    pub fn cluster_cidrs(mut self, cidrs: impl IntoIterator<Item = Prefix>) -> Self {
        self.cluster_cidrs = cidrs.into_iter().collect();
        self
    }

    /// Lays the underlay and makes the hosts; nothing of Husk runs, and nothing of it has to be built.
    ///
    /// # Errors
    /// When the kernel refuses a part; what was made is removed.
    pub fn build(self) -> Result<Cluster> {
        let scope = Arc::new(Scope::new()?);
        let switch = Netns::create(&scope.name("switch"))?;
        if self.routed {
            router::prepare(&switch)?;
        } else {
            prepare_switch(&switch)?;
        }
        let manifests = self.disk.as_deref().unwrap_or(scope.directory()).join(MANIFESTS);
        fs::create_dir_all(&manifests).with_context(|| format!("making {}", manifests.display()))?;
        let outside = Netns::create(&scope.name("outside"))?;
        let mut cluster = Cluster { builder: self, hosts: Vec::new(), outside, switch, scope };
        cluster.connect(&cluster.outside, "outside", if cluster.builder.routed { BEHIND_ROUTER } else { GATEWAY })?;
        cluster.outside.ip_batch(&format!(
            "addr add {}/32 dev lo\naddr add {}/128 dev lo nodad",
            Cluster::OUTSIDE_V4,
            Cluster::OUTSIDE_V6
        ))?;
        if let Some(router) = cluster.router() {
            router.lead_outside(&cluster.families())?;
        }
        for _ in 0..cluster.builder.hosts {
            cluster.plug_in_host()?;
        }
        cluster.wait_for_ports()?;
        Ok(cluster)
    }

    /// Builds the cluster, starts every daemon and waits until all are ready and know each other.
    ///
    /// # Errors
    /// When a part cannot be made or a daemon does not become ready.
    pub fn start(self) -> Result<Cluster> {
        let cluster = self.build()?;
        cluster.start()?;
        Ok(cluster)
    }

    pub(super) fn families(&self) -> Vec<Family> {
        if self.dual_stack || self.mode == Mode::Direct { Family::ALL.to_vec() } else { vec![self.underlay] }
    }

    /// The configuration of the host of this name.
    pub(super) fn config(&self, name: &str, manifests: &Path) -> Value {
        let mut config = json!({
            "mode": self.mode.as_str(),
            "clusterCIDRs": self.cluster_cidrs.iter().map(Prefix::to_string).collect::<Vec<_>>(),
            "node": {"name": name},
            "underlay": {"family": self.underlay},
            "source": {"directory": {"path": manifests}},
            "wireguard": {"device": "auto"},
            "log": {"format": "text", "level": "info"},
        });
        for (key, value) in &self.settings {
            let place = key.split('.').fold(&mut config, |place, part| &mut place[part]);
            *place = value.clone();
        }
        config
    }
}

/// A switch forwards frames; it neither filters nor reassembles packets, and has no address.
fn prepare_switch(switch: &Netns) -> Result<()> {
    for name in ["all", "default"] {
        switch.sysctl(&format!("net/ipv6/conf/{name}/disable_ipv6"), "1")?;
    }
    for name in ["iptables", "ip6tables", "arptables"] {
        let key = format!("net/bridge/bridge-nf-call-{name}");
        if switch.run(|| Path::new("/proc/sys").join(&key).exists())? {
            switch.sysctl(&key, "0")?;
        }
    }
    switch.ip_batch("link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0\nlink set br0 up")
}
