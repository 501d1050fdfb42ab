//! What goes in: everything that somebody needs who has never seen this host.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use husk_overlay::ipc::{LEASE_DIRECTORY, NODE_FILE};
use serde_json::Value;

use super::gather::Source;
use super::scrape;
use crate::daemon::SNAPSHOT_FILE;
use crate::follow::LAST_GOOD_FILE;
use crate::programs::Keep;

/// Where the container runtime looks unless the configuration says otherwise, as `cni` of the configuration has it.
const CNI_CONFIGURATION: &str = "/etc/cni/net.d";
const CNI_BINARIES: &str = "/opt/cni/bin";

/// Where things are.
#[derive(Debug, Clone)]
pub(super) struct Places {
    /// The configuration file, and what it says; null where it cannot be read.
    pub(super) config_file: PathBuf,
    pub(super) config: Value,
    pub(super) run_directory: PathBuf,
    pub(super) state_directory: PathBuf,
    /// Bytes of each log that go in.
    pub(super) log_bytes: u64,
    /// This program.
    pub(super) huskctl: PathBuf,
}

/// Something that goes in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Item {
    /// Its path in the archive; the first part is the group it belongs to.
    pub(super) name: String,
    pub(super) source: Source,
    /// It is a log, for which there is a limit of its own.
    pub(super) log: bool,
    /// It asks the daemon.
    pub(super) asks: bool,
    /// Long numbers in it are keys.
    pub(super) hide_numbers: bool,
}

impl Item {
    fn new(name: impl Into<String>, source: Source) -> Self {
        Self { name: name.into(), source, log: false, asks: false, hide_numbers: false }
    }

    fn program(name: &str, line: &str) -> Self {
        let mut words = line.split(' ').map(str::to_owned);
        let program = PathBuf::from(words.next().unwrap_or_default());
        Self::new(name, Source::Program { program, arguments: words.collect(), statuses: &[0], keep: Keep::Beginning })
    }

    fn file(name: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        Self::new(name, Source::File { path: path.into() })
    }
}

/// Reports: name, and what `huskctl` is asked.
const REPORTS: &[(&str, &str)] = &[
    ("status", "status"),
    ("peers", "peers"),
    ("mtu", "mtu"),
    ("diff", "diff"),
    ("ipam", "ipam show"),
    ("ipam-check", "ipam check"),
    ("keys", "keys status --verbose"),
    ("policy", "policy list"),
    ("quarantined", "quarantine --list"),
    ("flows", "flows --last 1000"),
    ("top", "top --once --limit 1000"),
    ("doctor", "doctor"),
];

/// Programs that tell of the network. None prints a key: `nokeys`, and wg's own default.
const NETWORK: &[(&str, &str)] = &[
    ("links", "ip -d -s link show"),
    ("addresses", "ip -d address show"),
    ("routes-ipv4", "ip -4 -d route show table all"),
    ("routes-ipv6", "ip -6 -d route show table all"),
    ("rules-ipv4", "ip -4 rule show"),
    ("rules-ipv6", "ip -6 rule show"),
    ("neighbours", "ip -s neighbour show"),
    ("fdb", "bridge -d fdb show"),
    ("tunnels-xfrm", "ip -d xfrm state list nokeys"),
    ("policies-xfrm", "ip -s xfrm policy list"),
    ("wireguard", "wg show all"),
    ("nft-husk", "nft -a list table inet husk"),
    ("nft-policy", "nft -a list table inet husk-policy"),
    ("nft-all", "nft -a -t list ruleset"),
    ("iptables", "iptables-save -c"),
    ("ip6tables", "ip6tables-save -c"),
    ("qdiscs", "tc -s qdisc show"),
    ("sockets", "ss -s"),
    ("listeners", "ss -tulpn"),
    ("offload-vxlan", "ethtool -k husk-vx"),
];

/// Files that tell of the network.
const NETWORK_FILES: &[&str] = &[
    "/proc/net/dev",
    "/proc/net/snmp",
    "/proc/net/snmp6",
    "/proc/net/netstat",
    "/proc/net/softnet_stat",
    "/proc/net/sockstat",
    "/proc/net/xfrm_stat",
    "/proc/net/stat/nf_conntrack",
    "/proc/net/ip_tables_names",
];

