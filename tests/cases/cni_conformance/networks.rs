//! Two networks in one pod, as Multus attaches them: what users expect is that the first keeps the default route, that the pod
//! is reached at the addresses of both, and that neither's end touches the other.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::probe::Echo;
use husk_tests::runtime::Attachment;
use husk_tests::{Family, Netns, eventually};
use serde_json::json;

use crate::bed::Bed;

const SOON: Duration = Duration::from_secs(5);

/// Every address of an attachment answers who asks from this namespace.
fn answers(from: &Netns, attachment: &Attachment) -> Result<()> {
    for address in attachment.addresses()? {
        let address: IpAddr = address.split('/').next().unwrap_or_default().parse()?;
        let what = format!("{} {address} to answer", attachment.ifname);
        eventually(&what, SOON, || Ok(Echo::to(address).limit(Duration::from_millis(200)).run(from)?.arrived()))?;
    }
    Ok(())
}

#[test]
fn a_second_network_beside_the_first() -> Result<()> {
    let bed = Bed::start(&Family::ALL)?;
    for version in ["0.3.1", "1.1.0"] {
        let first = bed.network(version)?;
        let second = first.named("second");
        let (pod, mut eth0) = bed.sandbox()?;
        let (peer, mut of_peer) = bed.sandbox()?;
        first.add(&mut of_peer)?;
        first.add(&mut eth0)?;
        let mut net1 = Attachment { ifname: "net1".to_owned(), cached: None, ..eth0.clone() };
        second.add(&mut net1)?;

        let routes =
            |attachment: &Attachment| attachment.cached.as_ref().map(|it| it["routes"].clone()).unwrap_or_default();
        ensure!(routes(&eth0).as_array().is_some_and(|it| it.len() == 2), "{}", routes(&eth0));
        ensure!(routes(&net1) == json!([]), "the default route is the first network's: {}", routes(&net1));
        for family in ["-4", "-6"] {
            let default = pod.netns().command("ip", [family, "route", "show", "default"])?;
            ensure!(default.lines().count() == 1 && default.contains("dev eth0"), "{default}");
        }
        for attachment in [&eth0, &net1] {
            answers(peer.netns(), attachment)?;
            answers(bed.host().netns(), attachment)?;
        }
        answers(pod.netns(), &of_peer)?;
        if first.speaks("0.4.0") {
            first.check(&eth0)?;
            second.check(&net1)?;
        }

        first.del(&eth0)?;
        answers(peer.netns(), &net1)?;
        first.add(&mut eth0)?;
        if first.speaks("1.1.0") {
            // Each network's list holds its own attachments; the other's are not in it.
            second.gc(&[])?;
            first.check(&eth0)?;
            crate::add::lacks(&pod, "net1")?;
        }
        second.del(&net1)?;
        answers(peer.netns(), &eth0)?;
        first.del(&eth0)?;
        first.del(&of_peer)?;
        bed.ensure_empty()?;
    }
    Ok(())
}

#[test]
fn as_second_network_beside_a_foreign_one() -> Result<()> {
    let bed = Bed::start(&Family::ALL)?;
    let network = bed.network("1.1.0")?;
    let (pod, eth0) = bed.sandbox()?;
    for command in [
        "link add eth0 type veth peer name other",
        "link set eth0 up",
        "link set other up",
        "address add 203.0.113.7/24 dev eth0",
        "route add default via 203.0.113.1 dev eth0",
    ] {
        pod.netns().command("ip", command.split(' '))?;
    }
    let mut net1 = Attachment { ifname: "net1".to_owned(), ..eth0 };
    let result = network.add(&mut net1)?;
    // Nobody has a default route for IPv6 yet.
    ensure!(result["routes"] == json!([{"dst": "::/0", "gw": "fe80::1"}]), "{result}");
    let default = pod.netns().command("ip", ["route", "show", "default"])?;
    ensure!(default.contains("dev eth0") && !default.contains("net1"), "{default}");
    answers(bed.host().netns(), &net1)?;
    network.check(&net1)?;

    let table = pod.netns().command("ip", ["rule", "show"])?;
    let rule = table.lines().find(|line| line.contains("lookup 72")).with_context(|| table.clone())?;
    ensure!(rule.starts_with("7200:"), "{rule}");
    network.del(&net1)?;
    bed.ensure_empty()
}
