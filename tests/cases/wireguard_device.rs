//! The two kinds of WireGuard device: they talk to each other, and a host changes from one to the other by its configuration,
//! in secret all the while.
//!
//! A kernel without WireGuard can prove only that the daemon says so. The case then says so too, on standard error; with
//! `HUSK_TEST_KERNEL_WIREGUARD=required` in the environment it fails instead. `hack/vm` runs it on a kernel that has it.

use std::io::Write as _;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::probe::{Echo, EchoServer, payload, tcp};
use husk_tests::{Cluster, Family, Host, Pod, Signal, eventually};
use serde_json::json;

/// How long what a daemon does by itself may take, on an emulated machine too.
const PATIENCE: Duration = Duration::from_secs(30);

/// Writes the kind of device into the host's configuration.
fn choose(host: &Host, device: &str) -> Result<()> {
    host.configure(|config| config["wireguard"]["device"] = json!(device))
}

/// The device is of this kind, by the daemon's word, the kernel's and that of the process table, and nothing is amiss.
fn uses(host: &Host, device: &str) -> Result<()> {
    let mut seen = String::new();
    let settled = eventually("the device to be as configured", PATIENCE, || {
        // The daemon may not answer yet.
        let Ok(status) = host.huskctl_json(["status"]) else { return Ok(false) };
        let link = host.ip(["-d", "link", "show", "dev", "husk-wg0"]).unwrap_or_default();
        let process = host.wireguard_process().is_some();
        seen = format!("{status}\n{link}\nprocess: {process}");
        let kernel = link.contains("wireguard");
        let consistent = if device == "kernel" { kernel && !process } else { link.contains("tun") && process };
        Ok(consistent && status["wireguardDevice"] == device && status["issues"] == json!([]))
    });
    settled.with_context(|| format!("{} with {device}: {seen}", host.name()))
}

fn connected(one: &Pod, other: &Pod) -> Result<()> {
    for (from, to) in [(one, other), (other, one)] {
        let server = EchoServer::start(to.netns())?;
        for family in Family::ALL {
            let address = to.address(family)?;
            let echo = Echo::to(address).packet_size(from.mtu()?);
            eventually("a full packet to arrive", PATIENCE, || Ok(echo.run(from.netns())?.arrived()))?;
            tcp::transfer(from.netns(), server.at(address), 30_000)?;
        }
    }
    Ok(())
}

/// The kernel's own word; the harness asks it without Husk.
fn kernel_has_wireguard(host: &Host) -> Result<bool> {
    let made = host.program("ip").args(["link", "add", "probe0", "type", "wireguard"]).run()?.status.success();
    if made {
        host.ip(["link", "del", "probe0"])?;
    }
    Ok(made)
}

#[test]
fn both_kinds_of_device_meet_and_change_places() -> Result<()> {
    let cluster = Cluster::builder().build()?;
    let (changing, other) = (cluster.host(1), cluster.host(2));
    for host in cluster.hosts() {
        choose(host, "userspace")?;
        host.start()?;
        host.wait_ready()?;
        uses(host, "userspace")?;
    }
    let (a, b) = (changing.add_pod("a")?, other.add_pod("b")?);
    let wire = cluster.capture()?;
    connected(&a, &b)?;

    let to = |device: &str, signal: Signal| -> Result<()> {
        choose(changing, device)?;
        changing.stop_daemon(signal)?;
        changing.start_daemon()
    };
    if kernel_has_wireguard(changing)? {
        for (device, signal) in [("kernel", Signal::SIGTERM), ("userspace", Signal::SIGKILL), ("auto", Signal::SIGKILL)]
        {
            to(device, signal)?;
            uses(changing, if device == "auto" { "kernel" } else { device })?;
            changing.wait_ready()?;
            connected(&a, &b).with_context(|| format!("{device} with userspace"))?;
        }
        choose(other, "kernel")?;
        other.restart_daemon(Signal::SIGTERM)?;
        uses(other, "kernel")?;
        connected(&a, &b).context("kernel with kernel")?;
    } else {
        ensure!(
            std::env::var_os("HUSK_TEST_KERNEL_WIREGUARD").is_none(),
            "HUSK_TEST_KERNEL_WIREGUARD is set, and the kernel has no WireGuard"
        );
        writeln!(std::io::stderr(), "the kernel has no WireGuard: NOT TESTED, only that the daemon says so")?;
        to("kernel", Signal::SIGTERM)?;
        eventually("the daemon to say what is missing", PATIENCE, || {
            Ok(changing.huskctl(["status"])?.stdout.contains("the kernel has no WireGuard"))
        })?;
        assert_eq!(changing.cni_status()?.error_code(), Some(51));
        to("auto", Signal::SIGTERM)?;
        changing.wait_ready()?;
        uses(changing, "userspace")?;
        connected(&a, &b)?;
    }

    let trace = wire.stop()?;
    assert_eq!((trace.containing(payload::MARKER), trace.readable(cluster.cluster_cidrs())), (0, 0));
    Ok(())
}
