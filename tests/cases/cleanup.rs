//! `huskd cleanup` leaves a host as it was before Husk came, and refuses where that would hurt.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::probe::Echo;
use husk_tests::process::{Output, binary};
use husk_tests::state::HostState;
use husk_tests::{Cluster, Family, Host, MODES, Mode, Signal, eventually};

/// How soon other nodes follow.
const SOON: Duration = Duration::from_secs(4);

fn cleanup<'a>(host: &Host, options: impl IntoIterator<Item = &'a str>) -> Result<Output> {
    host.program(binary("huskd")?).args(["cleanup"]).args(options).run()
}

#[test]
fn a_host_is_as_it_was() -> Result<()> {
    for mode in MODES {
        let cluster = Cluster::builder().mode(mode).dual_stack().hosts(2).build()?;
        let host = cluster.host(1);
        // What an administrator had before, next to where Husk works.
        host.netns().ip_batch("route add 10.9.0.0/16 via 192.0.2.254\nneigh add 192.0.2.200 lladdr 02:00:00:00:00:01 dev eth0 nud permanent")?;
        host.program("nft")
            .args(["-f", "-"])
            .stdin("table inet filter {\n chain input {\n type filter hook input priority 0\n }\n}\n")
            .check()?;
        fs::write(host.file("/etc/cni/net.d/10-other.conflist"), "{}")?;
        fs::write(host.file("/opt/cni/bin/other"), "")?;
        let before = HostState::of(host)?;

        cluster.hosts().iter().try_for_each(Host::start)?;
        cluster.wait_ready()?;
        let pods = [host.add_pod("a")?, host.add_pod("b")?];
        let far = cluster.host(2).add_pod("far")?;
        pods.iter().try_for_each(|pod| pod.await_answer_of(&far, SOON))?;
        let during = before.difference(&HostState::of(host)?);
        ensure!(during.len() > 20, "{mode}: this test does not see what Husk does: {during:#?}");
        let own_blocks = || -> Result<usize> {
            let listed = fs::read_dir(cluster.manifests().join("blocks"))?.flatten();
            let texts = listed.filter_map(|entry| fs::read_to_string(entry.path()).ok());
            Ok(texts.filter(|text| text.contains("node: host1")).count())
        };
        assert_eq!(own_blocks()?, 2);

        for pod in pods {
            assert!(pod.del()?.success());
        }
        host.stop_daemon(Signal::SIGTERM)?;
        let output = cleanup(host, [])?;
        ensure!(output.status.success(), "{mode}: {}{}", output.stdout, output.stderr);
        // What still looks at the pods' namespaces may hold them a moment longer.
        let mut difference = Vec::new();
        let restored = eventually("the host to be as it was", SOON, || {
            difference = before.difference(&HostState::of(host)?);
            Ok(difference.is_empty())
        });
        restored.with_context(|| format!("{mode}: {difference:#?}"))?;

        // The cluster has forgotten the node, and the others drop it.
        assert!(!cluster.manifests().join("nodes/host1.yaml").exists());
        assert_eq!(own_blocks()?, 0);
        let two = cluster.host(2);
        eventually("the other node to drop the peer", SOON, || {
            let peers = two.huskctl_json(["peers"])?;
            let routes = two.ip(["-4", "route", "show", "proto", "72"])?;
            Ok(peers.as_array().is_some_and(Vec::is_empty) && !routes.lines().any(|line| line.contains("/26")))
        })?;

        // Again, on a host where nothing is: nothing happens, and nothing comes into being.
        let output = cleanup(host, [])?;
        ensure!(output.status.success(), "{mode}: {}{}", output.stdout, output.stderr);
        assert_eq!(before.difference(&HostState::of(host)?), Vec::<String>::new());

        // And the host can come back.
        host.start()?;
        host.wait_ready()?;
        host.add_pod("again")?.await_answer_of(&far, SOON)?;
    }
    Ok(())
}

#[test]
fn cleanup_refuses_where_it_would_hurt() -> Result<()> {
    let cluster = Cluster::builder().hosts(2).start()?;
    let (host, two) = (cluster.host(1), cluster.host(2));
    let (a, far) = (host.add_pod("a")?, two.add_pod("far")?);
    a.await_answer_of(&far, SOON)?;

    let output = cleanup(host, ["--force"])?;
    assert!(!output.status.success());
    assert!(
        output.stderr.contains("another huskd runs") && output.stderr.contains("stop it first"),
        "{}",
        output.stderr
    );
    a.await_answer_of(&far, SOON)?;

    host.stop_daemon(Signal::SIGTERM)?;
    let before = HostState::of(host)?;
    let output = cleanup(host, [])?;
    assert!(!output.status.success());
    assert!(output.stderr.contains("1 pod") && output.stderr.contains("--force"), "{}", output.stderr);
    assert_eq!(before.difference(&HostState::of(host)?), Vec::<String>::new());
    a.await_answer_of(&far, SOON)?;

    // With force, and for a node that will be back.
    let record = cluster.manifests().join("nodes/host1.yaml");
    let output = cleanup(host, ["--force", "--keep-record"])?;
    ensure!(output.status.success(), "{}{}", output.stdout, output.stderr);
    assert!(record.exists());
    assert_eq!(host.netns().ip_json(["link", "show"])?.as_array().map(Vec::len), Some(2), "lo and eth0 are left");
    assert!(!Echo::to(far.address(Family::Ipv4)?).limit(Duration::from_millis(200)).run(a.netns())?.arrived());
    // DEL of the pod that lost its interface works without anything of Husk but the plugin, which the runtime still has.
    host.install_plugin()?;
    let deleted = host.cni_with(
        "DEL",
        Some(a.spec()),
        serde_json::json!({"cniVersion": "1.0.0", "name": "husk", "type": "husk"}),
    )?;
    assert!(deleted.success(), "{}{}", deleted.stdout, deleted.stderr);
    Ok(())
}

#[test]
fn cleanup_of_a_host_that_never_ran_anything_makes_nothing() -> Result<()> {
    let cluster = Cluster::builder().mode(Mode::Wireguard).hosts(1).build()?;
    let host = cluster.host(1);
    fs::remove_dir(cluster.manifests())?;
    let before = HostState::of(host)?;
    let output = cleanup(host, [])?;
    ensure!(output.status.success(), "{}{}", output.stdout, output.stderr);
    assert_eq!(before.difference(&HostState::of(host)?), Vec::<String>::new());
    assert!(!cluster.manifests().exists(), "cleanup made a cluster directory");
    Ok(())
}
