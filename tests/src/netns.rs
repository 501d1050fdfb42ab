//! Network namespaces: made under a name that `ip netns exec` knows, entered by threads, removed on drop.
//!
//! `setns` concerns one thread only, so every visit happens on a thread of its own. What is made there, a socket or a
//! child process, stays in the namespace after the thread is gone.

use std::fs::{self, File};
use std::io;
use std::panic;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use serde_json::Value;

use crate::process::{self, Process, Program};

/// Where iproute2 keeps the names of network namespaces.
pub const DIRECTORY: &str = "/run/netns";

/// A network namespace with loopback up and without duplicate address detection or router solicitation.
#[derive(Debug)]
pub struct Netns {
    name: String,
    file: File,
    /// It goes when this is dropped.
    own: bool,
}

impl Netns {
    /// Makes a namespace and names it.
    ///
    /// # Errors
    /// When the name is taken or the kernel refuses.
    pub fn create(name: &str) -> Result<Self> {
        let path = path_of(name);
        fs::create_dir_all(DIRECTORY).with_context(|| format!("creating {DIRECTORY}"))?;
        File::create_new(&path).with_context(|| format!("naming the network namespace {}", path.display()))?;
        let made = on_thread(|| -> Result<()> {
            unshare(CloneFlags::CLONE_NEWNET).context("unsharing the network namespace")?;
            mount(Some("/proc/thread-self/ns/net"), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
                .with_context(|| format!("binding the network namespace to {}", path.display()))?;
            // Addresses must be usable at once, and the underlay should carry what the test sends.
            for (key, value) in [("accept_dad", "0"), ("router_solicitations", "0"), ("accept_ra", "0")] {
                write_sysctl(&format!("net/ipv6/conf/default/{key}"), value)?;
            }
            Ok(())
        });
        if let Err(error) = made {
            let _ = remove(name);
            return Err(error);
        }
        let file = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
        let netns = Self { name: name.to_owned(), file, own: true };
        netns.command("ip", ["link", "set", "lo", "up"])?;
        Ok(netns)
    }

    /// A namespace that somebody else made and will remove, under a name for messages.
    pub(crate) fn of_others(name: &str, file: File) -> Self {
        Self { name: name.to_owned(), file, own: false }
    }

    /// Another handle on the namespace, for somebody who may hold it on while this one's owner works.
    ///
    /// # Errors
    /// When no more files can be open.
    pub fn handle(&self) -> Result<Self> {
        Ok(Self::of_others(&self.name, self.file.try_clone()?))
    }

    /// The name, as `ip netns exec` takes it; of a namespace that others made the name that messages use.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The path of the namespace, as `CNI_NETNS` takes it.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        path_of(&self.name)
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Runs `work` on a thread inside the namespace; a panic in it continues in the caller.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        enter(&self.file, None, work)
    }

