//! systemd: who changes the Ethernet addresses of interfaces, and whose routes systemd-networkd throws away.

use std::collections::BTreeMap;

use husk_dataplane::netlink::{Protocol, Socket};
use husk_dataplane::underlay;
use husk_overlay::marks;

use super::drop_ins::{Entry, entries, glob, in_force, is_false};
use super::{Action, Check, Evidence, Finding, Fix, HostFiles, Looked, Outcome, Unknown};

/// Ethernet addresses of pods' interfaces.
pub(super) const MAC_ADDRESSES: Check = Check {
    id: "mac-addresses",
    title: "the host's ends of pods' interfaces have the addresses they were made with",
    look: macs,
};

/// systemd-networkd.
pub(super) const NETWORKD: Check = Check {
    id: "systemd-networkd",
    title: "systemd-networkd leaves the overlay's routes and interfaces alone",
    look: networkd,
};

/// Where systemd looks for configuration, the directory that counts first (systemd.link(5), systemd.network(5)).
const NETWORK_DIRECTORIES: [&str; 5] = [
    "/etc/systemd/network",
    "/run/systemd/network",
    "/usr/local/lib/systemd/network",
    "/usr/lib/systemd/network",
    "/lib/systemd/network",
];

/// Where the main file of systemd-networkd and its additions are (networkd.conf(5)), the directory that counts first.
const NETWORKD_DIRECTORIES: [&str; 4] = ["/etc/systemd", "/run/systemd", "/usr/local/lib/systemd", "/usr/lib/systemd"];

/// What systemd-networkd writes while it runs (`manager_save` in src/network/networkd-state-file.c).
const NETWORKD_STATE: &str = "/run/systemd/netif/state";

/// What udev keeps while it runs.
const UDEV: &str = "/run/udev";

const LINK_FILE: &str = "/etc/systemd/network/10-husk.link";
const LINK: &str = "# Husk gives its interfaces their addresses itself; found by huskctl doctor.\n[Match]\nOriginalName=husk*\n\n[Link]\nMACAddressPolicy=none\n";

const NETWORK_FILE: &str = "/etc/systemd/network/00-husk.network";
const NETWORK: &str =
    "# Husk's interfaces are Husk's; found by huskctl doctor.\n[Match]\nName=husk*\n\n[Link]\nUnmanaged=yes\n";

const NETWORKD_FILE: &str = "/etc/systemd/networkd.conf.d/zz-husk.conf";
const NETWORKD_CONF: &str = "# Husk's routes are Husk's; found by huskctl doctor.\n[Network]\nManageForeignRoutes=no\nManageForeignRoutingPolicyRules=no\n";

/// Lines of evidence, and pods that are named.
const MOST_LINES: usize = 8;

fn macs(evidence: &Evidence) -> Looked {
    let interfaces = underlay::interfaces(&mut Socket::open(Protocol::Route)?)?;
    let actual: BTreeMap<&str, _> = interfaces.iter().map(|it| (it.name.as_str(), it.mac)).collect();
    let leases = &evidence.ipam()?.leases;
    let mut told = Vec::new();
    let mut actions = Vec::new();
    for lease in leases {
        let (name, made) = (lease.host_interface.as_str(), lease.id.host_mac());
        let Some(Some(now)) = actual.get(name).copied() else { continue };
        if now != made {
            told.push(format!("{name} of pod {} has {now}, and was made with {made}", lease.display_name()));
            actions.push(Action::run("ip", ["link", "set", "dev", name, "address", &made.to_string()]));
        }
    }
    let policy = link_policy(&evidence.host);
    if told.is_empty() {
        let policy = match policy {
            Ok(Some(entry)) => format!("; {} does not touch them", entry.place),
            _ => String::new(),
        };
        return Ok(Outcome::well(format!("all {} pods' interfaces{policy}", leases.len())));
    }
    let count = told.len();
    if count > MOST_LINES {
        told.truncate(MOST_LINES);
        told.push(format!("and {} more", count - MOST_LINES));
    }
    if let Ok(Some(entry)) = policy {
        told.push(format!("udev sets addresses by policy: {}", entry.place));
        actions.push(Action::WriteFile { path: LINK_FILE.into(), contents: LINK.into() });
        actions.push(Action::run_on_host("udevadm", ["control", "--reload"]));
    }
    let cause = format!(
        "something has changed the Ethernet addresses of {count} pods' interfaces: those pods send to an address that is not there, \
         and reach nobody"
    );
    let fix = Fix::safe("give them back the addresses that the pods know", actions);
    Ok(Outcome::of(vec![Finding::error(cause, told, fix)], ""))
}

/// The policy by which udev would set the address of an interface of ours, unless it leaves addresses alone.
fn link_policy(host: &HostFiles) -> Result<Option<Entry>, Unknown> {
    if !host.exists(UDEV)? {
        return Ok(None);
    }
    for (path, text) in in_force(host, &NETWORK_DIRECTORIES, ".link")? {
        let entries = entries(&path, &text);
        if OUR_DEVICES.iter().any(|device| device.is_meant(&entries)) {
            let policy = entries.into_iter().rfind(|it| it.section == "Link" && it.key == "MACAddressPolicy");
            return Ok(policy.filter(|it| it.value != "none"));
        }
    }
    Ok(None)
}

/// What files match an interface of ours by.
struct Device {
    name: &'static str,
    kind: &'static str,
    /// `Type=` as networkctl prints it.
    of: &'static str,
}

