//! That `hack/bench` measures at all: one round, whose times say nothing and are not looked at.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::patience;
use husk_tests::process::{Program, binary};
use serde_json::Value;

/// How long one round may take.
const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn one_round_has_a_time_of_everybody() -> Result<()> {
    let arguments = ["cni", "--rounds", "1", "--at-once", "2", "--mode", "direct", "--json"];
    let output = Program::new(binary("husk-bench")?).args(arguments).limit(patience(LIMIT)).run()?;
    ensure!(output.status.success(), "{}{}", output.stdout, output.stderr);
    let report: Value = serde_json::from_str(&output.stdout).with_context(|| output.stdout.clone())?;
    let timed = |place: &Value| {
        ["add", "del"].iter().all(|what| place[what]["median"].as_f64().is_some_and(|milliseconds| milliseconds > 0.0))
    };
    let list = |key: &str| report[key].as_array().cloned().unwrap_or_default();
    let comparisons = list("comparisons");
    for name in ["husk", "bridge"] {
        let found = comparisons.iter().find(|it| it["name"] == name);
        ensure!(found.is_some_and(timed), "no time of {name}: {:#}", report["comparisons"]);
    }
    // A reference plugin that this kernel cannot serve is left out, and said to be; a port mapping of Husk's is not.
    let unavailable: Vec<_> = comparisons.iter().filter(|it| !timed(it)).collect();
    let ours = |it: &&&Value| it["name"].as_str().is_some_and(|name| name.starts_with("husk"));
    ensure!(!unavailable.iter().any(|it| ours(&it)), "{unavailable:#?}");
    ensure!(unavailable.iter().all(|it| it["unavailable"].is_string()), "{unavailable:#?}");
    let at_once = list("atOnce");
    ensure!(!at_once.is_empty() && at_once.iter().all(timed), "{:#}", report["atOnce"]);
    ensure!(timed(&report["daemon"]) && report["memory"]["daemon"].as_u64().is_some(), "{report:#}");
    ensure!(list("aims").len() == 3, "{:#}", report["aims"]);
    Ok(())
}
