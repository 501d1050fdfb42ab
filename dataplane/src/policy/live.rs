//! The table in one network namespace: read again only when somebody else may have changed it.

use std::sync::Arc;

use husk_overlay::kernel::policy::PolicyTable;
use nix::errno::Errno;

use super::read::{self, Reading};
use super::{ActualPolicy, PolicyChange, diff, transaction};
use crate::error::Error;
use crate::netlink::Socket;
use crate::nft::nfnetlink;

/// Reads and changes the table in the network namespace in which it was first asked to.
#[derive(Debug, Default)]
pub struct Live {
    socket: Option<Socket>,
    /// What is known of the table, and the generation of rules of which that is true.
    pub(super) known: Option<Reading>,
}

/// What a transaction came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Applied {
    /// Octets that were sent to the kernel, those of a refused first attempt included.
    pub bytes: usize,
    /// The kernel did not take the changes one by one, and the table was replaced as a whole.
    pub replaced: bool,
}

impl Live {
    /// Reads the table; none when there is none.
    ///
    /// # Errors
    /// As [`super::read()`].
    pub fn read(&mut self) -> Result<Option<Arc<ActualPolicy>>, Error> {
        let socket = open(&mut self.socket)?;
        let generation = nfnetlink::generation(socket)?;
        match self.known.take() {
            Some(known) if known.0 == generation => self.known = Some(known),
            _ => self.known = Some(read::list(socket)?),
        }
        Ok(self.known.as_ref().and_then(|(_, state)| state.clone()))
    }

    /// Makes all changes in one transaction: all of them or, on error, none. They are those from what [`Self::read`] returned
    /// last. If they lead to `desired` and the kernel does not take them one by one, the table is replaced as a whole, once.
    ///
    /// # Errors
    /// [`Error::Refused`] names the first request that was refused; [`Error::Unsupported`] when the transaction is too large for
    /// the send buffer; the errors of a broken netlink exchange, after which the outcome is unknown.
    pub fn apply(&mut self, changes: &[PolicyChange], desired: Option<&PolicyTable>) -> Result<Applied, Error> {
        if changes.is_empty() {
            return Ok(Applied::default());
        }
        let socket = open(&mut self.socket)?;
        let known = self.known.take();
        let mut after = known.as_ref().and_then(|(_, state)| state.clone());
        changes.iter().for_each(|change| change.apply_to(&mut after));
        let before = nfnetlink::generation(socket)?;
        let refused = match transaction::send(socket, changes) {
            Ok(bytes) => {
                // What was not known to be true before is not known to be true after.
                if known.is_some_and(|(generation, _)| generation == before) {
                    self.known = following(socket, before, after);
                }
                return Ok(Applied { bytes, replaced: false });
            }
            Err(error) => error,
        };
        let whole = desired.filter(|_| is_quirk(&refused)).filter(|it| diff(Some(it), after.as_deref()).is_empty());
        let Some(table) = whole else {
            // A refused transaction changes nothing.
            self.known = known;
            return Err(refused);
        };
        tracing::debug!(error = %refused, "the policy table is replaced as a whole");
        let before = nfnetlink::generation(socket)?;
        let reason = "the kernel did not take its changes one by one".to_owned();
        let replacement = PolicyChange::ReplaceTable { table: table.clone(), reason };
        let bytes = transaction::send(socket, &[replacement])?;
        self.known = following(socket, before, after);
        Ok(Applied { bytes, replaced: true })
    }
}

fn open(socket: &mut Option<Socket>) -> Result<&mut Socket, Error> {
    match socket {
        Some(socket) => Ok(socket),
        none => Ok(none.insert(nfnetlink::open()?)),
    }
}

/// What is known after a transaction of ours. Every transaction makes the next generation: if that is the one now, nobody else
/// has changed anything since `before`.
fn following(socket: &mut Socket, before: u32, state: Option<Arc<ActualPolicy>>) -> Option<Reading> {
    let now = nfnetlink::generation(socket).ok()?;
    // The kernel leaves out 0 (net/netfilter/nf_tables_api.c `nf_tables_commit`).
    (now == before.wrapping_add(1).max(1)).then_some((now, state))
}

/// True for what the kernel says to changes of a table that is not as it was thought to be, and to some changes of intervals.
fn is_quirk(error: &Error) -> bool {
    matches!(error.errno(), Some(Errno::EEXIST | Errno::ENOTEMPTY | Errno::EBUSY | Errno::EINVAL))
}
