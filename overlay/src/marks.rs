//! Marks: how Husk recognises its own state in a kernel and on a disk that others use too.
//!
//! Whatever Husk creates carries one of these marks, and Husk sweeps only what carries one. They are defined here and
//! nowhere else.

use crate::name::InterfaceName;

/// Route protocol number (`rtm_protocol`) of every route Husk installs.
///
/// Values above `RTPROT_STATIC` (4) are free for user space; 72 is used by none of the protocols listed in
/// iproute2's `etc/iproute2/rt_protos`.
pub const ROUTE_PROTOCOL: u8 = 72;

/// Every interface Husk creates in a host's network namespace has a name with this prefix.
pub const INTERFACE_PREFIX: &str = "husk";

/// The VXLAN tunnel device.
pub const VXLAN_INTERFACE: &str = "husk-vx";

/// The WireGuard devices, one per key generation; a rotation moves the mesh from one to the other.
pub const WIREGUARD_INTERFACES: [&str; 2] = ["husk-wg0", "husk-wg1"];

/// Slot of the WireGuard device of a rotation generation: the parity, so that two generations in a row have one each.
#[must_use]
pub fn wireguard_slot(generation: u64) -> u8 {
    u8::from(generation % 2 == 1)
}

/// Name of the WireGuard device of a rotation generation.
#[must_use]
pub fn wireguard_interface(generation: u64) -> InterfaceName {
    InterfaceName::new(WIREGUARD_INTERFACES[usize::from(wireguard_slot(generation))])
        .expect("a constant of letters, digits and a dash")
}

/// The xfrm interface.
pub const XFRM_INTERFACE: &str = "husk-ipsec";

/// Request id of every xfrm state and policy template Husk installs: "husk" in ASCII, which nobody arrives at by counting.
pub const XFRM_REQID: u32 = 0x6875_736b;

/// Interface id of the xfrm interface and of what belongs to it.
pub const XFRM_IF_ID: u32 = 0x6875_736b;

/// Priority of the xfrm policies that block, which have no template to carry the request id; it is how they are recognised.
pub const XFRM_BLOCK_PRIORITY: u32 = 0x6875_736b;

/// Name of the nftables table, of family `inet`.
pub const NFT_TABLE: &str = "husk";

/// Name of the nftables table that enforces network policy, of family `inet`.
pub const NFT_POLICY_TABLE: &str = "husk-policy";

/// NFLOG group in which the kernel tells of packets that policy denied: 72 as [`ROUTE_PROTOCOL`].
pub const NFLOG_GROUP: u16 = 72;

/// Port at which nodes probe each other through the tunnel (UDP), and make transfers that test the offload of the VXLAN device
/// (TCP): "HUSK" on the keys of a telephone. No service is known to
/// Debian's `/etc/services` there, and it is below the ports that Kubernetes gives to services (30000) and that Linux gives to
/// whoever asks for none in particular (32768, `ip_local_port_range`).
pub const PROBE_PORT: u16 = 4875;

/// Gateway of every pod for IPv4: link-local (RFC 3927), never seen outside the veth pair.
pub const POD_GATEWAY_V4: std::net::Ipv4Addr = std::net::Ipv4Addr::new(169, 254, 1, 1);

/// Gateway of every pod for IPv6: link-local (RFC 4291 section 2.5.6), never seen outside the veth pair.
pub const POD_GATEWAY_V6: std::net::Ipv6Addr = std::net::Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// Runtime directory (tmpfs): `node.json`, the daemon's socket, leases, private keys. Gone after a reboot, on purpose.
pub const RUN_DIRECTORY: &str = "/run/husk";

/// Where userspace WireGuard processes put their control sockets, `<interface>.sock`: shared with other programs, and fixed
/// in `wg` (`SOCK_PATH` in wireguard-tools src/ipc-uapi-unix.h).
pub const WIREGUARD_SOCKET_DIRECTORY: &str = "/var/run/wireguard";

/// What survives a reboot: the last snapshot, sysctl values found before Husk changed them.
pub const STATE_DIRECTORY: &str = "/var/lib/husk";

/// The CNI type, and the file name of the plugin in the CNI binary directory.
pub const CNI_TYPE: &str = "husk";

/// File name of the CNI network configuration list in the CNI configuration directory.
pub const CNI_CONFLIST: &str = "05-husk.conflist";

/// Names of the interfaces that carry tunnels.
#[must_use]
pub fn is_tunnel_interface(name: &str) -> bool {
    name == VXLAN_INTERFACE || name == XFRM_INTERFACE || WIREGUARD_INTERFACES.contains(&name)
}

/// Names of the host ends of pod veth pairs: the prefix followed by a hash, without the dash of tunnel names.
#[must_use]
pub fn is_pod_interface(name: &str) -> bool {
    name.strip_prefix(INTERFACE_PREFIX)
        .is_some_and(|rest| rest.len() == POD_INTERFACE_HASH && rest.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// True for a kernel parameter of the host end of a pod, named by its path: it comes and goes with the pod.
#[must_use]
pub fn is_pod_parameter(path: &str) -> bool {
    path.split('/').any(is_pod_interface)
}

/// Hexadecimal digits behind the prefix in the name of a pod's host interface (`IFNAMSIZ` leaves 15 bytes in all).
pub const POD_INTERFACE_HASH: usize = 11;

/// Host interface name of an attachment: deterministic, so that DEL finds it with nothing but its environment.
#[must_use]
pub fn pod_interface(network: &str, container_id: &str, ifname: &str) -> InterfaceName {
    let digest = crate::digest::hex(&["pod-interface", network, container_id, ifname]);
    InterfaceName::new(&format!("{INTERFACE_PREFIX}{}", &digest[..POD_INTERFACE_HASH]))
        .expect("prefix and hash make 15 bytes of letters and digits")
}
