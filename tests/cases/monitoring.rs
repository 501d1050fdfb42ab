//! Alert rules, runbooks and dashboard: they parse, they name only metrics that there are, and a real Prometheus answers all of
//! their questions about a real cluster.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_node_daemon::metrics::catalogue::{ALL, Kind};
use husk_tests::process::Program;
use husk_tests::{Cluster, Mode, Netns, eventually, http};
use serde_json::{Value, json};

/// How long Prometheus may take to start, and to have scraped twice.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where the Prometheus of the test listens.
const PROMETHEUS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9090);

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> Result<String> {
    fs::read_to_string(root().join(path)).with_context(|| path.to_owned())
}

/// The rule file in the PrometheusRule.
fn rules() -> Result<Value> {
    let manifest: Value = serde_saphyr::from_str(&read("manifests/monitoring/rules.yaml")?)?;
    Ok(manifest["spec"].clone())
}

fn alerts() -> Result<Vec<Value>> {
    let groups = rules()?["groups"].as_array().cloned().unwrap_or_default();
    Ok(groups.iter().flat_map(|group| group["rules"].as_array().cloned().unwrap_or_default()).collect())
}

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// The dashboard's questions, with what Grafana puts into them, by panel.
fn questions() -> Result<Vec<(String, String)>> {
    let dashboard: Value = serde_json::from_str(&read("manifests/monitoring/dashboard.json")?)?;
    let panels = dashboard["panels"].as_array().cloned().unwrap_or_default();
    let mut questions = Vec::new();
    for panel in &panels {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let question = text(target, "/expr").replace("$instance", ".*").replace("$__rate_interval", "1m");
            ensure!(!question.contains('$'), "{}: {question}", panel["title"]);
            questions.push((text(panel, "/title").to_owned(), question));
        }
    }
    ensure!(questions.len() > 30, "{}", questions.len());
    Ok(questions)
}

/// The names of metrics that a question asks for.
fn metrics_of(question: &str) -> BTreeSet<&str> {
    let words = question.split(|it: char| !it.is_ascii_alphanumeric() && it != '_');
    words.filter(|word| word.starts_with("husk_") || word.starts_with("process_")).collect()
}

/// The names that samples of our metrics have.
fn names() -> BTreeSet<String> {
    let of = |metric: &husk_node_daemon::metrics::catalogue::Metric| match metric.kind {
        Kind::Histogram => ["bucket", "sum", "count"].map(|suffix| format!("{}_{suffix}", metric.name)).into(),
        _ => vec![metric.name.to_owned()],
    };
    ALL.iter().flat_map(of).collect()
}

#[test]
fn every_question_names_metrics_that_there_are() -> Result<()> {
    let names = names();
    let alerts = alerts()?;
    let of_alerts = alerts.iter().map(|alert| (text(alert, "/alert").to_owned(), text(alert, "/expr").to_owned()));
    for (asker, question) in of_alerts.chain(questions()?) {
        for metric in metrics_of(&question) {
            ensure!(names.contains(metric), "{asker} asks for {metric}, which is no metric");
        }
    }
    Ok(())
}

#[test]
fn every_alert_has_its_runbook() -> Result<()> {
    let runbooks = read("docs/runbooks.md")?;
    let sections: Vec<(&str, &str)> =
        runbooks.split("\n## ").skip(1).filter_map(|section| section.split_once('\n')).collect();
    let alerts = alerts()?;
    let titles: Vec<&str> = sections.iter().map(|(title, _)| *title).collect();
    let of_alerts: Vec<&str> = alerts.iter().map(|alert| text(alert, "/alert")).collect();
    ensure!(titles == of_alerts, "sections {titles:?}, alerts {of_alerts:?}");
    for (title, section) in sections {
        ensure!(section.contains("**Means:**") && section.contains("**Do:**"), "{title}: {section}");
    }
    for alert in &alerts {
        let name = text(alert, "/alert");
        let runbook = format!("docs/runbooks.md#{}", name.to_lowercase());
        ensure!(text(alert, "/annotations/runbook_url") == runbook, "{name}");
        for annotation in ["summary", "description"] {
            ensure!(text(alert, &format!("/annotations/{annotation}")).len() > 20, "{name} has no {annotation}");
        }
        ensure!(["critical", "warning", "info"].contains(&text(alert, "/labels/severity")), "{name}");
    }
    Ok(())
}

