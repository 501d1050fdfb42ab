//! What wakes the reconcile loop: changes in folders, events of the kernel. A wake carries no data; the pass reads.
//!
//! Folders are watched by inode (inotify(7)): a watch says nothing of a folder that was made anew, or mounted over, under the
//! same name. So the watches are renewed every few seconds, which costs nothing where the inode is still the same. Looking up
//! a folder on a share whose server is gone may take for ever: kernel events have a thread of their own, and so has each
//! group of folders that one may hang without the other.
//!
//! What cannot be watched is looked at with the loop's tick only.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use husk_dataplane::events::{Monitor, Subject};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};

/// How often watches of folders are renewed.
pub const RENEWAL: Duration = Duration::from_secs(5);

/// What changes a folder's content.
const INTEREST: AddWatchFlags = AddWatchFlags::IN_CREATE
    .union(AddWatchFlags::IN_CLOSE_WRITE)
    .union(AddWatchFlags::IN_MOVED_TO)
    .union(AddWatchFlags::IN_MOVED_FROM)
    .union(AddWatchFlags::IN_DELETE)
    .union(AddWatchFlags::IN_DELETE_SELF);

/// Signs that a watched folder may be another one now: a watch ended, or a folder within came or went.
const STALE: AddWatchFlags = AddWatchFlags::IN_IGNORED.union(AddWatchFlags::IN_ISDIR);

/// Wakes on every change in the folders, on a thread of its own that ends with the process.
///
/// # Errors
/// When no thread can be had.
pub fn folders(
    name: &str,
    folders: Vec<PathBuf>,
    renewal: Duration,
    wake: impl Fn() + Send + 'static,
) -> io::Result<()> {
    thread::Builder::new().name(name.to_owned()).spawn(move || {
        if let Err(error) = watch_folders(folders, renewal, &wake) {
            tracing::warn!(%error, "folders are not watched, only looked at every few seconds");
        }
    })?;
    Ok(())
}

/// Wakes on every change of these kinds in the network namespace of the caller, on a thread of its own that ends with the
/// process.
///
/// # Errors
/// When no thread can be had.
pub fn kernel(subjects: &[Subject], wake: impl Fn() + Send + 'static) -> io::Result<()> {
    let mut monitors = Vec::new();
    for subject in subjects.iter().copied() {
        match Monitor::open(subject) {
            Ok(monitor) => monitors.push(monitor),
            Err(error) => {
                tracing::warn!(?subject, %error, "no kernel events: what others change is noticed only every few seconds");
            }
        }
    }
    thread::Builder::new().name("husk-kernel".into()).spawn(move || {
        if let Err(error) = watch_kernel(&monitors, &wake) {
            tracing::error!(%error, "no kernel events any more: what others change is noticed only every few seconds");
        }
    })?;
    Ok(())
}

fn watch_kernel(monitors: &[Monitor], wake: &impl Fn()) -> io::Result<()> {
    loop {
        let mut ready: Vec<_> = monitors.iter().map(|it| PollFd::new(it.as_fd(), PollFlags::POLLIN)).collect();
        match poll(&mut ready, PollTimeout::NONE) {
            Err(nix::Error::EINTR) => continue,
            other => other?,
        };
        // What the news are does not matter, lost ones neither: the pass reads everything.
        let mut news = false;
        for monitor in monitors {
            news |= monitor.drain()?;
        }
        if news {
            wake();
        }
    }
}

/// A folder and what is known of its watch.
struct Watched {
    folder: PathBuf,
    watch: Option<WatchDescriptor>,
    /// The log says that it is not watched.
    told: bool,
}

fn watch_folders(folders: Vec<PathBuf>, renewal: Duration, wake: &impl Fn()) -> io::Result<()> {
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
    let mut folders: Vec<Watched> =
        folders.into_iter().map(|folder| Watched { folder, watch: None, told: false }).collect();
    loop {
        if renew(&inotify, &mut folders) {
            // What changed before the watch was there gave no event.
            wake();
        }
        let renewed = Instant::now();
        while let Some(left) = renewal.checked_sub(renewed.elapsed()) {
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut ready = [PollFd::new(inotify.as_fd(), PollFlags::POLLIN)];
            match poll(&mut ready, timeout) {
                Ok(0) | Err(nix::Error::EINTR) => continue,
                other => other?,
            };
            let stale = drain(&inotify)?;
            wake();
            if stale {
                break;
            }
        }
    }
}

/// Watches each folder by what its path leads to now. True if that is something else than before.
fn renew(inotify: &Inotify, folders: &mut [Watched]) -> bool {
    let before: BTreeSet<Option<WatchDescriptor>> = folders.iter().map(|it| it.watch).collect();
    for it in folders.iter_mut() {
        match inotify.add_watch(&it.folder, INTEREST) {
            Ok(watch) => {
                it.watch = Some(watch);
                it.told = false;
            }
            Err(error) => {
                it.watch = None;
                if !it.told {
                    tracing::warn!(folder = %it.folder.display(), %error, "folder is not watched, only looked at every few seconds");
                    it.told = true;
                }
            }
        }
    }
    folders.iter().any(|it| it.watch.is_some() && !before.contains(&it.watch))
}

/// Takes the events that wait. True if watches may have to be renewed.
fn drain(inotify: &Inotify) -> io::Result<bool> {
    let mut stale = false;
    loop {
        match inotify.read_events() {
            Ok(events) => stale |= events.iter().any(|event| event.mask.intersects(STALE)),
            Err(nix::Error::EAGAIN) => return Ok(stale),
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests;
