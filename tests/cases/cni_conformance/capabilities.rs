//! The list that the daemon ships, and what runtimes hand over since it declares it.

use anyhow::{Context, Result, ensure};
use husk_tests::runtime::{Attachment, VERSIONS, refusal};
use husk_tests::{Family, eventually};
use serde_json::{Value, json};

use crate::bed::{SOON, Stopped, host_end};
use crate::{Case, Must, Point, Should};

/// The host's port that is mapped.
const PORT: u16 = 18_080;

pub(crate) const POINTS: &[Point] = &[
    Point {
        level: Must,
        text: "the list has name, cniVersion, cniVersions and plugins in the form of the specification",
        since: "0.3.1",
        holds: list,
    },
    Point {
        level: Must,
        text: "every capability is declared that is understood, and understood when declared; null is nothing",
        since: "0.3.1",
        holds: declared,
    },
    Point {
        level: Should,
        text: "runtimeConfig.portMappings is heeded; CHECK tells when it is not in effect; DEL and GC remove it",
        since: "0.3.1",
        holds: port_mappings,
    },
    Point {
        level: Should,
        text: "runtimeConfig.bandwidth is heeded; CHECK tells when it is not in effect",
        since: "0.3.1",
        holds: bandwidth,
    },
];

fn list(case: &Case<'_>) -> Result<()> {
    let list: Value = serde_json::from_str(&std::fs::read_to_string(case.bed.host().conflist_path())?)?;
    // A runtime that does not know `cniVersions` has to know this one: containerd 1.6 and podman 4 know no later.
    ensure!(list["cniVersion"] == "1.0.0" && list["cniVersions"] == json!(VERSIONS), "{list}");
    let name = list["name"].as_str().context("name")?;
    let rest = |it: char| it.is_ascii_alphanumeric() || "_.-".contains(it);
    ensure!(name.starts_with(|it: char| it.is_ascii_alphanumeric()) && name.chars().all(rest), "{list}");
    let keys: Vec<&String> = list.as_object().into_iter().flat_map(|it| it.keys()).collect();
    ensure!(keys == ["cniVersion", "cniVersions", "name", "plugins"], "{keys:?}");
    let plugins = list["plugins"].as_array().context("plugins")?;
    ensure!(plugins.len() == 1 && plugins[0]["type"] == "husk", "{list}");
    Ok(())
}

fn declared(case: &Case<'_>) -> Result<()> {
    let (_pod, mut attachment) = case.bed.sandbox()?;
    let husk = case.network.husk_base();
    let declared: Vec<&String> = husk["capabilities"].as_object().into_iter().flat_map(|it| it.keys()).collect();
    ensure!(declared == ["bandwidth", "dns", "ips", "mac", "portMappings"], "{declared:?}");
    ensure!(declared.iter().all(|it| husk["capabilities"][it] == true), "{husk}");
    // Runtimes written in Go say `null` for lists and structures that nobody filled.
    attachment.capabilities = declared.into_iter().map(|it| (it.clone(), Value::Null)).collect();
    case.network.add(&mut attachment)?;
    case.network.del(&attachment)
}

/// A sandbox that the runtime hands this over for, added.
fn added_with(case: &Case<'_>, capability: &str, value: Value) -> Result<(husk_tests::Pod, Attachment)> {
    let (pod, mut attachment) = case.bed.sandbox()?;
    attachment.capabilities.insert(capability.to_owned(), value);
    case.network.add(&mut attachment)?;
    Ok((pod, attachment))
}

/// Families whose port leads to a pod.
fn mapped(case: &Case<'_>) -> Result<Vec<Family>> {
    let table = case.bed.host().netns().command("nft", ["list", "table", "inet", "husk"])?;
    let map = |family: Family| table.split("map ").find(|it| it.starts_with(&name_of_map(family)));
    let has = |family: &&Family| map(**family).is_some_and(|it| it.contains(&PORT.to_string()));
    Ok(case.bed.families.iter().filter(has).copied().collect())
}

fn name_of_map(family: Family) -> String {
    format!("host_ports_{}_to_address", family.to_string().to_lowercase())
}

fn port_mappings(case: &Case<'_>) -> Result<()> {
    let wish = json!([{"hostPort": PORT, "containerPort": 80, "protocol": "tcp"}]);
    let (_pod, attachment) = added_with(case, "portMappings", wish.clone())?;
    ensure!(mapped(case)? == case.bed.families, "{:?}", mapped(case)?);
    if case.network.speaks("0.4.0") {
        case.network.check(&attachment)?;
        for family in &case.bed.families {
            let daemon = Stopped::daemon(case.bed)?;
            let map = name_of_map(*family);
            case.bed.host().netns().command("nft", ["flush", "map", "inet", "husk", &map])?;
            let refused = refusal(case.network.check(&attachment))?;
            drop(daemon);
            ensure!(refused.outcome.error_code() == Some(103) && refused.to_string().contains(&map), "{refused}");
            eventually("the port mapping to come back", SOON, || Ok(case.network.check(&attachment).is_ok()))?;
        }
    }
    case.network.del(&attachment)?;
    eventually("the port mapping to go", SOON, || Ok(mapped(case)?.is_empty())).context("after DEL")?;

    let (_pod, attachment) = added_with(case, "portMappings", wish)?;
    if case.network.speaks("1.1.0") {
        case.network.gc(&[])?;
        eventually("the port mapping to go", SOON, || Ok(mapped(case)?.is_empty())).context("after GC")?;
        case.bed.ensure_empty()?;
    }
    case.network.del(&attachment)
}

fn bandwidth(case: &Case<'_>) -> Result<()> {
    let limits = json!({
        "ingressRate": 20_000_000, "ingressBurst": 20_000_000, "egressRate": 8_000_000, "egressBurst": 8_000_000,
    });
    let (pod, attachment) = added_with(case, "bandwidth", limits)?;
    let host_end = host_end(&attachment)?;
    for (netns, interface, rate) in
        [(case.bed.host().netns(), host_end.as_str(), "20Mbit"), (pod.netns(), "eth0", "8Mbit")]
    {
        let shown = netns.command("tc", ["qdisc", "show", "dev", interface, "root"])?;
        ensure!(shown.contains("tbf") && shown.contains(rate), "{interface}: {shown}");
    }
    if case.network.speaks("0.4.0") {
        case.network.check(&attachment)?;
        // Nobody puts a limit back.
        for (netns, interface) in [(pod.netns(), "eth0"), (case.bed.host().netns(), host_end.as_str())] {
            netns.command("tc", ["qdisc", "del", "dev", interface, "root"])?;
            let refused = refusal(case.network.check(&attachment))?;
            let said = format!("the limit of {interface}");
            ensure!(refused.outcome.error_code() == Some(103) && refused.to_string().contains(&said), "{refused}");
        }
    }
    case.network.del(&attachment)
}
