//! The cluster's preshared key: a file that an administrator put on every node.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use zeroize::Zeroizing;

/// Least bytes: 128 bits, if they are random.
const SHORTEST: usize = 16;

/// Most bytes that make sense.
const LONGEST: u64 = 4096;

/// Reads the secret. Line ends at its end do not count, since editors put them there.
///
/// # Errors
/// When the file cannot be read, others than this user may read it, or it is too short or too long. No error repeats any of
/// it.
pub fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>> {
    let name = path.display();
    let file = File::open(path).with_context(|| {
        format!(
            "cannot read {name}, which ipsec.presharedKeyFile names; put the cluster's secret there, or remove the key"
        )
    })?;
    let found = file.metadata().with_context(|| format!("cannot look at {name}"))?;
    if !found.is_file() {
        bail!("{name}, which ipsec.presharedKeyFile names, is no file");
    }
    let mode = found.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        bail!("{name} holds the preshared key and has mode {mode:04o}: others can read it; run `chmod 600 {name}`");
    }
    if found.uid() != 0 && found.uid() != nix::unistd::geteuid().as_raw() {
        bail!(
            "{name} holds the preshared key and belongs to user {}, who can read it; run `chown root {name}`",
            found.uid()
        );
    }
    // Room for all of it: a vector that grows leaves copies behind.
    let mut secret = Zeroizing::new(Vec::with_capacity(usize::try_from(LONGEST).unwrap_or_default() + 2));
    file.take(LONGEST + 1).read_to_end(&mut secret).with_context(|| format!("cannot read {name}"))?;
    if secret.len() as u64 > LONGEST {
        bail!("{name} is larger than {LONGEST} bytes; a preshared key is {SHORTEST} to {LONGEST} bytes");
    }
    while secret.last().is_some_and(|byte| matches!(byte, b'\n' | b'\r')) {
        secret.pop();
    }
    if secret.len() < SHORTEST {
        bail!(
            "the preshared key in {name} is {} bytes long, {SHORTEST} are the least; make one with \
             `openssl rand -base64 32` and put the same on all nodes",
            secret.len()
        );
    }
    Ok(secret)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(content: &[u8], mode: u32) -> Result<Zeroizing<Vec<u8>>, String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("psk");
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        read(&path).map_err(|error| format!("{error:#}").replace(&path.display().to_string(), "PSK"))
    }

    #[test]
    fn a_secret_is_what_is_in_the_file_but_for_line_ends() {
        for end in ["", "\n", "\r\n", "\n\n"] {
            let text = format!("0123456789abcdef{end}");
            assert_eq!(*reading(text.as_bytes(), 0o600).unwrap(), b"0123456789abcdef", "{end:?}");
        }
        assert_eq!(reading(&[0xff; 4096], 0o400).unwrap().len(), 4096);
    }

    #[test]
    fn what_cannot_be_a_secret_is_refused_with_a_remedy() {
        for (mode, told) in [(0o640, "0640"), (0o604, "0604"), (0o610, "0610")] {
            let error = reading(b"0123456789abcdef", mode).unwrap_err();
            assert!(error.contains(told) && error.contains("`chmod 600 PSK`"), "{error}");
        }
        let short = reading(b"0123456789abcde\n", 0o600).unwrap_err();
        assert!(short.contains("15 bytes long") && short.contains("openssl rand"), "{short}");
        assert!(!short.contains("0123"), "{short}");
        assert!(reading(&[1; 4097], 0o600).unwrap_err().contains("larger than 4096"));
        let directory = tempfile::tempdir().unwrap();
        let none = format!("{:#}", read(&directory.path().join("none")).unwrap_err());
        assert!(none.contains("ipsec.presharedKeyFile"), "{none}");
        assert!(format!("{:#}", read(directory.path()).unwrap_err()).contains("no file"));
    }
}
