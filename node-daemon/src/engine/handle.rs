//! How the rest of the daemon talks to the loop.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel as std_channel};
use std::time::{Duration, Instant};

use husk_dataplane::pod;
use husk_ipam::lease::LeaseStore;
use husk_overlay::endpoint::{AttachmentId, Endpoint};
use husk_overlay::ipc::{Attaching, Request, Response};
use husk_overlay::marks;
use husk_overlay::name::InterfaceName;
use husk_overlay::plan::are_mapped;
use husk_policy::cluster::pod_name;
use tokio::sync::{Semaphore, oneshot, watch};

use super::policy_reports::answer;
use super::{Ask, Message, State, Waker};
use crate::flows::{Flows, Kinds};
use crate::line_log::{Client, Event, Logs};
use crate::metrics::Live;
use crate::ui::served::Served;

/// How long a report may take before the client is told.
const PATIENCE: Duration = Duration::from_secs(20);

/// Interfaces that are deleted at once; who asks for more does it alone. Each takes a thread that waits in the kernel.
const DETACHING: usize = 32;

/// How long it may take to map a pod's ports, or to enforce its policy: less than the plugin waits for its answer.
const ADMISSION: Duration = Duration::from_secs(8);

/// A handle on the loop.
#[derive(Clone)]
pub struct Handle {
    inbox: Sender<Message>,
    waker: Waker,
    state: watch::Receiver<State>,
    leases: Arc<LeaseStore>,
    detaching: Arc<Semaphore>,
    index_of: IndexOf,
    flows: Flows,
    live: Live,
    logs: Logs,
    page: Served,
}

/// Finds the index of a host interface; none if there is none of that name.
type IndexOf = fn(&InterfaceName) -> Result<Option<u32>, husk_dataplane::Error>;

/// Makes the loop's inbox and the handle on it.
#[must_use]
pub fn channel(state: watch::Receiver<State>, leases: LeaseStore) -> (Handle, Receiver<Message>) {
    let (inbox, receiver) = std_channel();
    let waker = Waker::new(inbox.clone());
    let detaching = Arc::new(Semaphore::new(DETACHING));
    let index_of = pod::host_interface_index;
    let (flows, live, logs, page) = (Flows::default(), Live::default(), Logs::default(), Served::default());
    let leases = Arc::new(leases);
    (Handle { inbox, waker, state, leases, detaching, index_of, flows, live, logs, page }, receiver)
}

impl Handle {
    /// The waker that belongs to the loop.
    #[must_use]
    pub fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// The flows that clients are told of.
    #[must_use]
    pub fn flows(&self) -> &Flows {
        &self.flows
    }

    /// What is counted.
    #[must_use]
    pub fn live(&self) -> &Live {
        &self.live
    }

    /// The handle, with logs for what clients ask for.
    #[must_use]
    pub fn logging_to(self, logs: Logs) -> Self {
        self.flows.log_to(logs.clone());
        Self { logs, ..self }
    }

    /// Where the page is.
    #[must_use]
    pub fn page(&self) -> &Served {
        &self.page
    }

    /// The handle, with other eyes for interfaces.
    #[cfg(test)]
    pub(super) fn seeing(self, index_of: IndexOf) -> Self {
        Self { index_of, ..self }
    }

    /// Ends the loop after the pass it is in.
    pub fn stop(&self) {
        let _ = self.inbox.send(Message::Stop);
    }

    /// Answers a client of the daemon's socket, and logs what it decided.
    pub async fn answer_client(&self, request: Request, client: impl FnOnce() -> Client) -> Response {
        let decision = match &request {
            Request::RotateKeys => Some(Decision::Rotate),
            Request::Quarantine { pod, on } => Some(Decision::Quarantine { pod: pod.clone(), on: *on }),
            _ => None,
        };
        // Before it is answered: who has its answer may be gone.
        let by = decision.filter(|_| self.logs.wants_decisions()).map(|decision| (decision, client()));
        let response = self.answer(request).await;
        if let (Some((decision, by)), Response::Report { .. }) = (by, &response) {
            self.logs.decision(|| match decision {
                Decision::Rotate => Event::KeyRotationAsked { by },
                Decision::Quarantine { pod, on: true } => Event::QuarantineSet { pod, by },
                Decision::Quarantine { pod, on: false } => Event::QuarantineReleased { pod, by },
            });
        }
        response
    }

