//! Keys and SPIs of ESP security associations (RFC 4303), agreed on without IKE.
//!
//! Every node publishes an X25519 public key per *epoch*. A security association (SA) belongs to a sender in one of its
//! epochs and a receiver in one of its own; both sides compute its SPI from what both have published, and its key with
//! HKDF-SHA256 (RFC 5869) from their Diffie-Hellman secret:
//!
//! ```text
//! ikm  = X25519(own private key, peer's public key)          RFC 7748
//! salt = the cluster's preshared key, or nothing
//! info = "husk esp key v1", then of the sender and then of the receiver: name, epoch, address, public key; cipher
//! okm  = AES key, 16 or 32 bytes, and salt, 4 bytes           RFC 4106, section 8.1
//! ```
//! Each field of `info` goes with its length before it, so that no two associations share one. Lengths and epochs have 64
//! bits, addresses 4 or 16 bytes, all big-endian; names and the cipher are text. The SPI hashes the same fields behind a
//! label and a salt of 64 bits that the receiver has published:
//!
//! ```text
//! word = first 32 bits of SHA-256("husk esp spi v1", salt, the fields of info behind its label)
//! spi  = 256 + word mod (2^32 - 256)                         0 to 255 are reserved: RFC 4303, section 2.1
//! ```
//! The two directions differ in who is the sender; a node that comes back with another address, name or key gets other keys.
//! An epoch's private key is random and lives in memory-backed storage only, so that no association is ever keyed like an
//! earlier one.

use std::fmt;
use std::net::IpAddr;

use hkdf::Hkdf;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use crate::keys::{KeyError, PrivateKey, PublicKey};
use crate::name::NodeName;

/// Label of [`derive()`]'s `info`. Other than [`SPI_LABEL`], so that an SPI says nothing of a key.
const KEY_LABEL: &[u8] = b"husk esp key v1";
/// Label of what [`spi`] hashes.
const SPI_LABEL: &[u8] = b"husk esp spi v1";

/// Label of what [`Association::id`] hashes.
const ID_LABEL: &[u8] = b"husk esp association v1";

/// Smallest SPI that may be used; those below are reserved (RFC 4303, section 2.1).
const FIRST_SPI: u32 = 256;

/// Cipher of an SA: AES-GCM with a 16-byte ICV (RFC 4106).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Aead {
    /// Key of 128 bits.
    #[default]
    #[serde(rename = "aes-gcm-128")]
    AesGcm128,
    /// Key of 256 bits.
    #[serde(rename = "aes-gcm-256")]
    AesGcm256,
}

impl Aead {
    /// All ciphers.
    pub const ALL: [Self; 2] = [Self::AesGcm128, Self::AesGcm256];

    /// The text form, as in the configuration.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::AesGcm128 => "aes-gcm-128",
            Self::AesGcm256 => "aes-gcm-256",
        }
    }

    /// Bytes of keying material: the AES key and RFC 4106's salt of 4 bytes.
    #[must_use]
    pub fn key_length(self) -> usize {
        match self {
            Self::AesGcm128 => 20,
            Self::AesGcm256 => 36,
        }
    }
}

impl fmt::Display for Aead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// One end of an SA.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EspEnd {
    /// Node.
    pub node: NodeName,
    /// Its epoch.
    pub epoch: u64,
    /// Underlay address ESP packets carry.
    pub address: IpAddr,
    /// Public key of the epoch.
    pub public_key: PublicKey,
}

/// Whose keys an SA is made of. Holds no secret.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Association {
    /// Who sends.
    pub sender: EspEnd,
    /// Who receives.
    pub receiver: EspEnd,
    /// Cipher.
    pub cipher: Aead,
}

/// Tells one association from another, whatever its SPI.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct AssociationId(pub u64);

