//! Flows and logs on real hosts: what begins, ends and is denied has the names of its pods, in `huskctl flows` and in a log that
//! loses no line while it is rotated; decisions are logged with who made them; `huskctl top` counts what goes by.

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_dataplane::connections;
use husk_overlay::marks::PROBE_PORT;
use husk_tests::probe::{Datagram, EchoServer, tcp};
use husk_tests::{Cluster, Family, Host, Mode, Pod, Signal, eventually};
use serde_json::{Value, json};

/// How long what a daemon does by itself may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

const FLOWS: &str = "/var/lib/husk/log/flows.jsonl";
const AUDIT: &str = "/var/lib/husk/log/audit.jsonl";

/// Connections that are begun while the log is rotated.
const CONNECTIONS: usize = 150;

struct Stage {
    cluster: Cluster,
    /// On the first host, which logs.
    client: Pod,
    /// On the second one, which does not.
    server: Pod,
    echo: EchoServer,
}

impl Stage {
    fn start() -> Result<Self> {
        let cluster = Cluster::builder().mode(Mode::Wireguard).build()?;
        cluster.host(1).configure(|config| config["logs"] = json!({"flows": FLOWS, "audit": AUDIT}))?;
        for host in cluster.hosts() {
            host.netns().sysctl("net/netfilter/nf_conntrack_acct", "1")?;
            // The kernel forgets what is over after so many seconds.
            for state in ["tcp_timeout_time_wait", "tcp_timeout_close", "udp_timeout"] {
                host.netns().sysctl(&format!("net/netfilter/nf_conntrack_{state}"), "1")?;
            }
        }
        cluster.start()?;
        let (client, server) = (cluster.host(1).add_pod("client")?, cluster.host(2).add_pod("server")?);
        client.await_answer_of(&server, PATIENCE)?;
        let echo = EchoServer::start_on(server.netns(), SocketAddr::new(server.address(Family::Ipv4)?, 0))?;
        Ok(Self { cluster, client, server, echo })
    }

    fn at(&self) -> Result<SocketAddr> {
        Ok(self.echo.at(self.server.address(Family::Ipv4)?))
    }
}

/// Whole lines of a log, read as JSON.
fn lines(path: &Path) -> Result<Vec<Value>> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let whole = text.lines().take(text.matches('\n').count());
    whole.map(|line| serde_json::from_str(line).with_context(|| format!("in {}: {line:?}", path.display()))).collect()
}

/// The first line that is wanted, once it is there.
fn await_line(path: &Path, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
    let mut found = None;
    let awaited = eventually(what, PATIENCE, || {
        found = if path.exists() { lines(path)?.into_iter().find(&wanted) } else { None };
        Ok(found.is_some())
    });
    awaited.with_context(|| fs::read_to_string(path).unwrap_or_default())?;
    found.context("it was found")
}

/// Looks at all connections: the kernel forgets those that are over when somebody comes across them, and else within a minute
/// or two (net/netfilter/nf_conntrack_core.c `gc_worker`).
fn forget_what_is_over(host: &Host) -> Result<()> {
    host.netns().run(|| connections::list(0, |_| true))??;
    Ok(())
}

/// A flow at this port, of a connection that began or ended.
fn is_flow(flow: &Value, verdict: &str, protocol: &str, to: SocketAddr) -> bool {
    let (address, port) = (&flow["destination"]["address"], &flow["destination"]["port"]);
    flow["verdict"] == verdict
        && flow["protocol"] == protocol
        && *address == to.ip().to_string()
        && *port == json!(to.port())
}

#[test]
fn flows_are_told_logged_and_counted() -> Result<()> {
    let stage = Stage::start()?;
    followed(&stage)?;
    logged(&stage)?;
    rotated(&stage)?;
    denied(&stage)?;
    top(&stage)?;
    decisions(&stage)?;
    stage.cluster.wait_ready()
}