/// A panel with a line for each of 5,000 nodes shows nothing, and takes the browser down with it.
#[test]
fn no_panel_has_a_series_for_every_node() -> Result<()> {
    const SELECTING: [&str; 2] = ["topk(", "bottomk("];
    const AGGREGATING: [&str; 6] = ["count", "sum", "max", "min", "avg", "histogram_quantile"];
    for (panel, question) in questions()? {
        let begins = |words: &[&str]| words.iter().any(|word| question.starts_with(word));
        let mut kept = question.split(" by (").skip(1).filter_map(|rest| rest.split_once(')'));
        let of_all = begins(&AGGREGATING) && kept.all(|(labels, _)| !labels.contains("instance"));
        ensure!(begins(&SELECTING) || of_all, "{panel} has as many series as there are nodes: {question}");
    }
    Ok(())
}

#[test]
fn the_dashboard_is_whole() -> Result<()> {
    let dashboard: Value = serde_json::from_str(&read("manifests/monitoring/dashboard.json")?)?;
    let panels = dashboard["panels"].as_array().context("no panels")?;
    let ids: BTreeSet<u64> = panels.iter().filter_map(|panel| panel["id"].as_u64()).collect();
    ensure!(ids.len() == panels.len(), "panels share an id");
    let mut taken = BTreeSet::new();
    for panel in panels {
        let at = |key: &str| panel["gridPos"][key].as_u64().unwrap_or_default();
        ensure!(at("x") + at("w") <= 24 && at("w") > 0 && at("h") > 0, "{}: {}", panel["title"], panel["gridPos"]);
        for x in at("x")..at("x") + at("w") {
            for y in at("y")..at("y") + at("h") {
                ensure!(taken.insert((x, y)), "{} lies on another panel", panel["title"]);
            }
        }
        let described = panel["type"] == "row" || text(panel, "/description").len() > 5;
        ensure!(described, "{} has no description", panel["title"]);
    }
    Ok(())
}

/// A directory of the test's own.
fn scratch(cluster: &Cluster) -> Result<PathBuf> {
    let directory = cluster.host(1).file("/var/lib/prometheus");
    fs::create_dir_all(&directory)?;
    Ok(directory)
}

