//! What the daemon tells `huskctl`: the stable JSON of `--output json` and the source of every table.

mod ipam;
mod keys;
mod peers;
mod status;

pub use ipam::{BlockReport, IpamReport, PoolReport};
pub use keys::{AssociationReport, Direction, EpochReport, KeysReport, PeerKeysReport, RotationDue, RotationReport};
pub use peers::{DiffReport, MtuReport, PeerReport, PeerState};
pub use status::{Counter, KeysSummary, LastPass, Status};
