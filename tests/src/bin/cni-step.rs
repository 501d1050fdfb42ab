//! A CNI plugin that a test puts before or behind Husk's in a chain: it notes what it is called with, does what its
//! configuration says, and passes the result on.
//!
//! Configuration: `log` is the file each call is noted in, a line of JSON; `inPod` are commands it runs on ADD in the pod's
//! network namespace; `result` is what it adds to the previous result; `fail` makes it refuse ADD.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Map, Value, json};

fn main() -> ExitCode {
    match run() {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(output)) => say(&output, ExitCode::SUCCESS),
        Err(error) => say(&json!({"cniVersion": "1.0.0", "code": 999, "msg": format!("{error:#}")}), ExitCode::FAILURE),
    }
}

fn say(output: &Value, status: ExitCode) -> ExitCode {
    if writeln!(std::io::stdout(), "{output}").is_ok() { status } else { ExitCode::FAILURE }
}

fn run() -> Result<Option<Value>> {
    let conf: Value = serde_json::from_reader(std::io::stdin()).context("reading the configuration")?;
    let environment: Map<String, Value> = std::env::vars()
        .filter(|(name, _)| name.starts_with("CNI_"))
        .map(|(name, value)| (name, value.into()))
        .collect();
    let command = environment.get("CNI_COMMAND").and_then(Value::as_str).unwrap_or_default().to_owned();
    if let Some(path) = conf["log"].as_str() {
        let mut log =
            OpenOptions::new().create(true).append(true).open(path).with_context(|| format!("opening {path}"))?;
        writeln!(log, "{}", json!({"environment": environment, "configuration": conf}))?;
    }
    if command != "ADD" {
        return Ok(None);
    }
    ensure!(conf["fail"].is_null(), "told to fail");
    let netns = environment.get("CNI_NETNS").and_then(Value::as_str).unwrap_or_default();
    for line in conf["inPod"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        let done =
            Command::new("nsenter").arg(format!("--net={netns}")).args(line.split_ascii_whitespace()).output()?;
        ensure!(done.status.success(), "{line}: {}", String::from_utf8_lossy(&done.stderr));
    }
    let mut result = conf["prevResult"].as_object().cloned().unwrap_or_default();
    result.insert("cniVersion".to_owned(), conf["cniVersion"].clone());
    for (key, more) in conf["result"].as_object().into_iter().flatten() {
        match (result.entry(key.clone()).or_insert(Value::Null), more) {
            (Value::Array(list), Value::Array(more)) => list.extend(more.iter().cloned()),
            (place, more) => *place = more.clone(),
        }
    }
    Ok(Some(result.into()))
}
