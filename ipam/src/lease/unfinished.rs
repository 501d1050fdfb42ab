//! The temporary file that a killed process left: removed by whoever comes next, whatever it comes for.

use std::path::PathBuf;
use std::time::Duration;

use super::locked::remove_if_there;
use super::{LeaseStore, LockedStore, file_name, lock};
use crate::Error;

impl LeaseStore {
    /// Removes what a killed process left half-written, if there is any. What is being written right now stays, as its writer
    /// holds the lock; so this waits for nobody.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sweep(&self) -> Result<(), Error> {
        // What cannot be looked at is not known to be missing.
        if matches!(self.unfinished().try_exists(), Ok(false)) {
            return Ok(());
        }
        match lock::acquire(&self.directory, Duration::ZERO) {
            Err(Error::Locked { .. }) => Ok(()),
            locked => LockedStore { store: self, _lock: locked? }.sweep(),
        }
    }

    fn unfinished(&self) -> PathBuf {
        self.directory.join(file_name::temporary())
    }
}

impl LockedStore<'_> {
    /// Removes what a killed process left half-written, if there is any.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sweep(&self) -> Result<(), Error> {
        remove_if_there(&self.store.unfinished())
    }
}
