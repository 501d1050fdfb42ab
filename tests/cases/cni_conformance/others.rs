//! VERSION, STATUS, GC and what concerns all commands.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use husk_tests::runtime::{Attachment, VERSIONS};
use serde_json::{Value, json};

use crate::add::lacks;
use crate::{Case, Must, Point, Should};

pub(crate) const POINTS: &[Point] = &[
    Point {
        level: Must,
        text: "VERSION echoes cniVersion and lists supportedVersions, whatever else is there",
        since: "0.3.1",
        holds: version,
    },
    Point {
        level: Must,
        text: "STATUS succeeds when ADD can be served, without any attachment's variables, and prints nothing",
        since: "1.1.0",
        holds: status,
    },
    Point {
        level: Must,
        text: "plugins are run concurrently for different containers",
        since: "0.3.1",
        holds: concurrently,
    },
    Point {
        level: Should,
        text: "GC removes leases, interfaces and routes of what is not valid, and nothing else",
        since: "1.1.0",
        holds: collects,
    },
    Point {
        level: Must,
        text: "GC heeds the key that libcni 1.2.0 wrote; null is an empty list, and without a list nothing is removed",
        since: "1.1.0",
        holds: list_of_valid,
    },
];

fn plain(command: &str) -> BTreeMap<&'static str, String> {
    BTreeMap::from([("CNI_COMMAND", command.to_owned()), ("CNI_PATH", "/opt/cni/bin".to_owned())])
}

fn version(case: &Case<'_>) -> Result<()> {
    for (input, echoed) in [
        (json!({"cniVersion": case.network.version()}), case.network.version()),
        (json!({"cniVersion": "0.1.0"}), "0.1.0"),
        (json!({"cniVersion": "7.0.0", "name": "/", "unheard": 1}), "7.0.0"),
    ] {
        let answer = case.network.call_husk(&plain("VERSION"), &input.to_string())?.into_result()?;
        ensure!(answer == json!({"cniVersion": echoed, "supportedVersions": VERSIONS}), "{answer}");
    }
    Ok(())
}

fn status(case: &Case<'_>) -> Result<()> {
    case.network.status()?;
    let outcome = case.network.call_husk(&plain("STATUS"), &case.network.husk_base().to_string())?;
    ensure!(outcome.success() && outcome.stdout.is_empty() && outcome.stderr.is_empty(), "{outcome:?}");
    Ok(())
}

fn concurrently(case: &Case<'_>) -> Result<()> {
    let sandboxes = (0..4).map(|_| case.bed.sandbox()).collect::<Result<Vec<_>>>()?;
    let network = &case.network;
    let added: Vec<Attachment> = std::thread::scope(|scope| {
        let running: Vec<_> = sandboxes
            .iter()
            .map(|(_, attachment)| {
                let mut attachment = attachment.clone();
                scope.spawn(move || network.add(&mut attachment).map(|_| attachment))
            })
            .collect();
        let ended = running.into_iter().map(|it| it.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        ended.collect::<Result<_>>()
    })?;
    let mut addresses: Vec<String> = Vec::new();
    for attachment in &added {
        addresses.extend(attachment.addresses()?);
    }
    addresses.sort();
    addresses.dedup();
    ensure!(addresses.len() == added.len() * case.bed.families.len(), "{addresses:?}");
    added.iter().try_for_each(|attachment| network.del(attachment))
}

fn collects(case: &Case<'_>) -> Result<()> {
    let (_valid_pod, valid) = case.added()?;
    let (lost_pod, lost) = case.added()?;
    let (gone_pod, _gone) = case.added()?;
    drop(gone_pod);
    let (leaseless_pod, leaseless) = case.added()?;
    let (path, _) = case.bed.lease(&leaseless)?.context("no lease")?;
    std::fs::remove_file(path)?;
    let other = case.network.named("other");
    let (_other_pod, mut others) = case.bed.sandbox()?;
    other.add(&mut others)?;

    case.network.gc(&[&valid])?;
    ensure!(case.bed.leases()?.len() == 2 && case.bed.host().pod_interfaces()?.len() == 2, "{:?}", case.bed.leases()?);
    ensure!(case.bed.host().pod_routes()?.len() == 2 * case.bed.families.len(), "{:?}", case.bed.host().pod_routes()?);
    lacks(&lost_pod, "eth0")?;
    lacks(&leaseless_pod, "eth0")?;
    case.network.check(&valid)?;
    other.check(&others)?;
    // A runtime still deletes what was collected.
    case.network.del(&lost)?;
    other.gc(&[])?;
    case.network.check(&valid)?;
    case.network.gc(&[])?;
    case.bed.ensure_empty()
}

fn list_of_valid(case: &Case<'_>) -> Result<()> {
    let (_pod, attachment) = case.added()?;
    let list = json!([{"containerID": attachment.container_id, "ifname": attachment.ifname}]);
    let mut config = case.network.husk_base();
    config["cni.dev/attachments"] = list.clone();
    let outcome = case.network.call_husk(&plain("GC"), &config.to_string())?;
    ensure!(outcome.success() && outcome.stdout.is_empty(), "{outcome:?}");
    case.network.check(&attachment)?;
    for bad in [Value::Null, json!({}), json!([{"containerID": "/"}])] {
        let mut config = case.network.husk_base();
        if !bad.is_null() {
            config["cni.dev/valid-attachments"] = bad;
        }
        let outcome = case.network.call_husk(&plain("GC"), &config.to_string())?;
        ensure!(outcome.error_code() == Some(7), "{outcome:?}");
    }
    case.network.check(&attachment)?;
    // What libcni writes for a runtime that has given it no attachment.
    let mut config = case.network.husk_base();
    config["cni.dev/valid-attachments"] = Value::Null;
    config["cni.dev/attachments"] = Value::Null;
    let outcome = case.network.call_husk(&plain("GC"), &config.to_string())?;
    ensure!(outcome.success() && outcome.stdout.is_empty(), "{outcome:?}");
    case.bed.ensure_empty()
}