/// For each alert, a series that lets it fire, how it goes on minute by minute (in promtool's notation), and what its other
/// labels say.
const TROUBLES: &[(&str, &[(&str, &str)])] = &[
    ("HuskDaemonDown", &[("up{job='husk'}", "0x200")]),
    (
        "HuskDaemonMissing",
        &[
            ("kube_daemonset_status_number_unavailable{daemonset='husk'}", "2x200"),
            ("kube_daemonset_status_updated_number_scheduled{daemonset='husk'}", "7x200"),
        ],
    ),
    ("HuskNotReady", &[("husk_ready", "0x200")]),
    ("HuskLoopStuck", &[("husk_last_pass_timestamp_seconds", "0x200")]),
    ("HuskIssues", &[("husk_issues{kind='ApplyFailed',severity='error'}", "1x200")]),
    ("HuskReconcileFailing", &[("husk_table_failures_total{table='routes'}", "0+1x200")]),
    ("HuskSourceDown", &[("husk_source_up", "0x200")]),
    ("HuskAddFailing", &[("husk_cni_errors_total{command='ADD',code='11'}", "0+1x200")]),
    (
        "HuskAddSlow",
        &[
            ("husk_cni_duration_seconds_bucket{command='ADD',result='success',le='2.048'}", "0+1x200"),
            ("husk_cni_duration_seconds_bucket{command='ADD',result='success',le='4.096'}", "0+9x200"),
            ("husk_cni_duration_seconds_bucket{command='ADD',result='success',le='+Inf'}", "0+9x200"),
        ],
    ),
    (
        "HuskNodeIsolated",
        &[
            ("husk_paths{family='ipv4',standing='unreachable'}", "3x200"),
            ("husk_paths{family='ipv4',standing='verified'}", "2x200"),
        ],
    ),
    ("HuskPeersWithoutTunnel", &[("husk_peers{state='refused'}", "1x200")]),
    ("HuskPathsUnreachable", &[("husk_paths{family='ipv4',standing='unreachable'}", "1x200")]),
    ("HuskPathsLimited", &[("husk_paths{family='ipv4',standing='limited'}", "1x200")]),
    ("HuskPathsLossy", &[("husk_paths_loss_ratio{family='ipv4',stat='max'}", "0.1x200")]),
    ("HuskKeyTooOld", &[("husk_key_age_seconds", "200000x200"), ("husk_key_rotation_interval_seconds", "86400x200")]),
    ("HuskKeyRotationStuck", &[("husk_key_rotation_in_progress", "1x200")]),
    ("HuskPlaintextStopped", &[("husk_guard_dropped_packets_total{reason='plaintext_out'}", "0+1x200")]),
    ("HuskSpoofing", &[("husk_guard_dropped_packets_total{reason='spoofed'}", "0+600x200")]),
    ("HuskIpsecErrors", &[("husk_xfrm_errors_total{reason='XfrmInNoPols'}", "0+600x200")]),
    (
        "HuskPoolNearlyFull",
        &[("husk_ipam_pool_blocks{pool='a'}", "100x200"), ("husk_ipam_pool_blocks_used{pool='a'}", "95x200")],
    ),
    (
        "HuskAddressesNearlyExhausted",
        &[
            ("husk_ipam_addresses{family='ipv4'}", "63x200"),
            ("husk_ipam_addresses_leased{family='ipv4'}", "62x200"),
            ("husk_node_info{blocks='node-cidrs'}", "1x200"),
        ],
    ),
    ("HuskFlowsLost", &[("husk_flows_lost_total{kind='connection'}", "0+1x200")]),
    ("HuskMemoryHigh", &[("process_resident_memory_bytes{job='husk'}", "500000000x200")]),
];

/// The same of a node that is well. No alert fires.
const WELL: &[(&str, &str)] = &[
    ("up{job='husk'}", "1x200"),
    ("husk_ready", "1x200"),
    ("husk_last_pass_timestamp_seconds", "0+60x200"),
    ("husk_issues{kind='ForeignFirewall',severity='warning'}", "1x200"),
    // Another alert tells of it.
    ("husk_issues{kind='PeerSilent',severity='error'}", "1x200"),
    ("husk_table_failures_total{table='routes'}", "3x200"),
    ("husk_source_up", "1x200"),
    ("husk_cni_errors_total{command='ADD',code='11'}", "0x100 1x100"),
    ("husk_cni_duration_seconds_bucket{command='ADD',result='success',le='0.008'}", "0+9x200"),
    ("husk_cni_duration_seconds_bucket{command='ADD',result='success',le='+Inf'}", "0+9x200"),
    ("husk_peers{state='connected'}", "4999x200"),
    ("husk_peers{state='refused'}", "0x200"),
    ("husk_paths{family='ipv4',standing='verified'}", "4999x200"),
    ("husk_paths{family='ipv4',standing='unreachable'}", "0x100 1x2 0x97"),
    ("husk_paths_loss_ratio{family='ipv4',stat='max'}", "0.01x200"),
    ("husk_key_age_seconds", "0+60x200"),
    ("husk_key_rotation_interval_seconds", "86400x200"),
    ("husk_key_rotation_in_progress", "1x20 0x179"),
    // A few when nodes join or restart.
    ("husk_guard_dropped_packets_total{reason='plaintext_out'}", "0x120 5x40 9x40"),
    ("husk_guard_dropped_packets_total{reason='plaintext_in'}", "0x174 3x26"),
    ("husk_guard_dropped_packets_total{reason='spoofed'}", "0+2x200"),
    ("husk_xfrm_errors_total{reason='XfrmInNoPols'}", "7x200"),
    ("husk_ipam_pool_blocks{pool='a'}", "100x200"),
    ("husk_ipam_pool_blocks_used{pool='a'}", "50x200"),
    ("husk_ipam_addresses{family='ipv4'}", "63x200"),
    // The node takes another block when this one is full.
    ("husk_ipam_addresses_leased{family='ipv4'}", "63x200"),
    ("husk_node_info{blocks='pools'}", "1x200"),
    ("husk_flows_lost_total{kind='denied'}", "0x200"),
    // A rollout that makes progress.
    ("kube_daemonset_status_number_unavailable{daemonset='husk'}", "2x200"),
    ("kube_daemonset_status_updated_number_scheduled{daemonset='husk'}", "0+1x200"),
    ("process_resident_memory_bytes{job='husk'}", "50000000x200"),
];

