//! A router between the hosts, instead of a switch: each host is alone on its link, knows nobody's MTU but its own link's, and
//! learns of a smaller one on the way from packet-too-big, or never.
//!
//! ```text
//!  host1 eth0 192.0.2.1/32 ── host1 ┐                     ┌ outside ── eth0 192.0.2.253/32 outside
//!                                   ├ router 192.0.2.254 ─┤
//!  host2 eth0 192.0.2.2/32 ── host2 ┘                     └ ...
//! ```
//!
//! What the path to a host takes is the MTU of the router's route to it, not of a link: a link with two MTUs would discard at
//! its smaller end what comes from the other, without a word.

use std::net::IpAddr;

use anyhow::{Context, Result};
use husk_overlay::prefix::Family;

use super::{BEHIND_ROUTER, Cluster, GATEWAY, underlay_address};
use crate::host::UNDERLAY_INTERFACE;
use crate::netns::Netns;

/// The router's table of what it does to packets that it forwards.
const TABLE: &str = "inet path";

/// The router that joins the hosts of a cluster.
#[derive(Debug, Clone, Copy)]
pub struct Router<'a> {
    netns: &'a Netns,
}

/// Makes a router of a namespace without interfaces.
pub(super) fn prepare(netns: &Netns) -> Result<()> {
    netns.sysctl("net/ipv4/ip_forward", "1")?;
    netns.sysctl("net/ipv6/conf/all/forwarding", "1")?;
    // As many errors as there is reason for: a limit would be a second cause of what a test looks at.
    netns.sysctl("net/ipv4/icmp_ratelimit", "0")?;
    netns.sysctl("net/ipv6/icmp/ratelimit", "0")
}

impl<'a> Router<'a> {
    pub(super) fn new(netns: &'a Netns) -> Self {
        Self { netns }
    }

    /// The router's namespace. Its port to `host1` is called so.
    #[must_use]
    pub fn netns(&self) -> &'a Netns {
        self.netns
    }

    /// Gives the namespace behind a port addresses that end in `byte`, and the router the way to them.
    pub(super) fn address(
        &self,
        netns: &Netns,
        port: &str,
        byte: u8,
        before: &str,
        families: &[Family],
    ) -> Result<Vec<IpAddr>> {
        let (mut there, mut here) = (before.to_owned(), String::new());
        let mut addresses = Vec::new();
        for family in families {
            let (address, gateway) = (underlay_address(*family, byte), underlay_address(*family, GATEWAY));
            let (length, option) = if *family == Family::Ipv4 { (32, "") } else { (128, "nodad") };
            here += &format!("addr replace {gateway}/{length} dev {port} {option}\n");
            here += &format!("route replace {address}/{length} dev {port}\n");
            there += &format!("addr add {address}/{length} dev {UNDERLAY_INTERFACE} {option}\n");
            there += &format!("route replace {gateway}/{length} dev {UNDERLAY_INTERFACE}\n");
            there += &format!("route replace default via {gateway} dev {UNDERLAY_INTERFACE}\n");
            addresses.push(address);
        }
        self.netns.ip_batch(&here)?;
        netns.ip_batch(&there)?;
        Ok(addresses)
    }

    /// The way to what is beyond the outside.
    pub(super) fn lead_outside(&self, families: &[Family]) -> Result<()> {
        families.iter().try_for_each(|family| {
            let (to, via) = (Cluster::outside_address(*family), underlay_address(*family, BEHIND_ROUTER));
            self.netns.command("ip", ["route", "replace", &to.to_string(), "via", &via.to_string()]).map(drop)
        })
    }

    /// From now on the path to an address of a host or the outside takes packets of up to so many bytes, and the sender of a
    /// larger one is told so; with none it takes what the links take.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn limit(&self, to: IpAddr, mtu: Option<usize>) -> Result<()> {
        let route = self.netns.ip_json(["route", "show", &to.to_string()])?;
        let family = if to.is_ipv4() { "-4" } else { "-6" };
        let route = if to.is_ipv4() { route } else { self.netns.ip_json(["-6", "route", "show", &to.to_string()])? };
        let port = route[0]["dev"].as_str().with_context(|| format!("the router has no route to {to}"))?.to_owned();
        let to = to.to_string();
        let mut command = vec![family, "route", "replace", &to, "dev", &port];
        let gateway = route[0]["gateway"].as_str().map(str::to_owned);
        command.extend(gateway.iter().flat_map(|gateway| ["via", gateway]));
        // The kernel forwards by a route's MTU only if that is locked (`ip6_dst_mtu_maybe_forward`, include/net/ip6_route.h).
        let mtu = mtu.map(|mtu| mtu.to_string());
        command.extend(mtu.iter().flat_map(|mtu| ["mtu", "lock", mtu]));
        self.netns.command("ip", command).map(drop)
    }

    /// From now on packets of more bytes than this vanish without a word.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn swallow(&self, over: usize) -> Result<()> {
        self.rules(&format!("ip length > {over} drop\nip6 length > {} drop", over - 40))
    }

    /// From now on every packet vanishes with this probability.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn lose(&self, per_mille: u32) -> Result<()> {
        self.rules(&format!("numgen random mod 1000 < {per_mille} drop"))
    }

    /// All packets that the links take pass again; what [`Router::limit`] set stays.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn carry_all(&self) -> Result<()> {
        self.rules("")
    }

    fn rules(&self, rules: &str) -> Result<()> {
        let text = format!(
            "table {TABLE}\ndelete table {TABLE}\n\
             table {TABLE} {{\nchain forward {{\ntype filter hook forward priority 0;\n{rules}\n}}\n}}\n"
        );
        self.netns
            .program("nft")
            .args(["-f", "-"])
            .stdin(&text)
            .check()
            .map(drop)
            .with_context(|| format!("nft:\n{text}"))
    }
}
