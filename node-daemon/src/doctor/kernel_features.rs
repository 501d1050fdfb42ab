//! What the mode needs of the kernel, asked of the kernel itself: asking makes it load the module. Where it is missing, the host's
//! files tell whether there is a module, and what keeps it from being loaded.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use husk_dataplane::wireguard::Wireguard;
use husk_dataplane::{Error, features, nft, xfrm};
use husk_overlay::config::{Config, WireguardChoice};
use husk_overlay::marks;
use husk_overlay::mode::Mode;
use husk_overlay::mtu::EspMode;

use super::{Action, Check, Evidence, Finding, Fix, HostFiles, Looked, Outcome, Unknown};

/// Features of the kernel.
pub(super) const CHECK: Check = Check { id: "kernel-features", title: "the kernel has what the mode needs", look };

const TUN: &str = "/dev/net/tun";

/// What the kernel refused, and the modules that it takes.
struct Missing {
    what: String,
    modules: Vec<&'static str>,
}

fn look(evidence: &Evidence) -> Looked {
    let config = evidence.config()?;
    let mut findings = Vec::new();
    match nft::read().map(drop) {
        Err(error @ Error::NoProgram { .. }) => {
            let cause = "the program nft is missing, with which the daemon makes the rules that protect pods: nothing works without";
            let fix =
                Fix::words("install the package nftables with the host's package manager, version 1.0.6 or newer");
            findings.push(Finding::blocking(cause, vec![error.to_string()], fix));
        }
        result => findings.extend(asked(result, &["nf_tables"])?.map(|it| finding(&it, config.mode, &evidence.host))),
    }
    for missing in missing(config)? {
        findings.push(finding(&missing, config.mode, &evidence.host));
    }
    Ok(Outcome::of(findings, format!("all that mode {} takes", config.mode)))
}

/// What the mode lacks.
fn missing(config: &Config) -> Result<Vec<Missing>, Unknown> {
    let mut missing = Vec::new();
    if config.mode.uses_vxlan() {
        missing.extend(asked(features::vxlan(), &["vxlan"])?);
    }
    if config.mode.uses_wireguard() {
        missing.extend(wireguard(config.wireguard.device)?);
    }
    if config.mode.uses_esp() {
        let needs = xfrm::Needs {
            families: BTreeSet::from([config.underlay.family]),
            cipher: config.ipsec.cipher,
            mode: if config.mode == Mode::Ipsec { EspMode::Tunnel } else { EspMode::Transport },
            udp: config.ipsec.udp_port.is_some(),
        };
        let modules = ["xfrm_user", "esp4", "esp6", "gcm"].into_iter();
        let modules: Vec<_> = modules.chain((config.mode == Mode::Ipsec).then_some("xfrm_interface")).collect();
        missing.extend(asked(xfrm::support(&needs), &modules)?);
    }
    Ok(missing)
}

/// The kernel's device, or what the bundled one runs over.
fn wireguard(choice: WireguardChoice) -> Result<Option<Missing>, Unknown> {
    let kernel = || {
        let open = Wireguard::open(Path::new(marks::WIREGUARD_SOCKET_DIRECTORY));
        asked(open.and_then(|mut wireguard| wireguard.kernel_support()), &["wireguard"])
    };
    let without_tun = |also: &str| {
        (!Path::new(TUN).exists()).then(|| Missing {
            what: format!("{TUN} does not exist, which the bundled WireGuard device runs over{also}"),
            modules: vec!["tun"],
        })
    };
    match choice {
        WireguardChoice::Kernel => kernel(),
        WireguardChoice::Userspace => Ok(without_tun("")),
        WireguardChoice::Auto => Ok(match kernel()? {
            None => None,
            Some(missing) => without_tun(&format!(", and {}", missing.what))
                .map(|tun| Missing { modules: vec!["wireguard", "tun"], ..tun }),
        }),
    }
}

