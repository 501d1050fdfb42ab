//! Associations that were installed under an epoch: none is ever installed a second time, since sequence numbers (and with
//! them the nonces of AES-GCM) and replay windows would start anew.
//!
//! An association is written down *before* it is installed, and once more before a policy names one for sending: only then is
//! it used. A daemon that dies in between leaves one that is taken for what it never became, which costs a new epoch at most.
//!
//! The file has lines of the form `DESTINATION SPI ASSOCIATION unused|used|ended`, numbers in hexadecimal; a later line about
//! the same association replaces an earlier one. Lines are appended, so that one more association among thousands costs
//! one line. A last line without its end is that of a write that never came to its end, and after which nothing was
//! installed. A file that is missing or not understood makes the epoch useless: nobody knows what its key was used for.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::path::Path;

use husk_overlay::esp::AssociationId;
use husk_overlay::facts::{AssociationStage, SpentAssociation};
use husk_overlay::kernel::XfrmStateKey;

use crate::files;

/// Most bytes that are read back: room for a million associations.
const LARGEST: u64 = 64 << 20;

/// What was written down of an epoch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpentFile {
    all: BTreeMap<AssociationId, SpentAssociation>,
    /// The end of the file is not known: the next write is one of the whole.
    torn: bool,
}

impl SpentFile {
    /// Makes an empty file, for an epoch that begins.
    ///
    /// # Errors
    /// Of the file system.
    pub fn create(path: &Path) -> io::Result<()> {
        files::replace(path, b"", 0o600)
    }

    /// Reads the file of an epoch; none if it is missing or not understood.
    ///
    /// # Errors
    /// Of the file system.
    pub fn read(path: &Path, epoch: u64) -> io::Result<Option<Self>> {
        let text = match files::read_text(path, LARGEST) {
            Ok(Some(text)) => text,
            Ok(None) => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => return Ok(None),
            Err(error) => return Err(error),
        };
        let whole = text.rfind('\n').map_or("", |end| &text[..=end]);
        let torn = whole.len() < text.len();
        let all: Option<BTreeMap<_, _>> = whole.lines().map(|line| parse(line, epoch)).collect();
        Ok(all.map(|all| Self { all, torn }))
    }

    /// What was written down.
    #[must_use]
    pub fn all(&self) -> &BTreeMap<AssociationId, SpentAssociation> {
        &self.all
    }

    /// Writes down more, in place of what was written down of the same associations.
    ///
    /// # Errors
    /// Of the file system, with the path; then what these are for may not be done.
    pub fn add(&mut self, path: &Path, more: &BTreeMap<AssociationId, SpentAssociation>) -> io::Result<()> {
        let is_new = |(id, spent): &(&AssociationId, &SpentAssociation)| self.all.get(id) != Some(spent);
        let new: BTreeMap<_, _> = more.iter().filter(is_new).map(|(id, spent)| (*id, *spent)).collect();
        if new.is_empty() {
            return Ok(());
        }
        if self.torn || !append(path, &new).inspect_err(|_| self.torn = true)? {
            let mut all = self.all.clone();
            all.extend(&new);
            files::replace(path, lines(&all).as_bytes(), 0o600)?;
            self.torn = false;
        }
        self.all.extend(new);
        Ok(())
    }

    /// True if it was written down that one of these places in the kernel has an association of this epoch.
    #[must_use]
    pub fn holds(&self, places: &BTreeSet<XfrmStateKey>) -> bool {
        self.all.values().any(|spent| is_in(spent, places))
    }

    /// Takes back what was never installed, at these places in the kernel.
    ///
    /// # Errors
    /// Of the file system, with the path; then nothing was taken back.
    pub fn remove(&mut self, path: &Path, places: &BTreeSet<XfrmStateKey>) -> io::Result<()> {
        let mut left = self.all.clone();
        left.retain(|_, spent| !is_in(spent, places));
        files::replace(path, lines(&left).as_bytes(), 0o600)?;
        (self.all, self.torn) = (left, false);
        Ok(())
    }
}

/// The association is at one of these places, and not only was there once.
fn is_in(spent: &SpentAssociation, places: &BTreeSet<XfrmStateKey>) -> bool {
    spent.stage != AssociationStage::Ended && places.contains(&spent.key)
}

/// False if there is no file any more.
fn append(path: &Path, all: &BTreeMap<AssociationId, SpentAssociation>) -> io::Result<bool> {
    let mut file = match OpenOptions::new().append(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        file => file.map_err(|error| named(path, &error))?,
    };
    file.write_all(lines(all).as_bytes()).map_err(|error| named(path, &error))?;
    Ok(true)
}

fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("cannot write {}: {error}", path.display()))
}

fn lines(all: &BTreeMap<AssociationId, SpentAssociation>) -> String {
    all.iter().fold(String::new(), |mut text, (id, SpentAssociation { key, stage, .. })| {
        let stage = match stage {
            AssociationStage::Unused => UNUSED,
            AssociationStage::Used => USED,
            AssociationStage::Ended => ENDED,
        };
        let _ = writeln!(text, "{} {:08x} {:016x} {stage}", key.destination, key.spi, id.0);
        text
    })
}

