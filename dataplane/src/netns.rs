//! Network namespaces: opened once, recognised by device and inode, entered by a thread of its own.
//!
//! `setns(2)` changes the calling thread only, and nothing tells the rest of a program that a thread is elsewhere. So every
//! entry gets a thread that ends with it: no code path leaves a thread of a pool in the wrong namespace.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use husk_overlay::endpoint::NetnsIdentity;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::{FsType, fstatfs};

use crate::error::Error;

/// Magic number of nsfs (`NSFS_MAGIC` in include/uapi/linux/magic.h).
const NSFS_MAGIC: FsType = FsType(0x6e73_6673);

/// The calling thread's own network namespace (proc(5)).
const CURRENT: &str = "/proc/thread-self/ns/net";

/// An open network namespace; it lives at least as long as this value.
#[derive(Debug)]
pub struct Netns {
    file: File,
    path: String,
}

impl Netns {
    /// Opens the namespace that a path leads to, for example `/var/run/netns/NAME` or `/proc/PID/ns/net`.
    ///
    /// # Errors
    /// [`Error::Namespace`] when the path cannot be opened, [`Error::NotANamespace`] when it is something else, for
    /// example the empty file that `ip netns add` mounts on, left behind by a reboot.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let text = path.display().to_string();
        let failed = |source| Error::Namespace { operation: "open", path: text.clone(), source };
        // Without O_NONBLOCK a named pipe would hold us until somebody writes to it.
        let options = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).to_owned();
        let file = options.open(path).map_err(failed)?;
        let filesystem = fstatfs(&file).map_err(|errno| failed(errno.into()))?.filesystem_type();
        if filesystem != NSFS_MAGIC {
            let kind = file.metadata().map_err(failed)?.file_type();
            let found = if kind.is_dir() {
                "a directory"
            } else if kind.is_file() {
                "an ordinary file"
            } else {
                "neither a file of the namespace file system nor an ordinary file"
            };
            return Err(Error::NotANamespace { path: text, found });
        }
        let kind = nsfs::namespace_kind(&file).map_err(failed)?;
        if kind != CloneFlags::CLONE_NEWNET {
            return Err(Error::NotANamespace { path: text, found: "a namespace of another kind" });
        }
        Ok(Self { file, path: text })
    }

    /// The namespace of the calling thread.
    ///
    /// # Errors
    /// [`Error::Namespace`] when `/proc` is not mounted.
    pub fn current() -> Result<Self, Error> {
        Self::open(CURRENT)
    }

    /// A new namespace without a name: it is gone with the last file descriptor and process in it, so that a test that
    /// is killed leaves nothing behind.
    ///
    /// # Errors
    /// [`Error::Namespace`] when the privilege (`CAP_SYS_ADMIN`) is missing.
    pub fn new_unnamed() -> Result<Self, Error> {
        on_a_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| Error::Namespace {
                operation: "create",
                path: "(unnamed)".to_owned(),
                source: errno.into(),
            })?;
            Self::current()
        })?
    }

    /// Path it was opened by.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Device and inode, which tell two namespaces apart while both are open.
    ///
    /// # Errors
    /// [`Error::Namespace`] when the kernel refuses `fstat(2)`.
    pub fn identity(&self) -> Result<NetnsIdentity, Error> {
        let metadata = self.file.metadata().map_err(|source| self.failed("examine", source))?;
        Ok(NetnsIdentity { path: self.path.clone(), device: metadata.dev(), inode: metadata.ino() })
    }

    /// Runs `body` in the namespace, on a thread of its own, and waits for it. A panic of `body` goes on in the caller.
    ///
    /// # Errors
    /// [`Error::Namespace`] when no thread can be had or the kernel refuses the entry; `body` has not run then.
    pub fn run_in<T: Send>(&self, body: impl FnOnce() -> T + Send) -> Result<T, Error> {
        on_a_thread(|| {
            setns(&self.file, CloneFlags::CLONE_NEWNET).map_err(|errno| self.failed("enter", errno.into()))?;
            Ok(body())
        })?
    }

    fn failed(&self, operation: &'static str, source: io::Error) -> Error {
        Error::Namespace { operation, path: self.path.clone(), source }
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Runs `body` on a thread that ends with it.
fn on_a_thread<T: Send>(body: impl FnOnce() -> T + Send) -> Result<T, Error> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("netns".to_owned())
            .spawn_scoped(scope, body)
            .map_err(|source| Error::Namespace { operation: "start a thread for", path: CURRENT.to_owned(), source })?;
        Ok(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// The one question to nsfs that nix has no function for.
mod nsfs {
    use std::fs::File;
    use std::io;
    use std::os::fd::AsRawFd as _;

    use nix::sched::CloneFlags;

    /// Kind of a namespace file: `NS_GET_NSTYPE` (include/uapi/linux/nsfs.h, ioctl_ns(2)) returns its `CLONE_NEW*` flag.
    #[allow(unsafe_code)]
    pub(super) fn namespace_kind(file: &File) -> io::Result<CloneFlags> {
        let request = nix::request_code_none!(0xb7, 0x3);
        // SAFETY: the descriptor is open for the duration of the call, and this request takes no argument, so that the
        // kernel reads and writes no memory of ours.
        let kind = unsafe { libc::ioctl(file.as_raw_fd(), request) };
        if kind < 0 { Err(io::Error::last_os_error()) } else { Ok(CloneFlags::from_bits_retain(kind)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_namespace_is_another_one_and_is_entered_by_one_thread_only() {
        let here = Netns::current().unwrap().identity().unwrap();
        let other = Netns::new_unnamed().unwrap();
        let identity = other.identity().unwrap();
        assert_ne!((here.device, here.inode), (identity.device, identity.inode));
        let inside = other.run_in(|| Netns::current().unwrap().identity().unwrap()).unwrap();
        assert_eq!((inside.device, inside.inode), (identity.device, identity.inode));
        let still = Netns::current().unwrap().identity().unwrap();
        assert_eq!((here.device, here.inode), (still.device, still.inode));
    }

    #[test]
    fn what_is_no_network_namespace_is_refused_by_name() {
        for (path, expected) in [
            ("/etc/hostname", "/etc/hostname is not a network namespace: it is an ordinary file"),
            ("/proc", "/proc is not a network namespace: it is a directory"),
            ("/proc/self/ns/mnt", "/proc/self/ns/mnt is not a network namespace: it is a namespace of another kind"),
            ("/nowhere", "cannot open the network namespace /nowhere: No such file"),
        ] {
            let error = Netns::open(path).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}
