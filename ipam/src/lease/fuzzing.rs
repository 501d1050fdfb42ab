//! What fuzzing runs (see `fuzz/`): all that reads what others wrote into the store, for any bytes. Tests run the kept
//! inputs too.
//!
//! Nothing here may panic, and what must hold for every input is asserted.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::net::IpAddr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::time::Duration;

use husk_overlay::endpoint::{AttachmentId, NetnsIdentity};
use husk_overlay::prefix::{Family, Prefix};

use super::file_name::{self, Entry};
use super::{BootTime, DEFAULT_LOCK_WAIT, Demand, LeaseStore, Supply, record};
use crate::Error;

/// What a line begins with that names a file of the store; its content follows.
const FILE: &[u8] = b"%% ";

/// Time of all that happens, in milliseconds since boot.
const NOW: BootTime = BootTime(100_000);

/// How long addresses rest.
const COOL_DOWN: Duration = Duration::from_secs(30);

/// The content of a lease file.
pub fn lease_record(text: &[u8]) {
    match record::parse(text) {
        Ok(record) => {
            assert_eq!(record.version, super::VERSION);
            let again = serde_json::to_vec(&record).expect("a record is written as JSON");
            assert_eq!(record::parse(&again).expect("what was written is read"), record);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// The name of a file in the store.
pub fn lease_name(name: &[u8]) {
    let entry = Entry::parse(OsStr::from_bytes(name));
    let again = match &entry {
        Entry::Lease { key, addresses } => file_name::lease(key, addresses),
        Entry::Released { key, addresses, at } => file_name::released(key, addresses, *at),
        Entry::Temporary | Entry::Own | Entry::Unknown => return,
    };
    assert_eq!(Entry::parse(again.as_ref()), entry);
}

/// A whole store, whose files `text` has one after the other: a line `%% NAME`, then the content. The directory is emptied
/// first.
///
/// # Panics
/// When the directory cannot be written to, or the store breaks a promise.
pub fn lease_store(directory: &Path, text: &[u8]) {
    let _ = fs::remove_dir_all(directory);
    fs::create_dir(directory).expect("a directory can be made");
    let files = fill(directory, text);
    let store = LeaseStore::new(directory, DEFAULT_LOCK_WAIT);
    let before = store.load().expect("any store can be loaded");

    // No address has two endpoints, and none that a lease names is free.
    let endpoints: Vec<IpAddr> = before.endpoints.values().flat_map(|endpoint| endpoint.addresses.iter()).collect();
    assert_eq!(endpoints.iter().collect::<BTreeSet<_>>().len(), endpoints.len());
    for name in &files {
        match Entry::parse(name) {
            Entry::Lease { addresses, .. } => {
                assert!(addresses.iter().all(|address| before.leased.contains_key(&address)));
            }
            Entry::Unknown => {
                let path = directory.join(name).display().to_string();
                assert!(before.issues.iter().any(|issue| issue.subject == path), "nobody is told of {path}");
            }
            Entry::Released { .. } | Entry::Temporary | Entry::Own => {}
        }
    }
    for (id, endpoint) in &before.endpoints {
        assert_eq!(store.find(id).expect("a lease that was loaded can be read").as_ref(), Some(endpoint));
    }

    let locked = store.lock().expect("nobody else has the store");
    let network = "husk".parse().expect("a valid name");
    let (garbage, _) = locked
        .collectable(&network, &BTreeSet::new(), Duration::from_millis(NOW.0))
        .expect("any store can be collected");
    for found in &garbage {
        assert_eq!(before.endpoints.get(&found.endpoint.id), Some(&found.endpoint));
        assert!(locked.is_unchanged(found).expect("a lease that was loaded can be read"));
    }
    allocate(&locked, &before.leased.keys().copied().collect());

    // Nothing went but what had rested or was half written.
    for name in &files {
        let may_go = matches!(Entry::parse(name), Entry::Released { .. } | Entry::Temporary | Entry::Own);
        assert!(may_go || directory.join(name).exists(), "{} is lost", name.display());
    }
}

/// Writes the files; returns their names.
fn fill(directory: &Path, text: &[u8]) -> BTreeSet<OsString> {
    let mut files: Vec<(OsString, Vec<u8>)> = Vec::new();
    for line in text.split_inclusive(|byte| *byte == b'\n') {
        match (line.strip_prefix(FILE), files.last_mut()) {
            (Some(name), _) => files.push((OsStr::from_bytes(name.trim_ascii_end()).to_owned(), Vec::new())),
            (None, Some((_, content))) => content.extend_from_slice(line),
            (None, None) => {}
        }
    }
    files.retain(|(name, content)| {
        let path = directory.join(name);
        // Names with a slash, or none that a file can have, are no names within the store.
        path.file_name() == Some(name) && path.parent() == Some(directory) && fs::write(path, content).is_ok()
    });
    files.into_iter().map(|(name, _)| name).collect()
}

/// A new pod gets addresses that nobody has, or none.
fn allocate(locked: &super::LockedStore<'_>, leased: &BTreeSet<IpAddr>) {
    let block = |text: &str| text.parse::<Prefix>().expect("a block");
    let blocks = [block("10.42.0.0/29"), block("fd42::/125")];
    let reserved = [&blocks[0], &blocks[1]].into_iter().filter_map(|block| block.nth(0)).collect();
    let families = Family::ALL.into_iter().collect();
    let supply = Supply { blocks: &blocks, families: &families, reserved, cool_down: COOL_DOWN };
    let id = AttachmentId {
        network: "husk".parse().expect("a valid name"),
        container_id: "new".parse().expect("a valid name"),
        ifname: "eth0".parse().expect("a valid name"),
    };
    let demand = Demand::plain(id.clone(), NetnsIdentity { path: "/run/netns/new".to_owned(), device: 4, inode: 7 });
    let resting = locked.addresses(COOL_DOWN, NOW).expect("any store can be looked through");
    assert!(resting.is_superset(leased));
    match locked.allocate(&supply, &demand, NOW) {
        Ok(lease) => {
            assert!(lease.endpoint.addresses.iter().all(|address| !resting.contains(&address)));
            assert_eq!(locked.release(&id, NOW).expect("it can be released"), Some(lease.endpoint.addresses));
        }
        Err(error) => assert!(matches!(error, Error::AlreadyLeased { .. } | Error::Exhausted(_)), "no lease: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn kept(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
        let listed = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        let inputs: Vec<_> =
            listed.map(|item| item.unwrap().path()).map(|path| (path.clone(), fs::read(path).unwrap())).collect();
        assert!(!inputs.is_empty(), "{} is empty", folder.display());
        inputs
    }

    #[test]
    fn kept_inputs_of_records_and_names() {
        kept("lease_record").iter().for_each(|(_, input)| lease_record(input));
        kept("lease_name").iter().for_each(|(_, input)| lease_name(input));
    }

    #[test]
    fn kept_inputs_of_the_store() {
        let directory = tempfile::tempdir().unwrap();
        for (path, input) in kept("lease_store") {
            eprintln!("{}", path.display());
            lease_store(&directory.path().join("leases"), &input);
        }
    }
}
