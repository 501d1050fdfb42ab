//! Content of a lease file.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;

use husk_overlay::endpoint::Endpoint;
use serde::{Deserialize, Serialize};

use crate::Error;

/// Version of the content. A lease of another version counts as damaged: its addresses stay taken until its DEL.
pub const VERSION: u32 = 1;

/// An endpoint record as it lies on the disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Record {
    /// [`VERSION`]
    pub(super) version: u32,
    /// When the lease was made, in milliseconds since boot.
    pub(super) created: u64,
    /// The endpoint.
    #[serde(flatten)]
    pub(super) endpoint: Endpoint,
}

/// Reads and checks a lease file.
pub(super) fn read(path: &Path) -> Result<Record, Error> {
    let text = fs::read(path).map_err(Error::io("read lease", path))?;
    parse(&text).map_err(Error::io("read lease", path))
}

fn parse(text: &[u8]) -> io::Result<Record> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    let invalid = |message: String| io::Error::new(ErrorKind::InvalidData, message);
    let versioned: Versioned = serde_json::from_slice(text).map_err(|error| invalid(error.to_string()))?;
    if versioned.version != VERSION {
        return Err(invalid(format!("its version is {}, this program knows {VERSION}", versioned.version)));
    }
    serde_json::from_slice(text).map_err(|error| invalid(error.to_string()))
}