/// On a host that logs nothing, connections are recorded from when somebody follows them.
fn followed(stage: &Stage) -> Result<()> {
    let (host, at) = (stage.cluster.host(2), stage.at()?);
    let recorded = host.huskctl(["flows", "--new", "--output", "json"])?;
    ensure!(recorded.stdout.is_empty(), "nobody has followed yet: {}", recorded.stdout);
    ensure!(recorded.stderr.contains("--follow"), "and it says how to: {}", recorded.stderr);

    let path = host.file("/run/husk/followed");
    let log = fs::File::create(&path)?;
    let arguments =
        ["flows", "--follow", "--new", "--closed", "--pod", "default/server", "--peer", "host1", "-o", "json"];
    let mut follower = host.program(husk_tests::process::binary("huskctl")?).args(arguments).spawn(&log)?;
    let told = || fs::read_to_string(&path);
    eventually("the daemon to listen", PATIENCE, || Ok(told()?.contains("recorded from here on")))?;
    tcp::transfer(stage.client.netns(), at, 50_000)?;
    let mut closed = Value::Null;
    let ended = eventually("the connection to be told, and its end", PATIENCE, || {
        forget_what_is_over(host)?;
        let text = told()?;
        let flows: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let find = |verdict| flows.iter().find(|flow| is_flow(flow, verdict, "TCP", at)).cloned();
        closed = find("closed").unwrap_or_default();
        Ok(find("new").is_some() && !closed.is_null())
    });
    let outlived = ended.and_then(|()| restarted(stage, &told));
    follower.kill()?;
    follower.wait()?;
    outlived.with_context(|| told().unwrap_or_default())?;
    ensure!(told()?.contains("the daemon answers again"), "{}", told()?);
    let expected = stage.client.address(Family::Ipv4)?;
    ensure!(closed["source"]["address"] == expected.to_string() && closed["direction"] == "ingress", "{closed}");
    ensure!(closed["destination"]["pod"] == "server" && closed["destination"]["namespace"] == "default", "{closed}");
    for way in ["sent", "received"] {
        ensure!(closed[way]["bytes"].as_u64().is_some_and(|bytes| bytes > 50_000), "{way}: {closed}");
    }
    ensure!(closed["milliseconds"].is_u64(), "{closed}");
    let now = host.huskctl_json(["flows", "--denied", "--last", "1"]);
    ensure!(now.is_err(), "nothing was denied, so there is no line: {now:?}");
    Ok(())
}

/// Whoever follows outlives the daemon, and hears of what the next one sees.
fn restarted(stage: &Stage, told: &dyn Fn() -> std::io::Result<String>) -> Result<()> {
    let (host, at) = (stage.cluster.host(2), stage.at()?);
    host.stop_daemon(Signal::SIGTERM)?;
    eventually("it to be missed", PATIENCE, || Ok(told()?.contains("no daemon answers")))?;
    host.start_daemon()?;
    host.wait_ready()?;
    eventually("the next daemon to listen", PATIENCE, || Ok(told()?.matches("recorded from here on").count() == 2))?;
    tcp::transfer(stage.client.netns(), at, 1000)?;
    let is_new = |line: &str| serde_json::from_str(line).is_ok_and(|flow| is_flow(&flow, "new", "TCP", at));
    eventually("a connection after the restart to be told", PATIENCE, || {
        Ok(told()?.lines().filter(|line| is_new(line)).count() >= 2)
    })
}

/// On a host that logs, they are in the log without anybody's following.
fn logged(stage: &Stage) -> Result<()> {
    let (host, at) = (stage.cluster.host(1), stage.at()?);
    let path = host.file(FLOWS);
    let line = await_line(&path, "the connection in the log", |line| is_flow(&line["flow"], "new", "TCP", at))?;
    ensure!(line["node"] == "host1" && line["kind"] == "flow" && line["event"] == "new", "{line}");
    ensure!(line["flow"]["source"]["pod"] == "client" && line["flow"]["direction"] == "egress", "{line}");
    eventually("its end in the log", PATIENCE, || {
        forget_what_is_over(host)?;
        Ok(lines(&path)?.iter().any(|line| is_flow(&line["flow"], "closed", "TCP", at)))
    })?;
    let mode = fs::metadata(&path)?.permissions().mode();
    ensure!(mode & 0o777 == 0o640, "{mode:o}");
    let probes = lines(&path)?.iter().filter(|line| line["flow"]["destination"]["port"] == json!(PROBE_PORT)).count();
    ensure!(probes == 0, "probes of nodes are no flows of pods");
    Ok(())
}

