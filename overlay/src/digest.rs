//! One way to derive stable identifiers (interface names, MAC addresses, file names) from names.

use sha2::{Digest, Sha256};

/// SHA-256 over length-prefixed parts, so that no two lists of parts collide by concatenation.
#[must_use]
pub fn sha256(parts: &[&str]) -> [u8; 32] {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part.as_bytes());
    }
    hash.finalize().into()
}

/// [`sha256`] as 64 lower-case hexadecimal digits.
#[must_use]
pub fn hex(parts: &[&str]) -> String {
    use std::fmt::Write as _;
    sha256(parts).iter().fold(String::with_capacity(64), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a String cannot fail");
        text
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn parts_do_not_run_together() {
        assert_ne!(super::hex(&["ab", "c"]), super::hex(&["a", "bc"]));
        assert_eq!(super::hex(&["a"]).len(), 64);
    }
}
