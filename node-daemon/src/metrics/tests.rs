use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use husk_dataplane::kernel::Table;
use husk_dataplane::reconcile::{Failure, Outcome};
use husk_overlay::config::Config;
use husk_overlay::ipc::Attaching;
use husk_overlay::issue::{Issue, IssueKind, Severity};
use husk_overlay::name::NodeName;
use husk_overlay::prefix::Family;
use husk_overlay::probe::Standing;

use super::catalogue::{ALL, Kind};
use super::*;
use crate::flows::Totals;
use crate::report::{Counter, PeerState};

fn fixed(extra: &str) -> Fixed {
    let config = Config::parse("c", &format!("clusterCIDRs: [10.42.0.0/16]\n{extra}")).unwrap();
    Fixed::of(&config, &NodeName::new("host1").unwrap())
}

fn peer(number: u32) -> PeerSample {
    let path = |family| PathSample {
        family,
        standing: if number == 7 { Standing::Limited { passes: 1300 } } else { Standing::Verified },
        promised: 1440,
        passes: Some(if number == 7 { 1300 } else { 1440 }),
        rtt: Some(Duration::from_micros(number.into())),
        loss_per_mille: Some(u16::from(number == 7) * 250),
    };
    PeerSample {
        node: NodeName::new(&format!("node-{number}")).unwrap(),
        state: if number.is_multiple_of(2) { PeerState::Connected } else { PeerState::Idle },
        reason: None,
        address: None,
        heard: Some(Duration::from_secs(number.into())),
        mtu: Some(1440),
        paths: Family::ALL.map(path).into(),
    }
}

fn inputs(peers: u32, extra: &str) -> Inputs {
    let counter = |name: &str, packets| (name.to_owned(), Counter { packets, bytes: packets * 100 });
    let live = Live::default();
    let outcome = Outcome {
        applied: [(Table::Routes, 3), (Table::XfrmStates, 1)].into(),
        took: [(Table::Routes, Duration::from_millis(2)), (Table::Links, Duration::from_micros(100))].into(),
        ..Outcome::default()
    };
    live.passed(&outcome, Duration::from_millis(3));
    live.gave_up();
    let failure = Failure { table: Table::Fdb, change: None, error: husk_dataplane::Error::WithTheOthers };
    let outcome = Outcome { failures: vec![failure], ..Outcome::default() };
    live.passed(&outcome, Duration::from_millis(3));
    live.plugin_ended(Attaching::Add, Duration::from_millis(5), None);
    live.plugin_ended(Attaching::Add, Duration::from_millis(70), Some(11));
    live.plugin_ended(Attaching::Del, Duration::from_millis(2), Some(4_000_000_000));
    live.admitted(true, Duration::from_millis(1));
    let issue = |kind, severity, subject: &str| Issue {
        severity,
        kind,
        subject: subject.into(),
        message: "quotes \" and \\ and\nlines".into(),
        remedy: "none".into(),
    };
    Inputs {
        fixed: Arc::new(fixed(extra)),
        live,
        ready: true,
        issues: vec![
            issue(IssueKind::PathMtu, Severity::Error, "a"),
            issue(IssueKind::PathMtu, Severity::Error, "b"),
            issue(IssueKind::BadConfig, Severity::Warning, "c"),
        ],
        sample: Arc::new(Sample {
            underlay_mtu: Some(1500),
            pod_mtu: Some(1440),
            device: "kernel",
            keys: Some(KeySample { age: Some(Duration::from_secs(100)), held: 1, rotating: false }),
            source: SourceSample { up: true, age: Some(Duration::from_secs(2)) },
            endpoints: 12,
            pools: vec![PoolSample { name: "a \"pool\"\\\n".into(), blocks: 1024, used: 3 }],
            addresses: [(Family::Ipv4, AddressSample { blocks: 1, total: 63, leased: 12 })].into(),
            peers: (0..peers).map(peer).collect(),
        }),
        sample_age: Duration::from_secs(10),
        flows: Totals { recorded: [4, 9], lost: [1, 2] },
        guard: [counter("plaintext_out", 5), counter("spoofed", 0)].into(),
        policy: [
            counter("denied_ingress", 7),
            counter("denied_egress", 8),
            counter("unknown_pod", 9),
            counter("stateless", 10),
            counter("passed", 11),
            counter("of a later version", 12),
        ]
        .into(),
        xfrm: [("XfrmInNoPols".to_owned(), 3)].into(),
        process: Process::read(),
        now: Duration::from_secs(1_000_000),
    }
}

fn written(peers: u32, extra: &str) -> String {
    exposition(inputs(peers, extra), Form::Text).unwrap()
}

/// Series with their values, by text.
fn series(text: &str) -> BTreeMap<String, f64> {
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    samples
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').unwrap();
            (name.to_owned(), value.parse().unwrap())
        })
        .collect()
}

