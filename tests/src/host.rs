//! A host: a network namespace and a mount namespace in which the directories Husk uses are private.

mod attachments;
mod daemon;

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::net::IpAddr;
use std::os::unix::fs::{OpenOptionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use husk_overlay::marks::STATE_DIRECTORY;
use husk_overlay::prefix::Family;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use serde_json::Value;

use crate::capture::Capture;
use crate::cni::{CniOutcome, PodSpec};
use crate::netns::{self, Netns};
use crate::pod::Pod;
use crate::process::{self, Output, Process, Program};
use crate::scope::Scope;
use crate::syscalls::{Interference, Traced};

pub use self::attachments::LEASE_DIRECTORY;

/// The underlay interface of every host.
pub const UNDERLAY_INTERFACE: &str = "eth0";

/// Directories that every host has for itself.
const PRIVATE_DIRECTORIES: [&str; 6] =
    ["/run/husk", "/run/wireguard", "/var/lib/husk", "/etc/husk", "/etc/cni", "/opt/cni"];

/// Where the kernel names the boot.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Where a host's programs run; pods hold it too, since their DEL has to work whatever became of the host.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) name: String,
    pub(crate) netns: Netns,
    mounts: File,
    root: PathBuf,
    // Last: the directory goes after everything that lives in it.
    pub(crate) scope: Arc<Scope>,
}

impl Place {
    /// Makes the place. With a disk the state directory is in there instead.
    pub(crate) fn create(scope: &Arc<Scope>, name: &str, disk: Option<&Path>) -> Result<Self> {
        let netns = Netns::create(&scope.name(name))?;
        let root = scope.directory().join(name);
        if let Some(disk) = disk {
            let (kept, own) = (disk.join(name), root.join(STATE_DIRECTORY.trim_start_matches('/')));
            let parent = own.parent().context("the state directory is below /")?;
            for needed in [&kept, parent] {
                fs::create_dir_all(needed).with_context(|| format!("creating {}", needed.display()))?;
            }
            if !own.is_symlink() {
                symlink(&kept, &own).with_context(|| format!("pointing {} to {}", own.display(), kept.display()))?;
            }
        }
        let mounts = private_mounts(&netns, &root).with_context(|| format!("making the mount namespace of {name}"))?;
        Ok(Self { name: name.to_owned(), netns, mounts, root, scope: Arc::clone(scope) })
    }

    /// Takes away what does not survive a reboot, of a host that is gone: what is in memory. What is on its disk stays.
    pub(crate) fn forget_memory(scope: &Scope, name: &str) -> Result<()> {
        let root = scope.directory().join(name);
        for directory in PRIVATE_DIRECTORIES.iter().filter(|directory| directory.starts_with("/run/")) {
            let own = root.join(directory.trim_start_matches('/'));
            fs::remove_dir_all(&own).with_context(|| format!("removing {}", own.display()))?;
        }
        Ok(())
    }

    /// Gives the host a boot of its own; the kernel has one for all.
    pub(crate) fn pretend_boot(&self, id: &str) -> Result<()> {
        let own = self.root.join("boot_id");
        fs::write(&own, format!("{id}\n")).with_context(|| format!("writing {}", own.display()))?;
        netns::enter(self.netns.file(), Some(&self.mounts), || {
            mount(Some(&own), BOOT_ID, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        })?
        .with_context(|| format!("binding {} to {BOOT_ID} in {}", own.display(), self.name))
    }

    pub(crate) fn program(&self, program: &Path) -> Program<'_> {
        self.netns.program(program).in_mounts(&self.mounts)
    }

