//! CHECK: is an attachment as ADD made it?

use husk_dataplane::pod::{self, PodSpec};
use husk_overlay::ipc::NODE_FILE;

use crate::add::open_netns;
use crate::deadline::Deadline;
use crate::error::{Code, Failure};
use crate::invocation::Attach;
use crate::netconf::NetConf;
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
    deviations.extend(pod::check(&PodSpec::of(&endpoint, mtu), &netns)?);
    deviations.extend(host_ports::deviations(&endpoint, node.as_ref().ok())?);
    if deviations.is_empty() {
        return Ok(());
    }
    let message = format!("attachment {id} is not as it was made: {}; delete the pod", deviations.join("; "));
    Err(Failure::new(Code::Deviates, message))
}
