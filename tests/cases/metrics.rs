//! Metrics and health of real daemons, as Prometheus and a kubelet ask for them.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::http::{self, Answer};
use husk_tests::policy::scene::{Scene, Service, answers};
use husk_tests::process::Program;
use husk_tests::{Cluster, Family, Host, Mode, Signal, eventually};
use serde_json::json;

/// How long what a daemon does by itself may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// Where the endpoint is by default.
const ENDPOINT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9472);

fn get(host: &Host, path: &str) -> Result<Answer> {
    http::get(host.netns(), ENDPOINT, path, &[])
}

/// Series with their values.
struct Scrape(BTreeMap<String, f64>);

impl Scrape {
    fn of(host: &Host) -> Result<Self> {
        let answer = get(host, "/metrics")?;
        ensure!(answer.status == 200, "{answer:?}");
        let samples = answer.body.lines().filter(|line| !line.starts_with('#'));
        let parsed = samples.map(|line| {
            let (series, value) = line.rsplit_once(' ').with_context(|| line.to_owned())?;
            Ok((series.to_owned(), value.parse().with_context(|| line.to_owned())?))
        });
        Ok(Self(parsed.collect::<Result<_>>()?))
    }

    fn get(&self, series: &str) -> f64 {
        self.0.get(series).copied().unwrap_or(f64::NAN)
    }
}

/// Waits until a series has such a value.
fn await_series(host: &Host, series: &str, is_so: impl Fn(f64) -> bool) -> Result<()> {
    let mut last = f64::NAN;
    let awaited = eventually(series, PATIENCE, || {
        last = Scrape::of(host)?.get(series);
        Ok(is_so(last))
    });
    awaited.with_context(|| format!("{}: {series} is {last}", host.name()))
}

#[test]
fn metrics_follow_what_happens() -> Result<()> {
    let scene = Scene::start(Mode::Vxlan)?;
    let one = scene.cluster.host(1);
    well_formed(one)?;

    for (series, value) in [
        ("husk_ready", 1.0),
        ("husk_source_up", 1.0),
        ("husk_endpoints", 2.0),
        ("husk_peers{state=\"configured\"}", 1.0),
        ("husk_paths{family=\"ipv6\",standing=\"verified\"}", 1.0),
        ("husk_paths_mtu_bytes{family=\"ipv4\",stat=\"min\"}", 1450.0),
        ("husk_cni_duration_seconds_count{command=\"ADD\",result=\"success\"}", 2.0),
        ("husk_cni_admission_duration_seconds_count{result=\"success\"}", 2.0),
        ("husk_ipam_addresses_leased{family=\"ipv4\"}", 2.0),
    ] {
        await_series(one, series, |it| it == value)?;
    }
    let scrape = Scrape::of(one)?;
    let took = scrape.get("husk_cni_duration_seconds_sum{command=\"ADD\",result=\"success\"}");
    ensure!(took > 0.0 && scrape.get("husk_pass_duration_seconds_sum") > 0.0, "{took}");
    ensure!(scrape.get("husk_table_changes_total{table=\"routes\"}") > 0.0);
    ensure!(scrape.get("husk_policy_packets_total{verdict=\"accepted\",direction=\"any\",reason=\"policy\"}") > 0.0);
    ensure!(scrape.get("process_resident_memory_bytes") > 1e6 && scrape.get("process_open_fds") > 5.0);
    eprintln!("{} series", scrape.0.len());

    denials_and_drops(&scene)?;
    plugin(&scene)?;
    issues_and_readiness(&scene)
}

/// What every parser says of the exposition.
fn well_formed(host: &Host) -> Result<()> {
    let answer = get(host, "/metrics")?;
    ensure!(answer.headers["content-type"].starts_with("text/plain; version=0.0.4"), "{:?}", answer.headers);
    // It complains of names and texts against the rules as well as of bad syntax.
    let checked = Program::new("promtool").args(["check", "metrics"]).stdin(&answer.body).run()?;
    ensure!(checked.status.success() && checked.stderr.is_empty(), "{checked:?}");
    let accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5";
    let answer = http::get(host.netns(), ENDPOINT, "/metrics", &[("Accept", accept)])?;
    ensure!(answer.headers["content-type"].starts_with("application/openmetrics-text"), "{:?}", answer.headers);
    ensure!(answer.body.ends_with("# EOF\n"));
    let health = get(host, "/healthz")?;
    ensure!((health.status, health.body.as_str()) == (200, "alive\n"), "{health:?}");
    let refused = http::send(host.netns(), ENDPOINT, b"POST /metrics HTTP/1.1\r\nHost: x\r\n\r\n")?;
    ensure!(refused.starts_with("HTTP/1.1 405"), "{refused}");
    ensure!(get(host, "/passwords")?.status == 404);
    Ok(())
}

/// Flows that were denied.
const RECORDED: &str = "husk_flows_recorded_total{kind=\"denied\"}";

