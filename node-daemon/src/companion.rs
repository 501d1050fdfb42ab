//! Companions: processes of the same program that keep something open in the kernel and outlive the daemon, so that a crash,
//! restart or upgrade of the daemon touches no packet. A new daemon finds and adopts them.
//!
//! There are two: a userspace WireGuard device, and the sockets at which ESP in UDP arrives.
//!
//! Reading order: [`job`] says what a companion does; [`process`] is its life as others see it, `ownership` what makes it the
//! only one, `keeper` the daemon's part.

pub mod job;
mod keeper;
mod ownership;
pub mod process;

use std::future::Future;

use anyhow::{Context as _, Result};
use tokio::signal::unix::{SignalKind, signal};

pub use job::Job;
pub use keeper::{Companions, Keeper};
pub(crate) use keeper::{OWN_PROGRAM, START_PATIENCE};
pub(crate) use ownership::Ownership;
pub use process::{Answer, Process};

/// Makes the calling process one that nothing that happens to its parent reaches.
pub(crate) fn detach() {
    // Fails if this process leads a process group, as when started from a shell, whose job it then rightly stays.
    let _ = nix::unistd::setsid();
    // Started through `/proc/self/exe`, the process would go by the name `exe`.
    let _ = nix::sys::prctl::set_name(c"huskd");
}

/// Completes with the name of the signal that asks the process to end.
///
/// SIGHUP is taken and dropped: the process has no terminal, and its parent's end is none of its business. The Rust
/// runtime ignores SIGPIPE.
pub(crate) fn stop_signal() -> Result<impl Future<Output = &'static str>> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
    let mut hangup = signal(SignalKind::hangup()).context("cannot handle SIGHUP")?;
    Ok(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => return "SIGTERM",
                _ = interrupt.recv() => return "SIGINT",
                _ = hangup.recv() => {}
            }
        }
    })
}
