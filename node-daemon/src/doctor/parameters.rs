//! Kernel parameters of the network: forwarding, and reverse path filtering.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;

use husk_dataplane::netlink::{Protocol, Socket};
use husk_dataplane::{sysctl, underlay};
use husk_overlay::marks;
use husk_overlay::prefix::Family;
use husk_overlay::record::DualStack;

use super::drop_ins::{glob, in_force};
use super::{Action, Check, Evidence, Finding, Fix, HostFiles, Looked, Outcome, Unknown};

/// Forwarding.
pub(super) const FORWARDING: Check = Check {
    id: "forwarding",
    title: "the host forwards packets of pods, on every interface they pass",
    look: forwarding,
};

/// Reverse path filtering.
pub(super) const REVERSE_PATH: Check = Check {
    id: "reverse-path-filter",
    title: "reverse path filtering lets pass what other nodes send (the larger value of all and the interface)",
    look: reverse_path,
};

/// Where sysctl.d(5) looks, the directory that counts first.
const DIRECTORIES: [&str; 5] =
    ["/etc/sysctl.d", "/run/sysctl.d", "/usr/local/lib/sysctl.d", "/usr/lib/sysctl.d", "/lib/sysctl.d"];

/// Peers that are looked at: routes to more of them lead where those to these do.
const MOST_PEERS: usize = 256;

/// Lines of evidence of one kind.
const MOST_LINES: usize = 8;

fn forwarding(evidence: &Evidence) -> Looked {
    let config = evidence.config()?;
    let mut closed = Vec::new();
    for (family, path) in [(Family::Ipv4, "net/ipv4/ip_forward"), (Family::Ipv6, "net/ipv6/conf/all/forwarding")] {
        let wanted = config.families().any(|it| it == family);
        if wanted && sysctl::read([path])?.get(path).is_some_and(|value| value == "0") {
            closed.push(path.to_owned());
        }
    }
    if !closed.is_empty() {
        let told = told(&closed, "0", &evidence.host);
        let words = "let the daemon do it: it turns forwarding on as soon as what protects pods is in place (see the checks daemon and \
                     configuration); and take out of the files what turns it off";
        let because = "turned on before the daemon's rules are in place it would let packets pass that must not";
        let cause = "the host forwards no packets: pods reach nothing beyond the host";
        return Ok(Outcome::of(vec![Finding::error(cause, told, Fix::by_hand(words, [], because))], ""));
    }
    if !config.families().any(|family| family == Family::Ipv4) {
        return Ok(Outcome::well("on"));
    }
    // For IPv4 the interface that a packet comes by decides (`IN_DEV_FORWARD` in net/ipv4/route.c `ip_route_input_slow`); for IPv6
    // the one parameter for all does.
    let own = status_interface(evidence);
    let interfaces = underlay::interfaces(&mut Socket::open(Protocol::Route)?)?;
    let ours = interfaces.iter().filter(|it| it.is_husk() || own.as_deref() == Some(it.name.as_str()));
    let paths: Vec<String> = ours.map(|it| format!("net/ipv4/conf/{}/forwarding", it.name)).collect();
    let values = sysctl::read(&paths)?;
    let closed: Vec<String> = values.iter().filter(|(_, value)| *value == "0").map(|(path, _)| path.clone()).collect();
    let cause = "the host does not forward what arrives by some of the overlay's interfaces, and drops it";
    let fix = set("turn it on for them", &closed, "1", &evidence.host, "zz-husk-forwarding.conf");
    let found = Finding::error(cause, told(&closed, "0", &evidence.host), fix);
    let found = if closed.is_empty() { Vec::new() } else { vec![found] };
    Ok(Outcome::of(found, format!("on, and on all {} interfaces", values.len())))
}

fn status_interface(evidence: &Evidence) -> Option<String> {
    evidence.status().ok()?.underlay_interface.as_ref().map(ToString::to_string)
}

