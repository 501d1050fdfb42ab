//! Breakages of the host itself: its configuration, its kernel, its disks.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::kernel::{self, Part};
use husk_tests::probe::{Datagram, Echo};
use husk_tests::{Cluster, Family, Mode, Signal, eventually};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::{Bed, Breakage};

pub(crate) const BREAKAGES: &[Breakage] = &[
    Breakage { check: "configuration", finds: &["cannot start with this configuration"], run: configuration },
    Breakage { check: "daemon", finds: &["no daemon answers"], run: daemon },
    Breakage { check: "kernel-features", finds: &["/dev/net/tun"], run: kernel_features },
    Breakage { check: "forwarding", finds: &["does not forward"], run: forwarding },
    Breakage { check: "reverse-path-filter", finds: &["IPReversePathFilter"], run: reverse_path },
    Breakage { check: "mac-addresses", finds: &["MACAddressPolicy=persistent"], run: mac_addresses },
    Breakage { check: "conntrack", finds: &["% full"], run: conntrack },
    Breakage { check: "disk", finds: &["full", "inodes", "read-only"], run: disk },
    Breakage { check: "memory", finds: &["MemAvailable: 48.8 MiB"], run: memory },
];

/// How long a packet may take that is expected to arrive.
const ARRIVES: Duration = Duration::from_secs(10);

/// How long one is waited for that is not.
const LOST: Duration = Duration::from_secs(1);

fn configuration(bed: &mut Bed) -> Result<()> {
    let file = bed.host().file("/etc/husk/config.yaml");
    bed.well("configuration")?;
    let text = fs::read_to_string(&file)?;
    fs::write(&file, text.replace("mode:", "mood:"))?;
    bed.found("configuration", &["/etc/husk/config.yaml", "mood"])?;
    // What needs it says so.
    let forwarding = bed.look("forwarding")?;
    ensure!(
        forwarding["outcome"] == "unknown" && forwarding["why"].to_string().contains("configuration"),
        "{forwarding}"
    );
    fs::remove_file(&file)?;
    bed.found("configuration", &["does not exist"])?;
    fs::write(&file, text)?;
    bed.well("configuration")
}

fn daemon(bed: &mut Bed) -> Result<()> {
    bed.well("daemon")?;
    bed.host().stop_daemon(Signal::SIGKILL)?;
    bed.found("daemon", &["/run/husk/daemon.sock"])?;
    let macs = bed.look("mac-addresses")?;
    ensure!(macs["outcome"] == "unknown" && macs["why"].to_string().contains("check daemon"), "{macs}");
    // What can be seen without it is looked at all the same.
    bed.well("forwarding")?;
    bed.host().start_daemon()?;
    bed.host().wait_ready()?;
    bed.cluster.wait_meshed()?;
    bed.well("daemon")
}

/// Mounts something in the host's mount namespace.
fn cover(bed: &Bed, with: Option<&Path>, target: &str, options: Option<&str>) -> Result<()> {
    let (kind, flags) = if with.is_none() { (Some("tmpfs"), MsFlags::empty()) } else { (None, MsFlags::MS_BIND) };
    let mounted = bed.host().run(|| mount(with.or(Some(Path::new("tmpfs"))), target, kind, flags, options))?;
    mounted.with_context(|| format!("mounting over {target}"))
}

fn uncover(bed: &Bed, target: &str) -> Result<()> {
    bed.host().run(|| umount2(target, MntFlags::MNT_DETACH))?.with_context(|| format!("unmounting {target}"))
}

fn kernel_features(bed: &mut Bed) -> Result<()> {
    bed.well("kernel-features")?;
    let host = bed.host();
    let change = |mode: &str, device: &str| {
        host.configure(|config| {
            config["mode"] = mode.into();
            config["wireguard"]["device"] = device.into();
        })
    };
    change("wireguard", "userspace")?;
    bed.well("kernel-features")?;
    cover(bed, None, "/dev/net", None)?;
    bed.found("kernel-features", &["/dev/net/tun", "wireguard"])?;
    uncover(bed, "/dev/net")?;
    bed.well("kernel-features")?;
    // A kernel that lacks ESP is one that the mode ipsec is broken on, and one that has it is not.
    change("ipsec", "auto")?;
    if kernel::has(Part::Esp)? {
        bed.well("kernel-features")?;
    } else {
        bed.found("kernel-features", &["mode ipsec", "xfrm_interface"])?;
    }
    change("vxlan", "auto")?;
    bed.well("kernel-features")
}

