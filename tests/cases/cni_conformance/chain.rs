//! The reference plugins `portmap` and `bandwidth` behind Husk's in a list, for users who chained them so far: Husk neither
//! needs nor hinders them.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result, ensure};
use husk_tests::Family;
use husk_tests::eventually;
use husk_tests::probe::{EchoServer, tcp};
use husk_tests::runtime::Network;
use serde_json::{Value, json};

use crate::bed::{Bed, SOON, host_end};

/// Where the server in the pod listens, and the host's port that leads to it.
const CONTAINER_PORT: u16 = 7000;
const HOST_PORT: u16 = 8080;

/// Bytes of one verified transfer.
const TRANSFER: u64 = 20_000;

/// The shipped list with the reference plugins behind. They get what Husk's entry no longer declares.
fn list(bed: &Bed) -> Result<Value> {
    let mut list: Value = serde_json::from_str(&std::fs::read_to_string(bed.host().conflist_path())?)?;
    let own = list["plugins"][0]["capabilities"].as_object_mut().context("no capabilities")?;
    own.retain(|capability, _| !["portMappings", "bandwidth"].contains(&capability.as_str()));
    let more = [
        json!({"type": "portmap", "capabilities": {"portMappings": true}, "snat": true}),
        json!({"type": "bandwidth", "capabilities": {"bandwidth": true}}),
    ];
    list["plugins"].as_array_mut().context("no plugins")?.extend(more);
    Ok(list)
}

/// True if the packet filter of the reference plugin has rules for the port.
fn has_rules(bed: &Bed, family: Family) -> Result<bool> {
    let program = if family == Family::Ipv4 { "iptables-save" } else { "ip6tables-save" };
    Ok(bed.host().netns().command(program, ["-t", "nat"])?.contains(&HOST_PORT.to_string()))
}

#[test]
fn reference_plugins_behind_husk() -> Result<()> {
    let bed = Bed::start(&Family::ALL)?;
    let host = bed.host();
    let mut list = list(&bed)?;
    // Debian's reference plugins know no later version.
    let network = Network::read(host, &list, "1.0.0")?;
    // The CHECK of portmap 1.1.1 looks for its rules of IPv4 among those of IPv6, too, whoever is before it.
    list["plugins"].as_array_mut().context("no plugins")?.retain(|plugin| plugin["type"] != "portmap");
    let checked = Network::read(host, &list, "1.0.0")?;
    let (pod, mut attachment) = bed.sandbox()?;
    let mappings = json!([{"hostPort": HOST_PORT, "containerPort": CONTAINER_PORT, "protocol": "tcp"}]);
    // What a pod sends is limited by an ifb device there, which not every kernel has.
    let limits = json!({"ingressRate": 20_000_000, "ingressBurst": 20_000_000});
    attachment.capabilities.extend([("portMappings".to_owned(), mappings), ("bandwidth".to_owned(), limits)]);
    let result = network.add(&mut attachment)?;
    ensure!(attachment.addresses()?.len() == 2, "{result}");
    let (near, mut neighbour) = bed.sandbox()?;
    bed.network("1.0.0")?.add(&mut neighbour)?;

    let host_end = host_end(&attachment)?;
    let limited = || -> Result<bool> {
        Ok(host.netns().command("tc", ["qdisc", "show", "dev", &host_end, "root"])?.contains("tbf"))
    };
    let _server = EchoServer::start_on(pod.netns(), SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), CONTAINER_PORT))?;
    let reached = || -> Result<()> {
        for address in attachment.addresses()? {
            let inside: IpAddr = address.split('/').next().unwrap_or_default().parse()?;
            tcp::transfer(near.netns(), SocketAddr::new(inside, CONTAINER_PORT), TRANSFER)
                .context("from pod to pod")?;
        }
        // The underlay has one family; the host's address there is what others know it by.
        let at = SocketAddr::new(host.address(Family::Ipv4)?, HOST_PORT);
        for client in [bed.cluster.outside(), near.netns(), host.netns()] {
            tcp::transfer(client, at, TRANSFER).with_context(|| format!("from {} to {at}", client.name()))?;
        }
        Ok(())
    };
    reached()?;
    ensure!(limited()?, "the limit is not there");
    ensure!(has_rules(&bed, Family::Ipv4)? && has_rules(&bed, Family::Ipv6)?);
    checked.check(&attachment)?;

    // What Husk did not make is not in its way, and it does not remove it, not even when it begins anew.
    host.restart_daemon(husk_tests::Signal::SIGKILL)?;
    host.wait_ready()?;
    eventually("Husk to have nothing to do", SOON, || Ok(host.huskctl(["diff"])?.status.code() == Some(0)))?;
    reached()?;
    ensure!(limited()?, "the limit has gone");
    checked.check(&attachment)?;

    network.del(&attachment)?;
    network.del(&attachment)?;
    ensure!(!has_rules(&bed, Family::Ipv4)? && !has_rules(&bed, Family::Ipv6)?);
    bed.network("1.0.0")?.del(&neighbour)?;
    bed.ensure_empty()
}
