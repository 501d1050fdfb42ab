//! A thread that works beside the loop, as the loop has it: what both share, a way to wake it, and whether it is alive.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use crate::nudge::{self, Nudge, Nudged};

/// The thread, as the others see it. It finds out when the last of these is gone, and ends.
#[derive(Debug)]
pub(crate) struct Worker<T> {
    shared: Shared<T>,
    nudge: Nudge,
    thread: Arc<JoinHandle<()>>,
}

/// What the thread shares with the others.
#[derive(Debug)]
pub(crate) struct Shared<T>(Arc<Mutex<T>>);

impl<T: Send + 'static> Worker<T> {
    /// Starts the thread, in the network namespace of the caller. `work` gets what is shared, and both sides of what wakes it: its
    /// own, and the other for threads that it may start in turn.
    ///
    /// # Errors
    /// When there is no thread or no socket to be had.
    pub(crate) fn start<W>(name: &str, shared: T, work: impl FnOnce(Shared<T>, Nudged, &Nudge) -> W) -> io::Result<Self>
    where
        W: FnOnce() + Send + 'static,
    {
        let shared = Shared(Arc::new(Mutex::new(shared)));
        let (nudge, nudged) = nudge::pair()?;
        let work = work(shared.clone(), nudged, &nudge);
        let thread = thread::Builder::new().name(name.into()).spawn(work)?;
        Ok(Self { shared, nudge, thread: Arc::new(thread) })
    }
}

impl<T> Worker<T> {
    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        self.shared.lock()
    }

    /// Has the thread look at what is shared.
    pub(crate) fn wake(&self) {
        self.nudge.wake();
    }

    /// The thread has ended, which only a panic brings about; the log tells of it.
    pub(crate) fn is_over(&self) -> bool {
        self.thread.is_finished()
    }
}

// Derived, it would ask as much of what is shared.
impl<T> Clone for Worker<T> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone(), nudge: self.nudge.clone(), thread: Arc::clone(&self.thread) }
    }
}

impl<T> Shared<T> {
    /// What it holds; a thread that panicked meanwhile does not make it less true.
    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

/// Randomness for what only has to differ between nodes.
///
/// # Errors
/// When the kernel gives none.
pub(crate) fn seed() -> io::Result<u64> {
    let mut seed = [0; 8];
    getrandom::fill(&mut seed).map_err(io::Error::other)?;
    Ok(u64::from_ne_bytes(seed))
}
