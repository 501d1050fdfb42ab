//! The page in a real browser: Chromium inside the network namespace of a host, as somebody who sits there would see it.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
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
    let cookie = access(one, scene.cluster.host(2), at, &url)?;

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
    let late = scene.cluster.manifests().join("late.yaml");
    scripted(&browser, at, &url, || {
        fs::write(&late, "kind: [")?;
        eventually("the issue to be on the page", PATIENCE, || {
            Ok(http::get(one.netns(), at, "/part", &[("Cookie", &cookie)])?.body.contains("late.yaml"))
        })
    })
}

/// What the page has where it says that the daemon is lost, while it does not say so.
const NOT_LOST: &str = "id=\"lost\" class=\"lost\" hidden";

/// The same where it says that the key is another one by now.
const NOT_SHUT: &str = "id=\"shut\" class=\"lost\" hidden";

/// The script shows what is new without anybody loading the page again, and says that the daemon is lost and is back.
fn scripted(browser: &Browser<'_>, at: SocketAddr, url: &str, news: impl Fn() -> Result<()> + Sync) -> Result<()> {
    let host = browser.host;
    // It asks after five seconds, and then every five.
    let (once, twice) = (7_000, 12_000);
    let (document, asked) = Between { browser, at, url, happens: &news }.document(once)?;
    ensure!(document.contains("late.yaml") && document.contains(NOT_LOST), "{document}");
    ensure!(asked.iter().filter(|path| *path == "/").count() == 1, "the page was loaded again: {asked:?}");

    let stop = || host.stop_daemon(Signal::SIGTERM).map(drop);
    let (document, _) = Between { browser, at, url, happens: &stop }.document(once)?;
    ensure!(document.contains("host2"), "what was known goes on standing there: {document}");
    ensure!(!document.contains(NOT_LOST) && document.contains("id=\"lost\""), "{document}");

    host.start_daemon()?;
    host.wait_ready()?;
    let (still_at, still) = page_of(host)?;
    ensure!((still_at, still.as_str()) == (at, url), "a restart has shown everybody out");
    // The first answer is none.
    ensure!(document.contains(NOT_SHUT), "nobody has changed the key: {document}");
    let fail = || anyhow::bail!("lost on the way");
    let (document, asked) = Between { browser, at, url, happens: &fail }.document(twice)?;
    ensure!(asked.iter().filter(|path| path.starts_with("/part")).count() >= 2, "{asked:?}");
    ensure!(document.contains(NOT_LOST), "the daemon answers again: {document}");

    // As after a reboot.
    let new_key = || {
        host.stop_daemon(Signal::SIGTERM)?;
        fs::remove_file(host.file("/run/husk/ui.key"))?;
        host.start_daemon()?;
        host.wait_ready()
    };
    let (document, _) = Between { browser, at, url, happens: &new_key }.document(once)?;
    ensure!(!document.contains(NOT_SHUT) && document.contains(NOT_LOST), "it asks for the new address: {document}");
    Ok(())
}

/// Stands between a browser and the daemon, and has something happen just before the script's first question is passed on. If
/// that fails, the question is not answered.
struct Between<'a> {
    browser: &'a Browser<'a>,
    at: SocketAddr,
    url: &'a str,
    happens: &'a (dyn Fn() -> Result<()> + Sync),
}

impl Between<'_> {
    /// The document after its script has run for some time, and what was asked for meanwhile.
    fn document(&self, milliseconds: u32) -> Result<(String, Vec<String>)> {
        let netns = self.browser.host.netns();
        let listener = netns.run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))??;
        let own = listener.local_addr()?;
        let url = self.url.replace(&self.at.to_string(), &own.to_string());
        let (asked, is_over) = (Mutex::new(Vec::new()), AtomicBool::new(false));
        let document = thread::scope(|scope| {
            let (asked, is_over, listener) = (&asked, &is_over, &listener);
            scope.spawn(move || {
                for stream in listener.incoming().map_while(std::result::Result::ok) {
                    if is_over.load(Ordering::Acquire) {
                        return;
                    }
                    // A browser opens connections that it does not use: each has a thread.
                    scope.spawn(move || self.pass_on(stream, asked));
                }
            });
            let document = self.browser.document(&url, milliseconds);
            is_over.store(true, Ordering::Release);
            // Wakes who waits for the next one.
            drop(netns.run(|| TcpStream::connect(own)));
            document
        })?;
        Ok((document, asked.into_inner().unwrap_or_default()))
    }

    /// A connection is one request. Whatever goes wrong with it, the browser finds out.
    fn pass_on(&self, mut stream: TcpStream, asked: &Mutex<Vec<String>>) -> Result<()> {
        stream.set_read_timeout(Some(patience(BROWSER)))?;
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") {
            stream.read_exact(&mut byte)?;
            head.push(byte[0]);
        }
        let path = String::from_utf8_lossy(&head).split(' ').nth(1).unwrap_or_default().to_owned();
        let is_first = {
            let mut asked = asked.lock().map_err(|_| anyhow::anyhow!("another connection panicked"))?;
            let is_first =
                path.starts_with("/part") && !asked.iter().any(|before: &String| before.starts_with("/part"));
            asked.push(path);
            is_first
        };
        if is_first {
            (self.happens)()?;
        }
        let answer = http::send(self.browser.host.netns(), self.at, &head)?;
        Ok(stream.write_all(answer.as_bytes())?)
    }
}

/// Nobody is let in without the key, or by a foreign name, and nothing can be done but looking. The cookie of who was let in.
fn access(host: &Host, other: &Host, at: SocketAddr, url: &str) -> Result<String> {
    let key = url.rsplit_once('=').map(|(_, key)| key.to_owned()).unwrap_or_default();
    ensure!(key.len() == 32, "{url}");
    let get = |path: &str, headers: &[(&str, &str)]| http::get(host.netns(), at, path, headers);
    for path in ["/", "/api/state", "/part", "/?key=0000"] {
        let refused = get(path, &[])?;
        ensure!(refused.status == 401 && refused.body.contains("huskctl ui"), "{path}: {refused:?}");
    }
    let entered = get(&format!("/?key={key}"), &[])?;
    ensure!(entered.status == 303, "{entered:?}");
    let cookie = entered.headers["set-cookie"].split(';').next().unwrap_or_default().to_owned();
    ensure!(!cookie.contains(&key), "any other server on the host would be sent the key");
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
    // Another host's page has another key, and nobody reaches this one from there.
    let (theirs, _) = page_of(other)?;
    let refused = http::get(other.netns(), theirs, &format!("/?key={key}"), &[])?;
    ensure!(refused.status == 401, "{refused:?}");
    let outside = SocketAddr::new(host.address(Family::Ipv4)?, at.port());
    ensure!(http::get(other.netns(), outside, "/", &[]).is_err(), "the page is reached at {outside}");
    ensure!(!host.daemon_log().contains(&key), "the key is in the log");
    Ok(cookie)
}
