//! The second net under what is given away: the node's own secrets, searched for in every form in which somebody might have
//! written them down. The first one is not to collect them, and to take out what stands under their names ([`super::redact`]).

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use memchr::memmem;
use zeroize::Zeroizing;

use crate::files;

/// Shorter secrets would be found by chance, in words.
const SHORTEST: usize = 12;

/// Largest file that holds a key or a token, in bytes.
const LARGEST: u64 = 16 << 10;

/// How PEM says that a private key follows (RFC 7468).
const PEM: &[u8] = b"PRIVATE KEY-----";

/// A secret that is looked for.
struct Needle {
    /// Where it comes from: no part of it.
    origin: String,
    bytes: Zeroizing<Vec<u8>>,
}

/// The secrets that are looked for. Without `Debug`: it holds them.
pub(super) struct Net {
    needles: Vec<Needle>,
    keys: PathBuf,
    /// Key files that were read.
    known: BTreeSet<PathBuf>,
}

impl Net {
    /// A net for the private keys in a folder.
    pub(super) fn new(keys: PathBuf) -> Self {
        let pem = Needle { origin: "a private key in PEM form".into(), bytes: Zeroizing::new(PEM.to_vec()) };
        Self { needles: vec![pem], keys, known: BTreeSet::new() }
    }

    /// Looks for what is in a file, too: as it is, and what it is the base64 form of. One that is not there holds nothing; one
    /// that cannot be read cannot have been given away by this process either.
    pub(super) fn add_file(&mut self, path: &Path) {
        let Ok(Some(text)) = files::read_text(path, LARGEST) else { return };
        let text = Zeroizing::new(text);
        self.add(&path.display().to_string(), text.trim_end());
    }

    /// Looks for a secret, too.
    pub(super) fn add(&mut self, origin: &str, secret: &str) {
        self.add_bytes(origin, secret.as_bytes());
        if let Ok(decoded) = STANDARD.decode(secret.trim()) {
            self.add_bytes(origin, &Zeroizing::new(decoded));
        }
    }

    fn add_bytes(&mut self, origin: &str, secret: &[u8]) {
        if secret.len() >= SHORTEST {
            let needles = forms(secret).into_iter().filter(|bytes| bytes.len() >= SHORTEST);
            self.needles.extend(needles.map(|bytes| Needle { origin: origin.to_owned(), bytes }));
        }
    }

    /// Reads keys that were made since.
    fn refresh(&mut self) {
        let entries = fs::read_dir(&self.keys).into_iter().flatten().flatten();
        let paths = entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|it| it == "key"));
        let new: Vec<PathBuf> = paths.filter(|path| !self.known.contains(path)).collect();
        for path in new {
            self.add_file(&path);
            self.known.insert(path);
        }
    }

    /// Where the secret comes from that these bytes hold, if they hold one.
    pub(super) fn find(&mut self, bytes: &[u8]) -> Option<&str> {
        self.refresh();
        let found = self.needles.iter().find(|needle| memmem::find(bytes, &needle.bytes).is_some());
        found.map(|needle| needle.origin.as_str())
    }
}

/// Forms in which somebody might write a secret down: as it is, in hexadecimal, in base64 at each place where it can begin.
fn forms(secret: &[u8]) -> Vec<Zeroizing<Vec<u8>>> {
    let mut forms = vec![Zeroizing::new(secret.to_owned())];
    for separator in ["", ":", " "] {
        for upper in [false, true] {
            let digits = secret.iter().map(|byte| if upper { format!("{byte:02X}") } else { format!("{byte:02x}") });
            forms.push(Zeroizing::new(digits.collect::<Vec<_>>().join(separator).into_bytes()));
        }
    }
    for separator in [",", ", "] {
        let numbers: Vec<String> = secret.iter().map(u8::to_string).collect();
        forms.push(Zeroizing::new(numbers.join(separator).into_bytes()));
    }
    for engine in [&STANDARD_NO_PAD, &URL_SAFE_NO_PAD] {
        for before in 0..3 {
            let shifted = Zeroizing::new([&[0; 2][..before], secret].concat());
            let text = Zeroizing::new(engine.encode(&*shifted));
            // Characters that share their bits with what is before or after are not the secret's alone.
            let alone = (before * 8).div_ceil(6)..shifted.len() * 8 / 6;
            forms.push(Zeroizing::new(text.as_bytes()[alone].to_vec()));
        }
    }
    forms
}

#[cfg(test)]
#[allow(clippy::duplicate_mod, reason = "the engine's tests look for secrets, too")]
#[expect(unreachable_pub, reason = "the end-to-end harness, whose file it is, offers it")]
#[path = "../../../../tests/src/secret.rs"]
mod secret;

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: [u8; 32] = *b"\x01\xfe0123456789abcdef\xff\x80ghijklmnqr\0p";

    fn net() -> (tempfile::TempDir, Net) {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("esp-1.key"), STANDARD.encode(SECRET)).unwrap();
        let net = Net::new(directory.path().to_owned());
        (directory, net)
    }

    #[test]
    fn a_key_is_found_in_every_form() {
        let (_directory, mut net) = net();
        assert_eq!(net.find(b"nothing of interest"), None);
        // By another program's idea of what forms there are.
        for form in secret::forms(&SECRET) {
            let text = [b"before ".as_slice(), &form, b" after"].concat();
            assert!(net.find(&text).is_some_and(|origin| origin.ends_with("esp-1.key")), "{form:?}");
        }
        for before in 0..5 {
            let inside = [&vec![7; before][..], &SECRET, b"xyz"].concat();
            assert!(net.find(STANDARD.encode(inside).as_bytes()).is_some(), "{before}");
        }
        let broken = STANDARD.encode(&SECRET[..31]);
        assert_eq!(net.find(broken.as_bytes()), None, "not all of it");
    }

    #[test]
    fn keys_that_are_made_meanwhile_count_and_those_that_go_still_do() {
        let (directory, mut net) = net();
        let (first, second) = (STANDARD.encode(SECRET), STANDARD.encode([9; 32]));
        assert!(net.find(first.as_bytes()).is_some() && net.find(second.as_bytes()).is_none());
        fs::write(directory.path().join("esp-2.key"), &second).unwrap();
        fs::remove_file(directory.path().join("esp-1.key")).unwrap();
        assert!(net.find(second.as_bytes()).is_some() && net.find(first.as_bytes()).is_some());
    }

    #[test]
    fn a_text_secret_is_found_as_it_is_and_short_ones_are_not_looked_for() {
        let (directory, mut net) = net();
        let file = directory.path().join("psk");
        fs::write(&file, "correct horse battery staple\n").unwrap();
        net.add_file(&file);
        net.add_file(&directory.path().join("none"));
        net.add("short", "word");
        assert!(net.find(b"psk=correct horse battery staple;").is_some());
        assert!(net.find(STANDARD.encode("correct horse battery staple").as_bytes()).is_some());
        assert_eq!(net.find(b"a word is no secret"), None);
        assert!(net.find(b"-----BEGIN EC PRIVATE KEY-----\n").is_some());
    }
}
