//! X25519 keys (RFC 7748). A private key cannot be printed, compared, cloned or serialised; it is wiped when dropped.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// Why bytes or text are not a key. Says nothing of the key itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Not base64 of 32 bytes.
    #[error("not a key: 44 characters of base64 (32 bytes) are expected")]
    Encoding,
    /// The all-zero key, which no peer may have.
    #[error("not a key: all bytes are zero")]
    Zero,
    /// A private key that belongs to neither end of an association.
    #[error("the private key belongs to neither end of the association")]
    Foreign,
    /// A public key that gives the same secret with every private key.
    #[error("the peer's public key is of small order: the secret would be known to all")]
    SmallOrder,
}

/// A public key; text and serde form is base64, as `wg` prints it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(try_from = "String", into = "String")]
pub struct PublicKey([u8; 32]);

impl PublicKey {
    /// Takes the 32 bytes of a public key.
    ///
    /// # Errors
    /// When all are zero.
    pub fn from_bytes(bytes: [u8; 32]) -> Result<Self, KeyError> {
        if bytes == [0; 32] { Err(KeyError::Zero) } else { Ok(Self(bytes)) }
    }

    /// The key gives the all-zero secret with every private key (RFC 7748, section 6.1).
    #[must_use]
    pub fn is_small_order(&self) -> bool {
        let mut bytes = self.0;
        // The highest bit is ignored (RFC 7748, section 5).
        bytes[31] &= 127;
        SMALL_ORDER.contains(&bytes)
    }

    /// The 32 bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&BASE64.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PublicKey {
    type Err = KeyError;
    fn from_str(text: &str) -> Result<Self, KeyError> {
        let bytes = BASE64.decode(text.trim()).map_err(|_| KeyError::Encoding)?;
        Self::from_bytes(bytes.try_into().map_err(|_| KeyError::Encoding)?)
    }
}

impl TryFrom<String> for PublicKey {
    type Error = KeyError;
    fn try_from(text: String) -> Result<Self, KeyError> {
        text.parse()
    }
}

impl From<PublicKey> for String {
    fn from(key: PublicKey) -> String {
        key.to_string()
    }
}

/// The points of small order of Curve25519, all forms that 255 bits allow (<https://cr.yp.to/ecdh.html>, "validate").
const SMALL_ORDER: [[u8; 32]; 7] = [
    // 0
    [
        0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
        0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
    ],
    // 1
    [
        0x01, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
        0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
    ],
    // order 8
    [
        0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f, 0xc4, 0x6a, 0xda, 0x09,
        0x8d, 0xeb, 0x9c, 0x32, 0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16, 0x5f, 0x49, 0xb8, 0x00,
    ],
    // order 8
    [
        0x5f, 0x9c, 0x95, 0xbc, 0xa3, 0x50, 0x8c, 0x24, 0xb1, 0xd0, 0xb1, 0x55, 0x9c, 0x83, 0xef, 0x5b, 0x04, 0x44,
        0x5c, 0xc4, 0x58, 0x1c, 0x8e, 0x86, 0xd8, 0x22, 0x4e, 0xdd, 0xd0, 0x9f, 0x11, 0x57,
    ],
    // p - 1
    [
        0xec, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
        0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f,
    ],
    // p, a form of 0
    [
        0xed, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
        0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f,
    ],
    // p + 1, a form of 1
    [
        0xee, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
        0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f,
    ],
];

/// A private key. Deliberately without `Debug`, `Display`, `Clone`, `PartialEq` and serde.
#[derive(Zeroize, ZeroizeOnDrop)]
pub struct PrivateKey([u8; 32]);

impl PrivateKey {
    /// Makes a key of 32 random bytes, clamped as RFC 7748 section 5 says, so that what the kernel hands back compares
    /// equal to what was set.
    ///
    /// # Errors
    /// When all bytes are zero: the source of randomness is broken.
    pub fn from_random(mut bytes: [u8; 32]) -> Result<Self, KeyError> {
        if bytes == [0; 32] {
            return Err(KeyError::Zero);
        }
        bytes[0] &= 248;
        bytes[31] = (bytes[31] & 127) | 64;
        let key = Self(bytes);
        bytes.zeroize();
        Ok(key)
    }

    /// Reads the base64 form from a key file or a UAPI line.
    ///
    /// # Errors
    /// When it is not base64 of 32 bytes; the error does not repeat the text.
    pub fn from_base64(text: &str) -> Result<Self, KeyError> {
        let decoded = Zeroizing::new(BASE64.decode(text.trim()).map_err(|_| KeyError::Encoding)?);
        Self::from_random(decoded.as_slice().try_into().map_err(|_| KeyError::Encoding)?)
    }

    /// The base64 form, for the key file; wiped when dropped.
    #[must_use]
    pub fn to_base64(&self) -> Zeroizing<String> {
        Zeroizing::new(BASE64.encode(self.0))
    }

    /// The bytes, for the kernel.
    #[must_use]
    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }

    /// The public key that belongs to this one.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        PublicKey(x25519_dalek::x25519(self.0, x25519_dalek::X25519_BASEPOINT_BYTES))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 7748 section 6.1, Alice's pair.
    #[test]
    fn public_key_matches_the_rfc_vector() {
        let private = [
            0x77, 0x07, 0x6d, 0x0a, 0x73, 0x18, 0xa5, 0x7d, 0x3c, 0x16, 0xc1, 0x72, 0x51, 0xb2, 0x66, 0x45, 0xdf, 0x4c,
            0x2f, 0x87, 0xeb, 0xc0, 0x99, 0x2a, 0xb1, 0x77, 0xfb, 0xa5, 0x1d, 0xb9, 0x2c, 0x2a,
        ];
        let public = PrivateKey::from_random(private).unwrap().public();
        let expected = [
            0x85, 0x20, 0xf0, 0x09, 0x89, 0x30, 0xa7, 0x54, 0x74, 0x8b, 0x7d, 0xdc, 0xb4, 0x3e, 0xf7, 0x5a, 0x0d, 0xbf,
            0x3a, 0x0d, 0x26, 0x38, 0x1a, 0xf4, 0xeb, 0xa4, 0xa9, 0x8e, 0xaa, 0x9b, 0x4e, 0x6a,
        ];
        assert_eq!(public.as_bytes(), &expected);
    }

    #[test]
    fn base64_round_trips_and_errors_hide_the_text() {
        let key = PrivateKey::from_random([7; 32]).unwrap();
        let again = PrivateKey::from_base64(&key.to_base64()).unwrap();
        assert_eq!(key.public(), again.public());
        let error = PrivateKey::from_base64("c2VjcmV0").err().unwrap();
        assert!(!error.to_string().contains("c2VjcmV0"));
        assert_eq!(key.public().to_string().parse::<PublicKey>(), Ok(key.public()));
        assert_eq!("AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=".parse::<PublicKey>(), Err(KeyError::Zero));
    }

    /// The library's own arithmetic agrees with the table.
    #[test]
    fn keys_of_small_order_are_those_that_give_no_secret() {
        for bytes in SMALL_ORDER {
            assert_eq!(x25519_dalek::x25519([8; 32], bytes), [0; 32], "{bytes:?}");
            let mut high = bytes;
            high[31] |= 128;
            assert!(PublicKey(bytes).is_small_order() && PublicKey(high).is_small_order());
        }
        assert!(!PrivateKey::from_random([7; 32]).unwrap().public().is_small_order());
    }
}
