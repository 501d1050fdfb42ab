//! The daemon's two sites: the endpoint of metrics, and the page.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;

use husk_overlay::config::{Config, SourceConfig};
use husk_overlay::issue::{Issue, IssueKind, Severity};
use tokio::sync::watch;

use super::endpoint::Endpoint;
use super::{Limits, Listening, serve};
use crate::engine::Waker;
use crate::metrics::gather::Gathering;
use crate::ui::served::{At, Served};
use crate::ui::{Key, Page};

/// What the sites are made of.
pub struct Sites<'a> {
    /// What they tell.
    pub gathering: Gathering,
    /// Address for metrics, whatever the configuration says.
    pub metrics_address: Option<IpAddr>,
    /// Where it is written down where the page is.
    pub page: Served,
    /// Where the page's key is kept.
    pub run_directory: &'a Path,
}

impl Sites<'_> {
    /// Starts to serve what the configuration asks for. What is wrong with the endpoint and with the page is told in `issues`, and
    /// wakes the loop, which tells everybody else.
    pub fn serve(self, config: &Config, issues: [watch::Sender<Option<Issue>>; 2], waker: &Waker) {
        let [metrics_issue, ui_issue] = issues;
        let limits = Limits::default();
        let wake = || {
            let waker = waker.clone();
            move || waker.wake()
        };
        if let Some(configured) = config.metrics.listen {
            let address =
                self.metrics_address.map_or(configured, |address| SocketAddr::new(address, configured.port()));
            let listening = Listening { address, key: "metrics.listen", issue: metrics_issue, limits };
            tokio::spawn(serve(listening, Endpoint::new(self.gathering.clone()), wake()));
        }
        let Some(address) = config.ui.listen else { return };
        let key = match Key::of(self.run_directory) {
            Ok(key) => Arc::new(key),
            Err(error) => {
                ui_issue.send_replace(Some(keyless(self.run_directory, &error)));
                return;
            }
        };
        self.page.set(At {
            node: self.gathering.fixed.node.clone(),
            address,
            key: Arc::clone(&key),
            kubernetes: matches!(config.source, SourceConfig::Kubernetes { .. }),
            issue: ui_issue.subscribe(),
        });
        let listening = Listening { address, key: "ui.listen", issue: ui_issue, limits };
        tokio::spawn(serve(listening, Page::new(self.gathering, key), wake()));
    }
}

fn keyless(run_directory: &Path, error: &std::io::Error) -> Issue {
    Issue {
        severity: Severity::Warning,
        kind: IssueKind::ListenFailed,
        subject: "ui.listen".to_owned(),
        message: format!("the page is not served, since its key cannot be kept: {error}"),
        remedy: format!("make {} writable, with room in it, and restart the daemon", run_directory.display()),
    }
}