/// Only a kernel that says so lacks something; any other failure is no answer.
fn asked(result: Result<(), Error>, modules: &[&'static str]) -> Result<Option<Missing>, Unknown> {
    match result {
        Ok(()) => Ok(None),
        Err(error @ Error::Unsupported { .. }) => {
            Ok(Some(Missing { what: error.to_string(), modules: modules.to_vec() }))
        }
        Err(error) => Err(error.into()),
    }
}

fn finding(missing: &Missing, mode: Mode, host: &HostFiles) -> Finding {
    let cause = format!("the kernel lacks what mode {mode} needs: there is no tunnel, and pods have to wait");
    let mut told = vec![missing.what.clone()];
    let fix = match Modules::look(host) {
        Ok(modules) => remedy(missing, mode, host, &modules, &mut told),
        Err(Unknown(why)) => {
            told.push(format!("whether there are modules could not be looked at: {why}"));
            Fix::by_hand(
                format!("on the host, load the modules {}", missing.modules.join(", ")),
                [modprobe(&missing.modules)],
                why,
            )
        }
    };
    Finding::blocking(cause, told, fix)
}

fn modprobe(modules: &[&str]) -> Action {
    Action::run_on_host("modprobe", ["-a"].iter().chain(modules).copied())
}

fn remedy(missing: &Missing, mode: Mode, host: &HostFiles, modules: &Modules, told: &mut Vec<String>) -> Fix {
    let Modules { release, .. } = modules;
    let names = missing.modules.join(", ");
    let another = another_mode(mode);
    let (present, absent): (Vec<_>, Vec<_>) = missing.modules.iter().partition(|name| modules.has(name));
    let mut forbids = Vec::new();
    if !present.is_empty() {
        told.push(format!("/lib/modules/{release}/modules.dep has {}", list(&present)));
        forbids = forbidden(host, &missing.modules);
        told.extend(forbids.clone());
    }
    if absent.is_empty() && !forbids.is_empty() {
        // `modprobe` does what the line says instead of loading, and systemd-modules-load(8) heeds it, too.
        let words = format!(
            "somebody has forbidden them, perhaps with good reason: take that back where it is told above, and load the modules; or choose {another}"
        );
        return Fix::by_hand(words, [modprobe(&missing.modules)], "what was forbidden on purpose is for you to allow");
    }
    if absent.is_empty() {
        let contents = missing
            .modules
            .iter()
            .fold("# For Husk; found by huskctl doctor.\n".to_owned(), |text, name| text + name + "\n");
        let file = Action::WriteFile { path: "/etc/modules-load.d/husk.conf".into(), contents };
        return Fix::safe("load the modules now and at every boot", [modprobe(&missing.modules), file]);
    }
    if modules.there {
        told.push(format!("/lib/modules/{release}/modules.dep does not have {}, nor are they built in", list(&absent)));
        let (words, command) = package(host, release);
        let actions = [command, Some(modprobe(&missing.modules))].into_iter().flatten();
        return Fix::by_hand(format!("{words}; or choose {another}"), actions, "packages are for you to choose");
    }
    if !modules.others.is_empty() {
        told.push(format!("/lib/modules has {}, and not {release}, which runs", modules.others.join(", ")));
        let words = "the kernel was updated and the old modules removed: reboot into the new one";
        return Fix::by_hand(
            words,
            [Action::run_on_host("systemctl", ["reboot"])],
            "a reboot ends everything that runs",
        );
    }
    told.push(format!("/lib/modules has nothing: kernel {release} has no modules, only what is built in"));
    Fix::words(format!("use a kernel with {names}, or choose {another}"))
}

fn another_mode(mode: Mode) -> &'static str {
    match mode {
        Mode::Ipsec | Mode::VxlanIpsec => "mode wireguard, whose bundled device takes nothing but /dev/net/tun",
        Mode::Wireguard => "wireguard.device: auto, or another mode",
        Mode::Vxlan | Mode::Direct => "another mode",
    }
}

/// What the host has of modules for the kernel that runs.
struct Modules {
    release: String,
    /// There is a directory for it.
    there: bool,
    /// Names of modules, files and built in.
    names: BTreeSet<String>,
    /// Kernels that there are modules for.
    others: Vec<String>,
}

impl Modules {
    fn look(host: &HostFiles) -> Result<Self, Unknown> {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned();
        let directory = format!("/lib/modules/{release}");
        let mut names = BTreeSet::new();
        for file in ["modules.dep", "modules.builtin"] {
            names.extend(parse(&host.read(format!("{directory}/{file}"))?.unwrap_or_default()));
        }
        let others = host.list("/lib/modules")?.unwrap_or_default();
        Ok(Self { there: others.contains(&release), names, others, release })
    }

    fn has(&self, module: &str) -> bool {
        self.names.contains(module)
    }
}

/// Names of modules in modules.dep(5) and modules.builtin; the kernel takes dashes for underscores.
fn parse(text: &str) -> impl Iterator<Item = String> + '_ {
    let files = text.lines().filter_map(|line| line.split(':').next()?.rsplit('/').next());
    files.filter_map(|file| Some(file.split_once(".ko")?.0.replace('-', "_")))
}

