//! Room: on the disks that Husk writes to, and in memory.

use std::fs;
use std::path::{Path, PathBuf};

use husk_overlay::ipc::SOCKET_FILE;
use nix::sys::statvfs::{FsFlags, statvfs};

use super::{Action, Check, Evidence, Finding, Fix, Looked, Outcome, Unknown};
use crate::huskctl::{bytes, daemon_process};

/// Disks.
pub(super) const DISK: Check =
    Check { id: "disk", title: "the directories Husk writes to can be written and have room", look: disk };

/// Memory.
pub(super) const MEMORY: Check =
    Check { id: "memory", title: "the host and the daemon have memory left", look: memory };

/// Free bytes below which leases, keys and records may fail to be written: they are small files, a few hundred of them.
const LEAST_BYTES: u64 = 4 << 20;

/// Free files, alike: a lease is one.
const LEAST_FILES: u64 = 128;

/// Hundredths that are left from which it is told.
const LITTLE: u64 = 5;

/// On large disks a few hundredths are plenty.
const PLENTY: u64 = 100 << 20;

/// Available memory below which the kernel is about to end processes.
const LEAST_MEMORY: u64 = 64 << 20;

/// A file system, as statvfs(3) shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Room {
    read_only: bool,
    free: u64,
    size: u64,
    files_free: u64,
    /// 0 where files are not counted.
    files: u64,
}

fn disk(evidence: &Evidence) -> Looked {
    let config = evidence.config()?;
    let (run, state) = (evidence.places.run_directory.clone(), evidence.places.state_directory.clone());
    let cni = [&config.cni.config_directory, &config.cni.bin_directory].map(|path| evidence.host.shared(path));
    let mut findings = Vec::new();
    let mut least: Option<u64> = None;
    for directory in [run, state].into_iter().chain(cni) {
        // What does not exist is made when it is needed, and has the room of where it will be.
        let Some(there) = directory.ancestors().find(|it| it.exists()) else { continue };
        let stat = statvfs(there).map_err(|error| Unknown(format!("cannot look at {}: {error}", there.display())))?;
        let unit = stat.fragment_size();
        let room = Room {
            read_only: stat.flags().contains(FsFlags::ST_RDONLY),
            free: stat.blocks_available() * unit,
            size: stat.blocks() * unit,
            files_free: stat.files_available(),
            files: stat.files(),
        };
        least = Some(least.map_or(room.free, |least| least.min(room.free)));
        findings.extend(judge(&directory, room));
    }
    Ok(Outcome::of(findings, format!("{} and more are free", bytes(least.unwrap_or_default()))))
}

fn judge(directory: &Path, room: Room) -> Option<Finding> {
    let name = directory.display();
    let told = vec![
        format!("{name}: {} of {} free", bytes(room.free), bytes(room.size)),
        format!("{name}: {} of {} files free", room.files_free, room.files),
    ];
    let usage = |because: &str| {
        let command = Action::run_on_host("du", ["-x", "-h", "-d", "2", &name.to_string()]);
        Fix::by_hand(format!("make room on the file system of {name}; this shows what is in it"), [command], because)
    };
    let to_say = "what can go is for you to say";
    if room.read_only {
        let cause = format!(
            "{name} cannot be written: its file system is mounted read-only, perhaps after an error of its disk"
        );
        let log = Action::run_on_host("findmnt", ["--target", &name.to_string()]);
        let words = "look into the kernel's log for errors of the disk, then mount it writable (mount -o remount,rw)";
        return Some(Finding::blocking(
            cause,
            told,
            Fix::by_hand(words, [log], "a disk with errors must not be written"),
        ));
    }
    if room.free < LEAST_BYTES {
        let cause = format!(
            "the file system of {name} is full: leases, keys and records cannot be written, and pods not be added"
        );
        return Some(Finding::error(cause, told, usage(to_say)));
    }
    if room.files > 0 && room.files_free < LEAST_FILES {
        let cause =
            format!("the file system of {name} has no files left (inodes), whatever room it has: pods cannot be added");
        return Some(Finding::error(cause, told, usage(to_say)));
    }
    let little = room.free * 100 < room.size * LITTLE && room.free < PLENTY;
    let few = room.files > 0 && room.files_free * 100 < room.files * LITTLE;
    (little || few).then(|| Finding::warning(format!("the file system of {name} is nearly full"), told, usage(to_say)))
}

fn memory(evidence: &Evidence) -> Looked {
    let text = fs::read_to_string("/proc/meminfo")?;
    let value = |name: &str| meminfo(&text, name).ok_or_else(|| Unknown(format!("/proc/meminfo has no {name}")));
    let (total, available) = (value("MemTotal")?, value("MemAvailable")?);
    let told = vec![format!("MemAvailable: {} of {}", bytes(available), bytes(total))];
    let mut findings = Vec::new();
    let top = Action::run_on_host("ps", ["-e", "-o", "rss,pid,comm", "--sort", "-rss"]);
    let fix = || Fix::by_hand("find out who has it, largest first", [top.clone()], "what can end is for you to say");
    if available < LEAST_MEMORY {
        let cause = "the host has hardly any memory left: the kernel is about to end processes, Husk's among them";
        findings.push(Finding::error(cause, told, fix()));
    } else if available * 100 < total * LITTLE {
        findings.push(Finding::warning("the host has little memory left", told, fix()));
    }
    let mut seen = format!("{} of {} available", bytes(available), bytes(total));
    if let Some(limits) = daemon_process(&evidence.places.run_directory.join(SOCKET_FILE)).and_then(limits) {
        seen = format!("{seen}; the daemon uses {} of its limit of {}", bytes(limits.used), bytes(limits.limit));
        findings.extend(judge_daemon(&limits));
    }
    Ok(Outcome::of(findings, seen))
}

