//! Directory source: a folder of manifests on shared storage, or kept in step by other means.
//!
//! ```text
//! DIRECTORY/.husk-cluster       says that this is the folder, not an empty mount point
//! DIRECTORY/nodes/NAME.yaml     OverlayNode, written by that node only
//! DIRECTORY/blocks/CIDR.yaml    AddressBlock; its exclusive creation is the allocation lock
//! DIRECTORY/**/*.yaml           whatever people add: AddressPool, NetworkPolicy, Namespace and others, one folder deep
//! ```
//!
//! A file is parsed again only when its identity (size, modification time, inode) changed, and the snapshot is put together
//! again only when what was parsed changed: with nothing new, a snapshot of a big cluster costs a listing and a copy.

mod stamp;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use husk_overlay::issue::{Issue, IssueKind, Severity};
use husk_overlay::manifest::{self, Manifest};
use husk_overlay::name::NodeName;
use husk_overlay::prefix::Prefix;
use husk_overlay::record::{NodeRecord, Snapshot};
use husk_policy::object::Objects;
use husk_policy::read::collect::objects_from;
use husk_policy::read::{Object, Reading, read};

use self::stamp::Stamp;
use super::{Claim, ClusterSource, SourceError};
use crate::files;

/// Marks a directory as the cluster's.
const MARKER: &str = ".husk-cluster";

/// Folder of the nodes' records.
const NODES: &str = "nodes";

/// Folder of the allocation lock.
const BLOCKS: &str = "blocks";

/// Largest manifest file in bytes.
const LARGEST_FILE: u64 = 4 << 20;

/// True if trying again does not help, but a person: the path names something else, or may not be written.
fn is_lasting(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    matches!(
        error.kind(),
        Kind::AlreadyExists
            | Kind::NotADirectory
            | Kind::PermissionDenied
            | Kind::ReadOnlyFilesystem
            | Kind::InvalidFilename
            | Kind::InvalidInput
    )
}

struct Parsed {
    stamp: Stamp,
    /// The stamp will tell a change.
    settled: bool,
    manifests: Vec<Manifest>,
    policy: Vec<Reading>,
    issues: Vec<Issue>,
}

impl Parsed {
    /// True if a snapshot is the same with either.
    fn says_the_same(&self, other: &Self) -> bool {
        (&self.manifests, &self.issues) == (&other.manifests, &other.issues)
    }
}

fn policy_of(parsed: Option<&Parsed>) -> &[Reading] {
    parsed.map_or(&[], |parsed| &parsed.policy)
}

/// The directory source.
pub struct DirectorySource {
    root: PathBuf,
    parsed: BTreeMap<PathBuf, Parsed>,
    /// What has the name of a manifest and is no file.
    odd: BTreeSet<PathBuf>,
    /// What these make; none while they are newer.
    assembled: Option<Snapshot>,
    /// What policy was made of, and whether it still is.
    objects: Arc<Objects>,
    objects_are_current: bool,
}

/// Kind and name of an object of policy.
fn name_of(reading: &Reading) -> Option<(&'static str, String)> {
    Some(match reading.object.as_ref()? {
        Object::Namespace(name, _) => ("Namespace", name.clone()),
        Object::Pod(name, _) => ("Pod", name.to_string()),
        Object::NetworkPolicy(name, _) => ("NetworkPolicy", name.to_string()),
        Object::ClusterNetworkPolicy(name, _) => ("ClusterNetworkPolicy", name.clone()),
    })
}

