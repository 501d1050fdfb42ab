//! What no kernel table holds of the tunnels: processes that keep something open in the kernel and outlive the daemon.

use anyhow::Result;
use husk_dataplane::Sweep;
use husk_dataplane::kernel::Kernel;
use husk_overlay::issue::{Issue, IssueKind, Severity};
use husk_overlay::kernel::LinkKind;
use husk_overlay::marks;
use husk_overlay::name::InterfaceName;
use husk_overlay::plan::Plan;

use super::{Engine, Node};
use crate::source::ClusterSource;

impl<K: Kernel, S: ClusterSource, N: Node> Engine<K, S, N> {
    /// Starts and ends processes as planned.
    pub(super) fn ensure_devices(&mut self, plan: &Plan, issues: &mut Vec<Issue>) {
        for name in marks::WIREGUARD_INTERFACES {
            if let Ok(interface) = InterfaceName::new(name) {
                self.ensure_userspace_device(plan, &interface, issues);
            }
        }
        self.ensure_udp_encapsulation(issues);
    }

    /// A userspace WireGuard device that is missing starts; one that holds the name of a device of the kernel, or that the
    /// plan has no use for, ends. A retired generation takes its device with it.
    fn ensure_userspace_device(&mut self, plan: &Plan, interface: &InterfaceName, issues: &mut Vec<Issue>) {
        const BY_HAND: &str = "end the process `huskd wireguard-userspace` by hand";
        let kind = plan.desired.links.get(interface).map(|link| &link.kind);
        // Without a plan for any device, as while none can be had, the ones that are there go on.
        let planned = !self.parts.config.mode.uses_wireguard() || !plan.desired.wireguard.is_empty();
        let (outcome, failure, remedy) = match kind {
            Some(LinkKind::WireguardUserspace) => (
                self.parts.node.ensure_userspace_device(interface),
                "does not start",
                "provide /dev/net/tun and CAP_NET_ADMIN, or load the kernel module wireguard",
            ),
            Some(_) => (
                self.parts.node.stop_userspace_device(interface),
                "does not end and keeps the name from the kernel's",
                BY_HAND,
            ),
            None if planned && self.sweep() == Sweep::Allowed => {
                (self.parts.node.stop_userspace_device(interface), "does not end", BY_HAND)
            }
            None => return,
        };
        let what = format!("the userspace WireGuard device {failure}");
        note(outcome, kind.is_some(), interface.as_str(), &what, remedy, issues);
    }

    /// ESP in UDP arrives only while somebody keeps a socket open.
    fn ensure_udp_encapsulation(&mut self, issues: &mut Vec<Issue>) {
        let config = &self.parts.config;
        let port = config.ipsec.udp_port.filter(|_| config.mode.uses_esp());
        let (outcome, failure, remedy) = match port {
            Some(port) => (
                self.parts.node.ensure_udp_encapsulation(port),
                "does not start",
                format!(
                    "see who has UDP port {port} (`ss -ulpn 'sport = :{port}'`) and end it, or choose another ipsec.udpEncapsulation on all nodes"
                ),
            ),
            None if self.sweep() == Sweep::Allowed => (
                self.parts.node.stop_udp_encapsulation(),
                "does not end",
                "end the process `huskd udp-encapsulation` by hand".to_owned(),
            ),
            None => return,
        };
        let what = format!("the process that takes ESP in UDP {failure}");
        note(outcome, port.is_some(), "UDP encapsulation", &what, &remedy, issues);
    }
}

/// An issue for what failed; blocking if the node cannot do without.
fn note(outcome: Result<()>, needed: bool, subject: &str, what: &str, remedy: &str, issues: &mut Vec<Issue>) {
    let Err(error) = outcome else { return };
    let message = format!("{what}: {error:#}");
    tracing::error!(subject, "{message}");
    issues.push(Issue {
        severity: if needed { Severity::Blocking } else { Severity::Error },
        kind: IssueKind::EncapsulationUnavailable,
        subject: subject.to_owned(),
        message,
        remedy: remedy.to_owned(),
    });
}
