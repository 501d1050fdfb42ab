//! The forms in which somebody might write a secret down, for those who look for one where none may be.
//!
//! The daemon's own tests take in this file too: it needs nothing but the standard library.

/// RFC 4648, section 4.
const BASE64: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// RFC 4648, section 5: for URLs and names of files.
const BASE64_URL: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// Every form in which somebody might write these bytes down: as they are, as numbers, in hexadecimal digits, in base64.
#[must_use]
pub fn forms(secret: &[u8]) -> Vec<Vec<u8>> {
    let list = |write: fn(&u8) -> String, separator: &str| {
        secret.iter().map(write).collect::<Vec<_>>().join(separator).into_bytes()
    };
    let mut forms = vec![secret.to_owned()];
    forms.extend([", ", ","].map(|separator| list(u8::to_string, separator)));
    for separator in ["", " ", ":"] {
        forms.push(list(|byte| format!("{byte:02x}"), separator));
        forms.push(list(|byte| format!("{byte:02X}"), separator));
    }
    forms.extend([BASE64, BASE64_URL].map(|alphabet| base64(secret, alphabet)));
    forms
}

/// As much of the base64 form as these bytes alone make: the last character may share its bits with padding, which some leave
/// away, or with bytes that follow.
fn base64(bytes: &[u8], alphabet: &[u8; 64]) -> Vec<u8> {
    let group = |three: &[u8]| {
        let byte = |at: usize| u32::from(*three.get(at).unwrap_or(&0));
        let word = (byte(0) << 16) | (byte(1) << 8) | byte(2);
        [18, 12, 6, 0].map(|shift| alphabet[usize::try_from((word >> shift) & 0x3f).unwrap_or(0)])
    };
    let mut text: Vec<u8> = bytes.chunks(3).flat_map(group).collect();
    text.truncate(bytes.len() * 4 / 3);
    text
}