/// One of each kind of interface of ours.
const OUR_DEVICES: [Device; 4] = [
    Device { name: "husk00000000000", kind: "veth", of: "ether" },
    Device { name: marks::VXLAN_INTERFACE, kind: "vxlan", of: "ether" },
    Device { name: marks::WIREGUARD_INTERFACES[0], kind: "wireguard", of: "wireguard" },
    Device { name: marks::XFRM_INTERFACE, kind: "xfrm", of: "none" },
];

impl Device {
    /// Whether the section `[Match]` means it; one that asks for more than can be told does not. One without any condition
    /// means all (systemd.network(5)).
    fn is_meant(&self, entries: &[Entry]) -> bool {
        let any = |patterns: &str, value: &str| {
            let (denied, patterns) = patterns.strip_prefix('!').map_or((false, patterns), |rest| (true, rest));
            patterns.split_whitespace().any(|pattern| glob(pattern, value)) != denied
        };
        entries.iter().filter(|entry| entry.section == "Match").all(|entry| match entry.key.as_str() {
            "Name" | "OriginalName" => any(&entry.value, self.name),
            "Kind" | "Driver" => any(&entry.value, self.kind),
            "Type" => any(&entry.value, self.of),
            _ => false,
        })
    }
}

fn networkd(evidence: &Evidence) -> Looked {
    let host = &evidence.host;
    if !host.exists(NETWORKD_STATE)? {
        return Ok(Outcome::does_not_apply("systemd-networkd does not run"));
    }
    let mut findings = Vec::new();
    let setting = foreign_routes(host)?;
    if !setting.as_ref().is_some_and(|entry| is_false(&entry.value)) {
        let told = setting.map_or_else(
            || "ManageForeignRoutes is not set, and is yes by default (networkd.conf(5))".into(),
            |it| it.place,
        );
        let cause = "systemd-networkd throws away the overlay's routes on interfaces it configures, whenever it starts or configures one \
                     anew; the daemon brings them back, and packets are lost meanwhile";
        // It reads networkd.conf when it starts; `networkctl reload` is for .network files (networkctl(1)).
        let words = "tell it to leave routes alone that it did not make; it takes that up when it starts the next time: restart it at \
                     a time when its interfaces may be configured anew";
        let file = Action::WriteFile { path: NETWORKD_FILE.into(), contents: NETWORKD_CONF.into() };
        let restart = Action::restart_later("systemd-networkd");
        findings.push(Finding::warning(cause, vec![told], Fix::safe(words, [file, restart])));
    }
    if let Some((path, names)) = taken(host)? {
        let cause = format!(
            "systemd-networkd configures interfaces of the overlay ({names}) as if they were its own, and removes their addresses and routes"
        );
        let told = vec![format!("{path}: its section [Match] means {names}, and no file before it says Unmanaged=yes")];
        let file = Action::WriteFile { path: NETWORK_FILE.into(), contents: NETWORK.into() };
        let reload = Action::reload("networkctl", ["reload"]);
        findings.push(Finding::error(cause, told, Fix::safe("tell it that they are not its own", [file, reload])));
    }
    Ok(Outcome::of(findings, "it runs, and leaves them alone"))
}

/// The line that decides whether systemd-networkd removes routes of others: the last one, of the additions by name, or else of
/// the main file.
fn foreign_routes(host: &HostFiles) -> Result<Option<Entry>, Unknown> {
    let mut all = Vec::new();
    for directory in NETWORKD_DIRECTORIES {
        let path = format!("{directory}/networkd.conf");
        if let Some(text) = host.read(&path)? {
            all.extend(entries(&path, &text));
            break;
        }
    }
    let additions: Vec<String> = NETWORKD_DIRECTORIES.iter().map(|it| format!("{it}/networkd.conf.d")).collect();
    let additions: Vec<&str> = additions.iter().map(String::as_str).collect();
    for (path, text) in in_force(host, &additions, ".conf")? {
        all.extend(entries(&path, &text));
    }
    Ok(all.into_iter().rfind(|it| it.section == "Network" && it.key == "ManageForeignRoutes"))
}

/// The first file that means an interface of ours and does not leave it alone, with the interfaces.
fn taken(host: &HostFiles) -> Result<Option<(String, String)>, Unknown> {
    let files = in_force(host, &NETWORK_DIRECTORIES, ".network")?;
    let mut taken: Option<(String, String)> = None;
    for device in &OUR_DEVICES {
        let meant = files.iter().map(|(path, text)| (path, entries(path, text))).find(|(_, all)| device.is_meant(all));
        let Some((path, all)) = meant else { continue };
        let unmanaged = all.iter().any(|it| it.section == "Link" && it.key == "Unmanaged" && !is_false(&it.value));
        match &mut taken {
            _ if unmanaged => {}
            Some((_, names)) => *names = format!("{names}, {}", device.name),
            none => *none = Some((path.clone(), device.name.to_owned())),
        }
    }
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_meant(text: &str) -> Vec<&'static str> {
        let all = entries("x", text);
        OUR_DEVICES.iter().filter(|device| device.is_meant(&all)).map(|device| device.name).collect()
    }

    #[test]
    fn a_match_means_what_systemd_says() {
        assert_eq!(is_meant("[Match]\nName=en*\n"), [""; 0]);
        assert_eq!(is_meant("[Match]\nOriginalName=*\n[Link]\nx=y\n").len(), 4);
        assert_eq!(is_meant("[Match]\nKind=veth\nName=ve-* husk*\n"), ["husk00000000000"]);
        assert_eq!(is_meant("[Match]\nType=ether\n"), ["husk00000000000", "husk-vx"]);
        assert_eq!(is_meant("[Match]\nName=!lo\n").len(), 4);
        assert_eq!(is_meant("[Match]\nMACAddress=02:00:00:00:00:01\n"), [""; 0]);
    }
}
