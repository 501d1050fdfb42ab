//! `huskctl support-bundle`: one file with everything that somebody needs who has never seen this host, and no secret.
//!
//! Secrets are kept out thrice: key files are not read and programs are asked for no keys; what stands under the name of a secret,
//! or looks like one, is taken out of files ([`redact`]); and before an item is written, the node's own keys, the preshared key
//! and all that was taken out are looked for in it, in every form in which they might be written ([`secrets`]). An item in which
//! one is found is withheld, and named.
//!
//! A program that is missing, a daemon that is dead or hangs and a file that cannot be read cost the item, never the bundle.

mod archive;
mod gather;
mod items;
mod redact;
mod scrape;
mod secrets;

use std::fmt::Write as _;
use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::ValueHint;
use husk_overlay::ipc::SOCKET_FILE;
use husk_overlay::marks;
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;

use self::archive::Archive;
use self::items::{Item, Places, items};
use self::secrets::Net;
use super::style::{Tone, paint};
use super::{Show, standpoint};
use crate::daemon::CONFIG_FILE;
use crate::files;
use crate::follow::LAST_GOOD_FILE;
use crate::programs::Limits;

/// Time that one item may take.
const ITEM_TIME: Duration = Duration::from_secs(20);

/// Largest item that is no log, in bytes: the reports of a 5,000-node cluster fit.
const ITEM_BYTES: u64 = 32 << 20;

/// Most bytes of all items together, before they are compressed.
const ALL_BYTES: u64 = 512 << 20;

/// Largest configuration file.
const CONFIG_BYTES: u64 = 1 << 20;

/// Entries that tell of the bundle itself.
const ERRORS: &str = "errors.txt";
const INDEX: &str = "index.json";

/// What to collect, and where to.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Options {
    /// File to write, which must not exist, or - for standard output; husk-support-NODE-TIME.tar.gz in the current directory if
    /// left out
    #[arg(long, short, value_hint = ValueHint::FilePath)]
    file: Option<PathBuf>,
    /// Configuration file of the daemon
    #[arg(long, default_value = CONFIG_FILE, value_hint = ValueHint::FilePath)]
    config: PathBuf,
    /// Directory of what the daemon keeps over a reboot
    #[arg(long, default_value = marks::STATE_DIRECTORY, value_hint = ValueHint::DirPath)]
    state_directory: PathBuf,
    /// MiB of each log; its end is kept
    #[arg(long, value_name = "MIB", default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=256))]
    log_size: u64,
    /// Seconds after which what was not collected yet is left out
    #[arg(long, value_name = "SECONDS", default_value_t = 180, value_parser = clap::value_parser!(u64).range(1..=3600))]
    timeout: u64,
}

/// What was collected.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Summary {
    /// The file.
    file: PathBuf,
    /// Name of the node.
    node: String,
    /// When it was begun (RFC 3339).
    #[schemars(with = "String")]
    time: Timestamp,
    /// Version of huskctl.
    version: String,
    /// What is in it, by its path in the folder of the bundle.
    entries: Vec<Entry>,
    /// What could not be had.
    missing: Vec<Missing>,
    /// What was left out because it held a secret, and whose.
    withheld: Vec<Missing>,
}

/// Something that is in it.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
struct Entry {
    /// Path.
    name: String,
    /// Bytes.
    bytes: u64,
    /// There was more of it than a limit allows.
    truncated: bool,
}

/// Something that is not in it.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
struct Missing {
    /// Path that it would have had.
    name: String,
    /// Why.
    reason: String,
}

/// The text to print, and whether something was withheld.
pub(super) fn run(run_directory: &Path, options: &Options, show: &Show) -> Result<(String, bool)> {
    standpoint::ensure_here(&run_directory.join(SOCKET_FILE))?;
    let places = Places {
        config_file: options.config.clone(),
        config: read_config(&options.config).unwrap_or_default(),
        run_directory: std::path::absolute(run_directory).unwrap_or_else(|_| run_directory.to_owned()),
        state_directory: options.state_directory.clone(),
        log_bytes: options.log_size << 20,
        huskctl: std::env::current_exe().context("cannot tell where huskctl is")?,
    };
    let now = Timestamp::now();
    let node = node_name(&places);
    let name = format!("husk-support-{node}-{}", now.strftime("%Y%m%dT%H%M%SZ"));
    let file = options.file.clone().unwrap_or_else(|| PathBuf::from(format!("{name}.tar.gz")));
    let time = u64::try_from(now.as_second()).unwrap_or_default();
    let archive = Archive::create(&file, &name, time)?;
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let (entries, missing, withheld) = (Vec::new(), Vec::new(), Vec::new());
    let summary = Summary { file, node, time: now, version, entries, missing, withheld };
    let mut bundle = Bundle { archive, net: net(&places), summary, daemon_hangs: false };
    bundle.collect(&items(&places), options)?;
    let (summary, bytes) = bundle.finish()?;
    let withheld = !summary.withheld.is_empty();
    let text = show.text(&summary, |summary| table(summary, bytes))?;
    if summary.file == Path::new(archive::OUTPUT) {
        // Who does not read this has index.json.
        let _ = write!(std::io::stderr(), "{text}");
        return Ok((String::new(), withheld));
    }
    Ok((text, withheld))
}

