//! Which network the container runtime chooses: the first file of its directory, by name (libcni `ConfFiles`; containerd and CRI-O
//! take the first alike).

use std::io;

use husk_overlay::marks::{CNI_CONFLIST, CNI_TYPE};
use serde_json::Value;

use super::{Action, Check, Evidence, Finding, Fix, Looked, Outcome, Unknown, restart};
use crate::files;

/// Order of the files.
pub(super) const CHECK: Check = Check {
    id: "cni-config-order",
    title: "the container runtime takes Husk for new pods: no file sorts before its own",
    look,
};

/// Names of files that the runtime reads.
const SUFFIXES: [&str; 3] = [".conf", ".conflist", ".json"];

fn look(evidence: &Evidence) -> Looked {
    let config = evidence.config()?;
    let directory = config.cni.config_directory.clone();
    let here = evidence.host.shared(&directory);
    let mut names = Vec::new();
    match std::fs::read_dir(&here) {
        Ok(entries) => {
            for entry in entries {
                names.push(entry?.file_name().to_string_lossy().into_owned());
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(Unknown(format!("cannot list {}: {error}", here.display()))),
    }
    names.retain(|name| SUFFIXES.iter().any(|suffix| name.ends_with(suffix)));
    names.sort();
    let at = names.iter().position(|name| name == CNI_CONFLIST);
    let before = &names[..at.unwrap_or(names.len())];
    let order =
        format!("{}: {}", directory.display(), if names.is_empty() { "no files".into() } else { names.join(", ") });
    if at.is_none() && evidence.status().is_ok_and(|status| status.ready) {
        let cause = format!("{CNI_CONFLIST} is missing, so that the container runtime does not use Husk for new pods");
        let words = "start the daemon anew, which writes it; and look who removes it";
        let because = "who removes it may do so again";
        let fix = Fix::by_hand(words, [restart::own(evidence, config)], because);
        return Ok(Outcome::of(vec![Finding::error(cause, vec![order], fix)], ""));
    }
    let mut told = vec![order.clone()];
    let mut actions = Vec::new();
    for name in before {
        let types = types(&files::read_text(&here.join(name), 1 << 20)?.unwrap_or_default());
        // A plugin that calls others, and whose place is before them.
        if types.iter().any(|it| it == "multus" || it == "multus-shim" || it == CNI_TYPE) {
            continue;
        }
        told.push(format!("{name}: type {}", if types.is_empty() { "unknown".into() } else { types.join(", ") }));
        let from = directory.join(name);
        actions.push(Action::RenameFile { to: directory.join(format!("{name}.disabled")), from });
    }
    if actions.is_empty() {
        return Ok(Outcome::well(order));
    }
    let cause = format!(
        "the container runtime takes {} for new pods and not Husk, as it sorts before {CNI_CONFLIST}",
        before[0]
    );
    let because = "new pods would get another network than they get now; that is for you to say";
    let fix = Fix::by_hand("if Husk is to be the pods' network, take it out of the runtime's sight", actions, because);
    Ok(Outcome::of(vec![Finding::error(cause, told, fix)], ""))
}

/// Types of the plugins that a configuration, or a list of them, names.
fn types(text: &str) -> Vec<String> {
    let value: Value = serde_json::from_str(text).unwrap_or_default();
    let plugins = value["plugins"].as_array().into_iter().flatten().chain([&value]);
    plugins.filter_map(|plugin| plugin["type"].as_str()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::types;

    #[test]
    fn both_forms_of_configuration_have_types() {
        assert_eq!(types(r#"{"name": "x", "type": "bridge"}"#), ["bridge"]);
        assert_eq!(types(r#"{"plugins": [{"type": "flannel"}, {"type": "portmap"}]}"#), ["flannel", "portmap"]);
        assert!(types("garbage").is_empty());
    }
}
