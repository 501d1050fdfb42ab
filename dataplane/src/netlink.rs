//! Netlink: one blocking socket for every program and test of Husk.
//!
//! It blocks: the daemon uses it from a blocking thread; the plugin and the command-line tool need no runtime for it.
//! Tables are read whole or not at all ([`Socket::dump`]), changes are made many at a time ([`Socket::batch`]), those to nftables
//! all or none (`transaction`), and errors carry the kernel's own words.

mod ack;
mod batch;
mod dump;
mod frame;
mod listen;
mod message;
mod socket;
#[cfg(test)]
mod tests;
mod transaction;

pub use dump::Kept;
pub(crate) use frame::{Frame, frames};
pub(crate) use listen::Heard;
pub use socket::{Protocol, Request, Socket};
pub(crate) use transaction::Rejection;