/// A value of /proc/meminfo in bytes.
pub(super) fn meminfo(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
}

/// Memory of the daemon's control group.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Limits {
    /// What cannot be given back to make room.
    used: u64,
    limit: u64,
    /// Processes that were ended for want of memory.
    killed: u64,
    directory: PathBuf,
}

/// Limits of a process' control group; none where it has none, or where it cannot be seen.
fn limits(pid: i32) -> Option<Limits> {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = |controller: &str| {
        groups.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':').skip(1);
            let named = parts.next()?.split(',').any(|name| name == controller);
            named.then(|| parts.next()).flatten().map(|path| path.trim_start_matches('/').to_owned())
        })
    };
    if let Some(path) = path("memory") {
        let names = ["memory.limit_in_bytes", "memory.stat", "total_rss", "memory.oom_control"];
        return limits_in(&Path::new("/sys/fs/cgroup/memory").join(path), names);
    }
    let names = ["memory.max", "memory.stat", "anon", "memory.events"];
    limits_in(&Path::new("/sys/fs/cgroup").join(path("")?), names)
}

/// Of either version (Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst); no limit is `max`, or about 2^63.
fn limits_in(directory: &Path, [limit, stat, used, events]: [&str; 4]) -> Option<Limits> {
    let read = |name: &str| fs::read_to_string(directory.join(name)).ok();
    let value = |text: &str, name: &str| {
        text.lines().find_map(|line| line.split_once(' ').filter(|(key, _)| *key == name)?.1.trim().parse().ok())
    };
    let limit = read(limit)?.trim().parse().ok().filter(|limit| *limit < 1 << 62)?;
    let used = value(&read(stat)?, used)?;
    let killed = read(events).and_then(|text| value(&text, "oom_kill")).unwrap_or_default();
    Some(Limits { used, limit, killed, directory: directory.to_owned() })
}

fn judge_daemon(limits: &Limits) -> Option<Finding> {
    let Limits { used, limit, killed, directory } = limits;
    if used.saturating_mul(10) < limit.saturating_mul(9) {
        return None;
    }
    let cause = "the daemon has nearly used up the memory it is allowed, and will be ended by the kernel";
    let told = vec![
        format!("{}: {} of {}", directory.display(), bytes(*used), bytes(*limit)),
        format!("processes ended there for want of memory so far: {killed}"),
    ];
    let larger = (limit >> 20) * 2;
    let words = format!(
        "allow it more: resources.limits.memory: {larger}Mi of container huskd in DaemonSet husk, or MemoryMax={larger}M of its unit"
    );
    Some(Finding::error(cause, told, Fix::words(words)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use husk_overlay::issue::Severity;

    #[test]
    fn disks_are_judged_by_what_husk_needs_of_them() {
        let room = Room { read_only: false, free: 1 << 40, size: 1 << 41, files_free: 0, files: 0 };
        let severity = |room| judge(Path::new("/run/husk"), room).map(|finding| finding.severity);
        assert_eq!(severity(room), None, "no files are counted");
        assert_eq!(severity(Room { read_only: true, ..room }), Some(Severity::Blocking));
        assert_eq!(severity(Room { free: 4096, ..room }), Some(Severity::Error));
        assert_eq!(severity(Room { free: 50 << 20, ..room }), Some(Severity::Warning));
        assert_eq!(severity(Room { free: 200 << 20, ..room }), None, "a hundredth of a large disk is enough");
        assert_eq!(severity(Room { files: 1000, files_free: 3, ..room }), Some(Severity::Error));
    }

    #[test]
    fn both_versions_of_control_groups_are_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        for (name, text) in [
            ("memory.max", "1000\n"),
            ("memory.stat", "anon 950\nfile 7\ntotal_rss 20\n"),
            ("memory.events", "low 0\noom 1\noom_kill 2\n"),
            ("memory.limit_in_bytes", "9223372036854771712\n"),
        ] {
            fs::write(path.join(name), text).unwrap();
        }
        let two = limits_in(path, ["memory.max", "memory.stat", "anon", "memory.events"]).unwrap();
        assert_eq!((two.used, two.limit, two.killed), (950, 1000, 2));
        assert!(judge_daemon(&two).unwrap().evidence[1].ends_with(": 2"));
        assert_eq!(judge_daemon(&Limits { used: 500, ..two }), None);
        assert_eq!(
            limits_in(path, ["memory.limit_in_bytes", "memory.stat", "total_rss", "memory.oom_control"]),
            None,
            "no limit"
        );
    }

    #[test]
    fn memory_is_counted_in_kilobytes() {
        assert_eq!(meminfo("MemTotal:  16 kB\nMemAvailable:\t4 kB\n", "MemAvailable"), Some(4096));
        assert_eq!(meminfo("", "MemAvailable"), None);
    }
}
