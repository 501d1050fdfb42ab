//! Limits of what a pod receives and sends, measured; see `husk_overlay::bandwidth`.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::runtime::{Attachment, Network};
use husk_tests::{Cluster, Family, Mode, Pod, probe::tcp};
use serde_json::{Value, json};

/// What goes to the limited pod, and what comes from it, in bits per second.
const INGRESS: u32 = 20_000_000;
const EGRESS: u32 = 8_000_000;

/// How long is measured: long enough that what passes at once, a tenth of a second's traffic, matters little.
const TIME: Duration = Duration::from_secs(3);

/// The largest packet in bits, which a bucket has to hold.
const LEAST_BURST: u32 = 65_535 * 8;

/// What an unlimited pod gets at least: many times the limits, and little for any machine.
const UNLIMITED: f64 = 80_000_000.0;

fn pod(cluster: &Cluster, host: usize, name: &str, bandwidth: Option<Value>) -> Result<Pod> {
    let mut pod = cluster.host(host).sandbox(name)?;
    pod.spec_mut().runtime_config = bandwidth.map(|limits| json!({"bandwidth": limits}));
    pod.add()?.into_result().with_context(|| format!("ADD of {name}"))?;
    Ok(pod)
}

/// Bits per second from one pod to another.
fn goodput(from: &Pod, to: &Pod, family: Family) -> Result<f64> {
    tcp::throughput(from.netns(), to.netns(), to.address(family)?, TIME)
}

/// Goodput is less than the limit, which counts headers; what passes at once makes it a little more.
fn near(goodput: f64, limit: u32) -> bool {
    (0.6..1.25).contains(&(goodput / f64::from(limit)))
}

#[test]
fn a_pod_is_held_to_its_limits_in_both_directions_and_its_neighbour_to_none() -> Result<()> {
    let cluster = Cluster::builder().mode(Mode::Vxlan).hosts(2).start()?;
    // Bursts as the kubelet and containerd send them: "no limit".
    let limits = json!({
        "ingressRate": INGRESS, "ingressBurst": i32::MAX, "egressRate": EGRESS, "egressBurst": u32::MAX,
    });
    let (limited, free) = (pod(&cluster, 1, "limited", Some(limits))?, pod(&cluster, 1, "free", None)?);
    let far = pod(&cluster, 2, "far", None)?;
    far.await_answer_of(&limited, Duration::from_secs(5))?;
    far.await_answer_of(&free, Duration::from_secs(5))?;
    for (peer, family) in [(&far, Family::Ipv4), (&free, Family::Ipv6)] {
        let (to, from) = (goodput(peer, &limited, family)?, goodput(&limited, peer, family)?);
        println!("{} over {family}: {to:.0} bit/s to the limited pod, {from:.0} bit/s from it", peer.name());
        ensure!(near(to, INGRESS), "{to:.0} bit/s go from {} to a pod limited to {INGRESS}", peer.name());
        ensure!(near(from, EGRESS), "{from:.0} bit/s go to {} from a pod limited to {EGRESS}", peer.name());
    }
    for (from, to) in [(&free, &far), (&far, &free)] {
        let rate = goodput(from, to, Family::Ipv4)?;
        ensure!(rate > UNLIMITED, "{rate:.0} bit/s go from {} to {}, which have no limits", from.name(), to.name());
    }
    let checked = limited.check()?;
    ensure!(checked.success(), "CHECK says {}", checked.stdout);
    limited.netns().command("tc", ["qdisc", "del", "dev", "eth0", "root"])?;
    let checked = limited.check()?;
    let told = checked.json["msg"].as_str().unwrap_or_default();
    ensure!(told.contains("the limit of eth0 to 8000000 bit/s is missing"), "CHECK says {}", checked.stdout);
    ensure!(limited.del()?.success());
    Ok(())
}

/// Who prefers the reference plugin chains it behind Husk, which is then not told of the limits. What a pod sends it limits by
/// an interface of the kind ifb, which not every kernel has.
#[test]
fn the_reference_plugin_works_in_the_place_of_it() -> Result<()> {
    let cluster = Cluster::builder().mode(Mode::Direct).hosts(1).start()?;
    let host = cluster.host(1);
    let mut conflist: Value = serde_json::from_str(&std::fs::read_to_string(host.conflist_path())?)?;
    conflist["plugins"][0]["capabilities"]["bandwidth"] = json!(false);
    let reference = json!({"type": "bandwidth", "capabilities": {"bandwidth": true}});
    // The newest version of the specification that Debian's reference plugins know.
    let network = Network::read(host, &conflist, "1.0.0")?.chained([reference]);
    let (free, sandbox) = (pod(&cluster, 1, "free", None)?, host.sandbox("limited")?);
    let mut limited = Attachment::new("limited", "eth0", sandbox.netns());
    let limits = json!({"ingressRate": INGRESS, "ingressBurst": 10 * LEAST_BURST});
    limited.capabilities.insert("bandwidth".to_owned(), limits);
    network.add(&mut limited)?;
    let address = limited.addresses()?;
    let address = address.first().and_then(|it| it.split_once('/')).context("no address")?.0.parse()?;
    let rate = tcp::throughput(free.netns(), sandbox.netns(), address, TIME)?;
    ensure!(near(rate, INGRESS), "{rate:.0} bit/s go to a pod limited to {INGRESS}");
    network.check(&limited)?;
    network.del(&limited)?;
    network.del(&limited)?;
    Ok(())
}

#[test]
fn an_impossible_limit_is_refused_and_leaves_nothing() -> Result<()> {
    let cluster = Cluster::builder().mode(Mode::Direct).hosts(1).start()?;
    let mut pod = cluster.host(1).sandbox("pod")?;
    for (limits, expected) in [
        (json!({"ingressRate": 999}), "runtimeConfig.bandwidth.ingressRate is not valid: 999"),
        (json!({"egressRate": "10M"}), "runtimeConfig.bandwidth.egressRate is not valid: \"10M\""),
        (json!({"egressBurst": 8000}), "runtimeConfig.bandwidth.egressBurst is not valid: 8000"),
    ] {
        pod.spec_mut().runtime_config = Some(json!({"bandwidth": limits}));
        let refused = pod.add()?;
        ensure!(refused.error_code() == Some(7), "{}", refused.stdout);
        ensure!(refused.stdout.contains(&expected.replace('"', "\\\"")), "{}", refused.stdout);
    }
    let left = cluster.host(1).leases()?;
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}