/// What every node of a large cluster tells while one of them, which therefore tells nothing, is down; a second one cannot reach
/// anybody.
const ONE_IS_DOWN: &[(&str, &str)] = &[
    ("up{job='husk'}", "1x200"),
    ("husk_issues{kind='NoRouteToPeer',severity='error'}", "1x200"),
    ("husk_issues{kind='NoRouteToPeer',severity='blocking'}", "1x200"),
    ("husk_peers{state='connected'}", "97x200"),
    ("husk_peers{state='waiting'}", "1x200"),
    ("husk_paths{family='ipv4',standing='verified'}", "97x200"),
    ("husk_paths{family='ipv4',standing='unreachable'}", "1x200"),
    ("husk_paths{family='ipv4',standing='limited'}", "1x200"),
    ("husk_paths_loss_ratio{family='ipv4',stat='max'}", "1x200"),
    ("husk_source_up", "0x200"),
];
const NOBODY_IS_REACHED: &[(&str, &str)] = &[
    ("up{job='husk'}", "1x200"),
    ("husk_peers{state='connected'}", "99x200"),
    ("husk_paths{family='ipv4',standing='verified'}", "1x200"),
    ("husk_paths{family='ipv4',standing='unreachable'}", "98x200"),
];

/// What these nodes have in common is one alert each, which says how many see it and names some of them.
fn of_many_nodes() -> Value {
    let others = (0..98).flat_map(|number| ONE_IS_DOWN.iter().map(move |series| (format!("node-{number}"), series)));
    let lonely = NOBODY_IS_REACHED.iter().map(|series| ("lonely".to_owned(), series));
    let series: Vec<Value> = others.chain(lonely).map(|(node, series)| of_node(&node, series)).collect();
    let firing = |alert: &str, labels: &str| {
        let label = format!("ALERTS{{alertname=\"{alert}\",alertstate=\"firing\",{labels}}}");
        json!({"labels": label, "value": 1})
    };
    let all = [
        firing("HuskIssues", "kind=\"NoRouteToPeer\",severity=\"warning\""),
        firing("HuskSourceDown", "severity=\"warning\""),
        firing("HuskNodeIsolated", "instance=\"lonely\",severity=\"critical\""),
        firing("HuskPeersWithoutTunnel", "severity=\"critical\",state=\"waiting\""),
        firing("HuskPathsUnreachable", "family=\"ipv4\",severity=\"critical\""),
        firing("HuskPathsLimited", "family=\"ipv4\",severity=\"warning\""),
        firing("HuskPathsLossy", "family=\"ipv4\",severity=\"warning\""),
    ];
    let tests = json!([{"expr": "ALERTS{alertstate='firing'}", "eval_time": "179m", "exp_samples": all}]);
    json!({"interval": "1m", "input_series": series, "promql_expr_test": tests})
}

