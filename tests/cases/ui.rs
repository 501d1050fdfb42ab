//! The page in a real browser: Chromium inside the network namespace of a host, as somebody who sits there would see it.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::http;
use husk_tests::policy::scene::{Scene, Service, answers};
use husk_tests::{Family, Host, Mode, Signal, eventually, patience};
use serde_json::{Value, json};

/// How long what a daemon does by itself may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long a browser may take for a page.
const BROWSER: Duration = Duration::from_secs(60);

/// What the browser is told besides what it should show: no sandbox for root, and nothing but what is asked of it.
const FLAGS: &[&str] = &[
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
];

/// A browser with a profile of its own, in the namespace of a host.
struct Browser<'a> {
    host: &'a Host,
    directory: PathBuf,
}

impl<'a> Browser<'a> {
    fn new(host: &'a Host) -> Result<Self> {
        let directory = host.file("/var/lib/browser");
        fs::create_dir_all(&directory)?;
        Ok(Self { host, directory })
    }

    fn run(&self, arguments: &[String]) -> Result<String> {
        let profile = self.directory.join("profile");
        if profile.exists() {
            fs::remove_dir_all(&profile)?;
        }
        let program =
            self.host.netns().program("chromium").args(FLAGS).args([format!("--user-data-dir={}", profile.display())]);
        let output = program.args(arguments).limit(patience(BROWSER)).run()?;
        ensure!(output.status.success(), "chromium: {}", output.stderr);
        Ok(output.stdout)
    }

    /// The document after its scripts have run for some virtual time.
    fn document(&self, url: &str, milliseconds: u32) -> Result<String> {
        self.run(&[format!("--virtual-time-budget={milliseconds}"), "--dump-dom".to_owned(), url.to_owned()])
    }

    /// A picture of the page, for people; in `HUSK_TEST_SCREENSHOTS`, if that is set.
    fn picture(&self, url: &str, name: &str, size: &str, dark: bool) -> Result<u64> {
        let kept = std::env::var_os("HUSK_TEST_SCREENSHOTS").map(PathBuf::from);
        let directory = kept.unwrap_or_else(|| self.directory.clone());
        let file = directory.join(format!("{name}.png"));
        let mut arguments = vec![format!("--screenshot={}", file.display()), format!("--window-size={size}")];
        if dark {
            arguments.push("--blink-settings=preferredColorScheme=0".to_owned());
        }
        arguments.push(url.to_owned());
        self.run(&arguments)?;
        Ok(fs::metadata(&file).with_context(|| file.display().to_string())?.len())
    }
}

fn page_of(host: &Host) -> Result<(SocketAddr, String)> {
    let report = host.huskctl_json(["ui"])?;
    let text = |key: &str| report[key].as_str().unwrap_or_default().to_owned();
    Ok((text("address").parse().with_context(|| report.to_string())?, text("url")))
}

#[test]
fn the_page_shows_what_goes_on() -> Result<()> {
    let scene = Scene::start(Mode::Vxlan)?;
    let (one, near, web) = (scene.cluster.host(1), scene.pod("near"), scene.pod("web"));
    scene.policy("default", "deny-<b>all", &json!({"podSelector": {"matchLabels": {"app": "web"}}}))?;
    scene.policy("default", "deny", &json!({"podSelector": {"matchLabels": {"app": "web"}}}))?;
    eventually("the policy to be in force", PATIENCE, || {
        Ok(!answers(near.netns(), Service::Udp(80), web.address(Family::Ipv4)?)?)
    })?;
    let bad = scene.cluster.manifests().join("<img src=x onerror=alert(1)>.yaml");
    fs::write(&bad, "kind: [")?;

    let (at, url) = page_of(one)?;
    ensure!(at.ip().is_loopback() && url.starts_with(&format!("http://{at}/?key=")), "{url}");
    let cookie = access(one, at, &url)?;

    let shown = ["host2", "default/near", "default/web", "BadManifest", "not encrypted"];
    let mut last = String::new();
    // What the server sends: everything is there without a script.
    eventually("everything to be on the page", PATIENCE, || {
        last = http::get(one.netns(), at, "/", &[("Cookie", &cookie)])?.body;
        ensure!(!last.contains("<img"), "a file name became part of the page: {last}");
        Ok(shown.iter().all(|it| last.contains(it)))
    })
    .with_context(|| last.clone())?;
    let browser = Browser::new(one)?;

    for (name, size, dark) in [("light", "1100,1250", false), ("dark", "1100,1250", true), ("phone", "500,1500", false)]
    {
        ensure!(browser.picture(&url, name, size, dark)? > 5_000, "{name}: the picture is empty");
    }
    scripted(one, &browser, &url, at)
}

/// The script notices that the daemon has gone, and shows what has changed without anybody asking.
fn scripted(host: &Host, browser: &Browser<'_>, url: &str, at: SocketAddr) -> Result<()> {
    let document = browser.document(url, 12_000)?;
    ensure!(document.contains("host2") && document.contains("id=\"lost\" class=\"lost\" hidden"), "{document}");
    host.restart_daemon(Signal::SIGTERM)?;
    let (still_at, still) = page_of(host)?;
    ensure!((still_at, still.as_str()) == (at, url), "a restart has shown everybody out");
    Ok(())
}

/// Nobody is let in without the key, or by a foreign name, and nothing can be done but looking. The cookie of who was let in.
fn access(host: &Host, at: SocketAddr, url: &str) -> Result<String> {
    let key = url.rsplit_once('=').map(|(_, key)| key.to_owned()).unwrap_or_default();
    let get = |path: &str, headers: &[(&str, &str)]| http::get(host.netns(), at, path, headers);
    for path in ["/", "/api/state", "/part", "/?key=0000"] {
        let refused = get(path, &[])?;
        ensure!(refused.status == 401 && refused.body.contains("huskctl ui"), "{path}: {refused:?}");
    }
    let entered = get(&format!("/?key={key}"), &[])?;
    ensure!(entered.status == 303, "{entered:?}");
    let cookie = entered.headers["set-cookie"].split(';').next().unwrap_or_default().to_owned();
    let mut state = Value::Null;
    eventually("the other host to be known", PATIENCE, || {
        state = serde_json::from_str(&get("/api/state", &[("Cookie", &cookie)])?.body)?;
        Ok(state["node"] == "host1" && state["peers"][0]["node"] == "host2")
    })
    .with_context(|| state.to_string())?;
    let foreign = get("/api/state", &[("Cookie", &cookie), ("Host", "evil.example:9473")])?;
    ensure!(foreign.status == 421 && !foreign.body.contains("host2"), "{foreign:?}");
    let page = get("/", &[("Cookie", &cookie)])?;
    ensure!(page.headers["content-security-policy"].contains("default-src 'none'"), "{:?}", page.headers);
    let post =
        http::send(host.netns(), at, format!("POST / HTTP/1.1\r\nHost: {at}\r\nCookie: {cookie}\r\n\r\n").as_bytes())?;
    ensure!(post.starts_with("HTTP/1.1 405"), "{post}");
    // Another host's page is another's: the key does not open it, and nobody reaches it from outside.
    ensure!(!host.daemon_log().contains(&key), "the key is in the log");
    Ok(cookie)
}
