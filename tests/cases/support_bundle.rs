//! `huskctl support-bundle` on a running host: everything that is asked for is there, and no secret is, in whatever form.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_overlay::keys::PrivateKey;
use husk_tests::process::{self, Output, Program};
use husk_tests::secret::forms;
use husk_tests::{Cluster, Host, Mode, Signal};
use serde_json::Value;

/// How long a bundle may take; some of its programs wait for others.
const LIMIT: Duration = Duration::from_secs(60);

const SECRET: &str = "correct horse battery staple of the cluster";
const SECRET_FILE: &str = "/etc/husk/secret";
const TOKEN: &str = "a-bearer-token-nobody-may-see";

/// Where a host's bundles are put; their folders are unpacked beside them.
const PLACE: &str = "/var/lib/husk/bundles";

/// What has to be in every bundle of a healthy host.
const EXPECTED: &[&str] = &[
    "errors.txt",
    "index.json",
    "reports/status.json",
    "reports/status.txt",
    "reports/peers.json",
    "reports/peers.txt",
    "reports/mtu.json",
    "reports/mtu.txt",
    "reports/diff.json",
    "reports/ipam.json",
    "reports/ipam.txt",
    "reports/keys.json",
    "reports/keys.txt",
    "reports/policy.json",
    "reports/policy.txt",
    "reports/doctor.json",
    "reports/quarantined.json",
    "reports/flows.jsonl",
    "reports/top.json",
    "reports/metrics.txt",
    "reports/flows.txt",
    "husk/config.yaml",
    "husk/node.yaml",
    "husk/leases.yaml",
    "husk/snapshot.yaml",
    "husk/cluster.yaml",
    "husk/files.txt",
    "network/links.txt",
    "network/addresses.txt",
    "network/routes-ipv4.txt",
    "network/routes-ipv6.txt",
    "network/rules-ipv4.txt",
    "network/neighbours.txt",
    "network/fdb.txt",
    "network/tunnels-xfrm.txt",
    "network/policies-xfrm.txt",
    "network/wireguard.txt",
    "network/nft-husk.txt",
    "network/nft-policy.txt",
    "network/sysctl.txt",
    "network/proc/net/snmp",
    "system/proc/version",
    "system/etc/os-release",
    "system/proc/self/mounts",
    "system/proc/meminfo",
    "system/disk.txt",
    "cni/configuration.yaml",
    "cni/files.txt",
    "versions/huskctl.txt",
    "versions/huskd.txt",
    "versions/husk.txt",
];

/// A bundle, unpacked.
struct Bundle {
    output: Output,
    file: PathBuf,
    folder: PathBuf,
}

impl Bundle {
    fn of(host: &Host, name: &str) -> Result<Self> {
        fs::create_dir_all(host.file(PLACE))?;
        let inside = format!("{PLACE}/{name}.tar.gz");
        let output = bundle(host, &inside)?;
        let file = host.file(&inside);
        let folder = host.file(PLACE).join(name);
        fs::create_dir(&folder)?;
        let arguments = ["--strip-components=1", "-C", &text(&folder), "-xzf", &text(&file)].map(str::to_owned);
        Program::new("tar").args(arguments).check()?;
        Ok(Self { output, file, folder })
    }

    fn read(&self, name: &str) -> Result<String> {
        let bytes = fs::read(self.folder.join(name)).with_context(|| format!("{name} of the bundle"))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Every file in it.
    fn files(&self) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        let mut waiting = vec![self.folder.clone()];
        while let Some(folder) = waiting.pop() {
            for entry in fs::read_dir(folder)? {
                let path = entry?.path();
                if path.is_dir() { waiting.push(path) } else { found.push(path) }
            }
        }
        Ok(found)
    }

    /// The files in which one of these is found, in any form.
    fn holding(&self, secrets: &[Vec<u8>]) -> Result<BTreeSet<PathBuf>> {
        let forms: Vec<Vec<u8>> = secrets.iter().flat_map(|secret| forms(secret)).collect();
        let mut found = BTreeSet::new();
        for path in self.files()? {
            let bytes = fs::read(&path)?;
            if forms.iter().any(|form| bytes.windows(form.len()).any(|window| window == form.as_slice())) {
                found.insert(path);
            }
        }
        Ok(found)
    }
}