impl Association {
    /// Its identity: a hash of all that its key is derived from.
    #[must_use]
    pub fn id(&self) -> AssociationId {
        let mut hash = Sha256::new();
        let mut field = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_be_bytes());
            hash.update(bytes);
        };
        field(ID_LABEL);
        self.transcript(field);
        let word = hash.finalize()[..8].try_into().expect("a digest of 32 bytes has eight");
        AssociationId(u64::from_be_bytes(word))
    }

    /// Everything about it, each field with its length (64 bits, big-endian) before it.
    fn transcript(&self, mut field: impl FnMut(&[u8])) {
        for end in [&self.sender, &self.receiver] {
            field(end.node.as_str().as_bytes());
            field(&end.epoch.to_be_bytes());
            match end.address {
                IpAddr::V4(address) => field(&address.octets()),
                IpAddr::V6(address) => field(&address.octets()),
            }
            field(end.public_key.as_bytes());
        }
        field(self.cipher.as_str().as_bytes());
    }
}

/// The SPI of an association: both sides compute it from what they have published. The receiver chooses the salt, and so
/// gets other SPIs when two of its inbound associations collide. `bits` is 32; fewer make collisions likely, for tests.
#[must_use]
pub fn spi(association: &Association, salt: u64, bits: u8) -> u32 {
    let mut hash = Sha256::new();
    let mut field = |bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_be_bytes());
        hash.update(bytes);
    };
    field(SPI_LABEL);
    field(&salt.to_be_bytes());
    association.transcript(field);
    let digest = hash.finalize();
    let word = u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]]);
    let span = (1_u64 << bits.min(32)).min(u64::from(u32::MAX - FIRST_SPI) + 1);
    let offset = u64::from(word) % span;
    FIRST_SPI + u32::try_from(offset).expect("the span leaves room above the first SPI")
}

/// A secret that all nodes of a cluster share, mixed into every key. Deliberately without `Debug`, `Display`, `Clone`,
/// `PartialEq` and serde.
#[derive(Zeroize, ZeroizeOnDrop)]
pub struct PresharedKey(Vec<u8>);

impl PresharedKey {
    /// Takes the secret.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    /// Tells one secret from another, for who keeps keys that were made with it; keyed with a random value of the node, so
    /// that it says nothing of the secret to who does not know that value.
    #[must_use]
    pub fn fingerprint(&self, node_secret: &PrivateKey) -> [u8; 32] {
        let mut output = [0; 32];
        Hkdf::<Sha256>::new(Some(node_secret.expose()), &self.0)
            .expand(b"husk preshared key fingerprint v1", &mut output)
            .expect("32 bytes are one block of SHA-256");
        output
    }
}

/// Keying material of an SA: the AES key, then RFC 4106's salt. Deliberately without `Debug`, `Display`, `Clone`,
/// `PartialEq` and serde.
#[derive(Zeroize, ZeroizeOnDrop)]
pub struct EspKey(Vec<u8>);

impl EspKey {
    /// The bytes, for the kernel.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

/// The key of an association. `own` is the private key of one of its ends.
///
/// # Errors
/// When the private key belongs to neither end, or the other end's public key is of small order, so that the secret would
/// be known to all (RFC 7748, section 6.1).
pub fn derive(
    association: &Association,
    own: &PrivateKey,
    preshared: Option<&PresharedKey>,
) -> Result<EspKey, KeyError> {
    let public = own.public();
    let other = if association.sender.public_key == public {
        &association.receiver
    } else if association.receiver.public_key == public {
        &association.sender
    } else {
        return Err(KeyError::Foreign);
    };
    let secret = Zeroizing::new(x25519_dalek::x25519(*own.expose(), *other.public_key.as_bytes()));
    if *secret == [0; 32] {
        return Err(KeyError::SmallOrder);
    }
    let mut info = Vec::new();
    let mut field = |bytes: &[u8]| {
        info.extend_from_slice(&(bytes.len() as u64).to_be_bytes());
        info.extend_from_slice(bytes);
    };
    field(KEY_LABEL);
    association.transcript(field);
    let hkdf = Hkdf::<Sha256>::new(preshared.map(|key| key.0.as_slice()), &*secret);
    let mut key = EspKey(vec![0; association.cipher.key_length()]);
    hkdf.expand(&info, &mut key.0).expect("36 bytes are two blocks of SHA-256");
    Ok(key)
}

#[cfg(test)]
mod tests;
