//! Breakages by other services of the host: systemd, NetworkManager, and other networks for pods.

use std::fs;

use anyhow::{Context, Result, ensure};
use husk_tests::Signal;

use super::{Bed, Breakage};

pub(crate) const BREAKAGES: &[Breakage] = &[
    Breakage { check: "systemd-networkd", finds: &["ManageForeignRoutes=yes", "10-all.network"], run: networkd },
    Breakage { check: "network-manager", finds: &["unmanaged-devices"], run: network_manager },
    Breakage { check: "other-cni", finds: &["Flannel", "Calico", "bridge plugin"], run: other_cni },
    Breakage { check: "cni-config-order", finds: &["type bridge", "05-husk.conflist"], run: config_order },
];

fn networkd(bed: &mut Bed) -> Result<()> {
    let check = "systemd-networkd";
    ensure!(bed.look(check)?["outcome"] == "doesNotApply");
    bed.write("/run/systemd/netif/state", "OPER_STATE=routable\n")?;
    bed.write("/etc/systemd/networkd.conf", "[Network]\nManageForeignRoutes=no\n")?;
    bed.write("/etc/systemd/network/10-lan.network", "[Match]\nName=en*\n\n[Network]\nDHCP=yes\n")?;
    bed.well(check)?;

    bed.write("/etc/systemd/networkd.conf", "[Network]\nManageForeignRoutes=yes\n")?;
    bed.found(check, &["/etc/systemd/networkd.conf:2: ManageForeignRoutes=yes"])?;
    let left = bed.pending(check)?;
    ensure!(left[0] == "systemctl restart systemd-networkd", "{left}");
    let file = "/etc/systemd/networkd.conf.d/zz-husk.conf";
    ensure!(bed.read(file).is_some_and(|text| text.contains("ManageForeignRoutes=no")));

    bed.write("/etc/systemd/network/10-all.network", "[Match]\nName=*\n\n[Network]\nDHCP=yes\n")?;
    bed.found(check, &["/etc/systemd/network/10-all.network", "husk-vx", "husk00000000000"])?;
    let left = bed.pending(check)?;
    ensure!(left[0] == "networkctl reload", "{left}");
    ensure!(bed.read("/etc/systemd/network/00-husk.network").is_some_and(|text| text.contains("Unmanaged=yes")));
    bed.remove("run/systemd")?;
    Ok(())
}

fn network_manager(bed: &mut Bed) -> Result<()> {
    let check = "network-manager";
    ensure!(bed.look(check)?["outcome"] == "doesNotApply");
    fs::create_dir_all(bed.root()?.join("run/NetworkManager"))?;
    let main = "/etc/NetworkManager/NetworkManager.conf";
    bed.write(
        main,
        "[main]\nplugins=keyfile\n\n[keyfile]\nunmanaged-devices=interface-name:cali*;interface-name:husk*\n",
    )?;
    bed.well(check)?;
    bed.write(main, "[main]\nplugins=keyfile\n\n[keyfile]\nunmanaged-devices=interface-name:cali*\n")?;
    bed.found(check, &["NetworkManager.conf:5: unmanaged-devices=interface-name:cali*"])?;
    let left = bed.pending(check)?;
    ensure!(left[0] == "nmcli general reload conf", "{left}");
    bed.remove("run/NetworkManager")?;
    Ok(())
}

fn other_cni(bed: &mut Bed) -> Result<()> {
    let check = "other-cni";
    bed.well(check)?;
    bed.write("/run/flannel/subnet.env", "FLANNEL_NETWORK=10.244.0.0/16\n")?;
    let finding = bed.found(check, &["Flannel", "/run/flannel/subnet.env"])?;
    ensure!(finding["fix"]["commands"][0] == "rm /run/flannel/subnet.env", "{finding:#}");
    bed.remove("run/flannel")?;
    bed.host().ip(["link", "add", "cni0", "type", "bridge"])?;
    bed.host().netns().command("nft", ["add table ip filter; add chain ip filter cali-FORWARD"])?;
    let both = bed.look(check)?;
    let causes: Vec<&str> =
        both["findings"].as_array().into_iter().flatten().filter_map(|finding| finding["cause"].as_str()).collect();
    ensure!(causes.len() == 2 && causes[1].starts_with("Calico"), "{both:#}");
    bed.host().netns().command("nft", ["delete table ip filter"])?;
    let finding = bed.found(check, &["bridge plugin", "interfaces: cni0"])?;
    // It might be in use.
    let report = bed.report(check, &["--fix", "--yes"])?;
    ensure!(report["repairs"][0]["result"] == "byHand", "{report:#}");
    bed.obey(&finding)?;
    bed.well(check)
}

/// The files are the host's own, in its private directory.
fn config_order(bed: &mut Bed) -> Result<()> {
    let look = || -> Result<serde_json::Value> {
        let report = bed.host().huskctl_json(["doctor", "--only", "cni-config-order"])?;
        let outcome = report["checks"][0].clone();
        bed.note("cni-config-order", &outcome);
        Ok(outcome)
    };
    let well = look()?;
    ensure!(well["outcome"] == "well" && well["seen"].to_string().contains("05-husk.conflist"), "{well:#}");
    let directory = bed.host().file("/etc/cni/net.d");
    fs::write(directory.join("00-multus.conf"), r#"{"name": "multus", "type": "multus"}"#)?;
    fs::write(directory.join("10-flannel.conflist"), r#"{"name": "cbr0", "plugins": [{"type": "flannel"}]}"#)?;
    ensure!(look()?["outcome"] == "well", "what comes later, or calls Husk itself, does no harm: {:#}", look()?);
    fs::write(directory.join("01-bridge.conf"), r#"{"name": "net", "type": "bridge"}"#)?;
    let found = look()?;
    let finding = &found["findings"][0];
    let told = finding.to_string();
    ensure!(told.contains("01-bridge.conf") && told.contains("type bridge"), "{found:#}");
    bed.obey(finding)?;
    ensure!(look()?["outcome"] == "well", "{:#}", look()?);
    ensure!(directory.join("01-bridge.conf.disabled").exists());
    // And one that is not there at all: somebody moved the directory, and the daemon that runs has not heard of it.
    let moved = |to: &str| bed.host().configure(|config| config["cni"]["configDirectory"] = to.into());
    moved("/etc/cni/moved")?;
    let missing = look()?;
    let cause = missing["findings"][0]["cause"].as_str().context("a cause")?;
    ensure!(cause.starts_with("05-husk.conflist is missing"), "{missing:#}");
    let told = missing["findings"][0].to_string();
    ensure!(told.contains("/etc/cni/moved: no files") && told.contains("systemctl restart huskd"), "{missing:#}");
    restarted(bed)?;
    ensure!(look()?["outcome"] == "well", "{:#}", look()?);
    moved("/etc/cni/net.d")?;
    restarted(bed)?;
    for name in ["00-multus.conf", "10-flannel.conflist"] {
        fs::remove_file(directory.join(name))?;
    }
    ensure!(look()?["outcome"] == "well");
    Ok(())
}

/// The daemon starts anew, with what its configuration says now.
fn restarted(bed: &Bed) -> Result<()> {
    bed.host().restart_daemon(Signal::SIGTERM)?;
    bed.host().wait_ready()?;
    bed.cluster.wait_meshed()
}
