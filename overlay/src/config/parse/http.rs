//! Keys about what the daemon serves over HTTP.

use std::net::SocketAddr;

use super::super::reader::{Complaint, Fields};
use super::super::{MetricsConfig, UiConfig};

pub(super) fn read_metrics(top: &mut Fields<'_, '_>) -> MetricsConfig {
    let default = MetricsConfig::default();
    let mut section = top.section("metrics");
    let listen = read_listen(&mut section, "127.0.0.1:9472").unwrap_or(default.listen);
    let per_peer = section.flag("perPeer").unwrap_or(default.per_peer);
    section.finish();
    MetricsConfig { listen, per_peer }
}

pub(super) fn read_ui(top: &mut Fields<'_, '_>, metrics: &MetricsConfig) -> UiConfig {
    let default = UiConfig::default();
    let mut section = top.section("ui");
    let given = read_listen(&mut section, "127.0.0.1:9473");
    if let Some(Some(address)) = given {
        if !address.ip().is_loopback() {
            let reason = "the page tells who talks with whom and is meant for this host alone; only loopback addresses are served";
            let remedy = format!("write 127.0.0.1:{0}, and reach it with ssh -L {0}:127.0.0.1:{0}", address.port());
            section.complain("listen", Complaint::bad(reason, remedy));
        } else if metrics.listen == Some(address) {
            section.complain("listen", Complaint::conflict("metrics.listen is the same", "use another port"));
        }
    }
    section.finish();
    UiConfig { listen: given.unwrap_or(default.listen) }
}

/// Where to listen; `Some(None)` where it is said that nothing should.
fn read_listen(section: &mut Fields<'_, '_>, example: &str) -> Option<Option<SocketAddr>> {
    let text = section.text("listen", "an address with a port")?;
    if text.is_empty() || text == "off" {
        return Some(None);
    }
    match text.parse::<SocketAddr>() {
        Ok(address) if address.port() != 0 => Some(Some(address)),
        Ok(_) => {
            let reason = "with port 0 nobody knows where to find it";
            section.complain("listen", Complaint::bad(reason, format!("write for example {example}")));
            None
        }
        Err(_) => {
            let remedy = format!("write for example {example}, \"[::1]:9472\", or off");
            section.complain("listen", Complaint::bad("this is no address with a port", remedy));
            None
        }
    }
}
