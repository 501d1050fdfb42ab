//! NetworkManager: it has to leave the overlay's interfaces alone.

use super::drop_ins::{Entry, entries, glob, in_force, is_false};
use super::{Action, Check, Evidence, Finding, Fix, HostFiles, Looked, Outcome, Unknown};

/// Interfaces of the overlay.
pub(super) const CHECK: Check =
    Check { id: "network-manager", title: "NetworkManager leaves the overlay's interfaces alone", look };

/// What NetworkManager keeps while it runs.
const STATE: &str = "/run/NetworkManager";

/// Directories beside the main file, in the order in which they are read (NetworkManager.conf(5)); what is read later counts more.
/// The main file comes before the last of them.
const DIRECTORIES: [&str; 3] =
    ["/usr/lib/NetworkManager/conf.d", "/run/NetworkManager/conf.d", "/etc/NetworkManager/conf.d"];

const MAIN_FILE: &str = "/etc/NetworkManager/NetworkManager.conf";

const FILE: &str = "/etc/NetworkManager/conf.d/zz-husk.conf";
const CONTENTS: &str =
    "# Husk's interfaces are Husk's; found by huskctl doctor.\n[keyfile]\nunmanaged-devices+=interface-name:husk*\n";

/// One of each kind of interface of ours.
const OURS: [&str; 4] = ["husk00000000000", "husk-vx", "husk-wg0", "husk-ipsec"];

fn look(evidence: &Evidence) -> Looked {
    let host = &evidence.host;
    if !host.exists(STATE)? {
        return Ok(Outcome::does_not_apply("NetworkManager does not run"));
    }
    let entries = configuration(host)?;
    if is_left_alone(&entries) {
        return Ok(Outcome::well("it runs, and husk* is unmanaged"));
    }
    let lines: Vec<String> =
        entries.iter().filter(|it| it.key.starts_with("unmanaged-devices")).map(|it| it.place.clone()).collect();
    let told = if lines.is_empty() { vec!["no file says unmanaged-devices".to_owned()] } else { lines };
    let cause = "NetworkManager may take the overlay's interfaces for its own: it then configures them, and removes addresses and routes";
    let actions = [
        Action::WriteFile { path: FILE.into(), contents: CONTENTS.into() },
        Action::reload("nmcli", ["general", "reload", "conf"]),
    ];
    let fix = Fix::safe("tell it that they are not its own", actions);
    Ok(Outcome::of(vec![Finding::warning(cause, told, fix)], ""))
}

/// All lines, those that count more behind those that count less. A file is shadowed by one of its name in a directory that is read
/// later, and is not read at all.
fn configuration(host: &HostFiles) -> Result<Vec<Entry>, Unknown> {
    let [packages, boot, administrator] = DIRECTORIES;
    let additions = in_force(host, &[administrator, boot, packages], ".conf")?;
    let main = host.read(MAIN_FILE)?.map(|text| (MAIN_FILE.to_owned(), text));
    let of = |directory: &'static str| {
        additions.iter().filter(move |(path, _)| path.strip_prefix(directory).is_some_and(|rest| rest.starts_with('/')))
    };
    let files = of(packages).chain(of(boot)).chain(&main).chain(of(administrator));
    Ok(files.flat_map(|(path, text)| entries(path, text)).collect())
}

/// By `unmanaged-devices`, whose last assignment counts and to which `+=` adds, or by a section `[device…]`.
fn is_left_alone(all: &[Entry]) -> bool {
    let mut specs = String::new();
    for entry in all.iter().filter(|entry| entry.section == "keyfile") {
        match entry.key.as_str() {
            "unmanaged-devices" => entry.value.clone_into(&mut specs),
            "unmanaged-devices+" => specs = format!("{specs};{}", entry.value),
            _ => {}
        }
    }
    let sections =
        all.iter().filter(|it| it.key == "managed" && it.section.starts_with("device") && is_false(&it.value));
    let matches =
        sections.filter_map(|it| all.iter().find(|other| other.section == it.section && other.key == "match-device"));
    let specs: Vec<&str> = matches.map(|it| it.value.as_str()).chain([specs.as_str()]).collect();
    OURS.iter().all(|name| specs.iter().any(|specs| means(specs, name)))
}

/// A list of devices (NetworkManager.conf(5), "Device List Format").
fn means(specs: &str, name: &str) -> bool {
    let specs = || specs.split([';', ',']).map(str::trim);
    let is = |spec: &str| {
        spec == "*" || spec.strip_prefix("interface-name:").is_some_and(|it| glob(it.trim_start_matches('='), name))
    };
    let excepted = specs().filter_map(|spec| spec.strip_prefix("except:")).any(is);
    !excepted && specs().any(is)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn left_alone(text: &str) -> bool {
        is_left_alone(&entries("x", text))
    }

    #[test]
    fn files_count_in_the_order_of_their_directories() {
        let root = tempfile::tempdir().unwrap();
        let host = HostFiles::new(root.path());
        let write = |path: &str, value: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, format!("[keyfile]\nunmanaged-devices={value}\n")).unwrap();
        };
        let values = || configuration(&host).unwrap().into_iter().map(|it| it.value).collect::<Vec<_>>();
        // By their names alone, the packages' file would come last.
        write("usr/lib/NetworkManager/conf.d/zzz.conf", "packages");
        write("run/NetworkManager/conf.d/50.conf", "boot");
        write("etc/NetworkManager/NetworkManager.conf", "main");
        write("etc/NetworkManager/conf.d/00.conf", "administrator");
        assert_eq!(values(), ["packages", "boot", "main", "administrator"]);
        write("run/NetworkManager/conf.d/zzz.conf", "shadow of boot");
        assert_eq!(values(), ["boot", "shadow of boot", "main", "administrator"]);
        write("etc/NetworkManager/conf.d/zzz.conf", "shadow");
        assert_eq!(values(), ["boot", "main", "administrator", "shadow"]);
    }

    #[test]
    fn the_ways_to_leave_interfaces_alone() {
        assert!(left_alone(CONTENTS));
        assert!(left_alone(
            "[keyfile]\nunmanaged-devices=mac:02:00:00:00:00:01;interface-name:husk*;interface-name:cali*\n"
        ));
        assert!(left_alone("[device-husk]\nmatch-device=interface-name:husk*\nmanaged=0\n"));
        assert!(!left_alone("[keyfile]\nunmanaged-devices=interface-name:husk-*\n"), "pods are left out");
        assert!(!left_alone("[keyfile]\nunmanaged-devices=interface-name:husk*\nunmanaged-devices=interface-name:x\n"));
        assert!(!left_alone("[keyfile]\nunmanaged-devices=*;except:interface-name:husk-vx\n"));
        assert!(!left_alone(""));
    }
}
