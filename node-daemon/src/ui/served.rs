//! Where the page is, for `huskctl ui`.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use husk_overlay::ipc::Response;
use husk_overlay::issue::Issue;
use husk_overlay::name::NodeName;
use tokio::sync::watch;

use super::Key;
use crate::report::UiReport;

/// Where the page is served, once that is known. Clones are of the same.
#[derive(Debug, Clone, Default)]
pub struct Served(Arc<OnceLock<At>>);

/// Where a page is served.
#[derive(Debug)]
pub struct At {
    /// Name of the node.
    pub node: NodeName,
    /// Address.
    pub address: SocketAddr,
    /// What it asks for.
    pub key: Arc<Key>,
    /// The daemon runs in Kubernetes.
    pub kubernetes: bool,
    /// Why it is not served, as long as it is not.
    pub issue: watch::Receiver<Option<Issue>>,
}

impl Served {
    /// Says where; the first word counts.
    pub fn set(&self, at: At) {
        let _ = self.0.set(at);
    }

    /// What `huskctl ui` is told.
    pub(crate) fn answer(&self) -> Response {
        let refused = |reason: String| Response::Refused { reason };
        let Some(at) = self.0.get() else {
            return refused("this daemon serves no page: give ui.listen a loopback address and a port".into());
        };
        if let Some(issue) = &*at.issue.borrow() {
            return refused(issue.to_string());
        }
        let report = UiReport {
            node: at.node.clone(),
            address: at.address,
            url: format!("http://{}/?key={}", at.address, at.key.expose()),
            kubernetes: at.kubernetes,
        };
        match serde_json::to_value(report) {
            Ok(report) => Response::Report { report },
            Err(error) => refused(error.to_string()),
        }
    }
}