    pub(crate) fn stopped_program(&self, program: &Path) -> Program<'_> {
        Program::stopped(program).in_netns(self.netns.file()).in_mounts(&self.mounts)
    }

    /// Path, from outside, of a file that the host sees as `path` in one of its private directories.
    pub(crate) fn file(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// Makes a namespace visible here under its path; mounts made outside after the host do not arrive by themselves.
    pub(crate) fn show(&self, netns: &Netns) -> Result<()> {
        let path = netns.path();
        netns::enter(netns.file(), Some(&self.mounts), || {
            mount(Some("/proc/thread-self/ns/net"), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        })?
        .with_context(|| format!("binding {} in {}", path.display(), self.name))
    }
}

/// One machine of the test: underlay interface, private directories, a daemon, pods.
#[derive(Debug)]
pub struct Host {
    pub(crate) place: Arc<Place>,
    pub(crate) addresses: Mutex<Vec<IpAddr>>,
    pub(crate) config: Mutex<Value>,
    daemon: Mutex<Option<Child>>,
}

impl Host {
    pub(crate) fn new(place: Place, addresses: Vec<IpAddr>, config: Value) -> Self {
        Self {
            place: Arc::new(place),
            addresses: Mutex::new(addresses),
            config: Mutex::new(config),
            daemon: Mutex::new(None),
        }
    }

    /// The node name, `host1` and so on.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.place.name
    }

    /// The host's network namespace.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.place.netns
    }

    /// The host's underlay address.
    ///
    /// # Errors
    /// When the underlay does not have this family.
    pub fn address(&self, family: Family) -> Result<IpAddr> {
        let addresses = lock(&self.addresses);
        let found = addresses.iter().copied().find(|address| Family::of(*address) == family);
        found.with_context(|| format!("{} has no {family} underlay address", self.name()))
    }

    /// The host's address inside the overlay.
    ///
    /// # Errors
    /// When its daemon names none of this family.
    pub fn router(&self, family: Family) -> Result<IpAddr> {
        let status = self.huskctl_json(["status"])?;
        let key = family.to_string().to_lowercase();
        let text = status["router"][&key].as_str();
        Ok(text.with_context(|| format!("no {key} router address: {status}"))?.parse()?)
    }

    /// Path, from outside, of a file in one of the host's private directories, such as `/run/husk/node.json`.
    #[must_use]
    pub fn file(&self, path: &str) -> PathBuf {
        self.place.file(path)
    }

    /// Runs an `ip` command on the host, for what an outsider does by hand.
    ///
    /// # Errors
    /// When it fails.
    pub fn ip<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Result<String> {
        self.netns().command("ip", arguments)
    }

    /// A program to be run on the host, with the host's private directories.
    #[must_use]
    pub fn program(&self, program: impl AsRef<Path>) -> Program<'_> {
        self.place.program(program.as_ref())
    }

    /// Runs `huskctl` to its end, whatever its exit status.
    ///
    /// # Errors
    /// When it is missing or takes too long.
    pub fn huskctl<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Result<Output> {
        self.program(process::binary("huskctl")?).args(arguments).run()
    }

    /// What `huskctl ... --output json` says, whatever its exit status.
    ///
    /// # Errors
    /// When the output is no JSON.
    pub fn huskctl_json<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Result<Value> {
        let arguments: Vec<_> = arguments.into_iter().chain(["--output", "json"]).collect();
        let output = self.huskctl(arguments.iter().copied())?;
        serde_json::from_str(&output.stdout).with_context(|| {
            let name = self.name();
            format!("`huskctl {}` on {name} printed no JSON: {}{}", arguments.join(" "), output.stdout, output.stderr)
        })
    }

    /// Changes the daemon's configuration file; it counts from the daemon's next start.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn configure(&self, change: impl FnOnce(&mut Value)) -> Result<()> {
        let mut config = lock(&self.config);
        change(&mut config);
        let text = serde_saphyr::to_string(&*config).context("writing the configuration as YAML")?;
        let path = self.file("/etc/husk/config.yaml");
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
    }

    /// Installs the CNI plugin the way an operator does: `husk-cni install`.
    ///
    /// # Errors
    /// When the plugin has not been built or does not install itself.
    pub fn install_plugin(&self) -> Result<()> {
        let plugin = self.program(process::binary("husk-cni")?);
        plugin.args(["install", "--bin-dir", "/opt/cni/bin"]).check().map(drop)
    }

    /// Writes a secret of the host's to a file that root alone may read.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_secret(&self, path: &str, secret: &str) -> Result<()> {
        let path = self.file(path);
        let file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&path);
        let written = file.and_then(|mut file| file.write_all(secret.as_bytes()));
        written.with_context(|| format!("writing {}", path.display()))
    }

    /// Makes a pod's network namespace without asking the plugin for anything.
    ///
    /// # Errors
    /// When the host has one of this name.
    pub fn sandbox(&self, name: &str) -> Result<Pod> {
        Pod::sandbox(&self.place, name)
    }

    /// Makes a pod and attaches it to the overlay through the plugin.
    ///
    /// # Errors
    /// When ADD fails; the error carries what the plugin said.
    pub fn add_pod(&self, name: &str) -> Result<Pod> {
        let mut pod = self.sandbox(name)?;
        pod.add()?.into_result().with_context(|| format!("ADD of pod {name} on {}", self.name()))?;
        Ok(pod)
    }

    /// Calls the plugin for an attachment, with the configuration the daemon wrote.
    ///
    /// # Errors
    /// When the plugin cannot be run; what it answers, errors included, is in the outcome.
    pub fn cni(&self, command: &str, spec: &PodSpec) -> Result<CniOutcome> {
        self.place.cni(command, Some(spec), self.place.plugin_config(Some(spec))?)
    }

    /// Calls the plugin with a configuration of the caller's.
    ///
    /// # Errors
    /// As [`Host::cni`].
    pub fn cni_with(&self, command: &str, spec: Option<&PodSpec>, config: Value) -> Result<CniOutcome> {
        self.place.cni(command, spec, config)
    }

    /// Calls STATUS.
    ///
    /// # Errors
    /// As [`Host::cni`].
    pub fn cni_status(&self) -> Result<CniOutcome> {
        self.place.cni("STATUS", None, self.place.plugin_config(None)?)
    }

    /// Calls the plugin for an attachment, interfered with at a system call; also returns which ones it made.
    ///
    /// # Errors
    /// As [`Host::cni`], and when the plugin cannot be traced.
    pub fn cni_traced(
        &self,
        command: &str,
        spec: &PodSpec,
        interference: Option<Interference>,
    ) -> Result<(CniOutcome, Traced)> {
        self.place.cni_traced(command, Some(spec), &self.place.plugin_config(Some(spec))?, interference)
    }

    /// Runs `work` on a thread in the host's namespaces, where it sees the host's private directories.
    ///
    /// # Errors
    /// When the namespaces cannot be entered.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        netns::enter(self.netns().file(), Some(&self.place.mounts), work)
    }

    /// Calls GC; the attachments of `valid` are those that stay.
    ///
    /// # Errors
    /// As [`Host::cni`].
    pub fn cni_gc(&self, valid: &[&PodSpec]) -> Result<CniOutcome> {
        self.place.cni("GC", None, self.place.gc_config(valid)?)
    }

    /// Calls GC as [`Host::cni_gc`] does, interfered with at a system call; also returns which ones it made.
    ///
    /// # Errors
    /// As [`Host::cni_traced`].
    pub fn cni_gc_traced(
        &self,
        valid: &[&PodSpec],
        interference: Option<Interference>,
    ) -> Result<(CniOutcome, Traced)> {
        self.place.cni_traced("GC", None, &self.place.gc_config(valid)?, interference)
    }

    /// Captures what the host's underlay interface sends and receives.
    ///
    /// # Errors
    /// When the capture cannot be started.
    pub fn capture(&self) -> Result<Capture> {
        Capture::on(self.netns(), UNDERLAY_INTERFACE)
    }

    /// The processes of the host, its pods' excepted.
    #[must_use]
    pub fn processes(&self) -> Vec<Process> {
        self.netns().processes()
    }

    /// The process of the userspace WireGuard device, if the host runs one.
    #[must_use]
    pub fn wireguard_process(&self) -> Option<Process> {
        self.processes().into_iter().find(|process| process.command.contains("wireguard-userspace"))
    }

    /// Sets the MTU of the underlay interface.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set_underlay_mtu(&self, mtu: usize) -> Result<()> {
        self.ip(["link", "set", UNDERLAY_INTERFACE, "mtu", &mtu.to_string()]).map(drop)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() && self.log_path().exists() {
            eprintln!("the log of {} ends:\n{}", self.name(), self.log_end());
        }
        if let Some(mut daemon) = lock(&self.daemon).take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        // A pod may outlive the host and hold its place; the host's processes must not.
        if let Err(error) = process::end_all_in_netns(self.netns().file()) {
            eprintln!("ending the processes of {}: {error:#}", self.name());
        }
    }
}

