//! What a host is made of, to see whether a product for its network left anything behind.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use anyhow::Result;

use crate::host::Host;

/// What a host is made of, as far as a product for its network could change it.
#[derive(Debug, PartialEq, Eq)]
pub struct HostState(BTreeMap<String, String>);

impl HostState {
    /// Looks at a host.
    ///
    /// # Errors
    /// When a program fails or a directory cannot be read.
    pub fn of(host: &Host) -> Result<Self> {
        let mut state = BTreeMap::new();
        let commands = [
            "ip -o -d link show",
            "ip -o addr show",
            "ip -4 route show table all",
            "ip -6 route show table all",
            "ip rule show",
            "ip -6 rule show",
            "ip neigh show nud permanent",
            "ip xfrm state",
            "ip xfrm policy",
            "bridge fdb show",
            "nft list ruleset",
        ];
        for command in commands {
            let mut words = command.split(' ');
            let text = host.program(words.next().unwrap_or_default()).args(words).check()?;
            for (number, line) in text.lines().enumerate() {
                state.insert(format!("{command} {number:04}"), line.trim().to_owned());
            }
        }
        // Every parameter of the network that a namespace has for itself.
        host.netns().run(|| parameters(Path::new("/proc/sys/net"), &mut state))??;
        for directory in ["/run/husk", "/run/wireguard", "/var/lib/husk", "/etc/husk", "/etc/cni", "/opt/cni"] {
            files(&host.file(directory), directory, &mut state)?;
        }
        for process in host.processes() {
            state.insert(format!("process {}", process.command), String::new());
        }
        Ok(Self(state))
    }

    /// What is otherwise in a later look, in words.
    #[must_use]
    pub fn difference(&self, later: &Self) -> Vec<String> {
        let keys: std::collections::BTreeSet<_> = self.0.keys().chain(later.0.keys()).collect();
        let differs = keys.into_iter().filter(|key| self.0.get(*key) != later.0.get(*key));
        differs.map(|key| format!("{key}: {:?} became {:?}", self.0.get(key), later.0.get(key))).collect()
    }
}

fn parameters(directory: &Path, state: &mut BTreeMap<String, String>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            parameters(&path, state)?;
        } else if let Ok(value) = fs::read_to_string(&path) {
            // Counters and what the kernel randomises; a parameter that cannot be read is no state.
            let name = path.display().to_string();
            let moves = [
                "nf_conntrack_count",
                "/stable_secret",
                "dev_weight",
                "netdev_rss_key",
                "/stat/",
                "base_reachable_time",
            ];
            if !moves.iter().any(|part| name.contains(part)) {
                state.insert(name, value);
            }
        }
    }
    Ok(())
}

fn files(directory: &Path, shown: &str, state: &mut BTreeMap<String, String>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let (path, shown) = (entry.path(), format!("{shown}/{}", entry.file_name().to_string_lossy()));
        let metadata = fs::symlink_metadata(&path)?;
        state.insert(
            shown.clone(),
            format!("{:o} {} bytes", metadata.mode(), if metadata.is_dir() { 0 } else { metadata.len() }),
        );
        if metadata.is_dir() {
            files(&path, &shown, state)?;
        }
    }
    Ok(())
}