/// Whoever renames the log while lines come loses none, and whoever truncates it gets whole lines.
fn rotated(stage: &Stage) -> Result<()> {
    let at = stage.at()?;
    let path = stage.cluster.host(1).file(FLOWS);
    let directory = path.parent().context("a file has a directory")?;
    let served = || -> BTreeSet<u64> { stage.echo.peers().iter().map(|peer| peer.port().into()).collect() };
    let (before, done) = (served(), AtomicBool::new(false));
    let rename = |number: usize| {
        let renamed = fs::rename(&path, directory.join(format!("flows.jsonl-{number}")));
        thread::sleep(Duration::from_millis(5));
        usize::from(renamed.is_ok())
    };
    let renamed = thread::scope(|scope| -> Result<usize> {
        let rotation = scope.spawn(|| {
            let mut renamed = 0;
            while !done.load(Ordering::Relaxed) {
                renamed += rename(renamed);
            }
            renamed
        });
        let sent = (0..CONNECTIONS).try_for_each(|_| {
            // Every datagram is a connection of its own: its socket has a port of its own.
            Datagram::to(at).run(stage.client.netns()).map(drop)
        });
        let all = || -> Result<BTreeSet<u64>> {
            let files: Vec<_> = fs::read_dir(directory)?.collect::<std::io::Result<_>>()?;
            let files = files.iter().filter(|entry| entry.file_name().to_string_lossy().starts_with("flows"));
            let mut ports = BTreeSet::new();
            for entry in files {
                // The newest may be renamed between the list and the look.
                let Ok(lines) = lines(&entry.path()) else { continue };
                let flows = lines.iter().filter(|line| is_flow(&line["flow"], "new", "UDP", at));
                ports.extend(flows.filter_map(|line| line["flow"]["source"]["port"].as_u64()));
            }
            Ok(ports)
        };
        let made: BTreeSet<u64> = served().difference(&before).copied().collect();
        let waited = sent.and_then(|()| {
            ensure!(made.len() > CONNECTIONS / 2, "{} of {CONNECTIONS} connections", made.len());
            eventually("all connections in the logs", PATIENCE, || Ok(all()?.is_superset(&made)))
        });
        done.store(true, Ordering::Relaxed);
        let renamed = rotation.join().expect("it does not panic");
        waited.with_context(|| format!("missing: {:?}", all().map(|found| &made - &found)))?;
        Ok(renamed)
    })?;
    ensure!(renamed > 5, "renamed {renamed} times");

    Datagram::to(at).run(stage.client.netns())?;
    await_line(&path, "a log after the last renaming", |_| true)?;
    // As logrotate's copytruncate does it.
    let before = fs::copy(&path, directory.join("copied"))?;
    fs::OpenOptions::new().write(true).open(&path)?.set_len(0)?;
    Datagram::to(at).run(stage.client.netns())?;
    await_line(&path, "a line after the truncation", |line| is_flow(&line["flow"], "new", "UDP", at))?;
    let text = fs::read(&path)?;
    ensure!(text.first() == Some(&b'{') && !text.contains(&0), "no hole of {before} bytes");
    Ok(())
}

/// What policy denies stands in the same log, in the same form.
fn denied(stage: &Stage) -> Result<()> {
    let at = stage.at()?;
    let policy = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"namespace": "default", "name": "none"},
        "spec": {"podSelector": {}, "policyTypes": ["Egress"]},
    });
    let manifest = stage.cluster.manifests().join("NetworkPolicy-default-none.yaml");
    fs::write(&manifest, policy.to_string())?;
    let limit = Duration::from_millis(300);
    eventually("the connection to be denied", PATIENCE, || Ok(tcp::connect(stage.client.netns(), at, limit).is_err()))?;
    let path = stage.cluster.host(1).file(FLOWS);
    let line = await_line(&path, "what was denied", |line| is_flow(&line["flow"], "denied", "TCP", at))?;
    ensure!(line["event"] == "denied" && line["flow"]["source"]["pod"] == "client", "{line}");
    ensure!(line["flow"]["reason"].as_str().is_some_and(|it| it.contains("default/none")), "{line}");
    let output = stage.cluster.host(1).huskctl(["flows", "--denied", "--pod", "client"])?;
    ensure!(output.stdout.contains("denied  egress") && output.stdout.contains("default/client"), "{}", output.stdout);
    ensure!(!output.stdout.contains("  new  "), "{}", output.stdout);
    fs::remove_file(manifest)?;
    eventually("what is allowed again", PATIENCE, || Ok(tcp::connect(stage.client.netns(), at, limit).is_ok()))
}

