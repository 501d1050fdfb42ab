//! What is said to the loop, and how it is woken.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;

use husk_overlay::ipc::{Request, Response};
use tokio::sync::oneshot;

/// What the loop's inbox holds.
pub enum Message {
    /// Something may have changed.
    Wake,
    /// A pod waits for its policy.
    Enforce,
    /// What policy is made of may have changed.
    Policy,
    /// Somebody wants to know something, or needs an address block.
    Ask(Ask),
    /// The daemon ends; the data plane stays.
    Stop,
}

/// A question with the place for its answer.
pub struct Ask {
    /// The question.
    pub request: Request,
    /// Where the answer goes.
    pub answer: oneshot::Sender<Response>,
}

/// Wakes the loop; any number of wakes before the next pass count as one.
#[derive(Clone)]
pub struct Waker {
    inbox: Sender<Message>,
    pending: Arc<AtomicBool>,
    urgent: Arc<AtomicBool>,
    /// Messages of these kinds are on their way.
    enforcing: Arc<AtomicBool>,
    policy: Arc<AtomicBool>,
}

impl Waker {
    pub(super) fn new(inbox: Sender<Message>) -> Self {
        Self {
            inbox,
            pending: Arc::default(),
            urgent: Arc::default(),
            enforcing: Arc::default(),
            policy: Arc::default(),
        }
    }

    /// Wakes.
    pub fn wake(&self) {
        if !self.pending.swap(true, Ordering::AcqRel) {
            // A loop that has ended needs no wake.
            let _ = self.inbox.send(Message::Wake);
        }
    }

    /// Asks for the policy of pods that have come, at once.
    pub(super) fn enforce(&self) {
        if !self.enforcing.swap(true, Ordering::AcqRel) {
            let _ = self.inbox.send(Message::Enforce);
        }
    }

    /// Says that what policy is made of may have changed; that takes no whole pass.
    pub fn policy(&self) {
        if !self.policy.swap(true, Ordering::AcqRel) {
            let _ = self.inbox.send(Message::Policy);
        }
    }

    /// Policy is about to be enforced: later changes need a message of their own.
    pub(super) fn clear_policy(&self) {
        self.enforcing.swap(false, Ordering::AcqRel);
        self.policy.swap(false, Ordering::AcqRel);
    }

    /// Wakes for a pass at once, since somebody waits for what it will do.
    pub(super) fn hurry(&self) {
        if !self.urgent.swap(true, Ordering::AcqRel) {
            let _ = self.inbox.send(Message::Wake);
        }
    }

    /// True if somebody waits for the next pass.
    pub(super) fn is_urgent(&self) -> bool {
        self.urgent.load(Ordering::Acquire)
    }

    /// The pass begins: later changes need a wake of their own.
    pub(super) fn clear(&self) {
        // Acquires what the waker did before it found a wake pending.
        self.pending.swap(false, Ordering::AcqRel);
        self.urgent.swap(false, Ordering::AcqRel);
    }
}
