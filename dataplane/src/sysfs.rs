//! A view of sysfs that belongs to the network namespace at hand.
//!
//! `/sys/class/net` shows the devices of the namespace that sysfs was mounted in, which is not the namespace of a process
//! that entered another one; a name written there may be a stranger's. So an instance of our own is mounted, attached to no
//! directory and gone with its file descriptor (fsopen(2), fsmount(2), Linux 5.2).

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

/// A detached sysfs.
#[derive(Debug)]
pub(crate) struct Sysfs(OwnedFd);

impl Sysfs {
    /// Mounts it for the calling thread's network namespace. Needs `CAP_SYS_ADMIN`.
    pub(crate) fn mount() -> io::Result<Self> {
        let context = sys::open_context(c"sysfs")?;
        sys::create(context.as_fd())?;
        sys::mount(context.as_fd()).map(Self)
    }

    /// Opens a file by its path below the root of sysfs.
    pub(crate) fn open(&self, path: &str, flags: OFlag) -> io::Result<File> {
        Ok(openat(&self.0, path, flags | OFlag::O_CLOEXEC, Mode::empty())?.into())
    }
}

/// System calls that neither std nor nix nor libc has functions for.
#[allow(unsafe_code)]
mod sys {
    use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _};

    use super::{CStr, OwnedFd, io};

    /// include/uapi/linux/mount.h
    const FSOPEN_CLOEXEC: libc::c_uint = 1;
    const FSMOUNT_CLOEXEC: libc::c_uint = 1;
    const FSCONFIG_CMD_CREATE: libc::c_uint = 6;

    pub(super) fn open_context(filesystem: &CStr) -> io::Result<OwnedFd> {
        // SAFETY: the name is a terminated string that outlives the call; the kernel only reads it.
        let fd = unsafe { libc::syscall(libc::SYS_fsopen, filesystem.as_ptr(), FSOPEN_CLOEXEC) };
        owned(fd)
    }

    pub(super) fn create(context: BorrowedFd<'_>) -> io::Result<()> {
        let none = std::ptr::null::<libc::c_char>();
        // SAFETY: the descriptor is open; the command takes neither key nor value, so that both may be null.
        let result = unsafe {
            libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), FSCONFIG_CMD_CREATE, none, none, 0 as libc::c_int)
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    pub(super) fn mount(context: BorrowedFd<'_>) -> io::Result<OwnedFd> {
        // SAFETY: the descriptor is open and the call takes no pointers.
        let fd = unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FSMOUNT_CLOEXEC, 0 as libc::c_uint) };
        owned(fd)
    }

    fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
        match libc::c_int::try_from(fd) {
            // SAFETY: the kernel just returned this descriptor to us, and nobody else knows of it.
            Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
            _ => Err(io::Error::last_os_error()),
        }
    }
}
