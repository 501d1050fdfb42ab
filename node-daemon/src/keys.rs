//! The node's own keys: made on the node, kept in the run directory (tmpfs), destroyed when their time is over, never shown.
//!
//! A key belongs to an *epoch* (for WireGuard: a generation). Of each epoch the folder `keys` holds
//!
//! - `esp-7.key` or `wireguard-7.key`: the private key in base64, mode 0600; the epoch exists as long as this file does;
//! - `….json`: when it was made, and for ESP what its associations look like. No secret;
//! - `esp-7.spent`: the associations that were installed under it, see [`spent`]. No secret.
//!
//! Which technology is in use, and for ESP the parameters of all associations, follows from the configuration; keys that were
//! made for another one are destroyed when the store is opened, since the same key must never protect anything twice.

mod epoch;
pub mod preshared;
pub mod spent;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use husk_dataplane::wireguard::KeyRing;
use husk_overlay::config::Config;
use husk_overlay::esp::AssociationId;
use husk_overlay::esp::PresharedKey;
use husk_overlay::facts::{AssociationStage, OwnEpoch, SpentAssociation};
use husk_overlay::kernel::XfrmStateKey;
use husk_overlay::keys::PrivateKey;
use husk_overlay::mode::Mode;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use self::epoch::{Found, Held, Parameters};
use self::spent::SpentFile;
use crate::files;

/// Folder below the run directory.
const FOLDER: &str = "keys";

/// What the keys are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Technology {
    /// Keys of WireGuard devices.
    Wireguard,
    /// Keys that ESP associations are made of.
    Esp,
}

impl Technology {
    /// What a mode uses, if it encrypts.
    #[must_use]
    pub fn of(mode: Mode) -> Option<Self> {
        if mode.uses_wireguard() {
            Some(Self::Wireguard)
        } else if mode.uses_esp() {
            Some(Self::Esp)
        } else {
            None
        }
    }

    /// Beginning of file names.
    fn stem(self) -> &'static str {
        match self {
            Self::Wireguard => "wireguard",
            Self::Esp => "esp",
        }
    }
}

/// The own keys of the technology in use.
pub struct KeyStore {
    folder: PathBuf,
    technology: Option<Technology>,
    /// What ESP associations look like; none in other modes.
    parameters: Option<Parameters>,
    /// The cluster's preshared key.
    preshared: Option<Zeroizing<Vec<u8>>>,
    held: BTreeMap<u64, Held>,
    /// The folder was read: from then on `held` is the truth, but for files that somebody removes.
    loaded: bool,
}

impl KeyStore {
    /// Opens the folder `keys` below the run directory; mode 0700. Reads the preshared key, if one is configured.
    ///
    /// # Errors
    /// Of the file system; when the preshared key cannot be used.
    pub fn open(run_directory: &Path, config: &Config) -> Result<Self> {
        let folder = run_directory.join(FOLDER);
        files::create_directory(&folder, 0o700)?;
        let technology = Technology::of(config.mode);
        let esp = technology == Some(Technology::Esp);
        let preshared = match &config.ipsec.preshared_key_file {
            Some(path) if esp => Some(preshared::read(path)?),
            _ => None,
        };
        let parameters = esp.then(|| Parameters::of(config));
        Ok(Self { folder, technology, parameters, preshared, held: BTreeMap::new(), loaded: false })
    }

    /// The epochs whose keys the node holds. `now` is the time since boot. The folder is read once; an epoch whose key file
    /// somebody removes is over, one whose file holds no key is destroyed: peers learn a new public key from the record.
    ///
    /// # Errors
    /// Of the file system, in which case the keys that are there stay the node's.
    pub fn epochs(&mut self, now: Duration) -> Result<BTreeMap<u64, OwnEpoch>> {
        self.load(now)?;
        let known: Vec<u64> = self.held.keys().copied().collect();
        for epoch in known {
            // What cannot be told of the file does not make a known key wrong.
            if self.path(epoch, "key").try_exists().is_ok_and(|exists| !exists) {
                tracing::warn!(epoch, "somebody removed the key of this epoch; it is over");
                self.destroy(epoch)?;
            }
        }
        Ok(self.held.iter().map(|(epoch, held)| (*epoch, held.own.clone())).collect())
    }

    /// The private keys, for the kernel.
    ///
    /// # Errors
    /// Of the file system, where the keys were not read yet.
    pub fn ring(&mut self, now: Duration) -> Result<KeyRing> {
        self.load(now)?;
        let mut ring = KeyRing::default();
        for held in self.held.values() {
            ring.insert(held.key()?);
        }
        Ok(match &self.preshared {
            Some(bytes) => ring.with_preshared(PresharedKey::new(bytes.to_vec())),
            None => ring,
        })
    }

