//! CHECK: is an attachment as ADD made it?

use husk_dataplane::pod::{self, PodMtu, PodSpec};
use husk_overlay::ipc::NODE_FILE;

use crate::add::open_netns;
use crate::deadline::Deadline;
use crate::error::{Code, Failure};
use crate::invocation::Attach;
use crate::netconf::NetConf;
use crate::result::Reported;
use crate::version::Version;
use crate::{attachment, host_ports, node, result};

/// Compares lease, interfaces, addresses, routes and neighbours with what they should be. What plugins chained behind
/// added is no deviation.
pub(crate) fn check(conf: &NetConf, attach: &Attach, deadline: Deadline) -> Result<(), Failure> {
    conf.version.require(Version::V0_4_0, "CHECK")?;
    let previous = conf.previous_result()?.ok_or_else(|| {
        Failure::new(Code::InvalidConfig, "the network configuration has no prevResult, which CHECK compares with")
    })?;
    let id = attachment::id(conf, &attach.container);
    let reported = result::find_interface(previous, id.ifname.as_str()).ok_or_else(|| {
        Failure::new(
            Code::InvalidConfig,
            format!("the network configuration's prevResult has no interface {} with a sandbox", id.ifname),
        )
    })?;
    let netns = open_netns(&attach.netns)?;
    let mut deviations = Vec::new();
    let Some(endpoint) = attachment::leases(conf, deadline).find(&id)? else {
        return Err(Failure::new(
            Code::Deviates,
            format!("attachment {id} has no lease: its addresses may be given to another pod; delete the pod"),
        ));
    };
    for address in endpoint.addresses.iter().filter(|address| !reported.addresses.contains(address)) {
        deviations.push(format!("the lease has {address}, which prevResult does not report"));
    }
    let namespace = netns.identity()?;
    if (namespace.device, namespace.inode) != (endpoint.netns.device, endpoint.netns.inode) {
        deviations.push(format!("{} is not the network namespace that was connected", attach.netns));
    }
    // The daemon adapts pods to the underlay while they live: its word counts, the result's only without it.
    let node = node::read(&conf.run_file(NODE_FILE));
    let mtu = match (&node, reported.mtu) {
        (Ok(node), _) => node.pod_mtu,
        (Err(_), Some(mtu)) => mtu,
        (Err(failure), None) => return Err(failure.clone()),
    };
    let spec = PodSpec::of(&endpoint, mtu);
    let pod_mtu = pod_mtu(mtu, &reported, result::find_host_interface(previous, spec.host_interface.as_str()));
    deviations.extend(pod::check(&spec, &netns, &pod_mtu)?);
    if let Some(mac) = reported.mac.filter(|mac| *mac != spec.pod_mac) {
        deviations.push(format!(
            "prevResult reports the Ethernet address {mac} for {}, but the host sends to {}: a plugin chained behind has changed \
             it, and nobody reaches the pod; ask for the address with the capability mac instead",
            id.ifname, spec.pod_mac
        ));
    }
    deviations.extend(host_ports::deviations(&endpoint, node.as_ref().ok())?);
    if deviations.is_empty() {
        return Ok(());
    }
    let message = format!("attachment {id} is not as it was made: {}; delete the pod", deviations.join("; "));
    Err(Failure::new(Code::Deviates, message))
}

/// What MTU the pod's end may have. A plugin chained behind may have given it another one (CNI specification 1.1, section 2,
/// "CHECK"): then the result reports it, beside the one of the host's end, which is what ADD gave both. Results before version
/// 1.1.0 report none, and cannot tell that a plugin made it smaller.
fn pod_mtu(mtu: u32, pod: &Reported, host: Option<Reported>) -> PodMtu {
    match (pod.mtu, host.and_then(|host| host.mtu)) {
        (Some(pod), Some(host)) if pod != host => PodMtu::OneOf(vec![mtu, pod]),
        (Some(_), _) => PodMtu::OneOf(vec![mtu]),
        (None, _) => PodMtu::AtMost(mtu),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_mtu_than_ours_has_to_be_reported() {
        let reported = |mtu| Reported { mtu, ..Reported::default() };
        for (pod, host, expected) in [
            (Some(1420), Some(1420), PodMtu::OneOf(vec![1390])),
            (Some(1300), Some(1420), PodMtu::OneOf(vec![1390, 1300])),
            (Some(1300), None, PodMtu::OneOf(vec![1390])),
            (None, None, PodMtu::AtMost(1390)),
        ] {
            assert_eq!(pod_mtu(1390, &reported(pod), Some(reported(host))), expected, "{pod:?} {host:?}");
        }
    }
}
