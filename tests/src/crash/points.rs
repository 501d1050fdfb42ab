//! The points at which a command is interrupted, and the errors that are likely there.

use std::collections::{BTreeMap, BTreeSet};

use nix::errno::Errno;

use crate::syscalls::{Call, Point, Traced};

/// The system calls of a command, one after the other, each until all of its number have been met.
#[derive(Debug, Default)]
pub struct Points {
    next: BTreeMap<i64, u32>,
    ended: BTreeSet<i64>,
    met: BTreeSet<Point>,
    /// What every run to the end made: some make more, for example when the daemon is faster than the plugin.
    always: BTreeSet<Point>,
}

impl Points {
    /// Begins with the calls that an undisturbed run made.
    #[must_use]
    pub fn of(calls: &[Call]) -> Self {
        let mut points = Self::default();
        points.learn(calls);
        points.always.extend(calls.iter().map(|call| call.point));
        points
    }

    /// Takes in what a run did: numbers of calls that no run before it made.
    pub fn learn(&mut self, calls: &[Call]) {
        for call in calls {
            self.next.entry(call.point.number).or_insert(1);
        }
    }

    /// The next point; none when all have been met.
    #[must_use]
    pub fn next(&self) -> Option<Point> {
        let open = self.next.iter().find(|(number, _)| !self.ended.contains(number));
        open.map(|(number, occurrence)| Point { number: *number, occurrence: *occurrence })
    }

    /// Takes in a run that was to be interrupted at a point, and moves on.
    pub fn done(&mut self, point: Point, run: &Traced) {
        self.learn(&run.calls);
        if run.hit.is_some() {
            return self.meet(point);
        }
        let made: BTreeSet<Point> = run.calls.iter().map(|call| call.point).collect();
        self.always.retain(|point| made.contains(point));
        self.end(point.number);
    }

    /// A point was met: the next of its number is next.
    pub fn meet(&mut self, point: Point) {
        self.met.insert(point);
        self.next.insert(point.number, point.occurrence + 1);
    }

    /// No run makes more calls of this number.
    pub fn end(&mut self, number: i64) {
        self.ended.insert(number);
    }

    /// How many points were met.
    #[must_use]
    pub fn met(&self) -> usize {
        self.met.len()
    }

    /// The calls of an undisturbed run that were never met though every run to the end made them, without those that a run makes
    /// more or less often as it has to wait or as memory happens to lie.
    #[must_use]
    pub fn missed(&self, undisturbed: &[Call]) -> Vec<String> {
        const VARYING: [&str; 9] =
            ["sendto", "recvfrom", "clock_nanosleep", "mmap", "munmap", "mprotect", "madvise", "brk", "futex"];
        undisturbed
            .iter()
            .filter(|call| self.always.contains(&call.point) && !self.met.contains(&call.point))
            .filter(|call| !VARYING.contains(&call.point.name().as_str()))
            .map(Call::to_string)
            .collect()
    }
}

/// The errors that the kernel may give for a call; none for calls that concern nothing but the program itself.
#[must_use]
pub fn likely_errors(point: Point) -> &'static [Errno] {
    match point.name().as_str() {
        "openat" => &[Errno::ENOSPC, Errno::EIO, Errno::EMFILE],
        "write" | "rename" | "renameat" | "mkdir" | "mkdirat" | "link" | "linkat" | "fsync" | "ftruncate" => {
            &[Errno::ENOSPC, Errno::EIO]
        }
        "unlink" | "unlinkat" | "read" | "getdents64" | "statx" | "newfstatat" | "fstatfs" | "ioctl" => &[Errno::EIO],
        "utimensat" => &[Errno::EIO],
        "flock" => &[Errno::ENOLCK, Errno::EINTR],
        "socket" => &[Errno::EMFILE, Errno::ENOBUFS],
        "connect" | "bind" => &[Errno::ENOBUFS, Errno::EPERM],
        "getsockname" | "setsockopt" => &[Errno::ENOBUFS],
        "sendto" | "sendmsg" | "recvfrom" | "recvmsg" => &[Errno::ENOBUFS, Errno::EPERM, Errno::EINTR],
        "setns" => &[Errno::EPERM],
        "clone3" => &[Errno::EAGAIN],
        _ => &[],
    }
}
