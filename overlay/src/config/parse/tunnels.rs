//! The keys of tunnels: VXLAN, WireGuard, IPsec, and the rotation of cryptographic keys.

use super::read_path;
use crate::config::reader::{Complaint, Fields};
use crate::config::{Config, IpsecConfig, RotationConfig, VxlanConfig, WireguardChoice, WireguardConfig};
use crate::esp::Aead;
use crate::mode::Mode;
use crate::yaml::Value;

/// Largest VXLAN network identifier (RFC 7348, section 5: 24 bits).
const MAX_VNI: u32 = (1 << 24) - 1;

/// Smallest replay window in packets: what several queues and processors of one link reorder.
const MIN_REPLAY_WINDOW: u32 = 1024;

/// Largest replay window in packets: `XFRMA_REPLAY_ESN_MAX` (include/uapi/linux/xfrm.h), a limit in bits of the kernel's
/// bitmap.
const MAX_REPLAY_WINDOW: u32 = 4096;

/// The kernel's bitmap has words of so many bits.
const REPLAY_WORD: u32 = 32;

/// Fewer packets or bytes under a key and rotations would follow each other without a pause.
const MIN_PACKETS: u64 = 1_000;
const MIN_BYTES: u64 = 1_000_000;

/// Shortest time between two rotations in seconds: one has to be over before the next begins.
const MIN_ROTATION: u32 = 60;

/// Longest time an old key may stay, and between two rotations: a year in seconds.
const MAX_ROTATION: u32 = 365 * 24 * 60 * 60;

/// Longest time an unused key may stay, in seconds: an hour.
const MAX_GRACE: u32 = 60 * 60;

/// Fewest bits of an SPI: with fewer a test would run out of SPIs before it has made its associations.
const MIN_SPI_BITS: u8 = 4;

pub(super) fn read_vxlan(top: &mut Fields<'_, '_>) -> VxlanConfig {
    let mut section = top.section("vxlan");
    let default = VxlanConfig::default();
    let why = "a VXLAN network identifier has 24 bits (RFC 7348), and 0 is left to devices that take any";
    let vni = section.number("vni", 1..=MAX_VNI, why).unwrap_or(default.vni);
    let port = section.number("port", 1..=u16::MAX, "a UDP port has 16 bits, and 0 is none").unwrap_or(default.port);
    section.finish();
    VxlanConfig { vni, port }
}

pub(super) fn read_wireguard(top: &mut Fields<'_, '_>, vxlan: VxlanConfig) -> WireguardConfig {
    let vxlan_port_given = gives_port(top, "vxlan");
    let mut section = top.section("wireguard");
    let default = WireguardConfig::default();
    let why = "a UDP port has 16 bits, 0 is none, and the second device takes the port behind this one";
    let port = section.number("port", 1..=u16::MAX - 1, why);
    if let Some(port) = port
        && vxlan_port_given
        && (port == vxlan.port || port + 1 == vxlan.port)
    {
        let reason = format!("WireGuard takes the ports {port} and {}, and vxlan.port is {}", port + 1, vxlan.port);
        section.complain("port", Complaint::conflict(reason, "use ports that do not collide"));
    }
    let choices = [
        ("auto", WireguardChoice::Auto),
        ("kernel", WireguardChoice::Kernel),
        ("userspace", WireguardChoice::Userspace),
    ];
    let device = section.choice("device", &choices).unwrap_or(default.device);
    let why = "a keepalive interval in seconds has 16 bits; 0 is off";
    let keepalive = section.number("keepalive", 0..=u16::MAX, why).unwrap_or(default.keepalive);
    section.finish();
    WireguardConfig { port: port.unwrap_or(default.port), device, keepalive }
}

