//! Content of a lease file.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use husk_overlay::endpoint::Endpoint;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};

use crate::Error;

/// Version of the content. A lease of another version counts as damaged: its addresses stay taken until its DEL.
pub const VERSION: u32 = 1;

/// Longest lease file that is read, in bytes: more than the longest network configuration, out of which it is made.
const LONGEST: u64 = 32 << 20;

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
    let read = || {
        let mut text = Vec::new();
        open(path)?.take(LONGEST + 1).read_to_end(&mut text)?;
        if u64::try_from(text.len()).is_ok_and(|length| length > LONGEST) {
            return Err(invalid(format!("it is longer than {LONGEST} bytes")));
        }
        parse(&text)
    };
    read().map_err(Error::io("read lease", path))
}

/// Opens a lease file for reading. What is no regular file is no valid lease ([`ErrorKind::InvalidData`]), and none that anybody
/// waits for: to open a FIFO (fifo(7)) takes until somebody writes to it.
pub(super) fn open(path: &Path) -> io::Result<File> {
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path).map_err(|error| {
        match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ELOOP) => invalid("it is a symbolic link".to_owned()),
            Some(Errno::ENXIO) => invalid("it is no regular file".to_owned()),
            _ => error,
        }
    })?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(invalid("it is no regular file".to_owned())) }
}

fn invalid(message: String) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, message)
}

/// Reads and checks the content of a lease file.
pub(super) fn parse(text: &[u8]) -> io::Result<Record> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    let versioned: Versioned = serde_json::from_slice(text).map_err(|error| invalid(error.to_string()))?;
    if versioned.version != VERSION {
        return Err(invalid(format!("its version is {}, this program knows {VERSION}", versioned.version)));
    }
    serde_json::from_slice(text).map_err(|error| invalid(error.to_string()))
}