fn parse(line: &str, epoch: u64) -> Option<(AssociationId, SpentAssociation)> {
    let mut words = line.split(' ');
    let destination = words.next()?.parse().ok()?;
    let spi = u32::from_str_radix(words.next()?, 16).ok()?;
    let id = AssociationId(u64::from_str_radix(words.next()?, 16).ok()?);
    let stage = match words.next()? {
        UNUSED => AssociationStage::Unused,
        USED => AssociationStage::Used,
        ENDED => AssociationStage::Ended,
        _ => return None,
    };
    let key = XfrmStateKey { destination, spi };
    words.next().is_none().then_some((id, SpentAssociation { epoch, key, stage }))
}

const UNUSED: &str = "unused";
const USED: &str = "used";
const ENDED: &str = "ended";

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn key(spi: u32) -> XfrmStateKey {
        XfrmStateKey { destination: "2001:db8::7".parse().unwrap(), spi }
    }

    fn id(spi: u32) -> AssociationId {
        AssociationId(u64::MAX - u64::from(spi))
    }

    fn of(spis: impl IntoIterator<Item = u32>) -> BTreeMap<AssociationId, SpentAssociation> {
        let stage = |spi| [AssociationStage::Used, AssociationStage::Unused][spi as usize % 2];
        spis.into_iter().map(|spi| (id(spi), SpentAssociation { epoch: 1, key: key(spi), stage: stage(spi) })).collect()
    }

    fn read(path: &Path) -> BTreeMap<AssociationId, SpentAssociation> {
        SpentFile::read(path, 1).unwrap().unwrap().all
    }

    #[test]
    fn what_is_written_down_is_read_back_by_the_next_daemon() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("esp-1.spent");
        assert_eq!(SpentFile::read(&path, 1).unwrap(), None, "nobody knows what was used");
        SpentFile::create(&path).unwrap();
        let mut spent = SpentFile::read(&path, 1).unwrap().unwrap();
        for spi in [256, 257, u32::MAX] {
            spent.add(&path, &of([spi])).unwrap();
        }
        spent.add(&path, &of([256, 300])).unwrap();
        assert_eq!(read(&path), of([256, 257, 300, u32::MAX]));
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        spent.remove(&path, &[key(257)].into()).unwrap();
        assert_eq!(read(&path), of([256, 300, u32::MAX]));
    }

    #[test]
    fn an_association_that_comes_into_use_replaces_what_was_written_of_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("esp-1.spent");
        SpentFile::create(&path).unwrap();
        let mut spent = SpentFile::default();
        spent.add(&path, &of([257])).unwrap();
        for stage in [AssociationStage::Unused, AssociationStage::Used, AssociationStage::Ended] {
            let now = BTreeMap::from([(id(257), SpentAssociation { stage, ..of([257])[&id(257)] })]);
            spent.add(&path, &now).unwrap();
            assert_eq!(read(&path), now);
            let length = path.metadata().unwrap().len();
            spent.add(&path, &now).unwrap();
            assert_eq!(path.metadata().unwrap().len(), length, "what is known is not written again");
        }
    }

    #[test]
    fn taking_back_an_association_keeps_what_is_known_of_the_one_that_had_its_place_before() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("esp-1.spent");
        SpentFile::create(&path).unwrap();
        let mut spent = SpentFile::default();
        let ended = (id(1), SpentAssociation { epoch: 1, key: key(256), stage: AssociationStage::Ended });
        spent.add(&path, &[ended].into_iter().chain(of([256])).collect()).unwrap();
        assert!(spent.holds(&[key(256)].into()) && !spent.holds(&[key(257)].into()));
        spent.remove(&path, &[key(256)].into()).unwrap();
        assert_eq!(read(&path), [ended].into());
        assert!(!spent.holds(&[key(256)].into()));
    }

    #[test]
    fn a_write_that_was_cut_off_anywhere_loses_nothing_that_was_written_before() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("esp-1.spent");
        let before = lines(&of([256, 257]));
        let last = lines(&of([258]));
        for cut in 0..last.len() {
            std::fs::write(&path, before.clone() + &last[..cut]).unwrap();
            let mut spent = SpentFile::read(&path, 1).unwrap().unwrap();
            assert_eq!(spent.all(), &of([256, 257]), "cut after {cut} bytes");
            spent.add(&path, &of([259])).unwrap();
            assert_eq!(read(&path), of([256, 257, 259]), "cut after {cut} bytes");
        }
    }

    #[test]
    fn what_is_not_understood_is_not_taken_for_unused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("esp-1.spent");
        let good = "192.0.2.1 00000100 0000000000000001 used";
        std::fs::write(&path, format!("{good}\n")).unwrap();
        assert_eq!(read(&path).len(), 1);
        for garbage in
            ["", "{}", "192.0.2.1", "192.0.2.1 00000100", &format!("{good} "), &good.replace("used", "abused")]
        {
            std::fs::write(&path, format!("{good}\n{garbage}\n")).unwrap();
            assert_eq!(SpentFile::read(&path, 1).unwrap(), None, "{garbage:?}");
        }
        std::fs::write(&path, b"\xff\n").unwrap();
        assert_eq!(SpentFile::read(&path, 1).unwrap(), None);
    }

    #[test]
    fn a_file_that_somebody_removed_is_written_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("esp-1.spent");
        SpentFile::create(&path).unwrap();
        let mut spent = SpentFile::default();
        spent.add(&path, &of([256])).unwrap();
        std::fs::remove_file(&path).unwrap();
        spent.add(&path, &of([257])).unwrap();
        assert_eq!(read(&path), of([256, 257]));
    }
}
