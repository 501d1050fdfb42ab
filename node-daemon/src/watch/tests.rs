use std::fs;
use std::os::unix::fs::symlink;
use std::sync::mpsc::{Receiver, channel};

use super::*;

const PATIENCE: Duration = Duration::from_secs(10);
/// Longer than any test: only events count.
const NEVER: Duration = Duration::from_secs(3600);

fn watch(watched: &[PathBuf], renewal: Duration) -> Receiver<()> {
    let (sender, wakes) = channel();
    let wake = move || {
        // The last wakes of a test come when nobody listens any more.
        let _ = sender.send(());
    };
    folders("test", watched.to_vec(), renewal, wake).unwrap();
    // The first watches are there.
    wakes.recv_timeout(PATIENCE).unwrap();
    wakes
}

/// Changes the folder until that wakes: when a watch is renewed cannot be seen from here.
fn wakes_again(wakes: &Receiver<()>, folder: &std::path::Path) {
    let end = Instant::now() + PATIENCE;
    for number in 0.. {
        while wakes.try_recv().is_ok() {}
        fs::write(folder.join(format!("{number}.yaml")), "x").unwrap();
        if wakes.recv_timeout(Duration::from_millis(100)).is_ok() {
            return;
        }
        assert!(Instant::now() < end, "a change in {} wakes nobody", folder.display());
    }
}

#[test]
fn a_change_in_a_folder_wakes() {
    let directory = tempfile::tempdir().unwrap();
    let wakes = watch(&[directory.path().to_owned()], NEVER);
    fs::write(directory.path().join("a"), "x").unwrap();
    wakes.recv_timeout(PATIENCE).unwrap();
}

#[test]
fn a_folder_that_is_made_anew_is_watched_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let nodes = directory.path().join("nodes");
    fs::create_dir(&nodes).unwrap();
    let wakes = watch(&[directory.path().to_owned(), nodes.clone()], NEVER);
    fs::remove_dir(&nodes).unwrap();
    fs::create_dir(&nodes).unwrap();
    wakes_again(&wakes, &nodes);
}

#[test]
fn a_folder_that_becomes_another_one_without_an_event_is_watched_after_a_while() {
    let directory = tempfile::tempdir().unwrap();
    let [one, two, folder] = ["one", "two", "folder"].map(|name| directory.path().join(name));
    fs::create_dir(&one).unwrap();
    fs::create_dir(&two).unwrap();
    symlink(&one, &folder).unwrap();
    let wakes = watch(std::slice::from_ref(&folder), Duration::from_millis(20));
    // As when something is mounted over it: the path leads to another inode.
    fs::remove_file(&folder).unwrap();
    symlink(&two, &folder).unwrap();
    // The new watch wakes by itself, for what was changed before it was there.
    wakes.recv_timeout(PATIENCE).unwrap();
    wakes_again(&wakes, &two);
}

#[test]
fn a_folder_that_is_missing_at_first_is_watched_when_it_is_there_and_renewals_wake_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let late = directory.path().join("late");
    let there = tempfile::tempdir().unwrap();
    let wakes = watch(&[late.clone(), there.path().to_owned()], Duration::from_millis(20));
    assert!(wakes.recv_timeout(Duration::from_millis(200)).is_err());
    fs::create_dir(&late).unwrap();
    wakes_again(&wakes, &late);
    wakes_again(&wakes, there.path());
}