    /// Makes a key for an epoch.
    ///
    /// # Errors
    /// When there is one already, the file system refuses, or the kernel gives no randomness. Then there is no such epoch.
    pub fn begin(&mut self, epoch: u64, now: Duration) -> Result<()> {
        self.load(now)?;
        let technology = self.technology.context("this mode has no keys")?;
        anyhow::ensure!(!self.held.contains_key(&epoch), "there is a key of epoch {epoch} already");
        let made = self.make(technology, epoch, now);
        if made.is_err() {
            let _ = self.destroy(epoch);
        }
        self.held.insert(epoch, made.with_context(|| format!("cannot make a key for epoch {epoch}"))?);
        Ok(())
    }

    /// Destroys the key of an epoch; one that is not there is fine.
    ///
    /// # Errors
    /// When the file cannot be removed: then the epoch is still there.
    pub fn retire(&mut self, epoch: u64) -> Result<()> {
        self.destroy(epoch).with_context(|| format!("cannot destroy the key of epoch {epoch}"))
    }

    /// Epochs held that were ever handed to the cluster source, with the time since boot of the last time before it had them.
    #[must_use]
    pub fn published(&self) -> BTreeMap<u64, Duration> {
        self.held.iter().filter_map(|(epoch, held)| Some((*epoch, held.published()?))).collect()
    }

    /// Writes down that epochs that the cluster source does not have are about to be handed to it.
    ///
    /// # Errors
    /// When it could not be written down; then they may not be.
    pub fn note_published(&mut self, epochs: &BTreeSet<u64>, now: Duration) -> Result<()> {
        for epoch in epochs {
            let path = self.path(*epoch, "json");
            let Some(held) = self.held.get_mut(epoch) else { continue };
            let mut description = held.description.clone();
            description.published_milliseconds = Some(epoch::milliseconds(now));
            epoch::write_description(&path, &description)?;
            held.description = description;
        }
        Ok(())
    }

    /// What was written down of associations under the epochs held.
    #[must_use]
    pub fn spent(&self) -> BTreeMap<AssociationId, SpentAssociation> {
        self.held.values().flat_map(|held| held.spent.all()).map(|(id, spent)| (*id, *spent)).collect()
    }

    /// Writes down associations before they are installed, or before a policy names them. Those that have ended come first:
    /// of two with one place in the kernel, one always counts as ended.
    ///
    /// # Errors
    /// When one of them could not be written down, or belongs to no epoch held: then nothing may be done with any of them.
    pub fn spend(&mut self, associations: &BTreeMap<AssociationId, SpentAssociation>) -> Result<()> {
        let mut sorted: BTreeMap<(bool, u64), BTreeMap<AssociationId, SpentAssociation>> = BTreeMap::new();
        for (id, spent) in associations {
            sorted.entry((spent.stage != AssociationStage::Ended, spent.epoch)).or_default().insert(*id, *spent);
        }
        for ((_, epoch), more) in sorted {
            let path = self.path(epoch, "spent");
            let held = self.held.get_mut(&epoch).with_context(|| format!("there is no key of epoch {epoch}"))?;
            held.spent.add(&path, &more)?;
        }
        Ok(())
    }

    /// Takes back what was written down of associations at these places in the kernel, which it refused, so that they were
    /// never used.
    ///
    /// # Errors
    /// When that could not be written; then they stay spent, which is safe.
    pub fn take_back(&mut self, places: &BTreeSet<XfrmStateKey>) -> Result<()> {
        let epochs: Vec<u64> = self.held.keys().copied().collect();
        for epoch in epochs {
            let path = self.path(epoch, "spent");
            let Some(held) = self.held.get_mut(&epoch) else { continue };
            if held.spent.holds(places) {
                held.spent.remove(&path, places)?;
            }
        }
        Ok(())
    }

    fn load(&mut self, now: Duration) -> Result<()> {
        if self.loaded {
            return Ok(());
        }
        let mut epochs = BTreeSet::new();
        for name in names(&self.folder)? {
            match epoch::of_file(&name) {
                Some((technology, epoch)) if Some(technology) == self.technology => {
                    epochs.insert(epoch);
                }
                // Keys of another technology, and what a write that was interrupted left of one.
                Some(_) => shred(&self.folder.join(&name))?,
                None if name.starts_with(files::TEMPORARY_PREFIX) => shred(&self.folder.join(&name))?,
                None => {}
            }
        }
        let mut held = BTreeMap::new();
        for epoch in epochs {
            match self.find(epoch, now)? {
                Ok(found) => {
                    held.insert(epoch, found);
                }
                Err(reason) => {
                    tracing::warn!(epoch, reason, "the key of this epoch cannot be used any more; it is destroyed");
                    self.destroy(epoch)?;
                }
            }
        }
        self.held = held;
        self.loaded = true;
        Ok(())
    }

