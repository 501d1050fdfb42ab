//! `huskctl ui`: where the page is.

use std::fmt::Write as _;
use std::path::Path;

use husk_overlay::ipc::Request;

use super::{Show, ask};
use crate::report::UiReport;

/// The text to print; nothing is ever found.
pub(super) fn run(socket: &Path, show: &Show) -> anyhow::Result<(String, bool)> {
    let report: UiReport = ask(socket, &Request::Ui)?;
    Ok((show.text(&report, text)?, false))
}

fn text(report: &UiReport) -> String {
    let (url, port, at) = (&report.url, report.address.port(), report.address);
    let mut text = format!("{url}\n\n");
    // Writing to a text does not fail.
    let _ = writeln!(
        text,
        "Whoever has this address can read the page, on this host only. To open it on another machine, forward the port:"
    );
    let _ = writeln!(text, "  ssh -L {port}:{at} {}", report.node);
    if report.kubernetes {
        let _ = writeln!(
            text,
            "  kubectl --namespace husk-system port-forward pod/POD {port}    # the pod of {}",
            report.node
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_sits_elsewhere_is_told_how_to_get_there() {
        let report = UiReport {
            node: "host1".parse().unwrap(),
            address: "127.0.0.1:9473".parse().unwrap(),
            url: "http://127.0.0.1:9473/?key=00".into(),
            kubernetes: true,
        };
        let told = text(&report);
        assert!(told.starts_with("http://127.0.0.1:9473/?key=00\n"), "{told}");
        assert!(told.contains("ssh -L 9473:127.0.0.1:9473 host1\n") && told.contains("port-forward pod/POD 9473"));
        assert!(!text(&UiReport { kubernetes: false, ..report }).contains("kubectl"));
    }
}