/// Programs that tell of the system.
const SYSTEM: &[(&str, &str)] = &[
    ("disk", "df -k"),
    ("inodes", "df -i"),
    // Without arguments, which may hold anything.
    ("processes", "ps -eo pid,ppid,user,stat,rss,etime,comm"),
    ("clock", "date --utc --rfc-3339=ns"),
    ("time-synchronisation", "timedatectl show"),
];

/// Files that tell of the system.
const SYSTEM_FILES: &[&str] = &[
    "/proc/version",
    "/etc/os-release",
    "/proc/modules",
    "/proc/self/mounts",
    "/proc/meminfo",
    "/proc/loadavg",
    "/proc/uptime",
    "/proc/pressure/cpu",
    "/proc/pressure/memory",
    "/proc/pressure/io",
];

/// Versions of programs that matter.
const VERSIONS: &[(&str, &str)] =
    &[("ip", "ip -V"), ("nft", "nft --version"), ("wg", "wg --version"), ("iptables", "iptables --version")];

/// All that goes in, in the order of the archive. Reads folders, to name what is in them.
pub(super) fn items(places: &Places) -> Vec<Item> {
    let mut items = reports(places);
    items.extend(husk(places));
    items.extend(NETWORK.iter().map(|(name, line)| Item {
        hide_numbers: name.ends_with("-xfrm"),
        ..Item::program(&format!("network/{name}.txt"), line)
    }));
    if let Some(interface) = places.text(&["underlay", "interface"]) {
        items.push(Item::program("network/offload-underlay.txt", &format!("ethtool -k {interface}")));
    }
    items.extend(NETWORK_FILES.iter().map(|path| Item::file(format!("network{path}"), path)));
    items.push(Item::new("network/sysctl.txt", Source::Parameters { path: "/proc/sys/net".into() }));
    items.extend(SYSTEM.iter().map(|(name, line)| Item::program(&format!("system/{name}.txt"), line)));
    items.extend(SYSTEM_FILES.iter().map(|path| Item::file(format!("system{path}"), path)));
    items.extend(cni(places));
    items.extend(versions(places));
    items.extend(logs(places));
    items
}

fn reports(places: &Places) -> Vec<Item> {
    let item = |name: &str, line: &str, form: &str, ending: &str| {
        let run_directory = places.run_directory.display();
        let options = ["--color", "never", "--output", form, "--run-directory"].map(str::to_owned);
        let words = line.split(' ').map(str::to_owned);
        let mut arguments: Vec<String> = words.chain(options).chain([run_directory.to_string()]).collect();
        if name == "doctor" {
            // It reads what the others ask the daemon for.
            let (config, state) = (places.config_file.display(), places.state_directory.display());
            let told = ["--config", &config.to_string(), "--state-directory", &state.to_string()].map(str::to_owned);
            arguments.extend(told);
        }
        let source =
            Source::Program { program: places.huskctl.clone(), arguments, statuses: &[0, 1], keep: Keep::Beginning };
        // The doctor looks at a host without a daemon, too, and takes its time.
        Item { asks: name != "doctor", ..Item::new(format!("reports/{name}.{ending}"), source) }
    };
    let both = |(name, line): &(&str, &str)| {
        let ending = if *name == "flows" { "jsonl" } else { "json" };
        [item(name, line, "json", ending), item(name, line, "table", "txt")]
    };
    let metrics = scrape::address(places)
        .map(|address| Item { asks: true, ..Item::new("reports/metrics.txt", Source::Metrics { address }) });
    REPORTS.iter().flat_map(both).chain(metrics).collect()
}

