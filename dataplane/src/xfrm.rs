//! IPsec state of the kernel: security associations and policies, over the xfrm netlink protocol
//! (include/uapi/linux/xfrm.h, net/xfrm/xfrm_user.c).
//!
//! An association carries Husk's request id; a policy carries it in its template, and one that blocks, having none, by its
//! priority. An association is never changed and never installed twice: its sequence numbers would start anew under the same
//! key. What goes out changes from one association to the next by a policy that names another SPI, which the kernel replaces
//! in one step.
//!
//! Keys are derived when a change is made ([`KeyRing::esp_key`]), written into a buffer that is wiped, and never read back.

mod diff;
mod encapsulation;
mod message;
mod model;
mod policies;
mod states;
mod statistics;
mod support;

use std::collections::BTreeMap;

use husk_overlay::esp::{Association, EspEnd, EspKey};
use husk_overlay::kernel::{XfrmPolicyKey, XfrmStateKey};
use nix::errno::Errno;

pub use diff::{diff_policies, diff_states};
pub use encapsulation::encapsulation_socket;
pub use model::{ActualXfrmPolicy, ActualXfrmState, XfrmPolicyChange, XfrmStateChange};
pub use statistics::statistics;
pub use support::{Needs, support};

use crate::error::Error;
use crate::netlink::{Protocol, Request, Socket};
use crate::wireguard::KeyRing;
use message::Message;

/// Access to the associations and policies of one network namespace.
pub struct Xfrm(Socket);

impl Xfrm {
    /// Access to those of the calling thread's network namespace. Makes the kernel load the module.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the kernel has no xfrm netlink protocol, else [`Error::Socket`].
    pub fn open() -> Result<Self, Error> {
        Socket::open(Protocol::Xfrm).map(Self).map_err(explain)
    }

    /// Husk's associations.
    ///
    /// # Errors
    /// Those of [`Socket::dump`]; without `CAP_NET_ADMIN` the kernel refuses.
    pub fn states(&mut self) -> Result<BTreeMap<XfrmStateKey, ActualXfrmState>, Error> {
        let request = dump("read", "IPsec associations", message::XFRM_MSG_GETSA);
        let all = self.0.dump(request);
        // The kernel has told their keys.
        self.0.wipe();
        let ours = all?.into_iter().filter_map(|message| match message {
            Message::State(found) => found,
            _ => None,
        });
        Ok(ours.collect())
    }

    /// Husk's policies.
    ///
    /// # Errors
    /// As [`Xfrm::states`].
    pub fn policies(&mut self) -> Result<BTreeMap<XfrmPolicyKey, ActualXfrmPolicy>, Error> {
        let request = dump("read", "IPsec policies", message::XFRM_MSG_GETPOLICY);
        let ours = self.0.dump(request)?.into_iter().filter_map(|message| match message {
            Message::Policy(found) => found,
            _ => None,
        });
        Ok(ours.collect())
    }

    /// Makes changes in order, many to a datagram; one result for each. A failed change does not stop the others.
    pub fn apply_states(&mut self, changes: &[XfrmStateChange], keys: &KeyRing) -> Vec<Result<(), Error>> {
        let request = |change: &XfrmStateChange| {
            let (operation, message) = match change {
                XfrmStateChange::Add { key, state } => {
                    let secret = association_key(key, &state.association, keys)?;
                    ("add", states::add(key, &state.parameters, secret.expose()))
                }
                XfrmStateChange::Remove { key } => ("remove", states::remove(key)),
            };
            let key = match change {
                XfrmStateChange::Add { key, .. } | XfrmStateChange::Remove { key } => key,
            };
            let object = format!("the association {:#010x} to {}", key.spi, key.destination);
            Ok(Request { operation, object, flags: 0, message })
        };
        let removal = |change: &XfrmStateChange| matches!(change, XfrmStateChange::Remove { .. });
        self.apply(changes.iter().map(|change| (removal(change), request(change))).collect())
    }

