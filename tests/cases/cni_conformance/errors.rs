//! Errors: their form and their codes.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result, ensure};
use husk_tests::CniOutcome;
use husk_tests::runtime::Attachment;
use serde_json::{Value, json};

use crate::{Case, Must, Point, Should};

pub(crate) const POINTS: &[Point] = &[
    Point {
        level: Must,
        text: "1: a version that is not known, and a command that the version does not have",
        since: "0.3.1",
        holds: incompatible,
    },
    Point {
        level: Must,
        text: "2: an unsupported field, whose key and value the message contains",
        since: "0.3.1",
        holds: unsupported,
    },
    Point {
        level: Should,
        text: "3 is for containers that need no DEL, which only a DEL can know: it is not said",
        since: "0.3.1",
        holds: unknown_container,
    },
    Point {
        level: Must,
        text: "4: missing or invalid variables, all of which the message names",
        since: "0.3.1",
        holds: environment,
    },
    Point { level: Must, text: "5: an I/O failure", since: "0.3.1", holds: input_output },
    Point { level: Must, text: "6: content that cannot be decoded", since: "0.3.1", holds: undecodable },
    Point { level: Must, text: "7: an invalid network configuration", since: "0.3.1", holds: invalid },
    Point { level: Should, text: "11: a condition that should clear up", since: "0.3.1", holds: later },
];

/// An attachment without a sandbox, for calls that are refused before they would need one.
fn nobody() -> Attachment {
    Attachment {
        container_id: "nobody".to_owned(),
        ifname: "eth0".to_owned(),
        netns: "/proc/1/ns/net".to_owned(),
        args: String::new(),
        capabilities: serde_json::Map::new(),
        cached: None,
    }
}

fn call(case: &Case<'_>, command: &str, input: &str) -> Result<CniOutcome> {
    let mut variables = nobody().environment();
    variables.insert("CNI_COMMAND", command.to_owned());
    case.network.call_husk(&variables, input)
}

/// Refused with this code, in the form that the specification gives errors.
fn refused(outcome: &CniOutcome, code: u64, version: &str) -> Result<String> {
    ensure!(!outcome.success(), "it succeeded: {outcome:?}");
    ensure!(outcome.error_code() == Some(code), "code {code} was expected: {outcome:?}");
    ensure!(outcome.json["cniVersion"] == version, "{outcome:?}");
    let text =
        |key: &str| outcome.json[key].as_str().map(str::to_owned).with_context(|| format!("no {key}: {outcome:?}"));
    let message = format!("{}; {}", text("msg")?, text("details")?);
    ensure!(!message.trim_matches([';', ' ']).is_empty(), "{outcome:?}");
    ensure!(outcome.stderr.is_empty(), "standard error is for logs: {outcome:?}");
    Ok(message)
}

fn incompatible(case: &Case<'_>) -> Result<()> {
    for version in [json!("0.2.0"), json!("1.2.0"), Value::Null] {
        let mut config = case.network.husk_base();
        config["cniVersion"] = version.clone();
        for command in ["ADD", "DEL", "CHECK", "STATUS", "GC"] {
            let message = refused(&call(case, command, &config.to_string())?, 1, "1.1.0")?;
            ensure!(message.contains("0.3.1, 0.4.0, 1.0.0, 1.1.0"), "{message}");
        }
    }
    for (command, since) in [("CHECK", "0.4.0"), ("STATUS", "1.1.0"), ("GC", "1.1.0")] {
        if !case.network.speaks(since) {
            let outcome = call(case, command, &case.network.husk_base().to_string())?;
            let message = refused(&outcome, 1, case.network.version())?;
            ensure!(message.contains(command) && message.contains(since), "{message}");
        }
    }
    Ok(())
}