fn read_config(path: &Path) -> Option<Value> {
    let text = files::read_text(path, CONFIG_BYTES).ok()??;
    serde_saphyr::from_str(&text).ok()
}

/// The node's name without asking the daemon, which may be dead: what the file is called must not depend on it.
fn node_name(places: &Places) -> String {
    let configured = places.text(&["node", "name"]).map(str::to_owned);
    let named = configured.or_else(|| nix::unistd::gethostname().ok()?.into_string().ok());
    let plain = |it: char| if it.is_ascii_alphanumeric() || it == '-' || it == '.' { it } else { '-' };
    let name: String = named.unwrap_or_default().chars().map(plain).take(64).collect();
    let name = name.trim_matches(['-', '.']).to_owned();
    if name.is_empty() { "node".into() } else { name }
}

/// What must not be in any item.
fn net(places: &Places) -> Net {
    let mut net = Net::new(places.run_directory.join("keys"));
    // What opens the page.
    net.add_file(&places.run_directory.join("ui.key"));
    net.add_file(Path::new("/var/run/secrets/kubernetes.io/serviceaccount/token"));
    let mut configs = vec![places.config.clone()];
    configs.extend(read_config(&places.state_directory.join(LAST_GOOD_FILE)));
    for config in configs {
        if let Some(path) = config.pointer("/ipsec/presharedKeyFile").and_then(Value::as_str) {
            net.add_file(Path::new(path));
        }
        if let Some(path) = config.pointer("/source/kubernetes/kubeconfig").and_then(Value::as_str) {
            let text = files::read_text(Path::new(path), CONFIG_BYTES).ok().flatten().unwrap_or_default();
            let redacted = redact::structured(&text);
            redacted.iter().flat_map(|it| &it.secrets).for_each(|secret| net.add(path, secret));
        }
    }
    net
}

struct Bundle {
    archive: Archive,
    net: Net,
    summary: Summary,
    daemon_hangs: bool,
}

impl Bundle {
    fn collect(&mut self, items: &[Item], options: &Options) -> Result<()> {
        let over = Instant::now() + Duration::from_secs(options.timeout);
        let mut progress = Progress::new(items.len());
        for item in items {
            progress.step(&item.name);
            let left = over.saturating_duration_since(Instant::now());
            let bytes = if item.log { options.log_size << 20 } else { ITEM_BYTES };
            self.add(item, Limits { time: ITEM_TIME.min(left), bytes })?;
        }
        progress.end();
        Ok(())
    }

    /// Adds an item, or says why not.
    fn add(&mut self, item: &Item, limits: Limits) -> Result<()> {
        let so_far: u64 = self.summary.entries.iter().map(|entry| entry.bytes).sum();
        let refused = if limits.time.is_zero() {
            Some("there was no time left; see --timeout")
        } else if so_far >= ALL_BYTES {
            Some("the bundle is as large as it may be")
        } else if item.asks && self.daemon_hangs {
            Some("the daemon did not answer in time, and is not asked again")
        } else {
            None
        };
        if let Some(reason) = refused {
            return self.miss(&item.name, reason);
        }
        let began = Instant::now();
        match item.source.gather(limits) {
            Ok(gathered) => {
                let content = if item.hide_numbers {
                    redact::long_numbers(&String::from_utf8_lossy(&gathered.content)).into_bytes()
                } else {
                    gathered.content
                };
                self.write(&item.name, &content, gathered.truncated)
            }
            Err(reason) => {
                self.daemon_hangs |= item.asks && began.elapsed() >= limits.time;
                self.miss(&item.name, &reason)
            }
        }
    }

    fn miss(&mut self, name: &str, reason: &str) -> Result<()> {
        // Programs complain in several lines; errors.txt has one for each item.
        let reason = reason.split_whitespace().collect::<Vec<_>>().join(" ");
        self.summary.missing.push(Missing { name: name.to_owned(), reason });
        Ok(())
    }

    /// Writes an entry that holds no secret.
    fn write(&mut self, name: &str, content: &[u8], truncated: bool) -> Result<()> {
        if let Some(origin) = self.net.find(content) {
            let reason = format!("it holds what is secret: {origin}");
            self.summary.withheld.push(Missing { name: name.to_owned(), reason });
            return Ok(());
        }
        self.archive.add(name, content)?;
        self.summary.entries.push(Entry { name: name.to_owned(), bytes: content.len() as u64, truncated });
        Ok(())
    }

    fn finish(mut self) -> Result<(Summary, u64)> {
        let mut errors = String::new();
        for (what, list) in [("not to be had", &self.summary.missing), ("WITHHELD", &self.summary.withheld)] {
            for Missing { name, reason } in list {
                let _ = writeln!(errors, "{name}: {what}: {reason}");
            }
        }
        self.write(ERRORS, errors.as_bytes(), false)?;
        let index = serde_json::to_string_pretty(&self.summary)? + "\n";
        self.write(INDEX, index.as_bytes(), false)?;
        let bytes = self.archive.finish()?;
        Ok((self.summary, bytes))
    }
}