/// The value behind a mutex; a test that panicked elsewhere does not make it less true.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn private_mounts(netns: &Netns, root: &Path) -> Result<File> {
    for directory in PRIVATE_DIRECTORIES {
        let own = root.join(directory.trim_start_matches('/'));
        for needed in [Path::new(directory), &own] {
            fs::create_dir_all(needed).with_context(|| format!("creating {}", needed.display()))?;
        }
    }
    netns::on_thread(|| {
        // sysfs shows the network namespace of the thread that mounts it.
        setns(netns.file(), CloneFlags::CLONE_NEWNET).context("entering the network namespace")?;
        unshare(CloneFlags::CLONE_NEWNS).context("unsharing the mount namespace")?;
        let (none, recursive) = (None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE);
        mount(none, "/", none, recursive, none).context("making mount propagation private")?;
        for directory in PRIVATE_DIRECTORIES {
            let own = root.join(directory.trim_start_matches('/'));
            mount(Some(&own), directory, none, MsFlags::MS_BIND, none)
                .with_context(|| format!("binding a private directory to {directory}"))?;
        }
        let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("sysfs"), "/sys", Some("sysfs"), safe, none).context("mounting the host's own /sys")?;
        File::open("/proc/thread-self/ns/mnt").context("opening the mount namespace")
    })
}