fn husk(places: &Places) -> Vec<Item> {
    let (run, state) = (&places.run_directory, &places.state_directory);
    let mut items = vec![
        Item::new("husk/config.yaml", Source::Structured { path: places.config_file.clone() }),
        Item::new("husk/last-good-config.yaml", Source::Structured { path: state.join(LAST_GOOD_FILE) }),
        Item::new("husk/node.yaml", Source::Structured { path: run.join(NODE_FILE) }),
        Item::new("husk/leases.yaml", Source::Folders { paths: vec![run.join(LEASE_DIRECTORY)] }),
        Item::new("husk/snapshot.yaml", Source::Structured { path: state.join(SNAPSHOT_FILE) }),
        Item::new("husk/files.txt", Source::Listing { paths: vec![run.clone(), state.clone()] }),
    ];
    if let Some(root) = places.text(&["source", "directory", "path"]) {
        let root = Path::new(root);
        let paths = vec![root.to_owned(), root.join("nodes"), root.join("blocks")];
        items.push(Item::new("husk/cluster.yaml", Source::Folders { paths }));
    }
    items
}

fn cni(places: &Places) -> Vec<Item> {
    let configured = places.text(&["cni", "configDirectory"]).unwrap_or(CNI_CONFIGURATION);
    let binaries = places.text(&["cni", "binDirectory"]).unwrap_or(CNI_BINARIES);
    vec![
        Item::new("cni/configuration.yaml", Source::Folders { paths: vec![configured.into()] }),
        Item::new("cni/files.txt", Source::Listing { paths: vec![configured.into(), binaries.into()] }),
    ]
}

fn versions(places: &Places) -> Vec<Item> {
    let beside = |name: &str| places.huskctl.with_file_name(name);
    let of = |path: PathBuf, name: &str| {
        let program = if path.is_file() { path } else { name.into() };
        let source =
            Source::Program { program, arguments: vec!["--version".into()], statuses: &[0], keep: Keep::Beginning };
        Item::new(format!("versions/{name}.txt"), source)
    };
    let plugin = places.text(&["cni", "binDirectory"]).unwrap_or(CNI_BINARIES);
    let own = [
        of(places.huskctl.clone(), "huskctl"),
        of(beside("huskd"), "huskd"),
        of(Path::new(plugin).join("husk"), "husk"),
    ];
    let others = VERSIONS.iter().map(|(name, line)| Item::program(&format!("versions/{name}.txt"), line));
    own.into_iter().chain(others).collect()
}

fn logs(places: &Places) -> Vec<Item> {
    let journal = |name: &str, line: &str| {
        let mut item = Item { log: true, ..Item::program(name, line) };
        if let Source::Program { keep, .. } = &mut item.source {
            *keep = Keep::End;
        }
        item
    };
    let mut items = vec![
        journal("logs/huskd.txt", "journalctl --no-pager --output=short-iso-precise --unit=huskd --lines=50000"),
        journal("logs/kernel.txt", "dmesg --ctime"),
    ];
    for name in ["flows", "audit"] {
        let Some(path) = places.text(&["logs", name]) else { continue };
        items.push(Item { log: true, ..Item::file(format!("logs/{name}.jsonl"), path) });
        // What happened before the file was rotated: a new one may have a few lines only.
        let before = format!("{path}.1");
        if fs::metadata(path).map_or(0, |file| file.len()) < places.log_bytes && Path::new(&before).exists() {
            items.push(Item { log: true, ..Item::file(format!("logs/{name}.jsonl.1"), before) });
        }
    }
    let folders = ["wireguard", "ipsec"].map(|name| places.run_directory.join(name));
    for folder in folders {
        let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
        paths.retain(|path| path.extension() == Some(OsStr::new("log")));
        paths.sort();
        for path in paths {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            items.push(Item { log: true, ..Item::file(format!("logs/{name}"), path) });
        }
    }
    items
}