fn table(summary: &Summary, bytes: u64) -> String {
    let Summary { entries, missing, withheld, .. } = summary;
    let size = super::tables::bytes(bytes);
    let mut text = match &summary.file {
        file if file == Path::new(archive::OUTPUT) => format!("The bundle ({size}) has {} entries.\n", entries.len()),
        file => format!("{} ({size}, mode 0600) has {} entries.\n", file.display(), entries.len()),
    };
    if !missing.is_empty() {
        let _ = writeln!(text, "{} more could not be had; {ERRORS} in it says why.", missing.len());
    }
    for Missing { name, reason } in withheld {
        let _ = writeln!(text, "{} {name}: {reason}", paint(Tone::Bad, "WITHHELD"));
    }
    text +=
        "It holds no keys, but names, addresses and policies of the cluster: give it to those who may know these.\n";
    text
}

/// Tells on standard error how far it is: on a terminal in one line, else by group.
struct Progress {
    all: usize,
    done: usize,
    terminal: bool,
    group: String,
}

impl Progress {
    fn new(all: usize) -> Self {
        Self { all, done: 0, terminal: std::io::stderr().is_terminal(), group: String::new() }
    }

    fn step(&mut self, name: &str) {
        self.done += 1;
        let group = name.split('/').next().unwrap_or_default();
        let (done, all) = (self.done, self.all);
        // Who does not read this has the summary.
        if self.terminal {
            let _ = write!(std::io::stderr(), "\r\x1b[K[{done:>3}/{all}] {name}");
        } else if self.group != group {
            group.clone_into(&mut self.group);
            let _ = writeln!(std::io::stderr(), "huskctl: collecting {group}");
        }
    }

    fn end(&self) {
        if self.terminal {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::gather::Source;
    use super::*;
    use crate::programs::Keep;

    const LIMITS: Limits = Limits { time: Duration::from_secs(60), bytes: 1000 };

    fn bundle(directory: &Path) -> Bundle {
        let keys = directory.join("keys");
        std::fs::create_dir(&keys).unwrap();
        std::fs::write(keys.join("esp-1.key"), "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n").unwrap();
        let file = directory.join("b.tar.gz");
        let summary = Summary {
            file: file.clone(),
            node: "n".into(),
            time: Timestamp::UNIX_EPOCH,
            version: "0".into(),
            entries: vec![],
            missing: vec![],
            withheld: vec![],
        };
        Bundle { archive: Archive::create(&file, "b", 0).unwrap(), net: Net::new(keys), summary, daemon_hangs: false }
    }

    fn item(script: &str) -> Item {
        let arguments = vec!["-c".to_owned(), script.to_owned()];
        let source = Source::Program { program: "sh".into(), arguments, statuses: &[0], keep: Keep::Beginning };
        Item { name: "a/b".into(), source, log: false, asks: true, hide_numbers: false }
    }

    #[test]
    fn an_item_that_holds_a_key_is_withheld_and_named() {
        let directory = tempfile::tempdir().unwrap();
        let mut bundle = bundle(directory.path());
        bundle.add(&item("echo 000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"), LIMITS).unwrap();
        bundle.add(&item("echo harmless"), LIMITS).unwrap();
        let (summary, bytes) = bundle.finish().unwrap();
        assert_eq!(summary.entries.iter().map(|it| it.name.as_str()).collect::<Vec<_>>(), ["a/b", ERRORS, INDEX]);
        assert!(summary.withheld[0].reason.ends_with("esp-1.key"), "{:?}", summary.withheld);
        assert!(table(&summary, bytes).contains("a/b: it holds what is secret"), "{}", table(&summary, bytes));
    }

    #[test]
    fn a_daemon_that_hangs_is_asked_once() {
        let directory = tempfile::tempdir().unwrap();
        let mut bundle = bundle(directory.path());
        bundle.add(&item("sleep 600"), Limits { time: Duration::from_millis(100), ..LIMITS }).unwrap();
        bundle.add(&item("echo well"), LIMITS).unwrap();
        bundle.add(&Item { asks: false, ..item("echo well") }, Limits { time: Duration::ZERO, ..LIMITS }).unwrap();
        let reasons: Vec<&str> = bundle.summary.missing.iter().map(|it| it.reason.as_str()).collect();
        assert!(reasons[0].contains("took longer") && reasons[1].contains("not asked again"), "{reasons:?}");
        assert!(reasons[2].contains("--timeout"), "{reasons:?}");
        assert!(bundle.summary.entries.is_empty());
    }

    #[test]
    fn a_hidden_number_is_not_in_what_ip_says() {
        let directory = tempfile::tempdir().unwrap();
        let mut bundle = bundle(directory.path());
        let key = "0xffeeddccbbaa99887766554433221100";
        bundle.add(&Item { hide_numbers: true, ..item(&format!("echo aead {key}")) }, LIMITS).unwrap();
        assert_eq!(bundle.summary.entries[0].bytes, "aead <redacted>\n".len() as u64);
    }
}
