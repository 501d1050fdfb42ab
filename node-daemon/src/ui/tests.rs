use std::sync::Arc;
use std::time::Duration;

use husk_overlay::config::Config;
use husk_overlay::issue::{Issue, IssueKind, Severity};
use husk_overlay::name::NodeName;
use husk_overlay::prefix::Family;
use husk_overlay::probe::Standing;
use hyper::Request;
use tokio::sync::watch;

use super::*;
use crate::engine::State;
use crate::flows::{Flow, Flows};
use crate::metrics::{Fixed, Live, PathSample, PeerSample, Sample};
use crate::report::PeerState;

const HOSTILE: &str = "<script>alert('\"&x')</script>";

fn peer(number: usize, state: PeerState, standing: Standing) -> PeerSample {
    let path = PathSample {
        family: Family::Ipv4,
        standing,
        promised: 1440,
        passes: Some(if matches!(standing, Standing::Limited { .. }) { 1300 } else { 1440 }),
        rtt: Some(Duration::from_micros(700)),
        loss_per_mille: Some(0),
    };
    PeerSample {
        node: NodeName::new(&format!("node-{number:04}")).unwrap(),
        state,
        reason: (state == PeerState::Refused).then(|| HOSTILE.to_owned()),
        address: Some(format!("192.0.{}.{}", number / 250, number % 250).parse().unwrap()),
        heard: Some(Duration::from_secs(3)),
        mtu: Some(1440),
        paths: vec![path],
    }
}

fn flow() -> Flow {
    let flow = serde_json::json!({
        "sequence": 1, "time": "2026-11-28T12:00:00Z", "count": 3, "direction": "ingress", "verdict": "denied",
        "source": {"address": "10.42.0.5", "port": 40000, "pod": HOSTILE, "namespace": HOSTILE},
        "destination": {"address": "fd42::9", "port": 80, "pod": "web", "namespace": "default"},
        "protocol": "TCP", "icmp": null, "answer": false, "length": 60, "reason": HOSTILE, "policy": null,
        "changedSince": false,
    });
    serde_json::from_value(flow).unwrap()
}

fn gathering(peers: Vec<PeerSample>) -> Gathering {
    let config = Config::parse("c", "clusterCIDRs: [10.42.0.0/16]\nmode: wireguard").unwrap();
    let issue = |severity, subject: &str| Issue {
        severity,
        kind: IssueKind::BadManifest,
        subject: subject.into(),
        message: format!("it says {HOSTILE}"),
        remedy: HOSTILE.into(),
    };
    let issues = vec![issue(Severity::Warning, "small"), issue(Severity::Blocking, HOSTILE)];
    let live = Live::default();
    live.set_sample(Sample { peers, pod_mtu: Some(1440), device: "kernel", ..Sample::default() });
    let (_, states) = watch::channel(State { reason: Some(HOSTILE.into()), issues, ..State::default() });
    let flows = Flows::default();
    flows.keep(flow());
    let (_, configuration) = watch::channel(None);
    let fixed = Arc::new(Fixed::of(&config, &NodeName::new("host1").unwrap()));
    Gathering { fixed, live, states, configuration, flows }
}

fn view(peers: Vec<PeerSample>, query: &str) -> View {
    View::of(&gathering(peers), &Query::parse(query))
}

fn many() -> Vec<PeerSample> {
    let all = (0..5_000).map(|number| match number {
        3_000 => peer(number, PeerState::Refused, Standing::Unknown),
        3_001 => peer(number, PeerState::Connected, Standing::Limited { passes: 1300 }),
        3_002 => peer(number, PeerState::Connected, Standing::Unreachable),
        _ => peer(number, PeerState::Connected, Standing::Verified),
    });
    all.collect()
}

#[test]
fn what_the_cluster_says_is_text_and_nothing_else() {
    let mut peers = vec![peer(1, PeerState::Refused, Standing::Unknown)];
    peers.push(peer(2, PeerState::Connected, Standing::Verified));
    let page = page::whole(&view(peers, "q=%3Cscript%3E%22")).into_string();
    // The page's own script is the only one.
    assert_eq!(page.matches("<script").count(), 1);
    assert!(page.contains("&lt;script&gt;alert('&quot;&amp;x')&lt;/script&gt;"), "{page}");
    assert!(page.contains("value=\"&lt;script&gt;&quot;\""), "{page}");
    assert!(!page.contains("onerror") && !page.contains("http://") && !page.contains("https://"));
}

