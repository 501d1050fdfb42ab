//! Metrics, in the text exposition of Prometheus and OpenMetrics.
//!
//! Where a value comes from decides how it gets here, so that a scrape never waits for the loop and the loop never for a scrape:
//!
//! - what *happens* is counted where it happens, in [`Live`]: passes, changes and failures by table, how long passes and the
//!   plugin's commands took. Counters are atomic; a histogram's lock is held for the time of an addition.
//! - how things *stand* with peers, paths, keys and addresses is a [`Sample`] that the loop leaves after a pass, at most once a
//!   second: a slim row for each peer, behind an `Arc`. A scrape takes the newest and makes the figures from it. Ages grow on
//!   with the age of the sample, so that a loop that hangs is not taken for one whose peers are fine.
//! - what the *kernel* counts (drops, verdicts, IPsec errors, the process) is read from it by each scrape, on a thread that may
//!   wait ([`gather`]).
//!
//! [`catalogue`] names every metric with its labels and its meaning; `docs/metrics.md` is made from it. [`exposition()`] is a pure
//! function of all that. The number of series is bounded whatever the size of the cluster: of peers there are counts by state
//! and four figures of their distribution, never a series each, unless `metrics.perPeer` asks for them.
//!
//! The plugin is a process of some milliseconds, so that it tells the daemon how long it took and how it ended, in a message
//! that nobody waits for ([`husk_overlay::ipc::Request::Ended`]). An ADD or DEL while no daemon runs is therefore not counted, nor is one
//! whose configuration cannot be read; those the runtime's own metrics have.

pub mod catalogue;
mod distribution;
mod exposition;
mod families;
pub mod gather;
mod live;
mod process;
mod sample;
mod text;

pub use exposition::{Form, exposition};
pub use families::{Fixed, Inputs};
pub use live::Live;
pub use process::Process;
pub use sample::{AddressSample, KeySample, PathSample, PeerSample, PoolSample, Sample, SourceSample};
pub(crate) use sample::{standing_name, state_name};

#[cfg(test)]
mod tests;