    /// What an earlier daemon left of an epoch, or why it is of no use.
    fn find(&self, epoch: u64, now: Duration) -> io::Result<Result<Held, String>> {
        let Some(key) = epoch::read_key(&self.path(epoch, "key"))? else {
            return Ok(Err("there is no key in its file".into()));
        };
        let found = epoch::read_description(&self.path(epoch, "json"))?;
        let Some(expected) = &self.parameters else {
            // A device goes on with its key whatever is known of it.
            let description = match found {
                Found::Understood(description) => description,
                Found::Nothing | Found::Garbage => {
                    let description = epoch::Description::wireguard(now);
                    epoch::write_description(&self.path(epoch, "json"), &description)?;
                    description
                }
            };
            return Ok(Ok(Held::new(&key, description, SpentFile::default())));
        };
        let Found::Understood(description) = found else {
            return Ok(Err("it is not known what its associations look like".into()));
        };
        if description.esp.as_ref() != Some(&expected.with_preshared(self.preshared.as_deref(), &key)) {
            return Ok(Err("it was made for another configuration of mode, ipsec or preshared key".into()));
        }
        match SpentFile::read(&self.path(epoch, "spent"), epoch)? {
            Some(spent) => Ok(Ok(Held::new(&key, description, spent))),
            None => Ok(Err("it is not known which associations were installed under it".into())),
        }
    }

    /// The key file comes last: without it the other two mean nothing.
    fn make(&self, technology: Technology, epoch: u64, now: Duration) -> Result<Held> {
        let mut random = Zeroizing::new([0; 32]);
        let mut salt = [0; 8];
        getrandom::fill(&mut *random).and_then(|()| getrandom::fill(&mut salt)).map_err(io::Error::other)?;
        let key = PrivateKey::from_random(*random)?;
        let mut description = epoch::Description::wireguard(now);
        if technology == Technology::Esp {
            let parameters = self.parameters.as_ref().context("this mode has no associations")?;
            // 63 bits: the numbers of an API server's objects are signed (k8s.io/apimachinery pkg/util/json).
            description.spi_salt = u64::from_ne_bytes(salt) >> 1;
            description.esp = Some(parameters.with_preshared(self.preshared.as_deref(), &key));
            SpentFile::create(&self.path(epoch, "spent"))?;
        }
        epoch::write_description(&self.path(epoch, "json"), &description)?;
        files::replace(&self.path(epoch, "key"), key.to_base64().as_bytes(), 0o600)?;
        Ok(Held::new(&key, description, SpentFile::default()))
    }

    fn destroy(&mut self, epoch: u64) -> io::Result<()> {
        for ending in ["key", "json", "spent"] {
            shred(&self.path(epoch, ending))?;
        }
        self.held.remove(&epoch);
        Ok(())
    }

    fn path(&self, epoch: u64, ending: &str) -> PathBuf {
        let stem = self.technology.map_or("none", Technology::stem);
        self.folder.join(format!("{stem}-{epoch}.{ending}"))
    }
}

/// Destroys all keys below a run directory, whatever they were for: those of an earlier boot.
///
/// # Errors
/// Of the file system.
pub fn discard(run_directory: &Path) -> io::Result<()> {
    let folder = run_directory.join(FOLDER);
    if !folder.try_exists()? {
        return Ok(());
    }
    for name in names(&folder)? {
        shred(&folder.join(name))?;
    }
    Ok(())
}

/// Names of the files in the folder, sorted.
fn names(folder: &Path) -> io::Result<BTreeSet<String>> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("cannot list {}: {error}", folder.display()));
    let mut all = BTreeSet::new();
    for entry in std::fs::read_dir(folder).map_err(named)? {
        all.insert(entry.map_err(named)?.file_name().to_string_lossy().into_owned());
    }
    Ok(all)
}

/// Overwrites a file and removes it, so that its memory holds no key until somebody else gets it; one that is not there is
/// fine.
fn shred(path: &Path) -> io::Result<()> {
    let overwrite = || -> io::Result<()> {
        let flags = nix::fcntl::OFlag::O_NOFOLLOW.bits();
        let mut file = OpenOptions::new().write(true).custom_flags(flags).open(path)?;
        let length = usize::try_from(file.metadata()?.len()).unwrap_or(0);
        file.write_all(&vec![0; length])
    };
    // A file that cannot be overwritten can still be removed.
    let _ = overwrite();
    files::remove(path)
}

#[cfg(test)]
pub(crate) mod tests;