/// A case of promtool's, once `up` is gone altogether.
fn without_any_daemon() -> Value {
    let annotations = json!({
        "summary": "Prometheus knows of no huskd at all",
        "description": "Prometheus gets no metrics from the daemon. What it made in the kernel goes on working; pods cannot be \
                        added, and nothing is repaired.",
        "runbook_url": "docs/runbooks.md#huskdaemondown",
    });
    let alert = json!({"exp_labels": {"severity": "critical", "job": "husk"}, "exp_annotations": annotations});
    let tests = json!([{"eval_time": "20m", "alertname": "HuskDaemonDown", "exp_alerts": [alert]}]);
    json!({"interval": "1m", "input_series": [{"series": "up{job='other'}", "values": "1x200"}], "alert_rule_test": tests})
}

/// A series of a node.
fn of_node(node: &str, (name, values): &(&str, &str)) -> Value {
    let series = match name.split_once('{') {
        Some((name, labels)) => format!("{name}{{instance='{node}',{labels}"),
        None => format!("{name}{{instance='{node}'}}"),
    };
    json!({"series": series, "values": values})
}

/// A case of promtool's: after three hours of this, so many alerts of this name fire.
fn case(name: &str, series: &[(&str, &str)], firing: &Value) -> Value {
    let series: Vec<Value> = series.iter().map(|series| of_node("node-1", series)).collect();
    let question = format!("count(ALERTS{{alertname=~'{name}',alertstate='firing'}})");
    let tests = json!([{"expr": question, "eval_time": "179m", "exp_samples": firing}]);
    json!({"interval": "1m", "input_series": series, "promql_expr_test": tests})
}

#[test]
fn promtool_knows_the_alerts_and_they_fire() -> Result<()> {
    let named: Vec<&str> = TROUBLES.iter().map(|(alert, _)| *alert).collect();
    let alerts = alerts()?;
    ensure!(named == alerts.iter().map(|alert| text(alert, "/alert")).collect::<Vec<_>>(), "{named:?}");
    let directory = std::env::temp_dir().join(format!("husk-alerts-{}", std::process::id()));
    fs::create_dir_all(&directory)?;
    let (file, tests) = (directory.join("rules.json"), directory.join("tests.json"));
    fs::write(&file, rules()?.to_string())?;
    let one = json!([{"labels": "{}", "value": 1}]);
    let mut cases: Vec<Value> = TROUBLES.iter().map(|(alert, series)| case(alert, series, &one)).collect();
    cases.push(case(".*", WELL, &json!([])));
    cases.extend([of_many_nodes(), without_any_daemon()]);
    fs::write(&tests, json!({"rule_files": ["rules.json"], "evaluation_interval": "1m", "tests": cases}).to_string())?;
    let promtool = |action: &str, file: &Path| {
        Program::new("promtool").args([action, "rules", &file.display().to_string()]).limit(PATIENCE).run()
    };
    let (checked, tested) = (promtool("check", &file), promtool("test", &tests));
    fs::remove_dir_all(&directory)?;
    for outcome in [checked?, tested?] {
        ensure!(outcome.status.success(), "{}{}", outcome.stdout, outcome.stderr);
    }
    Ok(())
}

/// A Prometheus, until it is dropped.
struct Prometheus<'a> {
    child: Child,
    netns: &'a Netns,
}

