//! An epoch's files, but for what was spent.

use std::io;
use std::path::Path;
use std::time::Duration;

use husk_overlay::config::Config;
use husk_overlay::esp::{Aead, PresharedKey};
use husk_overlay::facts::OwnEpoch;
use husk_overlay::keys::{KeyError, PrivateKey};
use husk_overlay::mode::Mode;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::Technology;
use super::spent::SpentFile;
use crate::files;

/// An epoch whose key the node holds. Without `Debug`: it holds the private key.
pub(super) struct Held {
    key: Zeroizing<String>,
    pub(super) own: OwnEpoch,
    pub(super) description: Description,
    pub(super) spent: SpentFile,
}

impl Held {
    pub(super) fn new(key: &PrivateKey, description: Description, spent: SpentFile) -> Self {
        let own = OwnEpoch {
            public_key: key.public(),
            spi_salt: description.spi_salt,
            created: Duration::from_millis(description.created_milliseconds),
        };
        Self { key: key.to_base64(), own, description, spent }
    }

    /// When it was last handed to the cluster source before that had it, as time since boot.
    pub(super) fn published(&self) -> Option<Duration> {
        self.description.published_milliseconds.map(Duration::from_millis)
    }

    pub(super) fn key(&self) -> Result<PrivateKey, KeyError> {
        PrivateKey::from_base64(&self.key)
    }
}

/// What is known of an epoch besides its key. No secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Description {
    /// When it was made: milliseconds since boot (`CLOCK_BOOTTIME`).
    pub(super) created_milliseconds: u64,
    /// When it was last handed to the cluster source before that had it, likewise; none while it never was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) published_milliseconds: Option<u64>,
    /// What SPIs towards this node are made with.
    pub(super) spi_salt: u64,
    /// What its associations look like.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) esp: Option<Parameters>,
}

impl Description {
    pub(super) fn wireguard(now: Duration) -> Self {
        Self { created_milliseconds: milliseconds(now), published_milliseconds: None, spi_salt: 0, esp: None }
    }
}

pub(super) fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// What all associations of an epoch have in common. With another one of these, an association could be made anew under the
/// key of an earlier one, with its sequence numbers starting anew; so that another one takes another epoch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Parameters {
    mode: Mode,
    cipher: Aead,
    udp_port: Option<u16>,
    replay_window: u32,
    spi_bits: u8,
    /// Tells the preshared key from others, in hexadecimal; keyed with the epoch's private key, so that it tells nobody else.
    preshared: Option<String>,
}

impl Parameters {
    /// Those of a configuration, the preshared key left out.
    pub(super) fn of(config: &Config) -> Self {
        Self {
            mode: config.mode,
            cipher: config.ipsec.cipher,
            udp_port: config.ipsec.udp_port,
            replay_window: config.ipsec.replay_window,
            spi_bits: config.ipsec.spi_bits,
            preshared: None,
        }
    }

    /// As they are written down for the epoch of this key.
    pub(super) fn with_preshared(&self, preshared: Option<&Vec<u8>>, key: &PrivateKey) -> Self {
        let hex = |digest: [u8; 32]| digest.iter().map(|byte| format!("{byte:02x}")).collect();
        let fingerprint = preshared.map(|bytes| PresharedKey::new(bytes.clone()).fingerprint(key));
        Self { preshared: fingerprint.map(hex), ..self.clone() }
    }
}

/// The technology and epoch a file belongs to, by its name.
pub(super) fn of_file(name: &str) -> Option<(Technology, u64)> {
    let (stem, ending) = name.rsplit_once('.')?;
    let (technology, epoch) = stem.rsplit_once('-')?;
    let all = [Technology::Wireguard, Technology::Esp];
    let technology = all.into_iter().find(|it| it.stem() == technology)?;
    let epoch = epoch.parse().ok()?;
    ["key", "json", "spent"].contains(&ending).then_some((technology, epoch))
}

/// The key in a file; none if there is no file or no key in it.
pub(super) fn read_key(path: &Path) -> io::Result<Option<PrivateKey>> {
    let text = match files::read_text(path, 256) {
        Ok(None) => return Ok(None),
        Ok(Some(text)) => Zeroizing::new(text),
        // Not text, or too long.
        Err(error) if error.kind() == io::ErrorKind::InvalidData => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok(PrivateKey::from_base64(&text).ok())
}

/// What was found in a file.
pub(super) enum Found {
    Understood(Description),
    Garbage,
    Nothing,
}

pub(super) fn read_description(path: &Path) -> io::Result<Found> {
    match files::read_text(path, 4096) {
        Ok(None) => Ok(Found::Nothing),
        Ok(Some(text)) => Ok(serde_json::from_str(&text).map_or(Found::Garbage, Found::Understood)),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Ok(Found::Garbage),
        Err(error) => Err(error),
    }
}

pub(super) fn write_description(path: &Path, description: &Description) -> io::Result<()> {
    files::replace(path, &serde_json::to_vec(description)?, 0o600)
}
