//! A source that may hang, made one that answers in time.
//!
//! A call into a network file system whose server is gone may take for ever, and nothing can call it back. So the source
//! lives on a thread of its own, and who asks waits for a bounded time only. While a call is stuck, further ones fail at
//! once: nothing piles up behind it. The calls that did start are done one after the other, each at most once.
//!
//! What a late answer means:
//!
//! - a snapshot is used by the next call for one, unless something is written before. Nothing could be written while it was
//!   taken, so it is never older than what its caller knows, and a source that is merely slow still delivers;
//! - so are objects of policy, which nobody writes here;
//! - that a record was published or withdrawn, or a block claimed or released, is told by the next snapshot, which begins
//!   after that: a block that was granted late is listed as the caller's;
//! - a failure is forgotten; whoever still wants the same asks again.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::thread;
use std::time::Duration;

use husk_overlay::name::NodeName;
use husk_overlay::prefix::Prefix;
use husk_overlay::record::{NodeRecord, Snapshot};
use husk_policy::object::Objects;

use super::{Claim, ClusterSource, SourceError};

/// How long calls wait for the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Opening and reading, which each pass of the loop does.
    pub read: Duration,
    /// Writing, which is rare.
    pub write: Duration,
}

impl Limits {
    /// For the reconcile loop: the data plane must not wait.
    pub const LOOP: Self = Self { read: Duration::from_secs(2), write: Duration::from_secs(5) };

    /// For a command that a person started and that needs the answer.
    pub const COMMAND: Self = Self { read: Duration::from_secs(30), write: Duration::from_secs(30) };
}

enum Call {
    Open,
    Snapshot,
    PolicyObjects,
    Publish(Box<NodeRecord>),
    Claim(Prefix, NodeName),
    Release(Prefix, NodeName),
    Withdraw(NodeName),
}

enum Answer {
    Done,
    Snapshot(Snapshot),
    PolicyObjects(Arc<Objects>),
    Claim(Claim),
}

/// What came late, until somebody asks for it.
#[derive(Default)]
struct Late {
    snapshot: Option<Snapshot>,
    objects: Option<Arc<Objects>>,
}

impl Late {
    fn keep(&mut self, answer: Answer) {
        match answer {
            Answer::Snapshot(snapshot) => self.snapshot = Some(snapshot),
            Answer::PolicyObjects(objects) => self.objects = Some(objects),
            Answer::Done | Answer::Claim(_) => {}
        }
    }

    fn take(&mut self, call: &Call) -> Option<Answer> {
        match call {
            Call::Open => None,
            Call::Snapshot => self.snapshot.take().map(Answer::Snapshot),
            Call::PolicyObjects => self.objects.take().map(Answer::PolicyObjects),
            Call::Publish(_) | Call::Claim(..) | Call::Release(..) | Call::Withdraw(_) => {
                self.snapshot = None;
                None
            }
        }
    }
}

/// A call without an answer so far.
struct Pending {
    operation: &'static str,
    limit: Duration,
}

/// A source on a thread of its own. Dropping it ends the thread, or leaves it behind if it is stuck.
pub struct Bounded {
    subject: String,
    limits: Limits,
    calls: Sender<Call>,
    answers: Receiver<Result<Answer, SourceError>>,
    pending: Option<Pending>,
    late: Late,
}

impl Bounded {
    /// Opens a source on its thread. One that is not available, or does not answer in time, is opened by a later call.
    ///
    /// # Errors
    /// When the source says in time that it can never be opened like this, or no thread can be had.
    pub fn open<S, F>(subject: String, limits: Limits, open: F) -> Result<Self, SourceError>
    where
        S: ClusterSource,
        F: FnMut() -> Result<S, SourceError> + Send + 'static,
    {
        let (calls, inbox) = channel();
        let (outbox, answers) = channel();
        let name = subject.clone();
        thread::Builder::new().name("husk-source".into()).spawn(move || {
            let mut served = Served { subject: name, open, source: None };
            while let Ok(call) = inbox.recv() {
                if outbox.send(served.answer(call)).is_err() {
                    return;
                }
            }
        })?;
        let mut bounded = Self { subject, limits, calls, answers, pending: None, late: Late::default() };
        match bounded.call("opening it", limits.read, Call::Open) {
            Ok(_) => Ok(bounded),
            Err(error @ SourceError::Unavailable { .. }) => {
                tracing::warn!(%error, "the cluster source is opened later");
                Ok(bounded)
            }
            Err(error) => Err(error),
        }
    }

    fn unavailable(&self, reason: String) -> SourceError {
        SourceError::Unavailable { subject: self.subject.clone(), reason }
    }

