//! Blocks and addresses: more blocks when pods need them, given back when they do not, never to two nodes, and no address
//! again before it has rested.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_overlay::manifest::{self, Manifest};
use husk_tests::{Cluster, ClusterBuilder, Family, Host, Pod, Prefix, eventually};
use serde_json::json;

/// How soon the other hosts follow a block that was claimed.
const SOON: Duration = Duration::from_secs(4);

/// Blocks of eight addresses: seven for pods, of a node's first block, whose first address is the node's own.
const BLOCK_LENGTHS: (u8, u8) = (29, 125);

/// A cluster with small blocks, whose daemons do not run yet.
fn small_blocks(builder: ClusterBuilder, cool_down: u32) -> Result<Cluster> {
    let cluster = builder.build()?;
    for host in cluster.hosts() {
        host.configure(|config| {
            config["blockLengths"] = json!({"ipv4": BLOCK_LENGTHS.0, "ipv6": BLOCK_LENGTHS.1});
            config["ipam"] = json!({"coolDown": cool_down});
        })?;
        host.install_plugin()?;
    }
    Ok(cluster)
}

fn start(cluster: &Cluster) -> Result<()> {
    cluster.hosts().iter().try_for_each(Host::start_daemon)?;
    cluster.wait_ready()
}

/// Who owns which block, as the files of the cluster directory say.
fn owners(cluster: &Cluster) -> Result<BTreeMap<Prefix, String>> {
    let mut owners = BTreeMap::new();
    for entry in fs::read_dir(cluster.manifests().join("blocks"))? {
        let path = entry?.path();
        if path.extension().is_none_or(|end| end != "yaml") {
            continue;
        }
        // A file may be given back between listing and reading.
        let Ok(text) = fs::read_to_string(&path) else { continue };
        for manifest in manifest::parse_all("block", &text).manifests {
            if let Manifest::Block { cidr, node } = manifest {
                owners.insert(cidr, node.to_string());
            }
        }
    }
    Ok(owners)
}

fn blocks_of(cluster: &Cluster, node: &str, family: Family) -> Result<Vec<Prefix>> {
    let owners = owners(cluster)?.into_iter();
    Ok(owners.filter(|(block, owner)| owner == node && block.family() == family).map(|(block, _)| block).collect())
}

#[test]
fn seventy_pods_on_one_host_and_back_to_none() -> Result<()> {
    const PODS: usize = 70;
    let cluster = small_blocks(Cluster::builder(), 3)?;
    start(&cluster)?;
    let (one, two) = (cluster.host(1), cluster.host(2));
    let far = two.add_pod("far")?;
    let first: BTreeSet<Prefix> = one.blocks()?;
    assert_eq!(first.len(), 2, "{first:?}");

    let started = Instant::now();
    let mut pods = Vec::new();
    for number in 0..PODS {
        pods.push(one.add_pod(&format!("p{number}"))?);
    }
    eprintln!("{PODS} pods after {:?}", started.elapsed());
    let addresses: BTreeSet<IpAddr> = pods.iter().flat_map(Pod::addresses).collect();
    assert_eq!(addresses.len(), 2 * PODS, "every address is given once");
    for (family, length) in [(Family::Ipv4, BLOCK_LENGTHS.0), (Family::Ipv6, BLOCK_LENGTHS.1)] {
        let blocks = blocks_of(&cluster, "host1", family)?;
        // Seven pods in the first block, eight in every other one.
        assert_eq!(blocks.len(), 9, "{blocks:?}");
        assert!(blocks.iter().all(|block| block.length() == length), "{blocks:?}");
        let inside = |pod: &Pod| {
            Ok::<_, anyhow::Error>(blocks.iter().any(|block| pod.address(family).is_ok_and(|it| block.contains(it))))
        };
        for pod in &pods {
            assert!(inside(pod)?, "{:?} of {} lies in no block of its host", pod.addresses(), pod.name());
        }
        // One pod of every block from the other host, which has to know each of them.
        for block in &blocks {
            let inside = pods.iter().find_map(|pod| pod.address(family).ok().filter(|it| block.contains(*it)));
            far.await_answer_at(inside.with_context(|| format!("no pod has an address of {block}"))?, SOON)?;
        }
    }
    let mut shown = json!(null);
    eventually("the daemon to have seen every pod", SOON, || {
        shown = one.huskctl_json(["ipam", "show"])?["blocks"].clone();
        let leased = shown.as_array().into_iter().flatten().filter_map(|block| block["leased"].as_u64());
        Ok(leased.sum::<u64>() == 2 * PODS as u64)
    })
    .with_context(|| shown.to_string())?;
    // The check looks at the last pass, which may have met a pod that had a lease and no interface yet.
    eventually("no contradictions", SOON, || Ok(one.huskctl(["ipam", "check"])?.status.code() == Some(0)))?;

    let (kept, gone) = pods.split_at(3);
    for pod in gone {
        let outcome = pod.del()?;
        ensure!(outcome.success(), "DEL of {}: {}{}", pod.name(), outcome.stdout, outcome.stderr);
    }
    // The cool-down of three seconds, the daemon's tick of five, and a pass for the record after the blocks.
    let least: BTreeSet<Prefix> = first;
    eventually("the blocks to be given back", Duration::from_secs(20), || {
        let owned: BTreeSet<Prefix> =
            owners(&cluster)?.into_iter().filter(|(_, node)| node == "host1").map(|(it, _)| it).collect();
        Ok(owned == least && one.blocks()? == least)
    })
    .with_context(|| format!("host1 owns {:?}, first {least:?}", owners(&cluster)))?;
    let routes = |host: &Host| host.ip(["-4", "route", "show", "proto", "72"]);
    eventually("the other host to forget the blocks", SOON, || {
        Ok(routes(two)?.lines().filter(|line| line.contains("/29")).count() == 1)
    })
    .with_context(|| routes(two).unwrap_or_default())?;
    for pod in kept {
        for address in pod.addresses() {
            far.await_answer_at(address, SOON)?;
        }
    }
    // What was given back can be had again, by anybody.
    for number in 0..8 {
        let pod = two.add_pod(&format!("q{number}"))?;
        kept[0].await_answer_at(pod.address(Family::Ipv4)?, SOON)?;
        std::mem::drop(pod.del()?);
    }
    Ok(())
}

