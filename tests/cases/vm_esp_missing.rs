//! ESP is taken away from a kernel that has it, and given back: without it the daemon says so, no pod is made and nothing leaves
//! in plaintext instead; with it all is well without anybody's help.
//!
//! Modules belong to the whole machine: this is the only case of its program, so that no other runs meanwhile.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_tests::kernel::{self, Part};
use husk_tests::process::Program;
use husk_tests::{Cluster, ESP_MODES, Host, Leak, eventually};
use nix::mount::{MsFlags, mount};
use serde_json::json;

#[path = "esp_missing/refusal.rs"]
mod refusal;

/// The daemon asks the kernel again every 15 seconds, and all the rest comes on top.
const ASKED_AGAIN: Duration = Duration::from_secs(25);

/// How long the kernel may need to let go of a module: namespaces that are gone are cleaned up later.
const UNUSED: Duration = Duration::from_secs(10);

/// What has to be gone for ESP to be missing.
const MODULES: [&str; 3] = ["xfrm_interface", "esp4", "esp6"];

/// The program that the kernel runs when it misses a module.
const LOADER: &str = "/proc/sys/kernel/modprobe";

/// The machine while it has no ESP. Dropping it gives it back.
struct Without {
    loader: String,
}

impl Without {
    fn esp() -> Result<Self> {
        let loader = fs::read_to_string(LOADER).with_context(|| format!("reading {LOADER}"))?.trim().to_owned();
        let machine = Self { loader };
        fs::write(LOADER, "/bin/false").with_context(|| format!("writing {LOADER}"))?;
        let mut said = String::new();
        eventually("the modules to go", UNUSED, || {
            let removed = machine.modprobe("-r").run()?;
            said.clone_from(&removed.stderr);
            Ok(removed.status.success())
        })
        .with_context(|| format!("`{} -r` of {MODULES:?} says: {said}", machine.loader))?;
        ensure!(!kernel::has(Part::Esp)?, "the kernel has ESP without {MODULES:?}: is it built in?");
        Ok(machine)
    }

    fn modprobe(&self, what: &str) -> Program<'_> {
        Program::new(&self.loader).args([what]).args(MODULES)
    }
}

impl Drop for Without {
    fn drop(&mut self) {
        if let Err(error) = fs::write(LOADER, &self.loader) {
            eprintln!("{LOADER} stays without the program that loads modules: {error}");
        }
        if let Err(error) = self.modprobe("-a").check() {
            eprintln!("the modules {MODULES:?} are not loaded again: {error:#}");
        }
    }
}

/// What a machine loads by itself, and what it must not. The host gets directories of its own.
const PRIVATE: [&str; 2] = ["/etc/modprobe.d", "/etc/modules-load.d"];

/// Somebody has forbidden a module: the doctor names the line, and leaves it. When it is allowed again, `--fix` loads what is missing, and
/// sees to it that it is loaded at every boot.
fn doctored(host: &Host) -> Result<()> {
    for directory in PRIVATE {
        let mounted = host.run(|| mount(Some("tmpfs"), directory, Some("tmpfs"), MsFlags::empty(), None::<&str>))?;
        mounted.with_context(|| format!("mounting over {directory}"))?;
    }
    let (line, file) = ("install esp4 /bin/false", "/etc/modprobe.d/hardening.conf");
    host.run(|| fs::write(file, format!("{line}\n")))??;
    let fixed = || host.huskctl_json(["doctor", "--only", "kernel-features", "--fix", "--yes"]);
    let report = fixed()?;
    let named = report["checks"][0]["findings"][0]["evidence"].to_string();
    ensure!(named.contains(&format!("{file}:1: {line}")), "{report:#}");
    ensure!(report["repairs"][0]["result"] == "byHand" && !kernel::has(Part::Esp)?, "{report:#}");
    host.run(|| fs::remove_file(file))??;
    let report = fixed()?;
    ensure!(report["repairs"][0]["result"] == "gone" && report["checks"][0]["outcome"] == "well", "{report:#}");
    let kept = host.run(|| fs::read_to_string("/etc/modules-load.d/husk.conf"))??;
    ensure!(kept.lines().any(|name| name == "esp4"), "{kept}");
    Ok(())
}

#[test]
fn esp_that_goes_is_told_of_and_esp_that_comes_is_used() -> Result<()> {
    kernel::require(&[Part::Esp])?;
    for mode in ESP_MODES {
        let cluster = Cluster::builder().mode(mode).build()?;
        let leak = Leak::watch(&cluster)?;
        let machine = Without::esp()?;
        cluster.hosts().iter().try_for_each(Host::start)?;
        refusal::tell(&cluster)?;
        doctored(cluster.host(1)).context(mode)?;
        drop(machine);
        for host in cluster.hosts() {
            eventually("a daemon to find that there is ESP now", ASKED_AGAIN, || {
                Ok(host.huskctl_json(["status"])?["issues"] == json!([]))
            })?;
        }
        cluster.wait_ready()?;
        cluster.wait_meshed()?;
        let pods = cluster.add_pods("p")?;
        pods[0].await_answer_of(&pods[1], UNUSED)?;
        leak.finish(&cluster)?.with_tunnelled(4).context(mode)?;
    }
    Ok(())
}
