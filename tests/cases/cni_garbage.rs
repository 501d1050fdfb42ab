//! What lies where it should not, is old, cut off or somebody else's: nothing of it is lost, nothing fails over it that need
//! not, and people are told what it is and what to do.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use husk_tests::host::LEASE_DIRECTORY;
use husk_tests::{Cluster, Family, Host, Mode, Pod, Signal, eventually};
use serde_json::{Value, json};

/// How soon the daemon has followed what lies in its directories; its tick is five seconds.
const SOON: Duration = Duration::from_secs(8);

/// How long an answer may be under way.
const AT_ONCE: Duration = Duration::from_millis(300);

fn one_host() -> Result<Cluster> {
    Cluster::builder().mode(Mode::Vxlan).hosts(1).start()
}

/// The lease files by container id, of those that can be read.
fn leases(host: &Host) -> Result<BTreeMap<String, PathBuf>> {
    let mut found = BTreeMap::new();
    for path in host.leases()? {
        if path.metadata().is_ok_and(|it| it.is_file()) {
            let lease: Value = serde_json::from_slice(&fs::read(&path)?).unwrap_or_default();
            if let Some(id) = lease["containerId"].as_str() {
                found.insert(id.to_owned(), path);
            }
        }
    }
    Ok(found)
}

fn lease_of(host: &Host, pod: &Pod) -> Result<PathBuf> {
    leases(host)?.remove(&pod.spec().container_id).with_context(|| format!("{} has no lease", pod.name()))
}

/// Changes the content of a lease file, as whoever edits it by hand.
fn edit(lease: &Path, change: impl FnOnce(&mut Value)) -> Result<()> {
    let mut content: Value = serde_json::from_slice(&fs::read(lease)?)?;
    change(&mut content);
    Ok(fs::write(lease, content.to_string())?)
}

/// What `huskctl ipam check` prints and how it ends.
fn ipam_check(host: &Host) -> Result<(String, bool)> {
    let output = host.huskctl(["ipam", "check"])?;
    Ok((output.stdout + &output.stderr, output.status.code() == Some(0)))
}

/// Waits until `huskctl ipam check` names everything in `parts`; returns what it prints.
fn await_findings(host: &Host, parts: &[&str]) -> Result<String> {
    let mut said = String::new();
    eventually(&format!("`huskctl ipam check` to name {parts:?}"), SOON, || {
        let (text, clean) = ipam_check(host)?;
        said = text;
        Ok(!clean && parts.iter().all(|part| said.contains(part)))
    })
    .with_context(|| said.clone())?;
    Ok(said)
}

fn await_no_findings(host: &Host) -> Result<()> {
    let mut said = String::new();
    eventually("`huskctl ipam check` to find nothing", SOON, || {
        let (text, clean) = ipam_check(host)?;
        said = text;
        Ok(clean)
    })
    .context(said)
}

fn assert_no_panic(host: &Host) {
    let log = host.daemon_log();
    assert!(!log.contains("panicked"), "{log}");
}

/// What somebody put into the lease directory, by its name; and whether an address is in the name.
struct Litter {
    names: Vec<&'static str>,
    taken: Vec<IpAddr>,
}

