//! The node's private keys: made on the node, kept in the run directory (tmpfs) with mode 0600, never shown.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use husk_overlay::keys::PrivateKey;
use zeroize::Zeroizing;

use crate::files;

/// The folder of key files.
pub struct KeyStore {
    folder: PathBuf,
    /// Content of the files read so far.
    known: BTreeMap<u8, Zeroizing<String>>,
}

impl KeyStore {
    /// Opens the folder `keys` below the run directory; mode 0700.
    ///
    /// # Errors
    /// Of the file system.
    pub fn open(run_directory: &Path) -> io::Result<Self> {
        let folder = run_directory.join("keys");
        files::create_directory(&folder, 0o700)?;
        Ok(Self { folder, known: BTreeMap::new() })
    }

    /// The key of a WireGuard device, made on first use. A file is read once; where it is missing or holds no key, there is a
    /// new key: peers learn the new public key from the node record.
    ///
    /// # Errors
    /// Of the file system, in which case the key that is there stays the node's; or when the kernel gives no randomness.
    pub fn wireguard(&mut self, slot: u8) -> io::Result<PrivateKey> {
        let path = self.folder.join(format!("wireguard-{slot}.key"));
        // What cannot be told of the file does not make a known key wrong.
        let removed = path.try_exists().is_ok_and(|exists| !exists);
        if let Some(text) = self.known.get(&slot).filter(|_| !removed) {
            return PrivateKey::from_base64(text).map_err(io::Error::other);
        }
        let key = match read(&path)? {
            Some(key) => key,
            None => make(&path)?,
        };
        self.known.insert(slot, key.to_base64());
        Ok(key)
    }
}

/// The key in a file; none if there is no file or no key in it.
fn read(path: &Path) -> io::Result<Option<PrivateKey>> {
    let text = match files::read_text(path, 256) {
        Ok(None) => return Ok(None),
        Ok(Some(text)) => Zeroizing::new(text),
        // Not text, or too long.
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            tracing::warn!(%error, "key file is replaced by a new key");
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let key = PrivateKey::from_base64(&text);
    Ok(key
        .inspect_err(|error| tracing::warn!(file = %path.display(), %error, "key file is replaced by a new key"))
        .ok())
}

fn make(path: &Path) -> io::Result<PrivateKey> {
    let mut random = Zeroizing::new([0; 32]);
    getrandom::fill(&mut *random).map_err(io::Error::other)?;
    let key = PrivateKey::from_random(*random).map_err(io::Error::other)?;
    files::replace(path, key.to_base64().as_bytes(), 0o600)?;
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_key_is_kept_private_and_a_broken_file_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let open = || KeyStore::open(directory.path()).unwrap();
        let first = open().wireguard(0).unwrap().public();
        assert_eq!(open().wireguard(0).unwrap().public(), first);
        assert_ne!(open().wireguard(1).unwrap().public(), first);
        let path = directory.path().join("keys/wireguard-0.key");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let mut last = first;
        for broken in [&[0xff, 0xfe][..], b"no key", &[b'A'; 300], b""] {
            std::fs::write(&path, broken).unwrap();
            let key = open().wireguard(0).unwrap().public();
            assert_ne!(key, last);
            assert_eq!(open().wireguard(0).unwrap().public(), key);
            assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
            last = key;
        }
    }

    #[test]
    fn a_key_is_read_once_and_goes_with_its_file() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = KeyStore::open(directory.path()).unwrap();
        let first = store.wireguard(0).unwrap().public();
        let path = directory.path().join("keys/wireguard-0.key");
        std::fs::write(&path, "half of a ke").unwrap();
        assert_eq!(store.wireguard(0).unwrap().public(), first);
        std::fs::remove_file(&path).unwrap();
        assert_ne!(store.wireguard(0).unwrap().public(), first);
    }

    #[test]
    fn a_file_that_cannot_be_read_is_no_reason_for_a_new_key() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = KeyStore::open(directory.path()).unwrap();
        let path = directory.path().join("keys/wireguard-0.key");
        // Reading fails with ELOOP; replacing it would work.
        std::os::unix::fs::symlink("wireguard-0.key", &path).unwrap();
        let error = store.wireguard(0).err().unwrap();
        assert!(error.to_string().contains("wireguard-0.key"), "{error}");
        assert!(path.is_symlink());
    }
}
