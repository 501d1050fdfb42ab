//! STATUS when ADD cannot be served: 50 with the reason. (51, encryption that is not available, is `esp_missing`'s.)

use anyhow::{Context, Result, ensure};
use husk_tests::runtime::{Attachment, Network, refusal};
use husk_tests::{Cluster, Mode, Pod, Signal};
use serde_json::json;

fn network(cluster: &Cluster) -> Result<Network<'_>> {
    let host = cluster.host(1);
    Network::read(host, &serde_json::from_str(&std::fs::read_to_string(host.conflist_path())?)?, "1.1.0")
}

fn sandbox(cluster: &Cluster, name: &str) -> Result<(Pod, Attachment)> {
    let pod = cluster.host(1).sandbox(name)?;
    let attachment = Attachment::new(name, "eth0", pod.netns());
    Ok((pod, attachment))
}

/// A cluster of one host with IPv4 pods only, whose address space is this.
fn cluster(cidr: &str, block_length: u8) -> Result<Cluster> {
    let builder = Cluster::builder().mode(Mode::Vxlan).hosts(1).cluster_cidrs([cidr.parse()?]);
    builder.set("blockLengths", json!({"ipv4": block_length})).set("ipam.coolDown", 1).start()
}

#[test]
fn a_daemon_that_does_not_run() -> Result<()> {
    let cluster = cluster("10.42.0.0/24", 26)?;
    let network = network(&cluster)?;
    let (_pod, mut attachment) = sandbox(&cluster, "before")?;
    network.status()?;
    network.add(&mut attachment)?;
    cluster.host(1).stop_daemon(Signal::SIGKILL)?;
    let refused = refusal(network.status())?;
    ensure!(refused.outcome.error_code() == Some(50), "{refused}");
    ensure!(refused.to_string().contains("huskd is not running"), "{refused}");
    // STATUS keeps nobody from the other commands.
    let (_late_pod, mut late) = sandbox(&cluster, "late")?;
    let refused = refusal(network.add(&mut late))?;
    ensure!(refused.outcome.error_code() == Some(11), "{refused}");
    network.check(&attachment)?;
    network.del(&attachment)?;
    network.gc(&[])?;
    cluster.host(1).start_daemon()?;
    cluster.host(1).wait_ready()?;
    network.status()?;
    network.add(&mut late)?;
    network.del(&late)
}

#[test]
fn no_address_left() -> Result<()> {
    // Two blocks of eight addresses, of the first of which one is the node's own.
    let cluster = cluster("10.42.0.0/28", 29)?;
    let network = network(&cluster)?;
    let blocks = || -> Result<usize> {
        let report = cluster.host(1).huskctl_json(["ipam", "show"])?;
        Ok(report["blocks"].as_array().context("no blocks")?.len())
    };
    let mut pods = Vec::new();
    for number in 0..15 {
        network.status().with_context(|| format!("with {number} pods"))?;
        // The other block is claimed by the ADD that needs it, not by asking.
        ensure!(blocks()? == if number <= 7 { 1 } else { 2 }, "{} blocks for {number} pods", blocks()?);
        let (pod, mut attachment) = sandbox(&cluster, &format!("pod{number}"))?;
        network.add(&mut attachment).with_context(|| format!("pod {number}"))?;
        pods.push((pod, attachment));
    }
    let refused = refusal(network.status())?;
    ensure!(refused.outcome.error_code() == Some(50), "{refused}");
    for said in ["no IPv4 pod address is left", "default-ipv4 10.42.0.0/28: 2 of 2 blocks taken", "enlarge a pool"] {
        ensure!(refused.to_string().contains(said), "no {said:?} in {refused}");
    }
    let (_pod, mut more) = sandbox(&cluster, "more")?;
    let refused = refusal(network.add(&mut more))?;
    ensure!(refused.outcome.error_code() == Some(100), "{refused}");

    let (_, first) = pods.first().context("no pods")?;
    network.del(first)?;
    network.status().context("after a pod has gone")?;
    network.add(&mut more)?;
    ensure!(refusal(network.status())?.outcome.error_code() == Some(50));
    Ok(())
}