/// A policy that denies, and a pod that uses an address of somebody else.
fn denials_and_drops(scene: &Scene) -> Result<()> {
    let (one, near, web) = (scene.cluster.host(1), scene.pod("near"), scene.pod("web"));
    let denied = "husk_policy_packets_total{verdict=\"denied\",direction=\"ingress\",reason=\"policy\"}";
    let before = Scrape::of(one)?;
    ensure!(before.get(denied) == 0.0 && before.get(RECORDED) == 0.0, "{}", before.get(denied));
    scene.policy("default", "deny", &json!({"podSelector": {"matchLabels": {"app": "web"}}}))?;
    eventually("the policy to be in force", PATIENCE, || {
        Ok(!answers(near.netns(), Service::Udp(80), web.address(Family::Ipv4)?)?)
    })?;
    await_series(one, denied, |packets| packets > 0.0)?;
    await_series(one, RECORDED, |flows| flows > 0.0)?;
    scene.clear()?;

    let spoofed = "husk_guard_dropped_packets_total{reason=\"spoofed\"}";
    let packets = before.get(spoofed);
    near.netns().command("ip", ["address", "add", "10.42.255.250/32", "dev", "eth0"])?;
    let target = SocketAddr::new(web.address(Family::Ipv4)?, 80);
    near.netns().run(|| UdpSocket::bind("10.42.255.250:0")?.send_to(b"x", target))??;
    near.netns().command("ip", ["address", "del", "10.42.255.250/32", "dev", "eth0"])?;
    await_series(one, spoofed, |now| now > packets)
}

/// An ADD that fails, and a DEL.
fn plugin(scene: &Scene) -> Result<()> {
    let (two, far) = (scene.cluster.host(2), scene.pod("far"));
    let again = two.cni("ADD", far.spec())?;
    ensure!(again.into_result().is_err(), "a pod was added twice");
    await_series(two, "husk_cni_errors_total{command=\"ADD\",code=\"101\"}", |it| it == 1.0)?;
    await_series(two, "husk_cni_duration_seconds_count{command=\"ADD\",result=\"failure\"}", |it| it == 1.0)?;
    far.del()?.into_result()?;
    await_series(two, "husk_cni_duration_seconds_count{command=\"DEL\",result=\"success\"}", |it| it == 1.0)?;
    await_series(two, "husk_endpoints", |it| it == 1.0)
}

fn issues_and_readiness(scene: &Scene) -> Result<()> {
    let one = scene.cluster.host(1);
    let bad = scene.cluster.manifests().join("bad.yaml");
    std::fs::write(&bad, "kind: OverlayNode\napiVersion: husk.dev/v1alpha1\nmetadata: {name: [}\n")?;
    await_series(one, "husk_issues{kind=\"BadManifest\",severity=\"error\"}", |it| it >= 1.0)?;
    std::fs::remove_file(&bad)?;
    await_series(one, "husk_issues{kind=\"BadManifest\",severity=\"error\"}", f64::is_nan)?;

    ensure!(get(one, "/readyz")?.status == 200);
    // Less than IPv6 needs inside the tunnel: no pod can be served.
    one.set_underlay_mtu(1300)?;
    let mut ready = None;
    eventually("the node not to be ready", PATIENCE, || {
        ready = Some(get(one, "/readyz")?);
        Ok(ready.as_ref().is_some_and(|ready| ready.status == 503))
    })
    .with_context(|| format!("{ready:?}"))?;
    let reason = ready.map(|ready| ready.body).unwrap_or_default();
    ensure!(reason.starts_with("not ready: ") && reason.contains("1280"), "{reason}");
    await_series(one, "husk_ready", |it| it == 0.0)?;
    ensure!(get(one, "/healthz")?.status == 200, "a node that cannot serve pods is alive all the same");
    one.set_underlay_mtu(1500)?;
    eventually("the node to be ready again", PATIENCE, || Ok(get(one, "/readyz")?.status == 200))
}

#[test]
fn a_port_that_is_taken_is_an_issue_and_no_end() -> Result<()> {
    let cluster = Cluster::builder().mode(Mode::Direct).hosts(1).start()?;
    let host = cluster.host(1);
    host.stop_daemon(Signal::SIGTERM)?;
    let taken = host.netns().run(|| TcpListener::bind(ENDPOINT))??;
    host.start_daemon()?;
    host.wait_ready()?;
    let issue = || host.issues("ListenFailed").map(|mut issues| issues.pop());
    let mut told = None;
    eventually("the issue", PATIENCE, || {
        told = issue()?;
        Ok(told.is_some())
    })?;
    let told = told.unwrap_or_default();
    ensure!(told["subject"] == "metrics.listen" && told["severity"] == "warning", "{told}");
    let remedy = told["remedy"].as_str().unwrap_or_default();
    ensure!(remedy.contains("ss -lntp sport = :9472"), "{told}");
    let _pod = host.add_pod("a")?;
    drop(taken);
    eventually("the issue to go", PATIENCE, || Ok(issue()?.is_none()))?;
    ensure!(get(host, "/readyz")?.status == 200);
    await_series(host, "husk_endpoints", |it| it == 1.0)
}