pub(super) fn read_ipsec(top: &mut Fields<'_, '_>, config: &Config) -> IpsecConfig {
    let vxlan_port_matters = gives_port(top, "vxlan") || config.mode == Mode::VxlanIpsec;
    let wireguard_port_matters = gives_port(top, "wireguard");
    let mut section = top.section("ipsec");
    let default = IpsecConfig::default();
    let cipher = section.choice("cipher", &Aead::ALL.map(|it| (it.as_str(), it))).unwrap_or(default.cipher);

    let key = "udpEncapsulation";
    let why = "this is the UDP port of encapsulated packets, which has 16 bits; 0 is off";
    let udp_port = section.number(key, 0..=u16::MAX, why).filter(|port| *port != 0);
    if let Some(port) = udp_port {
        let wireguard = config.wireguard.port;
        let reason = if vxlan_port_matters && port == config.vxlan.port {
            Some(format!("vxlan.port is {port} too"))
        } else if wireguard_port_matters && (port == wireguard || port == wireguard + 1) {
            Some(format!("WireGuard takes the ports {wireguard} and {}", wireguard + 1))
        } else {
            None
        };
        if let Some(reason) = reason {
            section.complain(key, Complaint::conflict(reason, "use ports that do not collide"));
        }
    }

    let key = "replayWindow";
    let why = "with fewer than 1024 packets what a busy link reorders is lost, and the kernel knows 4096 at most";
    let replay_window = section.number(key, MIN_REPLAY_WINDOW..=MAX_REPLAY_WINDOW, why);
    if let Some(given) = replay_window
        && given % REPLAY_WORD != 0
    {
        let remedy = format!("write {}", given.next_multiple_of(REPLAY_WORD));
        let reason = format!("the kernel counts the replay window in words of {REPLAY_WORD} packets");
        section.complain(key, Complaint::bad(reason, remedy));
    }

    let preshared_key_file = read_path(&mut section, "presharedKeyFile");
    let why = "AES-GCM keeps its margin for so many packets under one key, and with few the keys never come to rest";
    let max_packets = section.number("maxPackets", MIN_PACKETS..=default.max_packets, why);
    let why = "AES-GCM keeps its margin for so many bytes under one key, and with few the keys never come to rest";
    let max_bytes = section.number("maxBytes", MIN_BYTES..=default.max_bytes, why);
    let why = "an SPI has 32 bits; fewer are for tests of collisions";
    let spi_bits = section.number("spiBits", MIN_SPI_BITS..=default.spi_bits, why);
    section.finish();
    IpsecConfig {
        cipher,
        udp_port,
        replay_window: replay_window.unwrap_or(default.replay_window),
        preshared_key_file,
        max_packets: max_packets.unwrap_or(default.max_packets),
        max_bytes: max_bytes.unwrap_or(default.max_bytes),
        spi_bits: spi_bits.unwrap_or(default.spi_bits),
    }
}

pub(super) fn read_rotation(top: &mut Fields<'_, '_>) -> RotationConfig {
    let mut section = top.section("keys");
    let default = RotationConfig::default();
    let why = "keys are replaced once a year or more often (in seconds); 0 is only on demand";
    let interval = match section.number("rotation", 0..=MAX_ROTATION, why) {
        None => default.interval,
        Some(0) => None,
        Some(given) => {
            if given < MIN_ROTATION {
                let reason = "a rotation has to be over before the next one begins";
                let remedy = format!("write a number of seconds from {MIN_ROTATION} on, or 0 to rotate only on demand");
                section.complain("rotation", Complaint::bad(reason, remedy));
            }
            Some(given)
        }
    };
    let why =
        "packets sent under the old key may be under way for some time (in seconds), but not for more than an hour";
    let given_grace = section.number("grace", 1..=MAX_GRACE, why);
    let grace = given_grace.unwrap_or(default.grace);
    let why = "an old key stays for a year at most (in seconds)";
    let given_lifetime = section.number("hardLifetime", 2..=MAX_ROTATION, why);
    let hard_lifetime = given_lifetime.unwrap_or(default.hard_lifetime);

    if let Some(interval) = interval.filter(|interval| given_grace.is_some() && grace >= *interval) {
        let reason = format!("the old key has to be gone before the next rotation, and keys.rotation is {interval}");
        section.complain("grace", Complaint::conflict(reason, "use a shorter grace, or rotate less often"));
    }
    if given_lifetime.is_some() && grace >= hard_lifetime {
        let default = if given_grace.is_some() { "" } else { "the default " };
        let reason = format!("an old key would be gone before {default}keys.grace, {grace} s, is over");
        section.complain("hardLifetime", Complaint::conflict(reason, "use a longer lifetime, or a shorter grace"));
    }
    section.finish();
    RotationConfig { interval, grace, hard_lifetime }
}

/// True if a section says which port to use. Ports that were both chosen must not collide, whatever the mode: the cluster is
/// meant to be able to change between the modes, node by node.
fn gives_port(top: &mut Fields<'_, '_>, section: &'static str) -> bool {
    matches!(top.value(section), Some(Value::Map(keys)) if keys.iter().any(|(key, _)| key == "port"))
}