impl DirectorySource {
    /// Opens the directory, creating it where it does not exist.
    ///
    /// `joined` says that this node has seen the cluster before: a directory without the marker is then taken for an
    /// unmounted share, not for a new cluster.
    ///
    /// # Errors
    /// [`SourceError::Unavailable`] when trying again may help; else when the path can be no cluster directory.
    pub fn open(root: &Path, joined: bool) -> Result<Self, SourceError> {
        let source = Self {
            root: root.to_owned(),
            parsed: BTreeMap::new(),
            odd: BTreeSet::new(),
            assembled: None,
            objects: Arc::default(),
            objects_are_current: true,
        };
        if joined {
            if fs::metadata(root).is_ok_and(|metadata| !metadata.is_dir()) {
                let reason = format!("{} is no directory", root.display());
                return Err(io::Error::new(io::ErrorKind::NotADirectory, reason).into());
            }
        } else {
            source
                .create()
                .map_err(|error| if is_lasting(&error) { error.into() } else { source.unavailable(error) })?;
        }
        for folder in Self::folders(root) {
            // A share that is not mounted yet has nothing to tidy.
            if let Err(error) = files::remove_leftovers(&folder) {
                tracing::debug!(%error, "the cluster directory is not tidied");
            }
        }
        Ok(source)
    }

    /// Folders of a cluster directory to watch for changes.
    #[must_use]
    pub fn folders(root: &Path) -> [PathBuf; 3] {
        [root.to_owned(), root.join(NODES), root.join(BLOCKS)]
    }

    fn create(&self) -> io::Result<()> {
        for folder in Self::folders(&self.root) {
            files::create_directory(&folder, 0o755)?;
        }
        let text = b"This folder holds the state of a Husk cluster.\n";
        files::create_exclusively(&self.root.join(MARKER), text, 0o644).map(drop)
    }

    fn nodes(&self) -> PathBuf {
        self.root.join(NODES)
    }

    fn blocks(&self) -> PathBuf {
        self.root.join(BLOCKS)
    }

    fn unavailable(&self, reason: impl ToString) -> SourceError {
        SourceError::Unavailable { subject: self.root.display().to_string(), reason: reason.to_string() }
    }

    /// An unmounted share looks like an empty cluster, and one that is being filled like a cluster without nodes.
    fn check_mounted(&self) -> Result<(), SourceError> {
        if !self.root.join(MARKER).exists() {
            return Err(self.unavailable(format!("the file {MARKER} is missing, as if the share were not mounted")));
        }
        for folder in [self.nodes(), self.blocks()] {
            if !folder.is_dir() {
                return Err(self.unavailable(format!("the folder {} is missing", folder.display())));
            }
        }
        Ok(())
    }

    /// Every manifest file with its stamp, one folder deep; none for what has the name of a manifest and is no file.
    fn list(&self) -> Result<BTreeMap<PathBuf, Option<Stamp>>, SourceError> {
        self.check_mounted()?;
        let mut found = BTreeMap::new();
        let mut folders = vec![(self.root.clone(), 0)];
        while let Some((folder, depth)) = folders.pop() {
            for entry in fs::read_dir(&folder).map_err(|error| self.unavailable(error))? {
                let entry = entry.map_err(|error| self.unavailable(error))?;
                let path = entry.path();
                let is_manifest = path.extension().is_some_and(|end| end == "yaml" || end == "yml");
                if entry.file_name().to_string_lossy().starts_with('.') {
                    continue;
                }
                match fs::metadata(&path) {
                    Ok(metadata) if metadata.is_dir() && depth == 0 => folders.push((path, 1)),
                    Ok(metadata) if is_manifest => {
                        found.insert(path, metadata.is_file().then(|| Stamp::of(&metadata)));
                    }
                    Ok(_) => {}
                    // A link that leads nowhere or in a circle; unless the entry itself vanished: the next listing tells.
                    Err(_) if is_manifest && fs::symlink_metadata(&path).is_ok() => {
                        found.insert(path, None);
                    }
                    Err(_) => {}
                }
            }
        }
        // Unmounted meanwhile, the listing would be that of the empty mount point.
        self.check_mounted()?;
        Ok(found)
    }

    /// Path as issues show it.
    fn shown(&self, path: &Path) -> String {
        path.strip_prefix(&self.root).unwrap_or(path).display().to_string()
    }