impl Places {
    /// A text of the configuration.
    pub(super) fn text(&self, path: &[&str]) -> Option<&str> {
        path.iter().try_fold(&self.config, |value, name| value.get(name))?.as_str()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn places(directory: &Path) -> Places {
        Places {
            config_file: "/etc/husk/config.yaml".into(),
            config: serde_json::json!({
                "source": {"directory": {"path": "/shared"}}, "underlay": {"interface": "ens1"}, "cni": {"configDirectory": "/cni"}
            }),
            run_directory: directory.to_owned(),
            state_directory: "/var/lib/husk".into(),
            log_bytes: 10,
            huskctl: "/usr/local/bin/huskctl".into(),
        }
    }

    #[test]
    fn names_are_unlike_and_go_nowhere_else() {
        let directory = tempfile::tempdir().unwrap();
        let all = items(&places(directory.path()));
        let names: BTreeSet<&str> = all.iter().map(|item| item.name.as_str()).collect();
        assert_eq!(names.len(), all.len());
        for name in &names {
            assert!(!name.contains("..") && !name.contains("//") && !name.starts_with('/'), "{name}");
        }
        for expected in [
            "reports/status.json",
            "reports/top.txt",
            "reports/metrics.txt",
            "reports/flows.jsonl",
            "husk/cluster.yaml",
            "network/offload-underlay.txt",
        ] {
            assert!(names.contains(expected), "{expected}");
        }
    }

    #[test]
    fn the_doctor_looks_where_the_bundle_was_told_to() {
        let directory = tempfile::tempdir().unwrap();
        let mut places = places(directory.path());
        (places.config_file, places.state_directory) = ("/a/config.yaml".into(), "/a/state".into());
        let all = items(&places);
        let doctor = all.iter().find(|item| item.name == "reports/doctor.json").unwrap();
        let Source::Program { program, arguments, .. } = &doctor.source else { panic!("{doctor:?}") };
        assert_eq!(program, Path::new("/usr/local/bin/huskctl"));
        let line = arguments.join(" ");
        let run = directory.path().display();
        let told = format!("--run-directory {run} --config /a/config.yaml --state-directory /a/state");
        assert!(line.starts_with("doctor ") && line.ends_with(&told), "{line}");
        let arguments = std::iter::once("huskctl").chain(arguments.iter().map(String::as_str));
        crate::huskctl::reference::command().try_get_matches_from(arguments).unwrap();
    }

    #[test]
    fn logs_of_companions_are_found_and_key_files_never_read() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["wireguard/husk-wg0.log", "wireguard/husk-wg0.lock", "keys/wireguard-1.key"] {
            let path = directory.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        let all = items(&places(directory.path()));
        assert!(all.iter().any(|item| item.name == "logs/husk-wg0.log" && item.log));
        let keys = directory.path().join("keys");
        for item in all {
            let paths = match item.source {
                Source::File { path } | Source::Structured { path } => vec![path],
                Source::Folders { paths } => paths,
                Source::Program { .. }
                | Source::Listing { .. }
                | Source::Parameters { .. }
                | Source::Metrics { .. } => vec![],
            };
            assert!(paths.iter().all(|path| !path.starts_with(&keys)), "{}", item.name);
        }
    }

    #[test]
    fn of_a_log_that_was_rotated_lately_the_file_before_goes_in_too() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("flows.jsonl");
        let mut places = places(directory.path());
        places.config["logs"] = serde_json::json!({"flows": path});
        let logs = |places: &Places| {
            let names = items(places).into_iter().map(|item| item.name).filter(|name| name.starts_with("logs/flows"));
            names.collect::<Vec<_>>()
        };
        fs::write(&path, "short").unwrap();
        assert_eq!(logs(&places), ["logs/flows.jsonl"]);
        fs::write(directory.path().join("flows.jsonl.1"), "older").unwrap();
        assert_eq!(logs(&places), ["logs/flows.jsonl", "logs/flows.jsonl.1"]);
        fs::write(&path, "long enough").unwrap();
        assert_eq!(logs(&places), ["logs/flows.jsonl"]);
    }

    #[test]
    fn metrics_are_not_asked_for_where_they_are_not_served() {
        let directory = tempfile::tempdir().unwrap();
        let mut places = places(directory.path());
        places.config["metrics"] = serde_json::json!({"listen": "off"});
        assert!(items(&places).iter().all(|item| item.name != "reports/metrics.txt"));
    }

    #[test]
    fn no_program_is_asked_for_keys() {
        let lines = NETWORK.iter().chain(SYSTEM).map(|(_, line)| *line);
        for line in lines {
            let words: Vec<&str> = line.split(' ').collect();
            if words.contains(&"xfrm") && words.contains(&"state") {
                assert!(words.contains(&"nokeys"), "{line}");
            }
            assert!(words[0] != "wg" || words == ["wg", "show", "all"], "{line}: dump and showconf print keys");
        }
    }
}