/// Fills the lease directory with all that is no lease of a pod. Names that look like leases have addresses of the node's own
/// blocks, the next that pods would get.
fn litter(host: &Host, directory: &Path, next: &[IpAddr]) -> Result<Litter> {
    let lease = |key: u8, address: &IpAddr| format!("{key:016x}_{address}_-.json");
    let mut names: Vec<String> = Vec::new();
    fs::write(directory.join("README"), "do not remove")?;
    fs::create_dir(directory.join("backup"))?;
    fs::write(directory.join("backup/lease.json"), "{}")?;
    symlink("/nonexistent", directory.join("dangling"))?;
    names.extend(["README", "backup", "dangling"].map(str::to_owned));

    for (key, address) in (0_u8..).zip(next) {
        let name = lease(key, address);
        let path = directory.join(&name);
        match key {
            0 => fs::write(&path, r#"{"version": 0, "container": "old", "ip": "10.42.0.1"}"#)?,
            1 => fs::write(&path, r#"{"version": 99, "attachment": {"id": "new"}}"#)?,
            2 => fs::write(&path, r#"{"version": 1, "created": 17, "network": "hu"#)?,
            3 => fs::create_dir(&path)?,
            4 => symlink("/nonexistent", &path)?,
            5 => symlink(&name, &path)?,
            6 => host.program("mkfifo").args([Path::new(LEASE_DIRECTORY).join(&name)]).check().map(drop)?,
            _ => fs::write(&path, vec![b'['; 1 << 20])?,
        }
        names.push(name);
    }
    // A writer died before its rename.
    fs::write(directory.join("new"), r#"{"version": 1, "created""#)?;
    fs::write(directory.join("cursors"), "[[[")?;
    let names = names.into_iter().map(|name| &*name.leak()).collect();
    Ok(Litter { names, taken: next.to_vec() })
}

#[test]
fn litter_in_the_lease_directory() -> Result<()> {
    let cluster = one_host()?;
    let host = cluster.host(1);
    let directory = host.lease_directory();
    let (mut a, b) = (host.add_pod("a")?, host.add_pod("b")?);
    let IpAddr::V4(last) = b.address(Family::Ipv4)? else { unreachable!("an IPv4 address") };
    let next: Vec<IpAddr> =
        (1..=8).map(|offset| (u32::from(last) + offset).into()).map(|it: std::net::Ipv4Addr| it.into()).collect();
    let litter = litter(host, &directory, &next)?;
    let untouched =
        || litter.names.iter().filter(|name| directory.join(name).symlink_metadata().is_err()).collect::<Vec<_>>();

    // The daemon tells of every piece, goes on, and starts with it.
    for round in 0..2 {
        let said = await_findings(host, &litter.names).with_context(|| format!("round {round}"))?;
        for part in ["version is 0", "version is 99", "not made by Husk", "remove"] {
            assert!(said.contains(part), "{part:?} in {said}");
        }
        let status = host.huskctl_json(["status"])?;
        assert_eq!(status["ready"], true, "{status}");
        assert!(a.reaches(&b, AT_ONCE)?);
        if round == 0 {
            host.restart_daemon(Signal::SIGKILL)?;
        }
    }

    // ADD avoids the addresses, takes away what a dead writer left, and nothing else.
    let c = host.add_pod("c")?;
    assert!(!c.addresses().iter().any(|address| litter.taken.contains(address)), "{:?}", c.addresses());
    assert!(a.reaches(&c, AT_ONCE)?);
    assert!(!directory.join("new").exists());
    let mut wanting = host.sandbox("wanting")?;
    wanting.spec_mut().runtime_config = Some(json!({"ips": [next[0].to_string()]}));
    let refused = wanting.add()?;
    assert_eq!(refused.error_code(), Some(7), "{}", refused.stdout);
    assert!(refused.stdout.contains(litter.names[3]), "{}", refused.stdout);
    // CHECK and DEL do not care.
    for pod in [&a, &b, &c] {
        pod.check()?.succeeded()?;
    }
    c.del()?.succeeded()?;
    // GC collects what it can, and reports what it could not judge.
    let stale = host.add_pod("stale")?;
    let collected = host.cni_gc(&[a.spec(), b.spec()])?;
    assert_eq!(collected.error_code(), Some(104), "{}", collected.stdout);
    for name in &litter.names {
        assert!(collected.stdout.contains(name), "{name} in {}", collected.stdout);
    }
    assert_eq!(stale.netns().ip_json(["link", "show"])?.as_array().map(Vec::len), Some(1));
    assert_eq!(leases(host)?.len(), 2);
    assert_eq!(untouched(), Vec::<&&str>::new(), "nothing of it is ours to remove");
    assert_eq!(fs::read_to_string(directory.join("backup/lease.json"))?, "{}");

    // The remedy helps.
    for name in &litter.names {
        let path = directory.join(name);
        if path.is_dir() { fs::remove_dir_all(path)? } else { fs::remove_file(path)? }
    }
    await_no_findings(host)?;
    host.cni_gc(&[a.spec(), b.spec()])?.succeeded()?;
    a.del()?.succeeded()?;
    a.add()?.succeeded()?;
    assert!(a.reaches(&b, AT_ONCE)?);
    assert_no_panic(host);
    Ok(())
}

/// A lease as the first release wrote it, for a pod that was connected then.
#[test]
fn a_lease_of_an_older_release() -> Result<()> {
    let cluster = one_host()?;
    let host = cluster.host(1);
    let (old, other) = (host.add_pod("old")?, host.add_pod("other")?);
    let path = lease_of(host, &old)?;
    edit(&path, |lease| {
        let known =
            ["version", "created", "network", "containerId", "ifname", "addresses", "podMac", "hostInterface", "netns"];
        lease.as_object_mut().expect("a lease is an object").retain(|key, _| known.contains(&key.as_str()));
    })?;
    host.restart_daemon(Signal::SIGKILL)?;
    assert!(other.reaches(&old, AT_ONCE)? && old.reaches(&other, AT_ONCE)?);
    await_no_findings(host)?;
    old.check()?.succeeded()?;
    host.cni_gc(&[old.spec(), other.spec()])?.succeeded()?;
    assert_eq!(leases(host)?.len(), 2);
    old.del()?.succeeded()?;

    // Of a release to come, nothing but the name is understood: the address stays taken until its DEL.
    let path = lease_of(host, &other)?;
    edit(&path, |lease| lease["version"] = json!(2))?;
    await_findings(host, &[&path.file_name().unwrap_or_default().to_string_lossy(), "version is 2"])?;
    host.cni_gc(&[other.spec()])?.succeeded()?;
    let replacement = host.add_pod("replacement")?;
    assert!(replacement.addresses().iter().all(|address| !other.addresses().contains(address)));
    other.del()?.succeeded()?;
    assert!(!path.exists());
    await_no_findings(host)?;
    assert_no_panic(host);
    Ok(())
}

#[test]
fn leases_that_contradict_each_other_or_the_node() -> Result<()> {
    let cluster = one_host()?;
    let host = cluster.host(1);
    let (first, second, third) = (host.add_pod("first")?, host.add_pod("second")?, host.add_pod("third")?);

    // By hand, the second pod's lease is given the first pod's address: name and content agree with one another.
    let (theirs, ours) = (lease_of(host, &first)?, lease_of(host, &second)?);
    let address = first.address(Family::Ipv4)?;
    let own = second.address(Family::Ipv4)?.to_string();
    let twin = ours.with_file_name(
        ours.file_name().unwrap_or_default().to_string_lossy().replace(&format!("_{own}_"), &format!("_{address}_")),
    );
    let kept = fs::read(&ours)?;
    fs::rename(&ours, &twin)?;
    edit(&twin, |lease| lease["addresses"]["ipv4"] = json!(address.to_string()))?;
    let said = await_findings(host, &["also leased by", &address.to_string()])?;
    assert!(said.contains(&twin.file_name().unwrap_or_default().to_string_lossy().into_owned()), "{said}");
    // The older one keeps it, across a restart too, and nobody else gets it.
    host.restart_daemon(Signal::SIGKILL)?;
    assert!(third.reaches(&first, AT_ONCE)?, "the older lease keeps its address");
    assert!(theirs.exists() && twin.exists());
    let checked = second.check()?;
    assert_eq!(checked.error_code(), Some(103), "{}", checked.stdout);
    let fourth = host.add_pod("fourth")?;
    assert!(fourth.address(Family::Ipv4)? != address);
    let collected = host.cni_gc(&[first.spec(), second.spec(), third.spec(), fourth.spec()])?;
    collected.succeeded()?;
    // DEL of the one does not touch the other.
    fs::rename(&twin, &ours)?;
    fs::write(&ours, kept)?;
    await_no_findings(host)?;

    // A lease of an address outside all blocks, as after the blocks were taken from the node.
    let path = lease_of(host, &third)?;
    let own = third.address(Family::Ipv4)?.to_string();
    let stray = path.with_file_name(
        path.file_name().unwrap_or_default().to_string_lossy().replace(&format!("_{own}_"), "_192.0.2.77_"),
    );
    fs::rename(&path, &stray)?;
    edit(&stray, |lease| lease["addresses"]["ipv4"] = json!("192.0.2.77"))?;
    await_findings(host, &["192.0.2.77", "in no block of this node", "delete the pod"])?;
    host.restart_daemon(Signal::SIGKILL)?;
    assert!(first.reaches(&second, AT_ONCE)?);
    host.cni_gc(&[first.spec(), second.spec(), third.spec(), fourth.spec()])?.succeeded()?;
    assert!(stray.exists());
    third.del()?.succeeded()?;
    assert!(!stray.exists());
    await_no_findings(host)?;
    assert_no_panic(host);
    Ok(())
}

#[test]
fn the_path_of_a_namespace_is_used_again() -> Result<()> {
    let cluster = one_host()?;
    let host = cluster.host(1);
    let other = host.add_pod("other")?;

    // The runtime died with the pod; a new sandbox has the same path, but is another namespace.
    let lost = host.add_pod("lost")?;
    let (spec, addresses) = (lost.spec().clone(), lost.addresses());
    drop(lost);
    let mut heir = host.sandbox("lost")?;
    assert_eq!(heir.netns().path(), spec.netns.clone().context("a path")?);
    let checked = host.cni("CHECK", &spec)?;
    assert!(matches!(checked.error_code(), Some(103)), "{}", checked.stdout);
    // The daemon sees that the namespace is another one, and releases the lease.
    eventually("the lease of a pod that is gone to be released", SOON, || Ok(leases(host)?.len() == 1))?;
    heir.spec_mut().container_id = "heir".to_owned();
    heir.add()?.succeeded()?;
    assert!(heir.addresses().iter().all(|address| !addresses.contains(address)), "they rest");
    assert!(other.reaches(&heir, AT_ONCE)?);
    // A late DEL of the old pod does not touch the new one.
    host.cni("DEL", &spec)?.succeeded()?;
    heir.check()?.succeeded()?;
    assert!(other.reaches(&heir, AT_ONCE)?);

    // Path and inode are those of a namespace that lives: nothing proves the pod gone, the lease stays until DEL or GC.
    let reused = host.sandbox("reused")?;
    let inode = fs::metadata(reused.netns().path())?;
    let gone = host.add_pod("gone")?;
    let path = lease_of(host, &gone)?;
    let gone_spec = gone.spec().clone();
    host.ip(["link", "del", &interface_of(&path)?])?;
    edit(&path, |lease| {
        use std::os::unix::fs::MetadataExt as _;
        lease["netns"] = json!({"path": reused.netns().path(), "device": inode.dev(), "inode": inode.ino()});
    })?;
    let said = await_findings(host, &["its host interface", "does not"])?;
    assert!(said.contains("gone"), "{said}");
    host.restart_daemon(Signal::SIGTERM)?;
    await_findings(host, &["its host interface"])?;
    assert!(path.exists(), "nothing proves that the pod is gone");
    // A new pod in that namespace has nothing to do with it.
    let mut reused = reused;
    reused.add()?.succeeded()?;
    host.cni_gc(&[other.spec(), heir.spec(), reused.spec()])?.succeeded()?;
    assert!(!path.exists());
    reused.check()?.succeeded()?;
    host.cni("DEL", &gone_spec)?.succeeded()?;
    await_no_findings(host)?;
    assert_no_panic(host);
    Ok(())
}

fn interface_of(lease: &Path) -> Result<String> {
    let lease: Value = serde_json::from_slice(&fs::read(lease)?)?;
    Ok(lease["hostInterface"].as_str().context("a lease names its host interface")?.to_owned())
}

#[test]
fn a_damaged_node_file() -> Result<()> {
    let cluster = one_host()?;
    let host = cluster.host(1);
    let (pod, mut late) = (host.add_pod("pod")?, host.sandbox("late")?);
    let path = host.file("/run/husk/node.json");
    let whole = fs::read(&path)?;
    let daemon = host.processes().into_iter().find(|it| it.command.contains("huskd")).context("huskd does not run")?;
    for (content, said) in [
        (&whole[..whole.len() / 2], "not understood"),
        (b"", "not understood"),
        (b"\xff\xfe{}", "not understood"),
        (br#"{"version": 2}"#, "husk-cni install"),
    ] {
        // While it sleeps the daemon cannot put it right; it cannot be asked either.
        host.stop_daemon(Signal::SIGKILL)?;
        fs::write(&path, content)?;
        let added = late.add()?;
        assert_eq!(added.error_code(), Some(11), "{}", added.stdout);
        assert!(added.stdout.contains(said) && added.stdout.contains("huskd"), "{said:?} in {}", added.stdout);
        assert_eq!(host.cni_status()?.error_code(), Some(50));
        pod.check()?.succeeded()?;
        late.del()?.succeeded()?;
        assert_eq!(leases(host)?.len(), 1);
        host.start_daemon()?;
        host.wait_ready()?;
        assert_eq!(fs::read(&path)?, whole);
    }
    drop(daemon);
    // Damaged under a daemon that runs, it is put right without a restart.
    fs::write(&path, b"{")?;
    eventually("node.json to be whole again", SOON, || Ok(fs::read(&path)? == whole))?;
    late.add()?.succeeded()?;
    assert!(late.reaches(&pod, AT_ONCE)?);
    assert_no_panic(host);
    Ok(())
}