    fn unreadable(&self, path: &Path, message: String) -> Issue {
        Issue {
            severity: Severity::Error,
            kind: IssueKind::BadManifest,
            subject: self.shown(path),
            message,
            remedy: "write it anew, or remove it".into(),
        }
    }

    /// Reads what changed since the last time.
    fn refresh(&mut self) -> Result<(), SourceError> {
        let listed = self.list()?;
        let mut changed = false;
        let odd = listed.iter().filter(|(_, stamp)| stamp.is_none()).map(|(path, _)| path.clone()).collect();
        changed |= self.odd != odd;
        self.odd = odd;
        self.parsed.retain(|path, gone| {
            let stays = listed.get(path).is_some_and(Option::is_some);
            changed |= !stays;
            self.objects_are_current &= stays || gone.policy.is_empty();
            stays
        });
        for (path, stamp) in listed {
            let Some(stamp) = stamp else { continue };
            let known = self.parsed.get(&path);
            if known.is_some_and(|known| known.settled && known.stamp == stamp) {
                continue;
            }
            let parsed = self.parse(&path, stamp);
            changed |= match (known, &parsed) {
                (Some(known), Some(parsed)) => !known.says_the_same(parsed),
                (known, parsed) => known.is_some() != parsed.is_some(),
            };
            self.objects_are_current &= policy_of(known) == policy_of(parsed.as_ref());
            match parsed {
                Some(parsed) => self.parsed.insert(path, parsed),
                None => self.parsed.remove(&path),
            };
        }
        if changed {
            self.assembled = None;
        }
        Ok(())
    }

    /// Puts together what was read.
    fn assemble(&self) -> Snapshot {
        let no_file = |path: &PathBuf| self.unreadable(path, "it has the name of a manifest, but is no file".into());
        let mut issues: Vec<Issue> = self.odd.iter().map(no_file).collect();
        let mut manifests = Vec::new();
        for (path, parsed) in &self.parsed {
            issues.extend(parsed.issues.iter().cloned());
            for manifest in &parsed.manifests {
                match self.own_file(manifest).filter(|own| own != path && self.holds(own, manifest)) {
                    Some(own) => issues.push(self.displaced(path, &own, manifest)),
                    None => manifests.push(manifest.clone()),
                }
            }
        }
        let mut snapshot = manifest::snapshot_from(manifests);
        snapshot.issues.extend(issues);
        snapshot.issues.sort();
        snapshot
    }

    fn parse(&self, path: &Path, stamp: Stamp) -> Option<Parsed> {
        let settled = stamp.is_settled(SystemTime::now());
        match files::read_text(path, LARGEST_FILE) {
            Ok(None) => None,
            Ok(Some(text)) => {
                let manifest::Parsed { manifests, policy_objects, issues } =
                    manifest::parse_all(&self.shown(path), &text);
                let mut policy: Vec<Reading> = policy_objects.iter().map(read).collect();
                if !issues.is_empty() || policy.iter().any(|reading| reading.object.is_none()) {
                    // What is not understood may be a policy that was: those that the file does not say anew stay in force.
                    let said: BTreeSet<_> = policy.iter().filter_map(name_of).collect();
                    let before = self.policy_before(path).into_iter();
                    policy.extend(
                        before.filter(|it| name_of(it).is_some_and(|name| !said.contains(&name))).collect::<Vec<_>>(),
                    );
                }
                Some(Parsed { stamp, settled, manifests, policy, issues })
            }
            Err(error) => {
                let issues = vec![self.unreadable(path, error.to_string())];
                // What cannot be read now may be readable next time, with nothing in its stamp to tell.
                let policy = self.policy_before(path);
                Some(Parsed { stamp, settled: false, manifests: Vec::new(), policy, issues })
            }
        }
    }

    /// The objects of policy that the file held when it was understood last.
    fn policy_before(&self, path: &Path) -> Vec<Reading> {
        self.parsed.get(path).map(|parsed| parsed.policy.clone()).unwrap_or_default()
    }