#[test]
fn every_metric_is_told_with_the_labels_it_promises() {
    let text = written(8, "metrics: {perPeer: true}");
    let all = series(&text);
    for metric in ALL {
        let suffix = if metric.kind == Kind::Histogram { "_count" } else { "" };
        let name = format!("{}{suffix}", metric.name);
        let found = all.keys().filter(|series| series.split('{').next() == Some(&name));
        let mut labels = BTreeSet::new();
        for series in found {
            let inside = series.split_once('{').map(|(_, labels)| labels.trim_end_matches('}')).unwrap_or_default();
            // Values of these tests have no comma and no equals sign in them.
            let of_series: Vec<&str> =
                inside.split(',').filter(|it| !it.is_empty()).map(|it| it.split('=').next().unwrap()).collect();
            labels.insert(of_series);
        }
        assert_eq!(labels.into_iter().collect::<Vec<_>>(), [metric.labels], "{}", metric.name);
        assert!(text.contains(&format!("# HELP {} {}", metric.name, metric.help)), "{}", metric.name);
    }
}

#[test]
fn values_are_those_that_were_gathered() {
    let all = series(&written(8, ""));
    for (name, value) in [
        (
            "husk_node_info{node=\"host1\",mode=\"wireguard\",encrypted=\"true\",source=\"directory\",blocks=\"pools\",device=\"kernel\"}",
            1.0,
        ),
        ("husk_ready", 1.0),
        ("husk_issues{kind=\"PathMtu\",severity=\"error\"}", 2.0),
        ("husk_issues{kind=\"BadConfig\",severity=\"warning\"}", 1.0),
        ("husk_passes_total{result=\"clean\"}", 1.0),
        ("husk_passes_total{result=\"given_up\"}", 1.0),
        ("husk_passes_total{result=\"failures\"}", 1.0),
        ("husk_table_failures_total{table=\"fdb\"}", 1.0),
        ("husk_table_changes_total{table=\"routes\"}", 3.0),
        ("husk_table_changes_total{table=\"xfrm_states\"}", 1.0),
        ("husk_table_failures_total{table=\"routes\"}", 0.0),
        ("husk_table_duration_seconds_count{table=\"routes\"}", 1.0),
        ("husk_table_duration_seconds_sum{table=\"routes\"}", 0.002),
        ("husk_table_duration_seconds_bucket{le=\"0.001\",table=\"links\"}", 1.0),
        ("husk_table_duration_seconds_count{table=\"fdb\"}", 0.0),
        ("husk_pass_duration_seconds_bucket{le=\"0.004\"}", 2.0),
        ("husk_pass_duration_seconds_bucket{le=\"0.002\"}", 0.0),
        ("husk_pass_duration_seconds_bucket{le=\"+Inf\"}", 2.0),
        ("husk_cni_duration_seconds_count{command=\"ADD\",result=\"success\"}", 1.0),
        ("husk_cni_duration_seconds_sum{command=\"ADD\",result=\"failure\"}", 0.07),
        ("husk_cni_duration_seconds_count{command=\"DEL\",result=\"success\"}", 0.0),
        ("husk_cni_errors_total{command=\"ADD\",code=\"11\"}", 1.0),
        ("husk_cni_errors_total{command=\"DEL\",code=\"other\"}", 1.0),
        ("husk_source_last_success_timestamp_seconds", 999_988.0),
        ("husk_key_age_seconds", 110.0),
        ("husk_key_rotation_interval_seconds", 86_400.0),
        ("husk_peers{state=\"connected\"}", 4.0),
        ("husk_peers{state=\"refused\"}", 0.0),
        ("husk_peers_handshake_age_seconds{stat=\"max\"}", 17.0),
        ("husk_paths{family=\"ipv6\",standing=\"limited\"}", 1.0),
        ("husk_paths{family=\"ipv4\",standing=\"unreachable\"}", 0.0),
        ("husk_paths_rtt_seconds{family=\"ipv4\",stat=\"max\"}", 7e-6),
        ("husk_paths_loss_ratio{family=\"ipv4\",stat=\"max\"}", 0.25),
        ("husk_paths_mtu_bytes{family=\"ipv4\",stat=\"min\"}", 1300.0),
        ("husk_guard_dropped_packets_total{reason=\"plaintext_out\"}", 5.0),
        ("husk_guard_dropped_bytes_total{reason=\"plaintext_out\"}", 500.0),
        ("husk_policy_packets_total{verdict=\"denied\",direction=\"ingress\",reason=\"policy\"}", 7.0),
        ("husk_policy_packets_total{verdict=\"denied\",direction=\"any\",reason=\"unknown_pod\"}", 9.0),
        ("husk_policy_packets_total{verdict=\"accepted\",direction=\"any\",reason=\"policy\"}", 11.0),
        ("husk_flows_recorded_total{kind=\"denied\"}", 4.0),
        ("husk_flows_recorded_total{kind=\"connection\"}", 9.0),
        ("husk_flows_lost_total{kind=\"denied\"}", 1.0),
        ("husk_flows_lost_total{kind=\"connection\"}", 2.0),
        ("husk_xfrm_errors_total{reason=\"XfrmInNoPols\"}", 3.0),
        ("husk_ipam_pool_blocks{pool=\"a \\\"pool\\\"\\\\\\n\"}", 1024.0),
        ("husk_ipam_addresses_leased{family=\"ipv4\"}", 12.0),
        ("husk_endpoints", 12.0),
    ] {
        assert_eq!(all.get(name), Some(&value), "{name}");
    }
}

