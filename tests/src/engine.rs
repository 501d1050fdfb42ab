//! A place for a container engine (containerd, podman) on a host under test: a process namespace of its own, so that all of its
//! containers end with it, and directories of its own below the cluster's, so that nothing of it stays on this machine.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::control_groups;
use crate::eventually;
use crate::host::Host;
use crate::process::{Output, Program};
use crate::scope::Scope;

/// How long an engine may take for one job; it starts programs, and unpacks images.
pub const TIME_LIMIT: Duration = Duration::from_secs(60);

/// Prepares mounts, says so and stays. `$1` is the engine's directory.
///
/// - Below `/run` the engine sees the host's `/run/husk` and `/run/netns` and what it makes itself. Where it mounts network
///   namespaces, the host has to see them too: the daemon opens them by the path of the lease.
/// - Below `/sys` it sees the control groups, which the host's own `/sys` hides.
const PREPARE: &str = r#"
set -e
mkdir -p "$1/run/husk" "$1/run/netns" "$1/cni-cache" "$1/containers" /var/lib/cni /var/lib/containers
mount --rbind /run/husk "$1/run/husk"
mount --rbind /run/netns "$1/run/netns"
mount --rbind "$1/run" /run
mount --bind "$1/cni-cache" /var/lib/cni
mount --bind "$1/containers" /var/lib/containers
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
umount -l /sys
if ! grep -qs ' /sys/fs/cgroup' /proc/self/mounts; then mount -t cgroup2 cgroup2 /sys/fs/cgroup; fi
touch "$1/ready"
exec sleep 100000
"#;

/// The host's part, before the namespaces are unshared: what is mounted on `/run/netns` from now on arrives on both sides.
const SHARE: &str = r#"
set -e
mkdir -p "$1/netns"
mount --bind "$1/netns" /run/netns
mount --make-shared /run/netns
exec unshare --pid --fork --mount --propagation unchanged --mount-proc --kill-child sh -c "$2" sh "$1"
"#;

/// The place. Everything in it ends when it is dropped.
#[derive(Debug)]
pub struct Engine<'a> {
    host: &'a Host,
    directory: PathBuf,
    control_group: String,
    holder: Child,
    /// Process 1 of the process namespace, as seen from here.
    init: u32,
}

impl<'a> Engine<'a> {
    /// Makes the place.
    ///
    /// # Errors
    /// When the kernel refuses, or a tool is missing.
    pub fn on(host: &'a Host, scope: &Scope) -> Result<Self> {
        let directory = scope.directory().join(format!("engine-{}", host.name()));
        fs::create_dir(&directory).with_context(|| format!("making {}", directory.display()))?;
        let log = File::create(directory.join("log"))?;
        let arguments = ["-c", SHARE, "sh"].map(Path::new);
        let arguments = arguments.into_iter().chain([directory.as_path(), Path::new(PREPARE)]);
        let holder = host.program("/bin/sh").args(arguments).spawn(&log)?;
        let mut engine = Self { host, control_group: scope.name("engine"), holder, init: 0, directory };
        eventually("the engine's place to be ready", Duration::from_secs(10), || {
            ensure!(engine.holder.try_wait()?.is_none(), "its preparation failed: {}", engine.log("log"));
            Ok(engine.directory.join("ready").exists())
        })?;
        let (pid, children) = (engine.holder.id(), format!("/proc/{0}/task/{0}/children", engine.holder.id()));
        let text = fs::read_to_string(&children).with_context(|| format!("reading {children}"))?;
        let first = text.split_whitespace().next().with_context(|| format!("process {pid} has no child"))?;
        engine.init = first.parse()?;
        Ok(engine)
    }

    /// Where its files are; the path is the same inside and outside.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// A control group for its containers, relative to the root of each hierarchy; removed with it.
    #[must_use]
    pub fn control_group(&self) -> String {
        format!("/{}", self.control_group)
    }

    /// A program to be run there.
    #[must_use]
    pub fn program(&self, program: &str) -> Program<'static> {
        let init = self.init.to_string();
        Program::new("nsenter")
            .args(["--target", &init, "--mount", "--net", "--pid", "--", program])
            .limit(crate::patience(TIME_LIMIT))
    }

    /// Runs a program there to its end, whatever its exit status.
    ///
    /// # Errors
    /// When it cannot be started, or takes too long.
    pub fn run<'b>(&self, program: &str, arguments: impl IntoIterator<Item = &'b str>) -> Result<Output> {
        self.program(program).args(arguments).run()
    }

    /// A file in its directory, as text.
    #[must_use]
    pub fn log(&self, name: &str) -> String {
        fs::read_to_string(self.directory.join(name)).unwrap_or_default()
    }

    /// Makes a root file system of one static program, busybox, in its directory.
    ///
    /// # Errors
    /// When the program is missing, or cannot be copied.
    pub fn root_file_system(&self) -> Result<PathBuf> {
        let bin = self.directory.join("rootfs/bin");
        fs::create_dir_all(&bin)?;
        let found = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).exists());
        let program = found.context("busybox is missing: install the package busybox-static")?;
        let elf = Program::new("readelf").args(["--program-headers", program]).check()?;
        ensure!(!elf.contains("INTERP"), "{program} needs a dynamic loader: install the package busybox-static");
        let copy = bin.join("busybox");
        fs::copy(program, &copy)?;
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
        Ok(self.directory.join("rootfs"))
    }

    /// The host it is on.
    #[must_use]
    pub fn host(&self) -> &'a Host {
        self.host
    }
}

impl Drop for Engine<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the log of the engine ends:\n{}", self.log("log"));
        }
        // The kernel ends all processes of a process namespace with its first, which `unshare --kill-child` ends.
        let _ = self.holder.kill();
        let _ = self.holder.wait();
        if let Err(error) = control_groups::remove(&control_groups::find(|name| name == self.control_group)) {
            eprintln!("{error:#}");
        }
    }
}