    /// The file that is the object's: the one its owner writes, and whose creation is the allocation lock. What another file
    /// says of the same object does not count.
    fn own_file(&self, manifest: &Manifest) -> Option<PathBuf> {
        match manifest {
            Manifest::Node(record) => Some(self.node_file(&record.name)),
            Manifest::Block { cidr, .. } => Some(self.block_file(*cidr)),
            Manifest::Pool(_) => None,
        }
    }

    /// True if the file has a manifest of the same object.
    fn holds(&self, path: &Path, manifest: &Manifest) -> bool {
        let same = |other: &Manifest| (other.kind(), other.name()) == (manifest.kind(), manifest.name());
        self.parsed.get(path).is_some_and(|parsed| parsed.manifests.iter().any(same))
    }

    fn displaced(&self, path: &Path, own: &Path, manifest: &Manifest) -> Issue {
        let (kind, name) = (manifest.kind(), manifest.name());
        let owner = match manifest {
            Manifest::Block { node, .. } => format!(" for {node}"),
            Manifest::Node(_) | Manifest::Pool(_) => String::new(),
        };
        let message = format!("it claims {kind} {name}{owner}, which {} holds already; it is ignored", self.shown(own));
        Issue {
            severity: Severity::Error,
            kind: IssueKind::BadManifest,
            subject: self.shown(path),
            message,
            remedy: format!("remove the {kind} from this file"),
        }
    }

    fn node_file(&self, node: &NodeName) -> PathBuf {
        self.nodes().join(format!("{node}.yaml"))
    }

    fn block_file(&self, block: Prefix) -> PathBuf {
        self.blocks().join(format!("{}.yaml", manifest::block_name(block)))
    }
}

impl ClusterSource for DirectorySource {
    fn snapshot(&mut self) -> Result<Snapshot, SourceError> {
        self.refresh()?;
        let snapshot = self.assembled.take().unwrap_or_else(|| self.assemble());
        Ok(self.assembled.insert(snapshot).clone())
    }

    fn policy_objects(&mut self) -> Result<Arc<Objects>, SourceError> {
        self.refresh()?;
        if !self.objects_are_current {
            let objects = objects_from(self.parsed.values().flat_map(|parsed| &parsed.policy));
            if objects != *self.objects {
                self.objects = Arc::new(objects);
            }
            self.objects_are_current = true;
        }
        Ok(Arc::clone(&self.objects))
    }

    fn publish(&mut self, record: &NodeRecord) -> Result<(), SourceError> {
        self.check_mounted()?;
        let yaml = Manifest::Node(record.clone()).to_yaml();
        Ok(files::replace(&self.node_file(&record.name), yaml.as_bytes(), 0o644)?)
    }

    fn claim(&mut self, block: Prefix, node: &NodeName) -> Result<Claim, SourceError> {
        self.check_mounted()?;
        let yaml = manifest::block(block, node).to_yaml();
        let created = files::create_exclusively(&self.block_file(block), yaml.as_bytes(), 0o644)?;
        Ok(if created { Claim::Granted } else { Claim::Taken })
    }

    fn release(&mut self, block: Prefix, node: &NodeName) -> Result<(), SourceError> {
        self.check_mounted()?;
        let path = self.block_file(block);
        // The lock is this very file, whatever other manifests say of the block.
        let text = files::read_text(&path, LARGEST_FILE)?.unwrap_or_default();
        let held = manifest::parse_all(&self.shown(&path), &text).manifests;
        if held == [manifest::block(block, node)] {
            files::remove(&path)?;
        }
        Ok(())
    }

    fn withdraw(&mut self, node: &NodeName) -> Result<(), SourceError> {
        self.check_mounted()?;
        Ok(files::remove(&self.node_file(node))?)
    }
}

#[cfg(test)]
mod tests;