fn forwarding(bed: &mut Bed) -> Result<()> {
    let (a, b) = (bed.host().add_pod("a")?, bed.cluster.host(2).add_pod("b")?);
    a.await_answer_of(&b, ARRIVES)?;
    bed.well("forwarding")?;
    let parameter = "net/ipv4/conf/husk-vx/forwarding";
    bed.host().netns().sysctl(parameter, "0")?;
    bed.write("/etc/sysctl.d/50-hardening.conf", "# By the security team.\nnet.ipv4.conf.*.forwarding = 0\n")?;
    ensure!(!a.reaches(&b, LOST)?, "the host forwards what it should not");
    let hardening = "/etc/sysctl.d/50-hardening.conf:2: net.ipv4.conf.*.forwarding = 0";
    bed.found("forwarding", &[&format!("{parameter} = 0"), hardening])?;
    bed.fixed("forwarding")?;
    a.await_answer_of(&b, ARRIVES)?;
    let kept = bed.read("/etc/sysctl.d/zz-husk-forwarding.conf").context("what is set should stay set")?;
    ensure!(kept.contains("net/ipv4/conf/husk*/forwarding = 1"), "{kept}");
    // Another interface, another time: what is kept of the first stays.
    bed.host().netns().sysctl("net/ipv4/conf/eth0/forwarding", "0")?;
    bed.found("forwarding", &["net/ipv4/conf/eth0/forwarding = 0"])?;
    bed.fixed("forwarding")?;
    let both = bed.read("/etc/sysctl.d/zz-husk-forwarding.conf").context("it was there")?;
    let eth0 = "net/ipv4/conf/eth0/forwarding = 1";
    ensure!(both.contains(eth0) && kept.lines().all(|line| both.contains(line)), "{both}");
    bed.remove("etc/sysctl.d")?;
    Ok(())
}

/// The host sends to the other by way of the gateway, on a second cable, and gets answers on the first.
fn reverse_path(bed: &mut Bed) -> Result<()> {
    let (host, other) = (bed.host(), bed.cluster.host(2).address(Family::Ipv4)?);
    let own = host.address(Family::Ipv4)?;
    let outside = bed.cluster.outside();
    outside.sysctl("net/ipv4/ip_forward", "1")?;
    outside.sysctl("net/ipv4/conf/all/send_redirects", "0")?;
    outside.sysctl("net/ipv4/conf/eth0/send_redirects", "0")?;
    host.netns().ip_batch(&format!(
        "link add eth1 type veth peer name cable netns {}\naddr add 203.0.113.1/24 dev eth1\nlink set eth1 up",
        outside.name()
    ))?;
    outside.ip_batch("addr add 203.0.113.2/24 dev cable\nlink set cable up")?;
    host.ip(["route", "add", &other.to_string(), "via", "203.0.113.2", "src", &own.to_string()])?;
    // It comes back by the first cable, as the kernel's own path does: the gateway forwards what its own filter lets pass.
    for interface in ["all", "cable"] {
        outside.sysctl(&format!("net/ipv4/conf/{interface}/rp_filter"), "0")?;
    }
    for interface in ["all", "eth0"] {
        host.netns().sysctl(&format!("net/ipv4/conf/{interface}/rp_filter"), "0")?;
    }
    let answered = || Ok(Echo::to(other).from(own).limit(LOST).run(host.netns())?.arrived());
    eventually("the other host to answer by the first cable", ARRIVES, answered)?;
    bed.well("reverse-path-filter")?;
    // The larger value counts.
    host.netns().sysctl("net/ipv4/conf/all/rp_filter", "1")?;
    ensure!(!answered()?, "strict filtering should drop the answers");
    bed.found(
        "reverse-path-filter",
        &["eth0", "eth1", &other.to_string(), "net/ipv4/conf/all/rp_filter = 1", "IPReversePathFilter"],
    )?;
    bed.fixed("reverse-path-filter")?;
    ensure!(answered()?, "the answers should arrive again");
    host.netns().sysctl("net/ipv4/conf/all/rp_filter", "0")?;
    host.ip(["link", "delete", "eth1"])?;
    Ok(())
}

