//! What makes a whole node of a host: a process namespace, so that a DaemonSet with `hostPID` sees the node's processes and all
//! of them end with it, and the directories that a kubelet and a container runtime take for the machine's own.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::service::Namespaces;
use crate::control_groups;
use crate::eventually;
use crate::host::Host;
use crate::patience;
use crate::process::Program;
use crate::scope::Scope;

/// How long one job on a node may take; images are unpacked in some of them.
const TIME_LIMIT: Duration = Duration::from_secs(60);

/// Directories that are the node's own as a whole.
const OWN: [&str; 3] = ["/run", "/var/lib", "/var/log"];

/// Directories below those that the host has of its own already.
const OF_HOST: [&str; 3] = ["/run/husk", "/run/wireguard", "/var/lib/husk"];

/// In the host's mount namespace: namespaces of pods, mounted from now on, are seen by the host too.
const SHARE: &str = r#"
set -e
mkdir -p "$1/run/netns"
mount --bind "$1/run/netns" /run/netns
mount --make-shared /run/netns
exec unshare --pid --fork --mount --propagation unchanged --mount-proc --kill-child sh -c "$2" sh "$1" "$3"
"#;

/// Prepares the mounts and control groups of the node, says so and stays. `$1` is the node's directory, `$2` the name of its
/// control group.
///
/// - `/sys` is that of the node's network namespace with the machine's control groups below.
/// - In hierarchies of version 1 a new cpuset has neither processors nor memory (cpusets.rst); in version 2 a group has the
///   controllers that the one above hands down.
/// - Everything is shared at the end: what a pod mounts with `mountPropagation` depends on that, as on a machine with systemd.
/// - Nobody waits for what the container runtime leaves behind, except the kernel where SIGCHLD is ignored.
const PREPARE: &str = r#"
set -e
umount -l /sys
grep -qs ' /sys/fs/cgroup' /proc/self/mounts || mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir -p "$1/control-groups"
mount --rbind /sys/fs/cgroup "$1/control-groups"
mount -t sysfs sysfs /sys
mount --rbind "$1/control-groups" /sys/fs/cgroup
umount -l "$1/control-groups"
if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
	for controller in $(cat /sys/fs/cgroup/cgroup.controllers); do
		echo "+$controller" >/sys/fs/cgroup/cgroup.subtree_control || true
	done
	mkdir -p "/sys/fs/cgroup/$2"
