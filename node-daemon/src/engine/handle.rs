//! How the rest of the daemon talks to the loop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel as std_channel};
use std::time::Duration;

use husk_ipam::lease::LeaseStore;
use husk_overlay::endpoint::AttachmentId;
use husk_overlay::ipc::{Request, Response};
use tokio::sync::{oneshot, watch};

use super::State;

/// How long a report may take before the client is told.
const PATIENCE: Duration = Duration::from_secs(20);

/// What the loop's inbox holds.
pub enum Message {
    /// Something may have changed.
    Wake,
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
}

impl Waker {
    /// Wakes.
    pub fn wake(&self) {
        if !self.pending.swap(true, Ordering::AcqRel) {
            // A loop that has ended needs no wake.
            let _ = self.inbox.send(Message::Wake);
        }
    }

    /// The pass begins: later changes need a wake of their own.
    pub(super) fn clear(&self) {
        // Acquires what the waker did before it found a wake pending.
        self.pending.swap(false, Ordering::AcqRel);
    }
}

/// A handle on the loop.
#[derive(Clone)]
pub struct Handle {
    inbox: Sender<Message>,
    waker: Waker,
    state: watch::Receiver<State>,
    leases: Arc<LeaseStore>,
}

/// Makes the loop's inbox and the handle on it.
#[must_use]
pub fn channel(state: watch::Receiver<State>, leases: LeaseStore) -> (Handle, Receiver<Message>) {
    let (inbox, receiver) = std_channel();
    let waker = Waker { inbox: inbox.clone(), pending: Arc::default() };
    (Handle { inbox, waker, state, leases: Arc::new(leases) }, receiver)
}

impl Handle {
    /// The waker that belongs to the loop.
    #[must_use]
    pub fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// Ends the loop after the pass it is in.
    pub fn stop(&self) {
        let _ = self.inbox.send(Message::Stop);
    }

    /// Answers a client of the daemon's socket.
    pub async fn answer(&self, request: Request) -> Response {
        match request {
            Request::Admit { id } => self.admit(id).await,
            Request::Released => {
                self.waker.wake();
                Response::Done
            }
            Request::Ready => self.ready(),
            other => self.ask(other).await,
        }
    }

    fn ready(&self) -> Response {
        let state = self.state.borrow();
        if state.ready {
            Response::Done
        } else {
            let reason = state.reason.clone().unwrap_or_else(|| "the daemon has just started".into());
            Response::NotReady { reason, issues: state.issues.clone() }
        }
    }

    /// A pod is admitted when its lease lies within what the node owns now: blocks may have changed since the plugin read
    /// `node.json`. Antispoofing needs no rule per pod, so there is nothing to program before the answer.
    async fn admit(&self, id: AttachmentId) -> Response {
        if let Response::NotReady { reason, issues } = self.ready() {
            return Response::NotReady { reason, issues };
        }
        let leases = Arc::clone(&self.leases);
        let lease = tokio::task::spawn_blocking(move || leases.find(&id).map(|found| (id, found))).await;
        let (id, endpoint) = match lease {
            Ok(Ok((id, Some(endpoint)))) => (id, endpoint),
            Ok(Ok((id, None))) => return Response::Refused { reason: format!("there is no lease of {id}") },
            Ok(Err(error)) => return Response::Refused { reason: error.to_string() },
            Err(error) => return Response::Refused { reason: error.to_string() },
        };
        self.waker.wake();
        let state = self.state.borrow();
        let owned = |address| {
            state.node_file.as_ref().is_some_and(|file| file.blocks.iter().any(|block| block.contains(address)))
        };
        match endpoint.addresses.iter().find(|address| !owned(*address)) {
            None => Response::Done,
            Some(address) => Response::NotReady {
                reason: format!("address {address} of {id} lies in no block of this node any more"),
                issues: Vec::new(),
            },
        }
    }

    async fn ask(&self, request: Request) -> Response {
        let (answer, receiver) = oneshot::channel();
        if self.inbox.send(Message::Ask(Ask { request, answer })).is_err() {
            return Response::Refused { reason: "the daemon is stopping".into() };
        }
        match tokio::time::timeout(PATIENCE, receiver).await {
            Ok(Ok(response)) => response,
            Ok(Err(_)) => Response::Refused { reason: "the daemon is stopping".into() },
            Err(_) => Response::Refused {
                reason: format!(
                    "the daemon is busy: no answer within {} s; its log tells with what",
                    PATIENCE.as_secs()
                ),
            },
        }
    }
}
