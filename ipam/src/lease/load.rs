//! Reading the whole store, for the daemon and for garbage collection.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use husk_overlay::endpoint::{AttachmentId, Endpoints};
use husk_overlay::issue::{Issue, IssueKind, Severity};
use husk_overlay::record::DualStack;

use super::BootTime;
use super::file_name::{self, Entry};
use super::record::{self, Record};
use crate::Error;

/// What the store holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Leases {
    /// The endpoints.
    pub endpoints: Endpoints,
    /// When each lease was made.
    pub created: BTreeMap<AttachmentId, BootTime>,
    /// Addresses that no new pod may get, each with the file that says so: those of the endpoints and those of files
    /// that could not be read.
    pub leased: BTreeMap<IpAddr, PathBuf>,
    /// Released addresses, each with the time of its last release.
    pub released: BTreeMap<IpAddr, BootTime>,
    /// What is wrong with the store.
    pub issues: Vec<Issue>,
}

/// Reads the store.
pub(super) fn load(directory: &Path) -> Result<Leases, Error> {
    load_where(directory, |_, _| Ok(true))
}

/// Reads the leases whose key and file the filter lets pass.
pub(super) fn load_where(
    directory: &Path,
    filter: impl Fn(&str, &Path) -> Result<bool, Error>,
) -> Result<Leases, Error> {
    let listing = match fs::read_dir(directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Leases::default()),
        other => other.map_err(Error::io("list", directory))?,
    };
    let mut leases = Leases::default();
    let mut records = Vec::new();
    for item in listing {
        let item = item.map_err(Error::io("list", directory))?;
        let path = item.path();
        match Entry::parse(&item.file_name()) {
            Entry::Lease { key, addresses } if filter(&key, &path)? => match record::read(&path) {
                // Released since the directory was listed.
                Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {}
                Err(error) => {
                    leases.leased.extend(addresses.iter().map(|address| (address, path.clone())));
                    leases.issues.push(damaged(&path, &addresses, &error.to_string()));
                }
                Ok(record) => records.push((path, key, addresses, record)),
            },
            Entry::Released { addresses, at, .. } => {
                for address in addresses.iter() {
                    let latest = leases.released.entry(address).or_insert(at);
                    *latest = at.max(*latest);
                }
            }
            Entry::Unknown => leases.issues.push(unknown(&path)),
            Entry::Lease { .. } | Entry::Temporary | Entry::Own => {}
        }
    }
    // The oldest lease wins a contradiction: it is the one whose pod has been using the address.
    records.sort_by(|(left_path, .., left), (right_path, .., right)| {
        (left.created, left_path).cmp(&(right.created, right_path))
    });
    for (path, key, addresses, record) in records {
        add(&mut leases, path, &key, &addresses, record);
    }
    leases.issues.sort();
    Ok(leases)
}

fn add(leases: &mut Leases, path: PathBuf, key: &str, addresses: &DualStack, record: Record) {
    let endpoint = record.endpoint;
    let wrong = if file_name::key(&endpoint.id) != key || endpoint.addresses != *addresses {
        Some("its name and its content contradict each other".to_owned())
    } else if endpoint.host_interface != endpoint.id.host_interface() {
        Some(format!("its host interface {} is not that of its attachment", endpoint.host_interface))
    } else if leases.endpoints.contains_key(&endpoint.id) {
        Some(format!("attachment {} has another lease", endpoint.id))
    } else {
        let taken = addresses.iter().find_map(|address| Some((address, leases.leased.get(&address)?)));
        taken.map(|(address, other)| format!("{address} is also leased by {}", other.display()))
    };
    for address in addresses.iter() {
        leases.leased.entry(address).or_insert_with(|| path.clone());
    }
    match wrong {
        Some(wrong) => leases.issues.push(damaged(&path, addresses, &wrong)),
        None => {
            leases.created.insert(endpoint.id.clone(), BootTime(record.created));
            leases.endpoints.insert(endpoint.id.clone(), endpoint);
        }
    }
}

fn damaged(path: &Path, addresses: &DualStack, wrong: &str) -> Issue {
    let addresses: Vec<String> = addresses.iter().map(|address| address.to_string()).collect();
    Issue {
        severity: Severity::Error,
        kind: IssueKind::BadLease,
        subject: path.display().to_string(),
        message: format!(
            "lease is not usable: {wrong}; its pod is not connected, and {} stays taken",
            addresses.join(" and ")
        ),
        remedy: "delete the pod that has the address; if there is none, remove the file".to_owned(),
    }
}

fn unknown(path: &Path) -> Issue {
    Issue {
        severity: Severity::Warning,
        kind: IssueKind::BadLease,
        subject: path.display().to_string(),
        message: "this file in the lease store was not made by Husk".to_owned(),
        remedy: "remove it".to_owned(),
    }
}