#[test]
fn trouble_comes_first_and_5000_nodes_stay_readable() {
    let view = view(many(), "");
    let names: Vec<&str> = view.peers.iter().take(4).map(|peer| peer.node.as_str()).collect();
    assert_eq!(names, ["node-3000", "node-3002", "node-3001", "node-0000"]);
    assert_eq!((view.peers.len(), view.found, view.all, view.cells.len()), (view::ROWS, 5_000, 5_000, 5_000));
    assert_eq!(view.counts.iter().map(|(_, count)| *count).collect::<Vec<_>>(), [4_997, 0, 1, 2]);
    let page = page::whole(&view).into_string();
    eprintln!("{} bytes of page, {} of JSON", page.len(), serde_json::to_vec(&view).unwrap().len());
    assert!(page.len() < 200_000, "{}", page.len());
    assert!(page.contains("5000 other nodes: 4997 well, 0 quiet, 1 impaired, 2 not reached"));
    assert!(page.contains("should be 1440") && page.contains("The first 100 of 5000"));
    assert!(serde_json::to_vec(&view).unwrap().len() < 60_000);
}

#[test]
fn a_search_finds_names_addresses_and_states() {
    let found = |query: &str| {
        let view = view(many(), query);
        (view.found, view.peers.first().map(|peer| peer.node.to_string()))
    };
    assert_eq!(found("q=node-4999"), (1, Some("node-4999".into())));
    assert_eq!(found("x=1&q=NODE-4999+"), (1, Some("node-4999".into())));
    assert_eq!(found("q=192.0.12.2").1, Some("node-3002".into()));
    assert_eq!(found("q=limited"), (1, Some("node-3001".into())));
    assert_eq!(found("q=not%20reached").0, 2);
    assert_eq!(found("q=nobody"), (0, None));
    assert_eq!(found(&format!("q={}", "%C3%A4".repeat(200))).0, 0);
    assert_eq!(found("q=%").0, 0);
}

#[test]
fn few_nodes_are_drawn_with_their_names() {
    let peers = (0..5).map(|number| peer(number, PeerState::Connected, Standing::Verified)).collect();
    let page = page::part(&view(peers, "")).into_string();
    assert_eq!((page.matches("<circle").count(), page.matches("<line").count()), (6, 5));
    assert!(page.contains(">node-0004</text>") && page.contains("0.7 ms"));
    let some = (0..100).map(|number| peer(number, PeerState::Connected, Standing::Verified)).collect();
    let page = page::part(&view(some, "q=node-0007")).into_string();
    assert_eq!(page.matches("<rect").count(), 100);
    assert!(page.contains("<title>node-0042: well</title>"));
    let alone = page::part(&view(Vec::new(), "")).into_string();
    assert!(alone.contains("knows of no other one") && !alone.contains("<svg"));
}

/// The name of this node stands straight below it; names of a dozen nodes have no room without a line, which stops around them.
#[test]
fn no_line_crosses_the_name_of_this_node() {
    for count in 1..=6 {
        let peers = (0..count).map(|number| peer(number, PeerState::Connected, Standing::Verified)).collect();
        let page = page::part(&view(peers, "")).into_string();
        let lines: Vec<&str> = page.split("<line ").skip(1).filter_map(|rest| rest.split('>').next()).collect();
        assert_eq!(lines.len(), count);
        for line in lines {
            let of = |name: &str| -> f64 {
                let value = line.split(&format!(" {name}=\"")).nth(1).and_then(|rest| rest.split('"').next());
                value.unwrap().parse().unwrap()
            };
            let (dx, dy) = (of("x2") - of("x1"), of("y2") - of("y1"));
            // 32 units below, where eight letters reach 30 to either side.
            assert!(dy <= 1.0 || (dx / dy * 32.0).abs() > 30.0, "{count}: {line}");
        }
    }
}

#[tokio::test]
async fn everything_is_served_with_its_rules() {
    let directory = tempfile::tempdir().unwrap();
    let key = Arc::new(Key::of(directory.path()).unwrap());
    let site = Page::new(gathering(many()), Arc::clone(&key));
    let get = async |path: &str, cookie: &str| {
        let request = Request::get(path).header("host", "localhost:9473").header("cookie", cookie).body(()).unwrap();
        site.get(&request.into_parts().0).await
    };
    let cookie = format!("husk-host1={}", key.cookie());
    for (path, media_type) in [
        ("/", "text/html"),
        ("/part?q=node-1", "text/html"),
        ("/api/state", "application/json"),
        ("/style.css", "text/css"),
        ("/app.js", "text/javascript"),
    ] {
        let refused = get(path, "").await;
        assert_eq!(refused.status(), StatusCode::UNAUTHORIZED, "{path}");
        let answer = get(path, &cookie).await;
        assert_eq!(answer.status(), StatusCode::OK, "{path}");
        assert!(answer.headers()["content-type"].to_str().unwrap().starts_with(media_type), "{path}");
        let policy = answer.headers()["content-security-policy"].to_str().unwrap();
        assert!(policy.starts_with("default-src 'none'") && !policy.contains("unsafe"), "{policy}");
    }
    assert_eq!(get("/etc/passwd", &cookie).await.status(), StatusCode::NOT_FOUND);
    let entered = get(&format!("/?key={}", key.expose()), "").await;
    assert_eq!((entered.status(), entered.headers()["location"].to_str().unwrap()), (StatusCode::SEE_OTHER, "/"));
}