fn bundle(host: &Host, file: &str) -> Result<Output> {
    let huskctl = host.program(process::binary("huskctl")?);
    huskctl.args(["support-bundle", "--file", file]).limit(LIMIT).run()
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// All that must not be given away: private keys as bytes, the preshared key, a token.
fn secrets(host: &Host) -> Result<Vec<Vec<u8>>> {
    let mut secrets = vec![SECRET.as_bytes().to_vec(), TOKEN.as_bytes().to_vec()];
    for entry in fs::read_dir(host.file("/run/husk/keys"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|it| it == "key") {
            secrets.push(PrivateKey::from_base64(fs::read_to_string(path)?.trim())?.expose().to_vec());
        }
    }
    ensure!(secrets.len() > 2, "the host has no private key");
    Ok(secrets)
}

#[test]
fn a_bundle_has_everything_but_secrets() -> Result<()> {
    let cluster = Cluster::builder().mode(Mode::Wireguard).set("ipsec.presharedKeyFile", SECRET_FILE).build()?;
    for host in cluster.hosts() {
        host.write_secret(SECRET_FILE, SECRET)?;
    }
    cluster.start()?;
    let _pods = cluster.add_pods("p")?;
    let host = cluster.host(1);
    let kubeconfig = format!("users: [{{name: u, user: {{token: {TOKEN}}}}}]\n");
    fs::write(host.file("/etc/cni/net.d/zz-other.kubeconfig"), kubeconfig)?;
    let secrets = secrets(host)?;

    let whole = Bundle::of(host, "whole")?;
    let said = format!("{}{}\n{}", whole.output.stdout, whole.output.stderr, whole.read("errors.txt")?);
    ensure!(whole.output.status.code() == Some(0), "{said}");
    ensure!(fs::metadata(&whole.file)?.permissions().mode() & 0o777 == 0o600, "others can read it");
    for name in EXPECTED {
        ensure!(whole.folder.join(name).is_file(), "{name} is missing:\n{said}");
    }
    ensure!(whole.output.stderr.contains("collecting reports"), "no progress is told: {said}");
    let status: Value = serde_json::from_str(&whole.read("reports/status.json")?)?;
    ensure!(status["node"] == "host1" && whole.read("reports/status.txt")?.contains("host1"), "{status}");
    let index: Value = serde_json::from_str(&whole.read("index.json")?)?;
    let entries = index["entries"].as_array().context("entries")?.len();
    // The index cannot tell of itself.
    ensure!(entries + 1 == whole.files()?.len(), "{entries} entries in {index:#}");
    for (name, expected) in [
        ("cni/configuration.yaml", "zz-other.kubeconfig"),
        ("cni/configuration.yaml", "token: <redacted>"),
        ("reports/metrics.txt", "husk_ready 1"),
        ("reports/top.txt", "host2"),
        ("husk/config.yaml", SECRET_FILE),
        ("husk/files.txt", "keys/wireguard-"),
        ("husk/leases.yaml", "containerId"),
        ("husk/cluster.yaml", "host2"),
        ("network/wireguard.txt", "private key: (hidden)"),
        ("logs/husk-wg0.log", ""),
    ] {
        // Where the kernel has WireGuard there is no process of its own, and no log.
        if name.starts_with("logs/") && host.wireguard_process().is_none() {
            continue;
        }
        ensure!(whole.read(name)?.contains(expected), "{name} lacks {expected:?}: {}", whole.read(name)?);
    }
    let holding = whole.holding(&secrets)?;
    ensure!(holding.is_empty(), "secrets are in {holding:?}");

    // What finds nothing there finds what is there.
    for (number, secret) in secrets.iter().enumerate() {
        let planted = whole.folder.join(format!("planted-{number}"));
        let hex: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
        fs::write(&planted, format!("deep inside: {hex}."))?;
        ensure!(whole.holding(&secrets)?.contains(&planted), "a planted secret is not found");
    }

    let again = bundle(host, &format!("{PLACE}/whole.tar.gz"))?;
    ensure!(again.status.code() == Some(3) && again.stderr.contains("nothing is overwritten"), "{again:?}");
    withheld(host, &secrets)?;
    without_a_daemon(host, &secrets)
}

/// A key that gets where it should not be is not given away, and it is told where it was found.
fn withheld(host: &Host, secrets: &[Vec<u8>]) -> Result<()> {
    let key = secrets.last().context("a key")?;
    let folder = host.file("/run/husk/wireguard");
    fs::create_dir_all(&folder)?;
    let log = folder.join("spoilt.log");
    fs::write(&log, format!("somebody logged {key:?}\n"))?;
    let spoilt = Bundle::of(host, "spoilt")?;
    fs::remove_file(log)?;
    ensure!(spoilt.output.status.code() == Some(1), "{:?}", spoilt.output);
    ensure!(spoilt.output.stdout.contains("WITHHELD logs/spoilt.log"), "{}", spoilt.output.stdout);
    ensure!(spoilt.read("errors.txt")?.contains("logs/spoilt.log: WITHHELD"), "{}", spoilt.read("errors.txt")?);
    let holding = spoilt.holding(secrets)?;
    ensure!(holding.is_empty() && !spoilt.folder.join("logs/spoilt.log").exists(), "secrets are in {holding:?}");
    Ok(())
}

/// A daemon that is dead costs its reports, and nothing else.
fn without_a_daemon(host: &Host, secrets: &[Vec<u8>]) -> Result<()> {
    host.stop_daemon(Signal::SIGKILL)?;
    let dead = Bundle::of(host, "dead")?;
    ensure!(dead.output.status.code() == Some(0), "{:?}", dead.output);
    let errors = dead.read("errors.txt")?;
    ensure!(errors.contains("reports/status.json: not to be had") && errors.contains("is huskd running?"), "{errors}");
    for name in EXPECTED.iter().filter(|name| !name.starts_with("reports/")) {
        ensure!(dead.folder.join(name).is_file(), "{name} is missing:\n{errors}");
    }
    let holding = dead.holding(secrets)?;
    ensure!(holding.is_empty(), "secrets are in {holding:?}");
    Ok(())
}