    /// Runs a program inside the namespace to success and returns its standard output.
    ///
    /// # Errors
    /// When it cannot be started, takes longer than ten seconds or fails; its standard error is in the error.
    pub fn command<'a>(&self, program: &str, arguments: impl IntoIterator<Item = &'a str>) -> Result<String> {
        self.program(program).args(arguments).check()
    }

    /// A program to be run inside the namespace.
    #[must_use]
    pub fn program(&self, program: impl AsRef<std::ffi::OsStr>) -> Program<'_> {
        Program::new(program).in_netns(&self.file)
    }

    /// Runs many `ip` commands in one process, one per line.
    ///
    /// # Errors
    /// When one of them fails; the ones before it have been done.
    pub fn ip_batch(&self, commands: &str) -> Result<()> {
        self.program("ip")
            .args(["-batch", "-"])
            .stdin(commands)
            .check()
            .map(drop)
            .with_context(|| format!("in this ip batch:\n{commands}"))
    }

    /// What `ip -j -d` says, for example of `["link", "show", "eth0"]`.
    ///
    /// # Errors
    /// When `ip` fails or prints no JSON.
    pub fn ip_json<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Result<Value> {
        let text = self.program("ip").args(["-j", "-d"]).args(arguments).check()?;
        if text.trim().is_empty() {
            return Ok(Value::Array(Vec::new()));
        }
        serde_json::from_str(&text).context("parsing the JSON output of ip")
    }

    /// The MTU that the kernel has for an interface.
    ///
    /// # Errors
    /// When there is no such interface.
    pub fn mtu(&self, interface: &str) -> Result<usize> {
        let links = self.ip_json(["link", "show", "dev", interface])?;
        let mtu = links[0]["mtu"].as_u64().with_context(|| format!("{interface} has no MTU"))?;
        Ok(usize::try_from(mtu)?)
    }

    /// Writes a sysctl of this namespace; the key has slashes, `net/ipv4/ip_forward`.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        self.run(|| write_sysctl(key, value))?
    }

    /// A counter of `/proc/net/snmp`, for example `("Tcp", "RetransSegs")` or `("Ip", "FragCreates")`.
    ///
    /// # Errors
    /// When there is no such counter.
    pub fn counter(&self, group: &str, name: &str) -> Result<u64> {
        let text = self.run(|| fs::read_to_string("/proc/thread-self/net/snmp"))?.context("reading net/snmp")?;
        let mut lines = text.lines().filter(|line| line.split(':').next() == Some(group));
        let (names, values) = lines.next().zip(lines.next()).with_context(|| format!("net/snmp has no {group}"))?;
        let column = names.split_whitespace().position(|it| it == name);
        let value = column.and_then(|column| values.split_whitespace().nth(column));
        value.with_context(|| format!("net/snmp has no {group} {name}"))?.parse().context("parsing a counter")
    }

    /// The processes that live in the namespace.
    #[must_use]
    pub fn processes(&self) -> Vec<Process> {
        process::in_netns(&self.file)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if !self.own {
            return;
        }
        if let Err(error) = remove(&self.name) {
            eprintln!("removing network namespace {}: {error:#}", self.name);
        }
    }
}

/// Runs `work` on a thread in the given namespaces.
pub(crate) fn enter<T: Send>(net: &File, mounts: Option<&File>, work: impl FnOnce() -> T + Send) -> Result<T> {
    on_thread(|| {
        setns(net, CloneFlags::CLONE_NEWNET).context("entering the network namespace")?;
        if let Some(mounts) = mounts {
            // A thread may change its mount namespace only if it shares root and working directory with no other.
            unshare(CloneFlags::CLONE_FS).context("unsharing the working directory")?;
            setns(mounts, CloneFlags::CLONE_NEWNS).context("entering the mount namespace")?;
        }
        Ok(work())
    })
}

pub(crate) fn on_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| scope.spawn(work).join()).unwrap_or_else(|panic| panic::resume_unwind(panic))
}

/// Says at once, and with the remedy, what would otherwise be an `EPERM` somewhere.
pub(crate) fn check_privileges() -> Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    bail!("making hosts out of network namespaces needs root: run this with sudo")
}

/// Ends the processes in a namespace and removes its name; the kernel removes the namespace with its devices.
pub(crate) fn remove(name: &str) -> Result<()> {
    let path = path_of(name);
    if let Ok(file) = File::open(&path) {
        process::end_all_in_netns(&file)?;
    }
    match umount2(&path, MntFlags::MNT_DETACH) {
        Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => {}
        Err(error) => return Err(error).with_context(|| format!("unmounting {}", path.display())),
    }
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

fn path_of(name: &str) -> PathBuf {
    Path::new(DIRECTORY).join(name)
}

fn write_sysctl(key: &str, value: &str) -> Result<()> {
    // `/proc/sys/net` shows the namespace of the thread that looks.
    let path = Path::new("/proc/sys").join(key);
    fs::write(&path, value).with_context(|| format!("writing {value} to {}", path.display()))
}