    /// Answers a question.
    pub async fn answer(&self, request: Request) -> Response {
        match request {
            Request::Admit { id } => {
                let began = Instant::now();
                let response = self.admit(id).await;
                self.live.admitted(response == Response::Done, began.elapsed());
                response
            }
            Request::Ended { command, microseconds, error } => {
                self.live.plugin_ended(command, Duration::from_micros(microseconds), error);
                if command == Attaching::Del {
                    self.waker.wake();
                }
                Response::Done
            }
            Request::Released => {
                self.waker.wake();
                Response::Done
            }
            Request::Ready => self.ready(),
            Request::Ui => self.page.answer(),
            Request::Flows { after, denied, connections, follow } => {
                answer(&self.flows.report(after, Kinds { denied, connections }, follow))
            }
            Request::Detach { interface, index } => self.detach(interface, index).await,
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

    /// A pod is admitted when its policy is in the kernel, its ports lead to it, and its lease lies within what the node owns
    /// now, since blocks may have changed since the plugin read `node.json`. Antispoofing needs no rule per pod.
    async fn admit(&self, id: AttachmentId) -> Response {
        if let Response::NotReady { reason, issues } = self.ready() {
            return Response::NotReady { reason, issues };
        }
        let (leases, index_of) = (Arc::clone(&self.leases), self.index_of);
        let wired = tokio::task::spawn_blocking(move || wired(&leases, &id, index_of).map(|wired| (id, wired))).await;
        let (id, Wired { endpoint, index }) = match wired {
            Ok(Ok(wired)) => wired,
            Ok(Err(reason)) => return Response::Refused { reason },
            Err(error) => return Response::Refused { reason: error.to_string() },
        };
        if self.state.borrow().enforces_policy {
            self.waker.enforce();
        }
        self.waker.wake();
        if let Err(refusal) = self.await_policy(&endpoint).await {
            return refusal;
        }
        if let Err(refusal) = self.await_ports(&endpoint, index).await {
            return refusal;
        }
        let state = self.state.borrow();
        let owned = |address| {
            state.node_file.as_ref().is_some_and(|file| file.blocks.iter().any(|block| block.contains(address)))
        };
        match endpoint.addresses.iter().find(|address| !owned(*address)) {
            None => {
                self.logs.decision(|| Event::PodAdmitted {
                    pod: pod_name(&endpoint).to_string(),
                    addresses: endpoint.addresses.iter().collect(),
                    container: id.container_id.to_string(),
                    interface: endpoint.host_interface.to_string(),
                });
                Response::Done
            }
            Some(address) => Response::NotReady {
                reason: format!("address {address} of {id} lies in no block of this node any more"),
                issues: Vec::new(),
            },
        }
    }

    /// Waits until the pod's policy is in the kernel: until then it gets no packet. The loop was asked; what it lacks may still
    /// be on its way from the cluster source, whose news wake it.
    async fn await_policy(&self, endpoint: &Endpoint) -> Result<(), Response> {
        let enforced = |state: &State| {
            state.enforced.as_ref().is_some_and(|enforced| enforced.get(&endpoint.id) == Some(endpoint))
        };
        if self.await_state(|state| !state.enforces_policy || enforced(state)).await? {
            return Ok(());
        }
        let state = self.state.borrow();
        let pod = endpoint.display_name();
        let why = if state.cluster.unknown().contains_key(&endpoint.id) {
            "the cluster source has not told of this pod yet, so that no policy is known for it"
        } else {
            "its policy is not in the kernel; huskctl status and the daemon's log tell why"
        };
        let seconds = ADMISSION.as_secs();
        Err(Response::NotReady {
            reason: format!("{pod} cannot be let onto the network after {seconds} s: {why}"),
            issues: state.issues.clone(),
        })
    }

    /// Waits until the state is as it has to be; false if it is not in time.
    async fn await_state(&self, is_done: impl Fn(&State) -> bool) -> Result<bool, Response> {
        let mut state = self.state.clone();
        let decided = state.wait_for(|state| !state.ready || is_done(state));
        match tokio::time::timeout(ADMISSION, decided).await.map(|decided| decided.map(|state| state.ready)) {
            Ok(Ok(true)) => Ok(true),
            Ok(Ok(false)) => Err(self.ready()),
            Ok(Err(_)) => Err(Response::Refused { reason: "the daemon is stopping".into() }),
            Err(_) => Ok(false),
        }
    }

    /// Waits until a pass has made the pod's port mappings. The loop was woken; it also was if the lease is older.
    ///
    /// Only a pass that saw this very interface counts. One that saw an earlier interface of that name, or none, read the leases
    /// before this pod's was made, and the mappings it found may be those of the attachment before, which the pass under way
    /// takes away.
    async fn await_ports(&self, endpoint: &Endpoint, index: Option<u32>) -> Result<(), Response> {
        if endpoint.port_mappings.is_empty() {
            return Ok(());
        }
        let Some(index) = index else {
            let (pod, interface) = (endpoint.display_name(), &endpoint.host_interface);
            return Err(Response::Refused { reason: format!("the interface {interface} of {pod} is gone") });
        };
        let led_to = |state: &State| {
            state.pod_interfaces.get(&endpoint.host_interface) == Some(&index)
                && are_mapped(endpoint, &state.host_ports)
        };
        if !led_to(&self.state.borrow()) {
            self.waker.hurry();
        }
        if self.await_state(led_to).await? {
            return Ok(());
        }
        Err(Response::NotReady {
            reason: format!(
                "the host ports of {} do not lead to it after {} s; huskctl status and the daemon's log tell why",
                endpoint.display_name(),
                ADMISSION.as_secs()
            ),
            issues: self.state.borrow().issues.clone(),
        })
    }

    /// Deletes the host interface of a pod and answers when it is gone; see [`pod::vacate`]. The loop takes no part: it may be
    /// in a pass, and its next one finds what is there then.
    async fn detach(&self, interface: InterfaceName, index: u32) -> Response {
        if !marks::is_pod_interface(interface.as_str()) {
            return Response::Refused { reason: format!("{interface} is no interface of a pod") };
        }
        let Ok(busy) = Arc::clone(&self.detaching).try_acquire_owned() else {
            return Response::Refused { reason: format!("{DETACHING} interfaces are being deleted already") };
        };
        match tokio::task::spawn_blocking(move || pod::vacate(&interface, index, busy)).await {
            Ok(Ok(_)) => Response::Done,
            Ok(Err(error)) => Response::Refused { reason: error.to_string() },
            Err(error) => Response::Refused { reason: error.to_string() },
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

/// What a client may decide.
enum Decision {
    Rotate,
    Quarantine { pod: String, on: bool },
}

/// A pod that a plugin has wired.
struct Wired {
    endpoint: Endpoint,
    /// Index of its host interface, as far as somebody will ask.
    index: Option<u32>,
}

fn wired(leases: &LeaseStore, id: &AttachmentId, index_of: IndexOf) -> Result<Wired, String> {
    let found = leases.find(id).map_err(|error| error.to_string())?;
    let endpoint = found.ok_or_else(|| format!("there is no lease of {id}"))?;
    let index = if endpoint.port_mappings.is_empty() {
        None
    } else {
        index_of(&endpoint.host_interface).map_err(|error| error.to_string())?
    };
    Ok(Wired { endpoint, index })
}
