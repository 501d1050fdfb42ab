//! The daemon's own process, under the names that Prometheus' client libraries agree on.

use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit};
use nix::time::{ClockId, clock_gettime};

/// What the kernel says of the daemon's process. What it does not say is absent.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Process {
    /// Processor time.
    pub cpu: Option<Duration>,
    /// Bytes that are resident.
    pub resident: Option<u64>,
    /// Bytes of address space.
    pub virtual_size: Option<u64>,
    /// Threads.
    pub threads: Option<u64>,
    /// Open file descriptors.
    pub open_fds: Option<u64>,
    /// Most of them.
    pub max_fds: Option<u64>,
}

impl Process {
    /// Reads all of it.
    #[must_use]
    pub fn read() -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let kibibytes = |key| field(&status, key).map(|value| value * 1024);
        // The one that the listing itself takes is counted, too.
        let open_fds = std::fs::read_dir("/proc/self/fd").ok().map(|entries| entries.count() as u64);
        Self {
            cpu: clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).ok().map(Duration::from),
            resident: kibibytes("VmRSS"),
            virtual_size: kibibytes("VmSize"),
            threads: field(&status, "Threads"),
            open_fds: open_fds.map(|count| count.saturating_sub(1)),
            max_fds: getrlimit(Resource::RLIMIT_NOFILE).ok().map(|(soft, _)| soft),
        }
    }
}

/// A number of `/proc/self/status` (proc_pid_status(5)).
fn field(status: &str, key: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_knows_itself() {
        let process = Process::read();
        assert!(process.cpu.is_some_and(|cpu| cpu < Duration::from_secs(3600)), "{process:?}");
        assert!(process.resident < process.virtual_size && process.resident > Some(1 << 16), "{process:?}");
        assert!(process.threads >= Some(1) && process.open_fds >= Some(2) && process.max_fds > process.open_fds);
        assert_eq!(field("VmRSS:\t  12 kB\nThreads:\t3\n", "Threads"), Some(3));
        assert_eq!(field("VmRSSX: 1\n", "VmRSS"), None);
    }
}
