//! The registers that a system call goes through.

#[cfg(not(target_arch = "x86_64"))]
pub(super) use self::unknown::{begins_anew, set_error, skip_call};
#[cfg(target_arch = "x86_64")]
pub(super) use self::x86_64::{begins_anew, set_error, skip_call};

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use anyhow::{Context, Result};
    use nix::errno::Errno;
    use nix::sys::ptrace::{getregs, setregs};
    use nix::unistd::Pid;

    /// Lets a thread that is at a call's entry make none: there is no call -1.
    pub(in crate::syscalls) fn skip_call(thread: Pid) -> Result<()> {
        let mut registers = getregs(thread).context("reading registers")?;
        registers.orig_rax = u64::MAX;
        setregs(thread, registers).context("writing registers")
    }

    /// True if the kernel begins the call anew at whose exit a thread is: `ERESTARTSYS`, `ERESTARTNOINTR`, `ERESTARTNOHAND` or
    /// `ERESTART_RESTARTBLOCK` (include/linux/errno.h), which no program ever sees.
    pub(in crate::syscalls) fn begins_anew(thread: Pid) -> Result<bool> {
        match getregs(thread) {
            Ok(registers) => Ok(matches!(registers.rax.cast_signed(), -514..=-512 | -516)),
            // Killed meanwhile.
            Err(Errno::ESRCH) => Ok(false),
            Err(errno) => Err(errno).context("reading registers"),
        }
    }

    /// Lets a thread that is at a call's exit see an error.
    pub(in crate::syscalls) fn set_error(thread: Pid, errno: Errno) -> Result<()> {
        let mut registers = getregs(thread).context("reading registers")?;
        registers.rax = i64::from(-(errno as i32)).cast_unsigned();
        setregs(thread, registers).context("writing registers")
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod unknown {
    use anyhow::{Result, bail};
    use nix::errno::Errno;
    use nix::unistd::Pid;

    /// Unknown here: what the kernel begins anew counts again.
    pub(in crate::syscalls) fn begins_anew(_: Pid) -> Result<bool> {
        Ok(false)
    }

    pub(in crate::syscalls) fn skip_call(_: Pid) -> Result<()> {
        bail!("system calls can be made to fail on x86_64 only")
    }

    pub(in crate::syscalls) fn set_error(_: Pid, _: Errno) -> Result<()> {
        bail!("system calls can be made to fail on x86_64 only")
    }
}