    /// Makes changes in order, many to a datagram; one result for each. A failed change does not stop the others.
    pub fn apply_policies(&mut self, changes: &[XfrmPolicyChange]) -> Vec<Result<(), Error>> {
        let request = |change: &XfrmPolicyChange| {
            let (operation, message) = match change {
                XfrmPolicyChange::Add { key, policy } => {
                    ("add", policies::set(message::XFRM_MSG_NEWPOLICY, key, policy))
                }
                XfrmPolicyChange::Replace { key, policy } => {
                    ("replace", policies::set(message::XFRM_MSG_UPDPOLICY, key, policy))
                }
                XfrmPolicyChange::Remove { key } => ("remove", policies::remove(key)),
            };
            Ok(Request { operation, object: model::policy_name(change.key()), flags: 0, message })
        };
        let removal = |change: &XfrmPolicyChange| change.policy().is_none();
        self.apply(changes.iter().map(|change| (removal(change), request(change))).collect())
    }

    /// Sends what could be put into requests. A removal, the first of the pair, also succeeds when there is nothing to
    /// remove.
    fn apply(&mut self, changes: Vec<(bool, Result<Request<Message>, Error>)>) -> Vec<Result<(), Error>> {
        let mut requests = Vec::with_capacity(changes.len());
        let mut outcomes = Vec::with_capacity(changes.len());
        for (removal, request) in changes {
            outcomes.push(request.map(|request| {
                requests.push(request);
                removal
            }));
        }
        let mut results = self.0.batch(requests).into_iter();
        let settle = |removal: bool| match results.next().expect("there is one result per request") {
            Err(error) if removal && matches!(error.errno(), Some(Errno::ESRCH | Errno::ENOENT)) => Ok(()),
            result => result,
        };
        outcomes
            .into_iter()
            .map({
                let mut settle = settle;
                move |outcome| outcome.and_then(&mut settle)
            })
            .collect()
    }
}

fn dump(operation: &'static str, object: &str, kind: u16) -> Request<Message> {
    Request { operation, object: object.to_owned(), flags: 0, message: Message::dump(kind) }
}

/// Says what is missing if the error says that the kernel has no xfrm netlink protocol.
pub(crate) fn explain(error: Error) -> Error {
    if !is_absent(&error) {
        return error;
    }
    Error::Unsupported {
        operation: "configure",
        object: "IPsec".to_owned(),
        reason: "the kernel has no xfrm netlink protocol".to_owned(),
        remedy: "load the module xfrm_user, or use a kernel with CONFIG_XFRM_USER",
    }
}

/// True if the error says that the kernel has no xfrm netlink protocol.
fn is_absent(error: &Error) -> bool {
    matches!(error, Error::Socket { .. }) && error.errno() == Some(Errno::EPROTONOSUPPORT)
}

/// True if the kernel has the protocol at hand in the calling thread's network namespace, so that there may be something in
/// its tables. Opening a socket to find out would load the module on hosts that have no use for it.
#[must_use]
pub fn is_present() -> bool {
    // Columns: address, protocol, port. Where the protocol is, the kernel has a socket of its own, whose port is 0.
    let sockets = std::fs::read_to_string("/proc/thread-self/net/netlink").unwrap_or_default();
    let protocol = Protocol::Xfrm.number().to_string();
    sockets.lines().any(|line| line.split_whitespace().nth(1) == Some(protocol.as_str()))
}

/// The key of an association, from the private key in the ring.
pub(crate) fn association_key(key: &XfrmStateKey, association: &Association, keys: &KeyRing) -> Result<EspKey, Error> {
    let failed = |reason: String| {
        let Association { sender, receiver, .. } = association;
        let end = |end: &EspEnd| format!("{} (epoch {}, {})", end.node, end.epoch, end.address);
        let association = format!("{:#010x} from {} to {}", key.spi, end(sender), end(receiver));
        Error::NoAssociationKey { association, reason }
    };
    match keys.esp_key(association) {
        Some(Ok(key)) => Ok(key),
        Some(Err(error)) => Err(failed(error.to_string())),
        None => Err(failed("the private key of this node's epoch is not in the key ring".to_owned())),
    }
}