fn reverse_path(evidence: &Evidence) -> Looked {
    let mut socket = Socket::open(Protocol::Route)?;
    let interfaces = underlay::interfaces(&mut socket)?;
    let named = |name: &str| interfaces.iter().any(|it| it.name.as_str() == name);
    let mut strict = BTreeMap::new();
    let mut findings = Vec::new();
    // Two devices, and a peer may send in one and be sent to in the other.
    let wireguard: Vec<&str> = marks::WIREGUARD_INTERFACES.into_iter().filter(|name| named(name)).collect();
    for name in &wireguard {
        if effective(name)? == 1 {
            strict.insert(
                (*name).to_owned(),
                vec![format!("two keys are in use at once while keys rotate: {}", wireguard.join(", "))],
            );
        }
    }
    if wireguard.len() < 2 {
        strict.clear();
    }
    let status = evidence.status()?;
    if let Some(own) = status.underlay_interface.as_ref().filter(|_| status.addresses.ipv4.is_some()) {
        let own = own.as_str();
        if effective(own)? == 1 {
            let elsewhere = routed_elsewhere(&mut socket, evidence, own)?;
            if !elsewhere.is_empty() {
                strict.insert(own.to_owned(), elsewhere);
            }
        }
    }
    if !strict.is_empty() {
        let paths: Vec<String> = strict.keys().map(|name| format!("net/ipv4/conf/{name}/rp_filter")).collect();
        let mut told: Vec<String> = Vec::new();
        for (name, why) in &strict {
            let values = sysctl::read(["net/ipv4/conf/all/rp_filter", &format!("net/ipv4/conf/{name}/rp_filter")])?;
            told.extend(values.iter().map(|(path, value)| format!("{path} = {value}")));
            told.extend(why.iter().take(MOST_LINES).cloned());
        }
        told.extend(lines_that_set(&evidence.host, &paths, "1"));
        if let Some(dropped) = dropped_by_filter() {
            told.push(format!(
                "dropped by it since boot: {dropped} packets (TcpExt IPReversePathFilter in /proc/net/netstat)"
            ));
        }
        let names: Vec<&str> = strict.keys().map(String::as_str).collect();
        let cause = format!(
            "reverse path filtering is strict on {}: packets of other nodes that arrive there are dropped, as the route back leads elsewhere",
            names.join(" and ")
        );
        let words =
            "make it loose there (RFC 3704 section 2.4): an address has to be routed somewhere, not back the same way";
        let fix = set(words, &paths, "2", &evidence.host, "zz-husk-rp-filter.conf");
        findings.push(Finding::error(cause, told, fix));
    }
    Ok(Outcome::of(findings, "nothing is filtered that other nodes send"))
}

/// The value in force: the larger of the interface's and that of all (Documentation/networking/ip-sysctl.rst).
fn effective(interface: &str) -> Result<u8, Unknown> {
    let values =
        sysctl::read(["net/ipv4/conf/all/rp_filter".to_owned(), format!("net/ipv4/conf/{interface}/rp_filter")])?;
    Ok(values.values().filter_map(|value| value.parse().ok()).max().unwrap_or(0))
}

/// Peers whose packets come by the interface of the own address, and to whom packets leave by another one.
fn routed_elsewhere(socket: &mut Socket, evidence: &Evidence, own: &str) -> Result<Vec<String>, Unknown> {
    let endpoints = evidence.peers()?.iter().filter_map(|peer| peer.endpoint.as_deref());
    let addresses = endpoints.filter_map(super::firewall::address_of).filter(IpAddr::is_ipv4);
    let addresses: BTreeSet<IpAddr> = addresses.take(MOST_PEERS).collect();
    let routes = underlay::routes(socket, DualStack::default(), addresses)?;
    let elsewhere = routes.iter().filter(|(_, route)| route.interface.as_str() != own);
    Ok(elsewhere
        .map(|(address, route)| format!("{address} is routed by {}, and its packets arrive by {own}", route.interface))
        .collect())
}

/// Packets that reverse path filtering dropped in this network namespace.
fn dropped_by_filter() -> Option<u64> {
    let text = fs::read_to_string("/proc/thread-self/net/netstat").ok()?;
    let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:"));
    let (names, values) = (lines.next()?, lines.next()?);
    let at = names.split_whitespace().position(|name| name == "IPReversePathFilter")?;
    values.split_whitespace().nth(at)?.parse().ok()
}

/// The parameters as they are, and the lines of files that make them so.
fn told(paths: &[String], value: &str, host: &HostFiles) -> Vec<String> {
    let mut told: Vec<String> = paths.iter().take(MOST_LINES).map(|path| format!("{path} = {value}")).collect();
    if paths.len() > MOST_LINES {
        told.push(format!("and {} more", paths.len() - MOST_LINES));
    }
    told.extend(lines_that_set(host, paths, value));
    told
}

/// Sets parameters now; and in a file that is read last, if another file would set them otherwise.
pub(super) fn set(words: &str, paths: &[String], value: &str, host: &HostFiles, file: &str) -> Fix {
    let mut actions: Vec<Action> =
        paths.iter().map(|path| Action::SetSysctl { path: path.clone(), value: value.to_owned() }).collect();
    let file = format!("/etc/sysctl.d/{file}");
    match lasting(paths, value, host, &file) {
        Ok(None) => Fix::safe(words, actions),
        Ok(Some(contents)) => {
            actions.push(Action::WriteFile { path: file.into(), contents });
            Fix::safe(words, actions)
        }
        Err(Unknown(why)) => {
            // Added to what is in the file, which cannot be seen either; of two lines the later one counts.
            let lines: BTreeSet<String> = paths.iter().map(|path| format!("\"{} = {value}\"", pattern(path))).collect();
            let lines: Vec<String> = lines.into_iter().collect();
            let script = format!("printf '%s\\n' {} >> {file}", lines.join(" "));
            actions.push(Action::run_on_host("sh", ["-c", &script]));
            let words = format!(
                "{words}. Whether a file sets it otherwise at the next boot is not known ({why}): a line in {file} on the host makes it last"
            );
            Fix::safe(words, actions)
        }
    }
}

