//! The table in one network namespace: read again only when somebody else may have changed it.

use std::sync::Arc;

use husk_overlay::kernel::policy::PolicyTable;
use husk_overlay::marks;
use nix::errno::Errno;

use super::read::{self, Reading};
use super::stages::stages;
use super::{ActualPolicy, PolicyChange, diff, encode, transaction};
use crate::error::Error;
use crate::netlink::Socket;
use crate::nft::nfnetlink;

/// Reads and changes the table in the network namespace in which it was first asked to.
#[derive(Debug, Default)]
pub struct Live {
    socket: Option<Socket>,
    /// What is known of the table, and the generation of rules of which that is true.
    pub(super) known: Option<Reading>,
    pub(super) ownership: Ownership,
}

/// Whether the table belongs to the socket.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Ownership {
    /// It need not.
    #[default]
    Unwanted,
    /// It should, if the kernel can.
    Wanted,
    /// It does, or will as soon as it is there.
    Possible,
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
    /// As the default, but the table belongs to this value as long as it lives, on kernels that can: others can read it only.
    /// It stays when the value goes.
    #[must_use]
    pub fn owning() -> Self {
        Self { ownership: Ownership::Wanted, ..Self::default() }
    }

    /// Reads the table; none when there is none.
    ///
    /// # Errors
    /// As [`super::read()`].
    pub fn read(&mut self) -> Result<Option<Arc<ActualPolicy>>, Error> {
        let socket = open(&mut self.socket)?;
        if self.ownership == Ownership::Wanted {
            self.ownership = ownership(socket)?;
        }
        let generation = nfnetlink::generation(socket)?;
        match self.known.take() {
            Some(known) if known.0 == generation => self.known = Some(known),
            // Others have changed rules of theirs: nobody else can change a table that belongs to this socket.
            Some((_, state @ Some(_))) if self.ownership == Ownership::Possible && is_ours(socket)? => {
                self.known = Some((generation, state));
            }
            _ if self.ownership == Ownership::Possible => {
                let unowned = !adopt(socket)?;
                let (generation, mut state) = read::list(socket)?;
                if let Some(state) = &mut state {
                    Arc::make_mut(state).unowned = unowned;
                }
                self.known = Some((generation, state));
            }
            _ => self.known = Some(read::list(socket)?),
        }
        Ok(self.known.as_ref().and_then(|(_, state)| state.clone()))
    }

    /// Makes all changes, which are those from what [`Self::read`] returned last. They come into force at one moment or, on error,
    /// not at all. If they lead to `desired` and the kernel does not take them one by one, the table is replaced as a whole, once.
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
        let (mut bytes, mut generation, mut refused) = (0, before, None);
        for stage in stages(changes) {
            match transaction::send(socket, &stage, self.ownership == Ownership::Possible) {
                Ok(sent) => (bytes, generation) = (bytes + sent, next(generation)),
                Err(error) => {
                    refused = Some(error);
                    break;
                }
            }
        }
        let Some(refused) = refused else {
            // What was not known to be true before is not known to be true after.
            if known.is_some_and(|(known, _)| known == before) {
                self.known = following(socket, generation, after);
            }
            return Ok(Applied { bytes, replaced: false });
        };
        let whole = desired.filter(|_| is_quirk(&refused)).filter(|it| diff(Some(it), after.as_deref()).is_empty());
        let Some(table) = whole else {
            // A refused transaction changes nothing, and those before it changed nothing that is in force.
            self.known = known.filter(|_| generation == before);
            return Err(refused);
        };
        tracing::debug!(error = %refused, "the policy table is replaced as a whole");
        let generation = next(nfnetlink::generation(socket)?);
        let reason = "the kernel did not take its changes one by one".to_owned();
        let replacement = PolicyChange::ReplaceTable { table: table.clone(), reason };
        bytes += transaction::send(socket, &[replacement], self.ownership == Ownership::Possible)?;
        self.known = following(socket, generation, after);
        Ok(Applied { bytes, replaced: true })
    }
}

fn open(socket: &mut Option<Socket>) -> Result<&mut Socket, Error> {
    match socket {
        Some(socket) => Ok(socket),
        none => Ok(none.insert(nfnetlink::open()?)),
    }
}

/// Whether the kernel has tables that belong to a process and outlive it.
fn ownership(socket: &mut Socket) -> Result<Ownership, Error> {
    match transaction::send_steps(socket, encode::probe_ownership()) {
        Ok(_) => Ok(Ownership::Possible),
        Err(error) if matches!(error.errno(), Some(Errno::EOPNOTSUPP | Errno::EINVAL)) => {
            tracing::info!(
                "this kernel has no nftables tables that outlive their owner (Linux 6.9): policy that others flush is put back, \
                 with a gap until then"
            );
            Ok(Ownership::Unwanted)
        }
        Err(error) => Err(error),
    }
}

/// True if the table is there and belongs to the socket.
fn is_ours(socket: &mut Socket) -> Result<bool, Error> {
    let table = nfnetlink::find(socket, marks::NFT_POLICY_TABLE)?;
    Ok(table.is_some_and(|table| table.owned && !table.dormant && table.owner == Some(socket.port())))
}

/// Adopts the table if its owner has left it. False if there is one that belongs to nobody and cannot be adopted.
fn adopt(socket: &mut Socket) -> Result<bool, Error> {
    match nfnetlink::find(socket, marks::NFT_POLICY_TABLE)? {
        Some(table) if table.persists && !table.owned => {
            transaction::send_steps(socket, [encode::adopt_table()])?;
            tracing::info!("adopted the policy table of an earlier daemon");
            Ok(true)
        }
        Some(table) => Ok(table.owned),
        None => Ok(true),
    }
}

/// The generation that a transaction makes. The kernel leaves out 0 (net/netfilter/nf_tables_api.c `nf_tables_commit`).
fn next(generation: u32) -> u32 {
    generation.wrapping_add(1).max(1)
}

/// What is known after transactions of ours, each of which made the next generation: if the one now is `expected`, nobody else
/// has changed anything meanwhile.
fn following(socket: &mut Socket, expected: u32, state: Option<Arc<ActualPolicy>>) -> Option<Reading> {
    let now = nfnetlink::generation(socket).ok()?;
    (now == expected).then_some((now, state))
}

/// True for what the kernel says to changes of a table that is not as it was thought to be, and to some changes of intervals.
fn is_quirk(error: &Error) -> bool {
    matches!(error.errno(), Some(Errno::EEXIST | Errno::ENOTEMPTY | Errno::EBUSY | Errno::EINVAL))
}