#[test]
fn an_exhausted_pool_says_so_and_recovers() -> Result<()> {
    let cidrs = ["10.42.0.0/28".parse()?, "fd42::/124".parse()?];
    let cluster = small_blocks(Cluster::builder().cluster_cidrs(cidrs), 0)?;
    start(&cluster)?;
    let one = cluster.host(1);
    let mut pods = Vec::new();
    for number in 0..7 {
        pods.push(one.add_pod(&format!("p{number}"))?);
    }
    let mut late = one.sandbox("late")?;
    for _ in 0..2 {
        let outcome = late.add()?;
        assert_eq!(outcome.error_code(), Some(100), "{}{}", outcome.stdout, outcome.stderr);
        let said = outcome.stdout.clone();
        for part in ["IPv4", "10.42.0.", "7 ", "pool"] {
            assert!(said.contains(part), "{part:?} in {said}");
        }
        assert!(
            ["clusterCIDRs", "AddressPool", "block"].iter().any(|remedy| said.contains(remedy)),
            "no remedy in {said}"
        );
    }
    // The failed ADD left nothing, and the node goes on serving the pods it has.
    assert_eq!(one.leases()?.len(), 7);
    assert_eq!(late.netns().ip_json(["link", "show"])?.as_array().map(Vec::len), Some(1));
    let far = cluster.host(2).add_pod("far")?;
    far.await_answer_at(pods[6].address(Family::Ipv4)?, SOON)?;
    // A pod that goes makes room for another at once, as nothing has to rest here.
    let freed = pods[3].addresses();
    assert!(pods[3].del()?.success());
    let outcome = late.add()?;
    assert!(outcome.success(), "{}", outcome.stdout);
    assert_eq!(late.addresses(), freed);

    // A third host finds no block at all.
    let mut cluster = cluster;
    let third = cluster.add_host()?;
    let third = cluster.host(third);
    third.configure(|config| config["blockLengths"] = json!({"ipv4": BLOCK_LENGTHS.0, "ipv6": BLOCK_LENGTHS.1}))?;
    third.start()?;
    let mut status = json!(null);
    eventually("the third host to say why it is not ready", SOON, || {
        status = third.huskctl_json(["status"]).unwrap_or_default();
        Ok(status["issues"].as_array().is_some_and(|issues| issues.iter().any(|it| it["kind"] == "PoolExhausted")))
    })
    .with_context(|| status.to_string())?;
    assert_eq!(status["ready"], false);
    assert!(status["reason"].as_str().is_some_and(|reason| reason.contains("clusterCIDRs")), "{status}");
    Ok(())
}