/// What the file has to say so that parameters keep the value at the next boot, and what it says already; none if no other file sets
/// them otherwise.
fn lasting(paths: &[String], value: &str, host: &HostFiles, file: &str) -> Result<Option<String>, Unknown> {
    let (own, others): (Vec<SysctlLine>, Vec<SysctlLine>) =
        sysctl_lines(host)?.into_iter().partition(|line| line.file == file);
    let disturbed = |path: &&String| others.iter().chain(&own).any(|line| line.sets(path) && line.value != value);
    let disturbed: Vec<&String> = paths.iter().filter(disturbed).collect();
    if disturbed.is_empty() {
        return Ok(None);
    }
    let mut lines: BTreeMap<String, String> = own.into_iter().map(|line| (line.path, line.value)).collect();
    for path in disturbed {
        // A line for this very name counts more than any pattern (sysctl.d(5)), in whatever file it is.
        let named = others.iter().any(|line| line.path == *path);
        let pattern = pattern(path);
        if pattern != *path && !named {
            lines.remove(path);
        }
        lines.extend(named.then(|| (path.clone(), value.to_owned())));
        lines.insert(pattern, value.to_owned());
    }
    let head = "# So that Husk's overlay works; found by huskctl doctor.\n".to_owned();
    Ok(Some(lines.iter().fold(head, |text, (path, value)| text + path + " = " + value + "\n")))
}

/// The parameter of all of Husk's interfaces, where it has to be alike for them: those of pods that come later have other names.
fn pattern(path: &str) -> String {
    match path.split('/').collect::<Vec<_>>()[..] {
        ["net", "ipv4", "conf", interface, "forwarding"] if interface.starts_with(marks::INTERFACE_PREFIX) => {
            format!("net/ipv4/conf/{}*/forwarding", marks::INTERFACE_PREFIX)
        }
        _ => path.to_owned(),
    }
}

/// Lines of the host's files that give one of the parameters this value; none where the files cannot be seen.
fn lines_that_set(host: &HostFiles, paths: &[String], value: &str) -> Vec<String> {
    let lines = sysctl_lines(host).unwrap_or_default().into_iter();
    let ours = lines.filter(|line| line.value == value && paths.iter().any(|path| line.sets(path)));
    ours.take(MOST_LINES).map(|line| line.place).collect()
}

/// A line of sysctl.d(5).
#[derive(Debug)]
struct SysctlLine {
    /// Path with slashes; may have a pattern in it.
    path: String,
    value: String,
    file: String,
    place: String,
}

impl SysctlLine {
    fn sets(&self, path: &str) -> bool {
        // What is set for all interfaces counts for each, and for default for those that are made later.
        let general = |general: &str| {
            let mut parts: Vec<&str> = path.split('/').collect();
            if let [_, _, "conf", interface, _] = parts.as_mut_slice() {
                *interface = general;
            }
            glob(&self.path, &parts.join("/"))
        };
        glob(&self.path, path) || general("all") || general("default")
    }
}

fn sysctl_lines(host: &HostFiles) -> Result<Vec<SysctlLine>, Unknown> {
    let mut files = in_force(host, &DIRECTORIES, ".conf")?;
    // Not systemd's, but of `sysctl --system` and of distributions that link to it.
    files.extend(host.read("/etc/sysctl.conf")?.map(|text| ("/etc/sysctl.conf".to_owned(), text)));
    Ok(files.iter().flat_map(|(path, text)| parse(path, text)).collect())
}

fn parse(path: &str, text: &str) -> Vec<SysctlLine> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with(['#', ';']));
    lines
        .filter_map(|(number, line)| {
            let (key, value) = line.split_once('=')?;
            let key = key.trim().trim_start_matches('-');
            Some(SysctlLine {
                path: with_slashes(key),
                value: value.split_whitespace().collect::<Vec<_>>().join(" "),
                file: path.to_owned(),
                place: format!("{path}:{}: {}", number + 1, line.trim()),
            })
        })
        .collect()
}