fn mac_addresses(bed: &mut Bed) -> Result<()> {
    let (a, b) = (bed.host().add_pod("a")?, bed.cluster.host(2).add_pod("b")?);
    a.await_answer_of(&b, ARRIVES)?;
    fs::create_dir_all(bed.root()?.join("run/udev"))?;
    let by_default =
        "[Match]\nOriginalName=*\n\n[Link]\nNamePolicy=keep kernel database\nMACAddressPolicy=persistent\n";
    bed.write("/usr/lib/systemd/network/99-default.link", by_default)?;
    bed.well("mac-addresses")?;
    let ipam = bed.host().huskctl_json(["ipam", "show"])?;
    let interface = ipam["leases"][0]["hostInterface"].as_str().context("a pod has an interface")?;
    bed.host().ip(["link", "set", "dev", interface, "address", "02:00:00:00:00:99"])?;
    ensure!(!a.reaches(&b, LOST)?, "the pod sends to an address that is not there");
    let policy = "/usr/lib/systemd/network/99-default.link:6: MACAddressPolicy=persistent";
    bed.found("mac-addresses", &[interface, "02:00:00:00:00:99", policy])?;
    let left = bed.fixed("mac-addresses")?;
    ensure!(left[0] == "udevadm control --reload", "{left}");
    a.await_answer_of(&b, ARRIVES)?;
    ensure!(bed.read("/etc/systemd/network/10-husk.link").is_some_and(|it| it.contains("OriginalName=husk*")));
    bed.remove("etc/systemd")?;
    bed.remove("usr")?;
    Ok(())
}

/// The kernel has one limit for all namespaces, which a test may not touch: a file stands for it. The connections are real.
fn conntrack(bed: &mut Bed) -> Result<()> {
    bed.well("conntrack")?;
    let (host, other) = (bed.host(), bed.cluster.host(2).address(Family::Ipv4)?);
    for port in 0..100 {
        // Nobody answers, which is an entry all the same.
        Datagram::to((other, 30_000 + port).into()).limit(Duration::from_millis(1)).run(host.netns())?;
    }
    let limit = host.file("conntrack_max");
    fs::write(&limit, "100\n")?;
    let parameter = "/proc/sys/net/netfilter/nf_conntrack_max";
    cover(bed, Some(&limit), parameter, None)?;
    bed.found("conntrack", &["net/netfilter/nf_conntrack_max = 100", "% full"])?;
    let double = bed.fixed("conntrack");
    let set = fs::read_to_string(&limit)?;
    uncover(bed, parameter)?;
    double?;
    ensure!(set.trim() == "200", "{set}");
    bed.well("conntrack")
}

fn disk(bed: &mut Bed) -> Result<()> {
    let state = "/var/lib/husk";
    bed.well("disk")?;
    cover(bed, None, state, Some("size=32m,nr_inodes=1k"))?;
    bed.well("disk")?;
    let ballast = Path::new(state).join("ballast");
    bed.host().run(|| fs::write(&ballast, vec![0; 30 << 20]))??;
    bed.found("disk", &[state, "full"])?;
    bed.host().run(|| fs::remove_file(&ballast))??;
    bed.well("disk")?;
    bed.host().run(|| (0..1000).try_for_each(|number| fs::write(Path::new(state).join(number.to_string()), "")))??;
    bed.found("disk", &[state, "inodes"])?;
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    bed.host().run(|| mount(None::<&str>, state, None::<&str>, read_only, None::<&str>))??;
    let finding = bed.found("disk", &[state, "read-only"])?;
    ensure!(finding["severity"] == "blocking", "{finding}");
    uncover(bed, state)?;
    bed.well("disk")
}

/// Nobody can want the machine's memory gone: a file stands for what the kernel says of it.
fn memory(bed: &mut Bed) -> Result<()> {
    bed.well("memory")?;
    let file = bed.host().file("meminfo");
    fs::write(&file, "MemTotal:       16000000 kB\nMemFree:          100000 kB\nMemAvailable:      50000 kB\n")?;
    cover(bed, Some(&file), "/proc/meminfo", None)?;
    let found = bed.found("memory", &["48.8 MiB of 15.2 GiB"]);
    uncover(bed, "/proc/meminfo")?;
    ensure!(found?["severity"] == "error");
    bed.well("memory")
}

/// Modes that need no ESP are well on any kernel that the other tiers run on.
#[test]
fn a_kernel_that_has_what_a_mode_needs_is_well() -> Result<()> {
    let cluster = Cluster::builder().hosts(1).mode(Mode::Direct).build()?;
    for mode in ["wireguard", "vxlan", "direct"] {
        cluster.host(1).configure(|config| config["mode"] = mode.into())?;
        let report = cluster.host(1).huskctl_json(["doctor", "--only", "kernel-features"])?;
        ensure!(report["checks"][0]["outcome"] == "well", "{report:#}");
    }
    Ok(())
}
