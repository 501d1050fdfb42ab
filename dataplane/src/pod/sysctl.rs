//! Kernel parameters of both veth ends (Documentation/networking/ip-sysctl.rst in the kernel's sources).

use std::fs;
use std::path::Path;

use husk_overlay::name::InterfaceName;

use super::PodSpec;
use crate::error::Error;

/// Tunes the pod end; called in the pod's namespace.
pub(super) fn tune_pod(spec: &PodSpec, loopback: &InterfaceName) -> Result<(), Error> {
    if spec.addresses.ipv6.is_none() {
        return Ok(());
    }
    // Container runtimes commonly switch IPv6 off in new namespaces; without it on the loopback interface, a pod could
    // not reach its own address.
    set("ipv6", loopback, "disable_ipv6", "0")?;
    set("ipv6", &spec.pod_interface, "disable_ipv6", "0")?;
    // The link-local address must be usable at once, too.
    set("ipv6", &spec.pod_interface, "accept_dad", "0")?;
    // There is no router beside the host, and the host sends neither advertisements nor redirects.
    set("ipv6", &spec.pod_interface, "accept_ra", "0")?;
    set("ipv6", &spec.pod_interface, "accept_redirects", "0")
}

/// Tunes the host end; called in the host's namespace.
pub(super) fn tune_host(spec: &PodSpec) -> Result<(), Error> {
    let interface = &spec.host_interface;
    // A reverse path filter that is strict: a pod sends from its own address or not at all, even before the daemon's
    // rules know it.
    set("ipv4", interface, "rp_filter", "1")?;
    // The host's own addresses are reached through the gateway's permanent neighbour entry; ARP has no business here.
    set("ipv4", interface, "arp_ignore", "8")?;
    set("ipv4", interface, "send_redirects", "0")?;
    set("ipv4", interface, "accept_redirects", "0")?;
    if spec.loopback {
        set("ipv4", interface, "route_localnet", "1")?;
    }
    if spec.addresses.ipv6.is_some() {
        set("ipv6", interface, "disable_ipv6", "0")?;
    }
    if spec.addresses.ipv6.is_some() || exists("ipv6", interface) {
        // No address of its own (1: none), and a pod cannot configure its host.
        set("ipv6", interface, "addr_gen_mode", "1")?;
        set("ipv6", interface, "accept_ra", "0")?;
        set("ipv6", interface, "accept_redirects", "0")?;
    }
    Ok(())
}

fn exists(family: &str, interface: &InterfaceName) -> bool {
    Path::new(&format!("/proc/sys/net/{family}/conf/{interface}")).exists()
}

fn set(family: &str, interface: &InterfaceName, name: &str, value: &str) -> Result<(), Error> {
    let path = format!("/proc/sys/net/{family}/conf/{interface}/{name}");
    fs::write(&path, value).map_err(|source| Error::File { operation: "write", path: path.into(), source })
}