/// With dots, slashes stand for dots in names of interfaces; the first separator tells which it is (sysctl.d(5)).
fn with_slashes(key: &str) -> String {
    match key.find(['.', '/']) {
        Some(at) if key.as_bytes()[at] == b'.' => key
            .chars()
            .map(|character| match character {
                '.' => '/',
                '/' => '.',
                other => other,
            })
            .collect(),
        _ => key.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_sysctl_files_are_found_in_all_their_forms() {
        let text = "# net.ipv4.conf.all.rp_filter=1\n-net.ipv4.conf.*.rp_filter = 1\nnet/ipv4/conf/eth0.1/rp_filter=1\n\
                    net.ipv4.conf.eth0/2.forwarding=0\nnonsense\n";
        let lines = parse("/etc/sysctl.d/x.conf", text);
        let paths: Vec<&str> = lines.iter().map(|line| line.path.as_str()).collect();
        assert_eq!(
            paths,
            ["net/ipv4/conf/*/rp_filter", "net/ipv4/conf/eth0.1/rp_filter", "net/ipv4/conf/eth0.2/forwarding"]
        );
        assert!(lines[0].sets("net/ipv4/conf/husk-wg0/rp_filter") && !lines[1].sets("net/ipv4/conf/eth0/rp_filter"));
        assert_eq!(lines[0].place, "/etc/sysctl.d/x.conf:2: -net.ipv4.conf.*.rp_filter = 1");
        let all = parse("x", "net.ipv4.conf.all.rp_filter=1");
        assert!(all[0].sets("net/ipv4/conf/eth0/rp_filter") && !all[0].sets("net/ipv4/conf/eth0/forwarding"));
    }
    /// A host whose `/etc/sysctl.d` has these files.
    fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, HostFiles) {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("etc/sysctl.d");
        fs::create_dir_all(&directory).unwrap();
        files.iter().for_each(|(name, text)| fs::write(directory.join(name), text).unwrap());
        let host = HostFiles::new(root.path());
        (root, host)
    }

    fn forwarding_of(interfaces: &[&str]) -> Vec<String> {
        interfaces.iter().map(|name| format!("net/ipv4/conf/{name}/forwarding")).collect()
    }

    /// Lines that a fix writes into its file, without the comment.
    fn written(fix: &Fix) -> Vec<&str> {
        let [Action::WriteFile { contents, .. }] = &fix.actions[fix.actions.len() - 1..] else { panic!("{fix:?}") };
        contents.lines().skip(1).collect()
    }

    #[test]
    fn what_a_fix_before_has_written_stays_written() {
        let file = "zz-husk-forwarding.conf";
        let before = "# So.\nnet.ipv4.conf.eth0.forwarding = 1\nnet/ipv4/conf/husk0123456789a/forwarding = 1\n";
        let (_root, host) = host(&[("50-hardening.conf", "net.ipv4.conf.*.forwarding = 0\n"), (file, before)]);
        let fix = set("", &forwarding_of(&["eth1", "husk0123456789a", "husk-vx"]), "1", &host, file);
        let kept = [
            "net/ipv4/conf/eth0/forwarding = 1",
            "net/ipv4/conf/eth1/forwarding = 1",
            "net/ipv4/conf/husk*/forwarding = 1",
        ];
        assert_eq!(written(&fix), kept);
        // A new value takes the place of an old one, and nothing else does.
        let fix = set("", &forwarding_of(&["eth0"]), "2", &host, file);
        assert_eq!(written(&fix)[0], "net/ipv4/conf/eth0/forwarding = 2");
        assert_eq!(written(&fix).len(), 2);
    }

    #[test]
    fn pods_that_come_later_are_meant_too_and_a_name_counts_more_than_a_pattern() {
        let named = "net.ipv4.conf.husk-vx.forwarding = 0\nnet.ipv4.conf.default.forwarding = 0\n";
        let (_root, host) = host(&[("50-hardening.conf", named)]);
        let fix = set("", &forwarding_of(&["husk-vx", "husk0123456789a"]), "1", &host, "zz-husk-forwarding.conf");
        assert_eq!(written(&fix), ["net/ipv4/conf/husk*/forwarding = 1", "net/ipv4/conf/husk-vx/forwarding = 1"]);
        // Filters of pods' interfaces are not the overlay's to loosen.
        let filter = "net/ipv4/conf/husk-wg0/rp_filter";
        assert_eq!(pattern(filter), filter);
        let quiet = set("", &forwarding_of(&["eth0"]), "0", &host, "zz-husk-forwarding.conf");
        assert_eq!(quiet.commands, ["sysctl -w net/ipv4/conf/eth0/forwarding=0"]);
    }

    #[test]
    fn where_files_are_hidden_the_file_is_left_to_do_on_the_host() {
        let fix = set("do it", &forwarding_of(&["husk-vx", "husk0123456789a"]), "1", &HostFiles::hidden(), "x.conf");
        let file = r#"sh -c 'printf '\''%s\n'\'' "net/ipv4/conf/husk*/forwarding = 1" >> /etc/sysctl.d/x.conf'"#;
        assert_eq!(fix.commands.last().unwrap(), file);
        assert!(fix.is_safe() && fix.words.contains("does not see the host's files"), "{}", fix.words);
    }
}