    /// The same words every time, so that it counts as one issue for as long as it lasts.
    fn stuck(&self, Pending { operation, limit }: &Pending) -> SourceError {
        self.unavailable(format!("it does not answer; {operation} takes longer than {} s", limit.as_secs_f32()))
    }

    fn ended(&self) -> SourceError {
        self.unavailable("the thread that asks it has ended; restart huskd".into())
    }

    fn call(&mut self, operation: &'static str, limit: Duration, call: Call) -> Result<Answer, SourceError> {
        if let Some(pending) = self.pending.take() {
            match self.answers.try_recv() {
                Ok(Ok(answer)) => {
                    tracing::info!(operation = pending.operation, "the cluster source answers again");
                    self.late.keep(answer);
                }
                Ok(Err(error)) => tracing::debug!(operation = pending.operation, %error, "late answer of the source"),
                Err(TryRecvError::Empty) => {
                    let error = self.stuck(&pending);
                    self.pending = Some(pending);
                    return Err(error);
                }
                Err(TryRecvError::Disconnected) => return Err(self.ended()),
            }
        }
        if let Some(answer) = self.late.take(&call) {
            return Ok(answer);
        }
        self.calls.send(call).map_err(|_| self.ended())?;
        match self.answers.recv_timeout(limit) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Timeout) => {
                let pending = Pending { operation, limit };
                let error = self.stuck(&pending);
                self.pending = Some(pending);
                Err(error)
            }
            Err(RecvTimeoutError::Disconnected) => Err(self.ended()),
        }
    }

    fn write(&mut self, operation: &'static str, call: Call) -> Result<Answer, SourceError> {
        self.call(operation, self.limits.write, call)
    }
}

impl ClusterSource for Bounded {
    fn snapshot(&mut self) -> Result<Snapshot, SourceError> {
        match self.call("reading it", self.limits.read, Call::Snapshot)? {
            Answer::Snapshot(snapshot) => Ok(snapshot),
            _ => unreachable!("the thread answers a call in its kind"),
        }
    }

    fn policy_objects(&mut self) -> Result<Arc<Objects>, SourceError> {
        match self.call("reading what policy is made of", self.limits.read, Call::PolicyObjects)? {
            Answer::PolicyObjects(objects) => Ok(objects),
            _ => unreachable!("the thread answers a call in its kind"),
        }
    }

    fn publish(&mut self, record: &NodeRecord) -> Result<(), SourceError> {
        self.write("publishing the own record", Call::Publish(Box::new(record.clone()))).map(drop)
    }

    fn claim(&mut self, block: Prefix, node: &NodeName) -> Result<Claim, SourceError> {
        match self.write("claiming a block", Call::Claim(block, node.clone()))? {
            Answer::Claim(claim) => Ok(claim),
            _ => unreachable!("the thread answers a call in its kind"),
        }
    }

    fn release(&mut self, block: Prefix, node: &NodeName) -> Result<(), SourceError> {
        self.write("releasing a block", Call::Release(block, node.clone())).map(drop)
    }

    fn withdraw(&mut self, node: &NodeName) -> Result<(), SourceError> {
        self.write("withdrawing the own record", Call::Withdraw(node.clone())).map(drop)
    }
}

/// What the thread has.
struct Served<S, F> {
    subject: String,
    open: F,
    source: Option<S>,
}

impl<S: ClusterSource, F: FnMut() -> Result<S, SourceError>> Served<S, F> {
    /// A panic would leave the caller without a source for good; the source is opened anew instead.
    fn answer(&mut self, call: Call) -> Result<Answer, SourceError> {
        catch_unwind(AssertUnwindSafe(|| self.ask(call))).unwrap_or_else(|_| {
            self.source = None;
            let reason = "asking it failed in a way that is a bug of Husk; the log tells where".into();
            Err(SourceError::Unavailable { subject: self.subject.clone(), reason })
        })
    }

    fn ask(&mut self, call: Call) -> Result<Answer, SourceError> {
        let source = match &mut self.source {
            Some(source) => source,
            none => none.insert((self.open)()?),
        };
        match call {
            Call::Open => Ok(Answer::Done),
            Call::Snapshot => source.snapshot().map(Answer::Snapshot),
            Call::PolicyObjects => source.policy_objects().map(Answer::PolicyObjects),
            Call::Publish(record) => source.publish(&record).map(|()| Answer::Done),
            Call::Claim(block, node) => source.claim(block, &node).map(Answer::Claim),
            Call::Release(block, node) => source.release(block, &node).map(|()| Answer::Done),
            Call::Withdraw(node) => source.withdraw(&node).map(|()| Answer::Done),
        }
    }
}

#[cfg(test)]
mod tests;
