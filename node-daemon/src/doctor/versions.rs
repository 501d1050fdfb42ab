//! Whether daemon, plugin and this command are of one version, and whether what the daemon tells the plugin is of this boot.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use husk_overlay::ipc::{self, NODE_FILE, NodeFile};
use husk_overlay::marks::CNI_TYPE;

use super::daemon::{LIMITS, asked};
use super::{Action, Check, Evidence, Finding, Fix, Looked, Outcome, Unknown, restart};
use crate::files;

/// The check.
pub(super) const CHECK: Check =
    Check { id: "versions", title: "the plugin is installed, and plugin, daemon and huskctl are of one version", look };

/// What the daemon tells the plugin.
pub(super) const NODE_FILE_CHECK: Check =
    Check { id: "node-file", title: "what the daemon has told the plugin is of this boot", look: node_file };

/// Name of this boot (random(4)).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Largest file that is read.
const LARGEST: u64 = 1 << 20;

fn look(evidence: &Evidence) -> Looked {
    let own = env!("CARGO_PKG_VERSION");
    let config = evidence.config()?;
    let directory = &config.cni.bin_directory;
    let path = directory.join(CNI_TYPE);
    evidence.host.seen()?;
    let mut findings: Vec<Finding> = missing(&evidence.host.path(&path), &path, directory).into_iter().collect();
    let daemon = evidence.status().ok().map(|status| status.version.clone());
    if let Some(daemon) = daemon.as_deref().filter(|daemon| *daemon != own) {
        findings.push(Finding::warning(
            format!(
                "huskctl is of version {own}, and the daemon of {daemon}: what one says the other may not understand"
            ),
            vec![format!("huskctl {own}"), format!("huskd {daemon}")],
            Fix::by_hand(
                "restart the daemon if it was upgraded, else use the huskctl that belongs to it",
                [restart::own(evidence, config)],
                "which of the two is the right one only you know",
            ),
        ));
    }
    // A program below another root may be made for another machine.
    let plugin = if findings.is_empty() && evidence.host.is_here() { version_of(&path) } else { None };
    let reference = daemon.as_deref().unwrap_or(own);
    if let Some(plugin) = plugin.as_deref().filter(|plugin| *plugin != reference) {
        findings.push(Finding::warning(
            format!(
                "the plugin is of version {plugin}, and the daemon of {reference}: the plugin may not do what \
                     the daemon expects"
            ),
            vec![format!("{} version: husk-cni {plugin}", path.display())],
            install(directory),
        ));
    }
    let plugin = plugin.unwrap_or_else(|| "of unknown version".into());
    let daemon = daemon.unwrap_or_else(|| "does not answer".into());
    Ok(Outcome::of(findings, format!("husk-cni {plugin}, huskd {daemon}, huskctl {own}")))
}

fn missing(seen: &Path, path: &Path, directory: &Path) -> Option<Finding> {
    let told = match fs::metadata(seen) {
        Ok(file) if !file.is_file() => "it is no file".to_owned(),
        Ok(file) if file.permissions().mode() & 0o111 == 0 => "nobody may execute it".to_owned(),
        Ok(_) => return None,
        Err(error) => error.to_string(),
    };
    Some(Finding::blocking(
        "the CNI plugin cannot be executed: no pod can be added or removed",
        vec![format!("{}: {told}", path.display())],
        install(directory),
    ))
}

fn install(directory: &Path) -> Fix {
    let directory = directory.display().to_string();
    Fix::safe(
        "install the plugin of this version (in Kubernetes the DaemonSet's init container does it: `kubectl rollout restart`)",
        [Action::run_on_host("husk-cni", ["install", "--bin-dir", &directory])],
    )
}

/// The version in `husk-cni 1.2.3, CNI specification ...`.
fn version_of(path: &Path) -> Option<String> {
    let text = asked(Command::new(path).arg("version").env_remove("CNI_COMMAND"), LIMITS)?;
    let version = text.strip_prefix("husk-cni ")?.split([',', '\n']).next()?;
    Some(version.trim().to_owned())
}

fn node_file(evidence: &Evidence) -> Looked {
    let path = evidence.places.run_directory.join(NODE_FILE);
    let boot = fs::read_to_string(BOOT_ID)?;
    let text = match files::read_text(&path, LARGEST) {
        Ok(text) => text,
        Err(error) => return Ok(Outcome::of(vec![refused(evidence, &path, error.to_string())], "")),
    };
    let Some(text) = text else {
        // A daemon that is not ready takes it away, and says why.
        return Err(Unknown(format!("{} does not exist: the daemon has not been ready yet", path.display())));
    };
    let wrong = wrong_with(&text, boot.trim());
    let found = wrong.map(|told| refused(evidence, &path, told));
    Ok(Outcome::of(found.into_iter().collect(), "of this boot, in the plugin's version"))
}

fn wrong_with(text: &str, boot: &str) -> Option<String> {
    match serde_json::from_str::<NodeFile>(text) {
        Err(error) => Some(format!("it cannot be understood: {error}")),
        Ok(node) if node.version != ipc::VERSION => {
            Some(format!("version {} of the format; this one knows version {}", node.version, ipc::VERSION))
        }
        Ok(node) if node.boot_id != boot => Some(format!("it is of boot {}, and this is boot {boot}", node.boot_id)),
        Ok(_) => None,
    }
}

fn refused(evidence: &Evidence, path: &Path, told: String) -> Finding {
    let words = "restart the daemon; no traffic is disturbed";
    Finding::blocking(
        "the plugin refuses what the daemon told it, and adds no pod until a daemon writes it anew",
        vec![format!("{}: {told}", path.display())],
        match evidence.config() {
            Ok(config) => restart::fix(evidence, config, words),
            Err(Unknown(why)) => Fix::by_hand(words, [], why),
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"version":1,"bootId":"b","podMtu":1420,"blocks":["10.42.0.0/26"],"families":["ipv4"],
        "router":{"ipv4":"10.42.0.0"},"clusterCidrs":["10.42.0.0/16"],"coolDown":30}"#;

    #[test]
    fn what_the_plugin_refuses_is_found() {
        assert_eq!(wrong_with(GOOD, "b"), None);
        assert!(wrong_with(GOOD, "c").unwrap().contains("of boot b, and this is boot c"));
        assert!(wrong_with(&GOOD.replace("\"version\":1", "\"version\":2"), "b").unwrap().contains("version 2"));
        assert!(wrong_with("{", "b").unwrap().contains("cannot be understood"));
    }
}