#[test]
fn hosts_that_start_at_once_never_share_a_block() -> Result<()> {
    // Room for eight blocks and six hosts: with random starts some of them want the same.
    let cidrs = ["10.42.0.0/26".parse()?, "fd42::/122".parse()?];
    let mut first = Vec::new();
    for _ in 0..2 {
        let cluster = small_blocks(Cluster::builder().hosts(6).cluster_cidrs(cidrs), 0)?;
        start(&cluster)?;
        let owners = owners(&cluster)?;
        assert_eq!(owners.len(), 12, "{owners:?}");
        let mut seen: BTreeMap<Prefix, &str> = BTreeMap::new();
        for host in cluster.hosts() {
            let served = host.blocks()?;
            assert_eq!(served.len(), 2, "{served:?}");
            for block in served {
                assert_eq!(owners.get(&block).map(String::as_str), Some(host.name()), "{block}");
                assert_eq!(seen.insert(block, host.name()), None, "{block} is served by two hosts");
            }
        }
        let pods = cluster.add_pods("p")?;
        for pod in &pods[1..] {
            pods[0].await_answer_at(pod.address(Family::Ipv4)?, SOON)?;
        }
        first.push(owners);
    }
    eprintln!("blocks of the first run {:?}", first[0]);
    Ok(())
}

#[test]
fn no_address_comes_back_before_it_has_rested() -> Result<()> {
    const REST: Duration = Duration::from_secs(8);
    let cluster = small_blocks(Cluster::builder(), u32::try_from(REST.as_secs())?)?;
    start(&cluster)?;
    let one = cluster.host(1);
    let mut released: BTreeMap<IpAddr, Instant> = BTreeMap::new();
    let given = |pod: &Pod, released: &BTreeMap<IpAddr, Instant>| -> Result<()> {
        for address in pod.addresses() {
            let rested = released.get(&address).map(Instant::elapsed);
            ensure!(rested.is_none_or(|rested| rested >= REST), "{address} is given again after {rested:?}");
        }
        Ok(())
    };
    // Three at a time of seven addresses: with round robin alone the third round would meet the first again, and so would
    // a daemon that was restarted.
    for round in 0..4 {
        let pods: Vec<Pod> = (0..3).map(|number| one.add_pod(&format!("r{round}n{number}"))).collect::<Result<_>>()?;
        pods.iter().try_for_each(|pod| given(pod, &released))?;
        for pod in pods {
            assert!(pod.del()?.success());
            released.extend(pod.addresses().into_iter().map(|address| (address, Instant::now())));
        }
        if round == 2 {
            one.restart_daemon(husk_tests::Signal::SIGTERM)?;
        }
    }
    let last = *released.values().max().context("nothing was released")?;
    eventually("all addresses to have rested", REST + Duration::from_secs(1), || Ok(last.elapsed() >= REST))?;
    let again = one.add_pod("again")?;
    assert!(again.addresses().iter().all(|address| released.contains_key(address)), "{:?}", again.addresses());
    Ok(())
}

#[test]
fn an_address_pool_manifest_replaces_the_default() -> Result<()> {
    let cluster = small_blocks(Cluster::builder(), 0)?;
    fs::create_dir(cluster.manifests().join("pools"))?;
    for (name, cidr, length) in [("v4", "10.42.200.0/24", 28), ("v6", "fd42:0:0:200::/64", 124)] {
        let pool = format!(
            "apiVersion: husk.dev/v1alpha1\nkind: AddressPool\nmetadata: {{name: {name}}}\nspec: {{cidr: \"{cidr}\", blockLength: {length}}}\n"
        );
        fs::write(cluster.manifests().join(format!("pools/{name}.yaml")), pool)?;
    }
    start(&cluster)?;
    for block in owners(&cluster)?.keys() {
        let pool: Prefix =
            if block.family() == Family::Ipv4 { "10.42.200.0/24".parse()? } else { "fd42:0:0:200::/64".parse()? };
        assert!(pool.covers(block) && block.size() == 16, "{block}");
    }
    let (a, b) = (cluster.host(1).add_pod("a")?, cluster.host(2).add_pod("b")?);
    a.await_answer_of(&b, SOON)
}