impl Drop for Prometheus<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl<'a> Prometheus<'a> {
    fn start(cluster: &'a Cluster) -> Result<Self> {
        let (host, directory) = (cluster.host(1), scratch(cluster)?);
        fs::write(directory.join("rules.json"), rules()?.to_string())?;
        let scrape = json!({"job_name": "husk", "scrape_interval": "1s", "scrape_timeout": "1s", "static_configs": [
            {"targets": ["127.0.0.1:9472"], "labels": {"instance": "host1"}},
        ]});
        let rule_files = [directory.join("rules.json")];
        let config =
            json!({"global": {"evaluation_interval": "1s"}, "rule_files": rule_files, "scrape_configs": [scrape]});
        fs::write(directory.join("prometheus.json"), config.to_string())?;
        let log = File::create(directory.join("log"))?;
        let arguments = [
            format!("--config.file={}", directory.join("prometheus.json").display()),
            format!("--storage.tsdb.path={}", directory.join("data").display()),
            format!("--web.listen-address={PROMETHEUS}"),
        ];
        let child = host.netns().program("prometheus").args(arguments).spawn(&log)?;
        Ok(Self { child, netns: host.netns() })
    }

    fn ask(&self, path: &str, query: &str) -> Result<Value> {
        let query: String = query.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let body = http::get_whole(self.netns, PROMETHEUS, &format!("/api/v1/{path}{query}"))?.body;
        serde_json::from_str(&body).with_context(|| format!("{path}: {body}"))
    }

    fn query(&self, question: &str) -> Result<Vec<Value>> {
        let answer = self.ask("query?query=", question)?;
        ensure!(answer["status"] == "success", "{question}: {answer}");
        Ok(answer["data"]["result"].as_array().cloned().unwrap_or_default())
    }
}

#[test]
fn a_real_prometheus_answers_every_question() -> Result<()> {
    let cluster = Cluster::builder().mode(Mode::Wireguard).hosts(2).start()?;
    let (one, two) = (cluster.host(1), cluster.host(2));
    let _pods = [one.add_pod("a")?, one.add_pod("b")?, two.add_pod("c")?];
    let prometheus = Prometheus::start(&cluster)?;
    let scraped = eventually("Prometheus to have scraped several times", PATIENCE, || {
        let Ok(series) = prometheus.query("count_over_time(up{job=\"husk\"}[1m])") else { return Ok(false) };
        Ok(series.first().is_some_and(|it| text(it, "/value/1").parse::<f64>().is_ok_and(|scrapes| scrapes >= 4.0)))
    });
    scraped
        .with_context(|| fs::read_to_string(scratch(&cluster).unwrap_or_default().join("log")).unwrap_or_default())?;
    ensure!(text(&prometheus.query("up{job=\"husk\"}")?[0], "/value/1") == "1", "the exposition is not understood");

    let mut empty = Vec::new();
    for (panel, question) in questions()? {
        if prometheus.query(&question)?.is_empty() {
            empty.push((panel, question));
        }
    }
    // What does not happen in a cluster that is well.
    let may_be_empty = |(panel, question): &(String, String)| {
        ["Issues", "Errors of ADD and DEL"].contains(&panel.as_str())
            || question.contains("husk_xfrm_errors_total")
            || question.contains("husk_table_") && question.ends_with("> 0")
            || question.contains("policy_programming")
    };
    empty.retain(|question| !may_be_empty(question));
    ensure!(empty.is_empty(), "nothing is known of {empty:#?}");

    let rules = prometheus.ask("rules?type=alert", "")?;
    let all: Vec<&Value> = rules["data"]["groups"].as_array().into_iter().flatten().collect();
    let evaluated: Vec<&Value> = all.iter().flat_map(|group| group["rules"].as_array().into_iter().flatten()).collect();
    ensure!(evaluated.len() == alerts()?.len(), "{rules}");
    let unwell: Vec<&Value> = evaluated.iter().copied().filter(|rule| rule["health"] != "ok").collect();
    ensure!(unwell.is_empty(), "{unwell:?}");
    let firing = evaluated.iter().filter(|rule| rule["state"] == "firing").map(|rule| text(rule, "/name"));
    let firing: Vec<&str> = firing.collect();
    ensure!(firing.is_empty(), "{firing:?}");
    Ok(())
}
