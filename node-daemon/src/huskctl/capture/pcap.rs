//! The pcap file format, <https://www.ietf.org/archive/id/draft-ietf-opsawg-pcap-04.html>: version 2.4, nanoseconds.
//!
//! Two dozen bytes and a header of sixteen per packet do not ask for a library, of which the one there is brings a parser and
//! procedural macros along.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use husk_dataplane::capture::{Captured, Link, WHOLE};

/// Magic number of files whose times are in nanoseconds, which also tells their byte order.
const NANOSECONDS: u32 = 0xa1b2_3c4d;

/// Link types (<https://www.tcpdump.org/linktypes.html>).
const LINKTYPE_ETHERNET: u32 = 1;
const LINKTYPE_RAW: u32 = 101;

/// Makes a file that only its owner can read: packets hold secrets of whoever sent them.
pub(super) fn create(path: &Path) -> anyhow::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => {
            anyhow::anyhow!("{} exists already; remove it, or choose another name", path.display())
        }
        _ => anyhow::anyhow!("cannot create {}: {error}", path.display()),
    })
}

/// Writes packets.
pub(super) struct PcapWriter<W> {
    out: W,
    packets: u64,
}

impl<W: Write> PcapWriter<W> {
    /// Writes the header of the file.
    pub(super) fn begin(mut out: W, link: Link) -> io::Result<Self> {
        let link = match link {
            Link::Ethernet => LINKTYPE_ETHERNET,
            Link::None => LINKTYPE_RAW,
        };
        out.write_all(&NANOSECONDS.to_le_bytes())?;
        // Version 2.4, then two fields that are always zero.
        out.write_all(&[2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0])?;
        out.write_all(&WHOLE.to_le_bytes())?;
        out.write_all(&link.to_le_bytes())?;
        // A reader at the other end of a pipe can begin.
        out.flush()?;
        Ok(Self { out, packets: 0 })
    }

    /// Writes a packet.
    pub(super) fn packet(&mut self, captured: &Captured, bytes: &[u8]) -> io::Result<()> {
        let number = |value: u64| u32::try_from(value).unwrap_or(u32::MAX).to_le_bytes();
        self.out.write_all(&number(captured.at.as_secs()))?;
        self.out.write_all(&captured.at.subsec_nanos().to_le_bytes())?;
        self.out.write_all(&number(bytes.len() as u64))?;
        self.out.write_all(&number(captured.length as u64))?;
        self.out.write_all(bytes)?;
        self.packets += 1;
        Ok(())
    }

    /// Hands over what was written.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }

    /// Packets so far.
    pub(super) fn packets(&self) -> u64 {
        self.packets
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_bytes_are_those_of_the_format() {
        let mut file = Vec::new();
        let mut pcap = PcapWriter::begin(&mut file, Link::None).unwrap();
        let at = Duration::new(0x0102_0304, 5);
        let captured = Captured { at, outgoing: true, link: Link::None, kept: 2, length: 1500 };
        pcap.packet(&captured, &[0x45, 0]).unwrap();
        let header = [0x4d, 0x3c, 0xb2, 0xa1, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 101, 0, 0, 0];
        let packet = [4, 3, 2, 1, 5, 0, 0, 0, 2, 0, 0, 0, 0xdc, 5, 0, 0, 0x45, 0];
        assert_eq!(file, [&header[..], &packet].concat());
    }

    #[test]
    fn a_file_is_private_and_never_overwritten() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.pcap");
        let mode = create(&path).unwrap().metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(create(&path).unwrap_err().to_string().contains("exists already"));
        assert!(create(&directory.path().join("no/b")).unwrap_err().to_string().contains("cannot create"));
    }
}
