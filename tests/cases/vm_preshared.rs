//! One node has another preshared key than the rest: it reaches nobody and nobody reaches it, nothing goes in plaintext
//! instead, and its neighbours say what is wrong.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::kernel::{self, Part};
use husk_tests::load::while_knocking;
use husk_tests::{Capture, Cluster, ESP_MODES, Host, Leak, Pod, Signal, eventually, xfrm};
use serde_json::{Value, json};

/// How long what a daemon does by itself may take.
const SOON: Duration = Duration::from_secs(10);

const SECRET_FILE: &str = "/etc/husk/secret";
const SECRET: &str = "correct horse battery staple";
const WRONG: &str = "correct horse battery stable";

/// Packets that nobody could decrypt, so that it is seen that there are some.
const REFUSED: u64 = 10;

/// What a host says about a peer whose packets it cannot decrypt.
fn said_of(host: &Host, peer: &Host) -> Result<Option<Value>> {
    let status = host.huskctl_json(["status"])?;
    let issues = status["issues"].as_array().context("issues")?;
    let of_peer = |issue: &&Value| issue["kind"] == json!("KeyMismatch") && issue["subject"] == json!(peer.name());
    Ok(issues.iter().find(of_peer).cloned())
}

/// How many packets of the first pod are in what the second one's interface saw.
fn arrived(at: Capture, from: &Pod) -> Result<usize> {
    let addresses = from.addresses();
    let of = |address: IpAddr| addresses.contains(&address);
    Ok(at.stop()?.count(|packet| packet.addresses.is_some_and(|(source, _)| of(source))))
}

#[test]
fn a_node_with_another_preshared_key_is_out_and_is_told_of() -> Result<()> {
    kernel::require(&[Part::Esp])?;
    for mode in ESP_MODES {
        let builder = Cluster::builder().mode(mode).hosts(3).set("ipsec.presharedKeyFile", SECRET_FILE);
        let cluster = builder.set("keys.grace", 1).build()?;
        let leak = Leak::watch(&cluster)?;
        for (host, secret) in cluster.hosts().iter().zip([SECRET, WRONG, SECRET]) {
            host.write_secret(SECRET_FILE, secret)?;
        }
        cluster.start()?;
        let pods = cluster.add_pods("p")?;
        let [a, odd, c] = [&pods[0], &pods[1], &pods[2]];
        let [first, second, third] = [1, 2, 3].map(|number| cluster.host(number));
        a.await_answer_of(c, SOON)?;

        let captures = (Capture::on(a.netns(), "eth0")?, Capture::on(odd.netns(), "eth0")?);
        let refused = |host: &Host| xfrm::counter(host.netns(), "XfrmInStateProtoError");
        while_knocking(&[a.netns()], &odd.addresses(), || {
            while_knocking(&[odd.netns()], &a.addresses(), || {
                eventually("packets to be refused on both sides", SOON, || {
                    Ok(refused(first)? >= REFUSED && refused(second)? >= REFUSED)
                })?;
                eventually("both sides to say so", SOON, || {
                    Ok(said_of(first, second)?.is_some() && said_of(second, first)?.is_some())
                })
            })
        })
        .with_context(|| format!("{mode}: {:?}, {:?}", first.huskctl(["status"]), second.huskctl(["peers"])))?;
        let (to_a, to_odd) = (arrived(captures.0, odd)?, arrived(captures.1, a)?);
        ensure!((to_a, to_odd) == (0, 0), "{mode}: {to_a} and {to_odd} packets arrived under another preshared key");
        // Those that agree have nothing to say of each other.
        ensure!(
            said_of(first, third)?.is_none() && said_of(third, first)?.is_none(),
            "{mode}: it tells of the wrong one"
        );
        let issue = said_of(first, second)?.context("the issue was there")?;
        let remedy = issue["remedy"].as_str().unwrap_or_default();
        ensure!(remedy.contains("presharedKeyFile"), "{mode}: {issue:#}");
        eprintln!("{mode}: {issue:#}\n{}", first.huskctl(["peers"])?.stdout);

        second.write_secret(SECRET_FILE, SECRET)?;
        second.restart_daemon(Signal::SIGTERM)?;
        for (from, to) in [(a, odd), (odd, c)] {
            from.await_answer_of(to, SOON).with_context(|| format!("{mode}: the right key"))?;
        }
        eventually("nobody to complain any more", SOON, || {
            let pairs = [(first, second), (second, first), (third, second)];
            Ok(pairs
                .into_iter()
                .map(|(host, peer)| said_of(host, peer))
                .collect::<Result<Vec<_>>>()?
                .iter()
                .all(Option::is_none))
        })?;
        leak.finish(&cluster)?.with_tunnelled(20).context(mode)?;
    }
    Ok(())
}