/// What keeps a module that is there from being loaded.
fn forbidden(host: &HostFiles, modules: &[&str]) -> Vec<String> {
    let mut told = Vec::new();
    if fs::read_to_string("/proc/sys/kernel/modules_disabled").is_ok_and(|text| text.trim() == "1") {
        told.push("kernel.modules_disabled = 1: nothing can be loaded until the next boot".into());
    }
    let files = super::drop_ins::in_force(
        host,
        &["/etc/modprobe.d", "/run/modprobe.d", "/usr/lib/modprobe.d", "/lib/modprobe.d"],
        ".conf",
    );
    for (path, text) in files.unwrap_or_default() {
        for (number, line) in text.lines().enumerate() {
            let mut words = line.split_whitespace();
            let forbids = matches!(words.next(), Some("blacklist" | "install"));
            if forbids && words.next().is_some_and(|name| modules.contains(&name.replace('-', "_").as_str())) {
                told.push(format!("{path}:{}: {}", number + 1, line.trim()));
            }
        }
    }
    told
}

/// The package of the host's distribution that has modules its kernel comes without.
fn package(host: &HostFiles, release: &str) -> (String, Option<Action>) {
    let text = host.read("/etc/os-release").ok().flatten().unwrap_or_default();
    let value = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        line.unwrap_or_default().trim_matches('"').to_owned()
    };
    let ids = format!("{} {}", value("ID"), value("ID_LIKE"));
    let is = |id: &str| ids.split_whitespace().any(|it| it == id);
    let command = |program: &str, package: String| {
        (format!("install the package {package}"), Some(Action::run_on_host(program, ["install".to_owned(), package])))
    };
    if is("ubuntu") {
        command("apt-get", format!("linux-modules-extra-{release}"))
    } else if is("fedora") || is("rhel") || is("centos") {
        command("dnf", format!("kernel-modules-extra-{release}"))
    } else if is("suse") || is("opensuse") {
        command("zypper", "kernel-default".into())
    } else {
        ("use a kernel of the distribution that has them".into(), None)
    }
}

fn list(names: &[&&str]) -> String {
    names.iter().map(|name| **name).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, HostFiles) {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let files = HostFiles::new(root.path());
        (root, files)
    }

    fn found(files: &[(&str, &str)]) -> Finding {
        let (_root, host) = host(files);
        finding(&Missing { what: "no".into(), modules: vec!["esp4", "xfrm_interface"] }, Mode::Ipsec, &host)
    }

    #[test]
    fn the_remedy_depends_on_what_the_host_has() {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        let dep = format!("lib/modules/{}/modules.dep", release.trim());
        let builtin = format!("lib/modules/{}/modules.builtin", release.trim());
        let both = found(&[
            (&dep, "kernel/net/xfrm/xfrm-interface.ko.zst: a.ko\n"),
            (&builtin, "kernel/net/ipv4/esp4.ko\n"),
            ("etc/modprobe.d/cis.conf", "options x\ninstall esp4 /bin/true\n"),
        ]);
        assert!(!both.fix.is_safe() && both.fix.commands == ["modprobe -a esp4 xfrm_interface"], "{both:?}");
        let allowed = found(&[
            (&dep, "kernel/net/xfrm/xfrm-interface.ko.zst: a.ko\n"),
            (&builtin, "kernel/net/ipv4/esp4.ko\n"),
            ("etc/modprobe.d/cis.conf", "install sctp /bin/true\n"),
        ]);
        assert!(allowed.fix.is_safe() && allowed.fix.commands[0] == both.fix.commands[0], "{allowed:?}");
        assert!(both.evidence.iter().any(|it| it == "/etc/modprobe.d/cis.conf:2: install esp4 /bin/true"), "{both:?}");
        let ubuntu = found(&[(&dep, "x.ko:\n"), ("etc/os-release", "NAME=\"x\"\nID=ubuntu\nID_LIKE=debian\n")]);
        assert!(ubuntu.fix.words.contains("linux-modules-extra-") && !ubuntu.fix.is_safe(), "{ubuntu:?}");
        let updated = found(&[("lib/modules/0.0.1/modules.dep", "x.ko:\n")]);
        assert!(updated.fix.words.contains("reboot"), "{updated:?}");
        let bare = found(&[]);
        assert!(bare.fix.words.contains("mode wireguard") && bare.fix.actions.is_empty(), "{bare:?}");
    }
}