#[test]
fn before_the_first_pass_there_is_nothing_to_tell_of_it() {
    let before = Inputs { live: Live::default(), sample: Arc::default(), ready: false, ..inputs(0, "") };
    let all = series(&exposition(before, Form::Text).unwrap());
    assert_eq!((all["husk_ready"], all["husk_source_up"], all["husk_peers{state=\"connected\"}"]), (0.0, 0.0, 0.0));
    let absent = ["husk_last_pass_timestamp", "husk_key_age", "husk_pod_mtu", "husk_paths", "husk_peers_handshake"];
    for name in absent {
        assert!(!all.keys().any(|series| series.starts_with(name)), "{name}");
    }
}

/// 5,000 nodes, and 200 pools: a node has a few hundred series. With a series for each peer it has thousands, which is asked for.
#[test]
fn the_number_of_series_does_not_grow_with_the_cluster() {
    let count = |peers, extra: &str| {
        let mut inputs = inputs(peers, extra);
        let pools = (0..200).map(|number| PoolSample { name: format!("pool-{number}"), blocks: 10, used: 1 });
        inputs.sample = Arc::new(Sample { pools: pools.collect(), ..(*inputs.sample).clone() });
        let all = series(&exposition(inputs, Form::Text).unwrap());
        assert_eq!(all["husk_ipam_pool_blocks{pool=\"(others)\"}"], 1000.0);
        all.len()
    };
    let (few, many) = (count(10, ""), count(5_000, ""));
    eprintln!("{many} series");
    assert_eq!(few, many);
    assert!(many < 700, "{many}");
    assert_eq!(count(5_000, "metrics: {perPeer: true}"), many + 5_000 * (2 + 3 * 2));
}

#[test]
fn both_forms_tell_the_same() {
    let (open, text) =
        (exposition(inputs(3, ""), Form::OpenMetrics).unwrap(), exposition(inputs(3, ""), Form::Text).unwrap());
    assert!(open.ends_with("# EOF\n") && !text.contains("# EOF"));
    assert!(open.contains("# TYPE husk_passes counter\n") && open.contains("# TYPE husk_build info\n"));
    assert!(text.contains("# TYPE husk_passes_total counter\n") && text.contains("# TYPE husk_build_info gauge\n"));
    let names = |text: &str| series(text).into_keys().collect::<Vec<_>>();
    assert_eq!(names(&open), names(&text));
    assert_eq!(Form::accepted("application/openmetrics-text;version=1.0.0;q=0.5,text/plain"), Form::OpenMetrics);
    assert_eq!(Form::accepted("*/*"), Form::Text);
}

#[test]
fn names_follow_the_rules() {
    for metric in ALL {
        let ours = metric.name.starts_with("husk_") || metric.name.starts_with("process_");
        assert!(ours && metric.name.chars().all(|it| it.is_ascii_lowercase() || it == '_'), "{}", metric.name);
        assert_eq!(metric.name.ends_with("_total"), metric.kind == Kind::Counter, "{}", metric.name);
        assert_eq!(metric.name.ends_with("_info"), metric.kind == Kind::Info, "{}", metric.name);
        assert!(!metric.help.contains('\n') && !metric.help.contains('\\'), "{}: help is not escaped", metric.name);
    }
    let names: BTreeSet<&str> = ALL.iter().map(|metric| metric.name).collect();
    assert_eq!(names.len(), ALL.len());
}

/// The table of the documentation is this one; with `HUSK_WRITE_DOCS` set, it is written.
#[test]
fn the_documentation_has_every_metric() {
    let mut table = String::from("| metric | type | labels | meaning |\n|---|---|---|---|\n");
    for metric in ALL {
        let labels: Vec<String> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
        let kind = format!("{:?}", metric.kind).to_lowercase();
        table += &format!("| `{}` | {kind} | {} | {} |\n", metric.name, labels.join(", "), metric.help);
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md");
    let text = std::fs::read_to_string(path).unwrap();
    let (begin, end) = ("<!-- table -->\n", "<!-- end of table -->");
    let (before, rest) = text.split_once(begin).expect("the mark before the table");
    let (now, after) = rest.split_once(end).expect("the mark after the table");
    if std::env::var_os("HUSK_WRITE_DOCS").is_some() {
        std::fs::write(path, format!("{before}{begin}{table}{end}{after}")).unwrap();
        return;
    }
    assert_eq!(now, table, "write it anew: HUSK_WRITE_DOCS=1 cargo test -p husk-node-daemon the_documentation_has");
}