else
	for hierarchy in /sys/fs/cgroup/*/; do
		[ ! -e "$hierarchy/tasks" ] || mkdir -p "$hierarchy/$2"
	done
	for file in cpuset.cpus cpuset.mems; do
		[ ! -d /sys/fs/cgroup/cpuset ] || cat "/sys/fs/cgroup/cpuset/$file" >"/sys/fs/cgroup/cpuset/$2/$file"
	done
fi
mkdir -p "$1/run/husk" "$1/run/wireguard" "$1/var/lib/husk" "$1/var/lib/kubelet" "$1/var/lib/cni" "$1/var/lib/containerd" "$1/var/log"
for shared in /run/husk /run/wireguard /run/netns /var/lib/husk; do mount --rbind "$shared" "$1$shared"; done
for own in /run /var/lib /var/log; do mount --rbind "$1$own" "$own"; done
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount --make-rshared /
touch "$1/ready"
trap '' CHLD
exec sleep infinity
"#;

/// A node without anything of Kubernetes. Everything on it ends when it is dropped.
#[derive(Debug)]
pub(super) struct Machine {
    control_group: String,
    net: File,
    mounts: File,
    pids: File,
    /// Process 1 of the node, as seen from here.
    init: u32,
    holder: Child,
}

impl Machine {
    /// Makes a node of a host.
    pub(super) fn on(host: &Host, scope: &Scope) -> Result<Self> {
        let directory = directory(scope, host.name());
        let control_group = scope.name(host.name());
        let ready = directory.join("ready");
        fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
        // A machine of this name may have been here before.
        let _ = fs::remove_file(&ready);
        let path = directory.join("machine.log");
        let log = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
        let arguments = [Path::new("-c"), Path::new(SHARE), Path::new("sh"), &directory, Path::new(PREPARE)];
        let program = host.program("/bin/sh").args(arguments).args([&control_group]);
        let mut holder = Holder(Some(program.spawn(&log)?));
        eventually("a node's mounts to be ready", Duration::from_secs(10), || {
            let said =
                || format!("preparing {} failed: {}", host.name(), fs::read_to_string(&path).unwrap_or_default());
            ensure!(holder.runs()?, said());
            Ok(ready.exists())
        })?;
        let init = holder.only_child()?;
        let namespace = |kind: &str| {
            let path = format!("/proc/{init}/ns/{kind}");
            File::open(&path).with_context(|| format!("opening {path}"))
        };
        let net = host.netns().file().try_clone().context("duplicating a namespace's file")?;
        let (mounts, pids) = (namespace("mnt")?, namespace("pid")?);
        let holder = holder.0.take().context("the node's process is gone")?;
        Ok(Self { control_group, net, mounts, pids, init, holder })
    }

    /// Where programs of the node run.
    pub(super) fn namespaces(&self) -> Namespaces<'_> {
        Namespaces { net: &self.net, mounts: Some(&self.mounts), pids: Some(&self.pids) }
    }

    /// A program to be run on the node to its end.
    pub(super) fn program(&self, program: &str) -> Program<'static> {
        let init = self.init.to_string();
        Program::new("nsenter")
            .args(["--target", &init, "--mount", "--net", "--pid", "--", program])
            .limit(patience(TIME_LIMIT))
    }

    /// Its control group, as a path from the root of each hierarchy.
    pub(super) fn control_group(&self) -> String {
        format!("/{}", self.control_group)
    }

    /// A file as the node sees it, mounts included, as long as the node lives.
    pub(super) fn seen(&self, path: &str) -> PathBuf {
        Path::new(&format!("/proc/{}/root", self.init)).join(path.trim_start_matches('/'))
    }
}

/// Where the files of a host's machine are; they outlive it.
pub(super) fn directory(scope: &Scope, host: &str) -> PathBuf {
    path(scope.directory(), host)
}

/// The same, in the directory of a cluster that was left up.
pub(super) fn path(cluster: &Path, host: &str) -> PathBuf {
    cluster.join(format!("machine-{host}"))
}

/// Path, from outside, of a file that is in one of a machine's own directories.
pub(super) fn own_file(directory: &Path, path: &str) -> Option<PathBuf> {
    let below = |directories: &[&str]| directories.iter().any(|it| Path::new(path).starts_with(it));
    (below(&OWN) && !below(&OF_HOST)).then(|| directory.join(path.trim_start_matches('/')))
}

impl Drop for Machine {
    fn drop(&mut self) {
        // The kernel ends all processes of a process namespace with its first, which `unshare --kill-child` ends.
        let _ = self.holder.kill();
        let _ = self.holder.wait();
        if let Err(error) = control_groups::remove(&control_groups::find(|name| name == self.control_group)) {
            eprintln!("{error:#}");
        }
    }
}

/// The holder while its node is not complete.
struct Holder(Option<Child>);

impl Holder {
    fn runs(&mut self) -> Result<bool> {
        let holder = self.0.as_mut().context("the node's process is gone")?;
        Ok(holder.try_wait()?.is_none())
    }

    fn only_child(&self) -> Result<u32> {
        let pid = self.0.as_ref().context("the node's process is gone")?.id();
        let path = format!("/proc/{pid}/task/{pid}/children");
        let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        text.split_whitespace().next().with_context(|| format!("process {pid} has no child"))?.parse().context(path)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        if let Some(mut holder) = self.0.take() {
            let _ = holder.kill();
            let _ = holder.wait();
        }
    }
}
