//! DEL.

use anyhow::{Context, Result, ensure};
use husk_tests::runtime::Attachment;
use serde_json::json;

use crate::add::lacks;
use crate::bed::{host_end, step};
use crate::{Case, Must, Point, Should};

pub(crate) const POINTS: &[Point] = &[
    Point {
        level: Must,
        text: "DEL deletes the interface and releases all resources, and prints nothing",
        since: "0.3.1",
        holds: deletes,
    },
    Point { level: Must, text: "DEL may be repeated", since: "0.3.1", holds: repeated },
    Point { level: Must, text: "DEL without ADD succeeds", since: "0.3.1", holds: never_added },
    Point {
        level: Must,
        text: "DEL succeeds without CNI_NETNS and without prevResult, and still releases all",
        since: "0.3.1",
        holds: without_netns,
    },
    Point {
        level: Should,
        text: "DEL succeeds when namespace, interface or lease are gone",
        since: "0.3.1",
        holds: something_missing,
    },
    Point {
        level: Should,
        text: "DEL does not fail over what it does not need: prevResult, runtimeConfig, CNI_ARGS, unknown fields",
        since: "0.3.1",
        holds: odd_input,
    },
    Point {
        level: Must,
        text: "DEL in a chain gets the final result, and the plugins are called in reverse order",
        since: "0.4.0",
        holds: in_a_chain,
    },
];

fn deletes(case: &Case<'_>) -> Result<()> {
    let (pod, attachment) = case.added()?;
    let host_end = host_end(&attachment)?;
    ensure!(case.bed.host().pod_interfaces()?.contains(&host_end));
    ensure!(case.bed.host().pod_routes()?.len() == case.bed.families.len(), "{:?}", case.bed.host().pod_routes()?);
    case.network.del(&attachment)?;
    lacks(&pod, "eth0")?;
    case.bed.ensure_empty()
}

fn repeated(case: &Case<'_>) -> Result<()> {
    let (_pod, attachment) = case.added()?;
    for _ in 0..3 {
        case.network.del(&attachment)?;
    }
    Ok(())
}

fn never_added(case: &Case<'_>) -> Result<()> {
    let (_pod, attachment) = case.bed.sandbox()?;
    case.network.del(&attachment)
}

fn without_netns(case: &Case<'_>) -> Result<()> {
    let (pod, attachment) = case.added()?;
    case.network.del(&Attachment { netns: String::new(), cached: None, ..attachment.clone() })?;
    lacks(&pod, "eth0")?;
    case.bed.ensure_empty()?;

    let (_pod, attachment) = case.added()?;
    let mut variables = attachment.environment();
    variables.remove("CNI_NETNS");
    variables.remove("CNI_ARGS");
    variables.insert("CNI_COMMAND", "DEL".to_owned());
    let outcome = case.network.call_husk(&variables, &case.network.husk_base().to_string())?;
    ensure!(outcome.success() && outcome.stdout.is_empty() && outcome.stderr.is_empty(), "{outcome:?}");
    Ok(())
}

fn something_missing(case: &Case<'_>) -> Result<()> {
    let (pod, attachment) = case.added()?;
    drop(pod);
    case.network.del(&attachment)?;
    case.bed.ensure_empty()?;

    let (pod, attachment) = case.added()?;
    pod.netns().command("ip", ["link", "del", "eth0"])?;
    case.network.del(&attachment)?;
    case.bed.ensure_empty()?;

    let (pod, attachment) = case.added()?;
    let (lease, _) = case.bed.lease(&attachment)?.context("no lease")?;
    std::fs::remove_file(lease)?;
    case.network.del(&attachment)?;
    lacks(&pod, "eth0")
}

fn odd_input(case: &Case<'_>) -> Result<()> {
    let (_pod, attachment) = case.added()?;
    let mut config = case.network.husk_base();
    config["prevResult"] = json!("garbage");
    config["runtimeConfig"] = json!({"ips": 7, "unheard": true});
    config["unheard"] = json!(1);
    let mut variables = attachment.environment();
    variables.insert("CNI_COMMAND", "DEL".to_owned());
    variables.insert("CNI_ARGS", "garbage".to_owned());
    variables.insert("CNI_NETNS", "/nonexistent".to_owned());
    let outcome = case.network.call_husk(&variables, &config.to_string())?;
    ensure!(outcome.success() && outcome.stdout.is_empty(), "{outcome:?}");
    Ok(())
}

fn in_a_chain(case: &Case<'_>) -> Result<()> {
    let (_pod, mut attachment) = case.bed.sandbox()?;
    let log = case.bed.run_file("reverse.log");
    std::fs::remove_file(&log).ok();
    let note = |name| step(json!({"log": "/run/husk/reverse.log", "label": name}));
    let chain = case.network.behind(note("first")).chained([note("last")]);
    let result = chain.add(&mut attachment)?;
    chain.del(&attachment)?;
    let calls: Vec<String> = crate::bed::noted(&log)?
        .iter()
        .map(|it| format!("{} {}", it["environment"]["CNI_COMMAND"], it["configuration"]["label"]))
        .collect();
    ensure!(calls == ["\"ADD\" \"first\"", "\"ADD\" \"last\"", "\"DEL\" \"last\"", "\"DEL\" \"first\""], "{calls:?}");
    let notes = crate::bed::noted(&log)?;
    ensure!(notes[2]["configuration"]["prevResult"] == result, "{notes:?}");
    Ok(())
}
