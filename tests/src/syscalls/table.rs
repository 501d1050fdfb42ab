//! The system calls that the programs here are known to make, by their numbers.

use nix::libc;

/// Where a call's arguments say what it is about.
pub(super) enum Subject {
    /// The path that this argument points to.
    Path(usize),
    /// The file of the first argument.
    Descriptor,
    Nothing,
}

/// Names of system calls, and what they are about.
macro_rules! calls {
    ($($(#[$condition:meta])* $call:ident $name:ident $subject:expr;)*) => {
        /// The name of a system call, if it is one of these.
        pub(super) fn name(number: i64) -> Option<&'static str> {
            match number {
                $($(#[$condition])* libc::$call => Some(stringify!($name)),)*
                _ => None,
            }
        }

        /// Where its arguments say what it is about.
        pub(super) fn subject(number: i64) -> Subject {
            match number {
                $($(#[$condition])* libc::$call => $subject,)*
                _ => Subject::Nothing,
            }
        }
    };
}

calls! {
    SYS_openat openat Subject::Path(1);
    SYS_statx statx Subject::Path(1);
    SYS_newfstatat newfstatat Subject::Path(1);
    SYS_readlinkat readlinkat Subject::Path(1);
    SYS_mkdirat mkdirat Subject::Path(1);
    SYS_unlinkat unlinkat Subject::Path(1);
    SYS_renameat renameat Subject::Path(1);
    SYS_renameat2 renameat2 Subject::Path(1);
    #[cfg(target_arch = "x86_64")] SYS_open open Subject::Path(0);
    #[cfg(target_arch = "x86_64")] SYS_stat stat Subject::Path(0);
    #[cfg(target_arch = "x86_64")] SYS_readlink readlink Subject::Path(0);
    #[cfg(target_arch = "x86_64")] SYS_mkdir mkdir Subject::Path(0);
    #[cfg(target_arch = "x86_64")] SYS_unlink unlink Subject::Path(0);
    #[cfg(target_arch = "x86_64")] SYS_rename rename Subject::Path(0);
    #[cfg(target_arch = "x86_64")] SYS_link link Subject::Path(0);
    SYS_linkat linkat Subject::Path(1);
    SYS_fsync fsync Subject::Descriptor;
    SYS_ftruncate ftruncate Subject::Descriptor;
    SYS_close close Subject::Descriptor;
    SYS_fcntl fcntl Subject::Descriptor;
    SYS_flock flock Subject::Descriptor;
    SYS_utimensat utimensat Subject::Descriptor;
    SYS_fstat fstat Subject::Descriptor;
    SYS_fstatfs fstatfs Subject::Descriptor;
    SYS_getdents64 getdents64 Subject::Descriptor;
    SYS_ioctl ioctl Subject::Descriptor;
    SYS_lseek lseek Subject::Descriptor;
    SYS_read read Subject::Descriptor;
    SYS_write write Subject::Descriptor;
    SYS_writev writev Subject::Descriptor;
    SYS_setns setns Subject::Descriptor;
    SYS_socket socket Subject::Nothing;
    SYS_bind bind Subject::Descriptor;
    SYS_connect connect Subject::Descriptor;
    SYS_getsockname getsockname Subject::Descriptor;
    SYS_setsockopt setsockopt Subject::Descriptor;
    SYS_getsockopt getsockopt Subject::Descriptor;
    SYS_sendto sendto Subject::Descriptor;
    SYS_sendmsg sendmsg Subject::Descriptor;
    SYS_recvfrom recvfrom Subject::Descriptor;
    SYS_recvmsg recvmsg Subject::Descriptor;
    SYS_clone3 clone3 Subject::Nothing;
    SYS_clone clone Subject::Nothing;
    SYS_mmap mmap Subject::Nothing;
    SYS_munmap munmap Subject::Nothing;
    SYS_mremap mremap Subject::Nothing;
    SYS_mprotect mprotect Subject::Nothing;
    SYS_madvise madvise Subject::Nothing;
    SYS_brk brk Subject::Nothing;
    SYS_futex futex Subject::Nothing;
    SYS_clock_nanosleep clock_nanosleep Subject::Nothing;
    SYS_clock_gettime clock_gettime Subject::Nothing;
    SYS_getrandom getrandom Subject::Nothing;
    SYS_ppoll ppoll Subject::Nothing;
    #[cfg(target_arch = "x86_64")] SYS_poll poll Subject::Nothing;
    #[cfg(target_arch = "x86_64")] SYS_arch_prctl arch_prctl Subject::Nothing;
    SYS_prctl prctl Subject::Nothing;
    SYS_prlimit64 prlimit64 Subject::Nothing;
    SYS_rseq rseq Subject::Nothing;
    SYS_rt_sigaction rt_sigaction Subject::Nothing;
    SYS_rt_sigprocmask rt_sigprocmask Subject::Nothing;
    SYS_sigaltstack sigaltstack Subject::Nothing;
    SYS_sched_getaffinity sched_getaffinity Subject::Nothing;
    SYS_set_robust_list set_robust_list Subject::Nothing;
    SYS_set_tid_address set_tid_address Subject::Nothing;
    SYS_gettid gettid Subject::Nothing;
    SYS_exit exit Subject::Nothing;
    SYS_exit_group exit_group Subject::Nothing;
}