fn top(stage: &Stage) -> Result<()> {
    let host = stage.cluster.host(1);
    let sending = tcp::Flow::start(stage.client.netns(), stage.at()?, 200_000)?;
    let mut seen = Value::Null;
    let counted = eventually("traffic to be counted", PATIENCE, || {
        seen = host.huskctl_json(["top", "--once", "--interval", "0.5"])?;
        let rate = |row: &Value, way: &str| row[way].as_u64().is_some_and(|rate| rate > 20_000);
        let rows = ["peers", "pods", "tunnels"].map(|table| seen[table][0].clone());
        Ok(rows.iter().all(|row| rate(row, "sentPerSecond") && rate(row, "receivedPerSecond")))
    });
    sending.stop()?;
    counted.with_context(|| seen.to_string())?;
    ensure!(seen["peers"][0]["node"] == "host2" && seen["peerCount"] == 1 && seen["podCount"] == 1, "{seen}");
    ensure!(seen["pods"][0]["pod"] == "default/client", "{seen}");
    // Without a terminal it looks once.
    let table = host.huskctl(["top", "--interval", "0.2", "--pods"])?;
    ensure!(table.stdout.contains("default/client") && !table.stdout.contains("PEER"), "{}", table.stdout);
    ensure!(!table.stdout.contains('\u{1b}'), "{:?}", table.stdout);
    Ok(())
}

/// People's and the daemon's decisions, with who made them.
fn decisions(stage: &Stage) -> Result<()> {
    let (host, path) = (stage.cluster.host(1), stage.cluster.host(1).file(AUDIT));
    let event = |name: &'static str| move |line: &Value| line["kind"] == "audit" && line["event"] == name;
    let admitted = await_line(&path, "the pod that was added", event("podAdmitted"))?;
    ensure!(admitted["pod"] == "default/client" && admitted["node"] == "host1", "{admitted}");
    await_line(&path, "the first key", |line| event("keyMade")(line) && line["cause"] == "first")?;

    host.huskctl(["quarantine", "default/client"])?;
    let set = await_line(&path, "the quarantine", event("quarantineSet"))?;
    ensure!(set["pod"] == "default/client" && set["by"]["uid"] == 0, "{set}");
    ensure!(set["by"]["command"] == "huskctl" && set["by"]["pid"].is_u64(), "{set}");
    host.huskctl(["quarantine", "default/client", "--release"])?;
    await_line(&path, "its end", event("quarantineReleased"))?;

    host.huskctl(["keys", "rotate"])?;
    await_line(&path, "who asked for keys", event("keyRotationAsked"))?;
    await_line(&path, "the key that was made", |line| event("keyMade")(line) && line["cause"] == "request")?;

    stage.client.del()?.into_result()?;
    let released = await_line(&path, "the pod that is gone", event("podReleased"))?;
    ensure!(
        released["container"] == admitted["container"] && released["addresses"] == admitted["addresses"],
        "{released}"
    );

    host.restart_daemon(Signal::SIGTERM)?;
    await_line(&path, "the end of the daemon", event("daemonStopped"))?;
    let starts = lines(&path)?.into_iter().filter(event("daemonStarted")).count();
    ensure!(starts == 2, "{starts} starts");

    // A log that cannot be written is an issue, and nothing else suffers from it.
    let full: &Host = stage.cluster.host(2);
    full.configure(|config| config["logs"] = json!({"audit": "/dev/full"}))?;
    full.restart_daemon(Signal::SIGTERM)?;
    eventually("the issue of a log that cannot be written", PATIENCE, || {
        let status = full.huskctl_json(["status"])?;
        Ok(status["ready"] == true && !full.issues("LogUnwritable")?.is_empty())
    })
}