fn unsupported(case: &Case<'_>) -> Result<()> {
    for (key, value, said) in [
        ("mtu", json!(1400), "mtu = 1400"),
        ("ipam", json!({"type": "host-local"}), r#"ipam = {"type":"host-local"}"#),
        ("runtimeConfig", json!({"infinibandGUID": "x"}), r#"runtimeConfig.infinibandGUID = "x""#),
    ] {
        let mut config = case.network.husk_base();
        config[key] = value;
        let message = refused(&call(case, "ADD", &config.to_string())?, 2, case.network.version())?;
        ensure!(message.contains(said), "no {said} in {message}");
    }
    Ok(())
}

fn unknown_container(case: &Case<'_>) -> Result<()> {
    if case.network.speaks("0.4.0") {
        let (_pod, attachment) = case.bed.sandbox()?;
        let mut config = case.network.husk_base();
        config["prevResult"] = json!({"interfaces": [{"name": "eth0", "sandbox": attachment.netns}]});
        let mut variables = attachment.environment();
        variables.insert("CNI_COMMAND", "CHECK".to_owned());
        let outcome = case.network.call_husk(&variables, &config.to_string())?;
        refused(&outcome, 103, case.network.version())?;
    }
    Ok(())
}

fn environment(case: &Case<'_>) -> Result<()> {
    let required: &[(&str, &[&str])] = &[
        ("ADD", &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
        ("CHECK", &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
        ("DEL", &["CNI_CONTAINERID", "CNI_IFNAME"]),
    ];
    let complete = nobody().environment();
    let base = case.network.husk_base().to_string();
    let expect = |command: &str, variables: &BTreeMap<&'static str, String>, names: &[&str]| -> Result<()> {
        let mut variables = variables.clone();
        variables.insert("CNI_COMMAND", command.to_owned());
        let message = refused(&case.network.call_husk(&variables, &base)?, 4, case.network.version())?;
        ensure!(names.iter().all(|name| message.contains(name)), "not all of {names:?} in {message}");
        Ok(())
    };
    for (command, names) in required {
        for name in *names {
            for value in [None, Some("")] {
                let mut variables = complete.clone();
                match value {
                    None => variables.remove(name),
                    Some(value) => variables.insert(name, value.to_owned()),
                };
                expect(command, &variables, &[name])?;
            }
        }
        expect(command, &BTreeMap::new(), names)?;
    }
    let invalid: &[(&'static str, &[&str])] = &[
        ("CNI_CONTAINERID", &["_a", ".a", "a/b", "a b", "ä"]),
        ("CNI_IFNAME", &[".", "..", "a/b", "a:b", "a b", "sixteen-letters!", "a%d"]),
        ("CNI_NETNS", &["/nonexistent", "/etc/passwd", "/proc/self/ns/mnt", "/proc/self/ns/net"]),
        ("CNI_ARGS", &["no-equals-sign"]),
    ];
    for (name, values) in invalid {
        for value in *values {
            let mut variables = complete.clone();
            variables.insert(name, (*value).to_owned());
            expect("ADD", &variables, &[name]).with_context(|| format!("{name}={value}"))?;
        }
    }
    for command in ["", "add", "FROBNICATE"] {
        expect(command, &complete, &["CNI_COMMAND"])?;
    }
    Ok(())
}

/// A configuration with a run directory of its own, which the host sees as `/run/husk/<name>`.
fn elsewhere(case: &Case<'_>, name: &str) -> Result<(std::path::PathBuf, Value)> {
    let directory = case.bed.run_file(name);
    fs::create_dir_all(&directory)?;
    let mut config = case.network.husk_base();
    config["runDirectory"] = format!("/run/husk/{name}").into();
    Ok((directory, config))
}

fn input_output(case: &Case<'_>) -> Result<()> {
    let (directory, config) = elsewhere(case, "unreadable")?;
    fs::write(directory.join("leases"), "not a directory")?;
    let message = refused(&call(case, "DEL", &config.to_string())?, 5, case.network.version())?;
    ensure!(message.contains("/run/husk/unreadable/leases"), "{message}");
    Ok(())
}

fn undecodable(case: &Case<'_>) -> Result<()> {
    for input in ["", "{", "[]", "7", "\u{fffd}", "{\"cniVersion\": \"newest\"}"] {
        for command in ["ADD", "DEL"] {
            refused(&call(case, command, input)?, 6, "1.1.0").with_context(|| format!("{command} with {input:?}"))?;
        }
    }
    Ok(())
}

fn invalid(case: &Case<'_>) -> Result<()> {
    let (_pod, attachment) = case.bed.sandbox()?;
    let mut variables = attachment.environment();
    variables.insert("CNI_COMMAND", "ADD".to_owned());
    for (key, value) in [
        ("name", json!("")),
        ("name", json!("-a")),
        ("name", json!("a/b")),
        ("name", Value::Null),
        ("runDirectory", json!("relative")),
        ("runtimeConfig", json!({"ips": "10.42.0.9"})),
        ("runtimeConfig", json!({"ips": ["10.42.0.300"]})),
        ("runtimeConfig", json!({"ips": ["192.0.2.1"]})),
        ("runtimeConfig", json!({"mac": "01:00:5e:00:00:01"})),
        ("runtimeConfig", json!([])),
        ("args", json!({"cni": {"ips": 7}})),
        ("dns", json!([])),
        ("prevResult", json!([])),
        ("prevResult", json!({"ips": 7})),
    ] {
        let mut config = case.network.husk_base();
        config[key] = value.clone();
        let outcome = case.network.call_husk(&variables, &config.to_string())?;
        let message = refused(&outcome, 7, case.network.version()).with_context(|| format!("{key} = {value}"))?;
        ensure!(!message.is_empty());
    }
    case.bed.ensure_empty()
}

fn later(case: &Case<'_>) -> Result<()> {
    let (_pod, attachment) = case.bed.sandbox()?;
    let (_, config) = elsewhere(case, "empty")?;
    let mut variables = attachment.environment();
    variables.insert("CNI_COMMAND", "ADD".to_owned());
    let message = refused(&case.network.call_husk(&variables, &config.to_string())?, 11, case.network.version())?;
    ensure!(message.contains("huskd"), "{message}");
    Ok(())
}
