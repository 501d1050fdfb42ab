//! Threaded NAPI on tunnel devices: packets of one device are worked off, and decrypted, on more than one core.
//!
//! It is an optimisation and treated as one: where it cannot be read it is unknown and left alone. It is only ever turned on;
//! kernels from 6.17 on do so by themselves for WireGuard. A WireGuard device has one NAPI instance per peer and refuses the
//! setting while it has none (net/core/net-sysfs.c `modify_napi_threaded`), so this table comes after the peers. A TUN device
//! has none at all. A VXLAN device must never get it: its receive queue (net/core/gro_cells.c) is lockless per processor and
//! relies on NAPI staying on that processor; with a thread elsewhere it stops receiving under load, for good. Decrypted
//! packets of an xfrm interface go through the same kind of queue (net/xfrm/xfrm_input.c `xfrm_input`).

use std::collections::BTreeMap;
use std::fmt;
use std::io::{Read as _, Write as _};

use husk_overlay::kernel::{Desired, LinkKind};
use husk_overlay::name::InterfaceName;
use nix::fcntl::OFlag;
use serde::Serialize;

use crate::error::Error;
use crate::sysfs::Sysfs;

/// Turn threaded NAPI on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NapiChange {
    /// Tunnel device.
    pub interface: InterfaceName,
}

impl fmt::Display for NapiChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "turn on threaded NAPI of {}", self.interface)
    }
}

/// Devices to turn it on for. A device that is absent in `actual` has no known state and is left alone.
#[must_use]
pub fn diff(desired: &Desired, actual: &BTreeMap<InterfaceName, bool>) -> Vec<NapiChange> {
    let wanted = desired.links.iter().filter(|(interface, link)| {
        link.threaded_napi
            && match link.kind {
                LinkKind::Wireguard => desired.wireguard.get(*interface).is_some_and(|device| !device.peers.is_empty()),
                // Refused here as well, whatever is desired: a VXLAN device that stops receiving comes back only anew.
                LinkKind::Vxlan { .. } | LinkKind::Xfrm { .. } | LinkKind::WireguardUserspace => false,
            }
    });
    wanted
        .filter(|(interface, _)| actual.get(*interface) == Some(&false))
        .map(|(interface, _)| NapiChange { interface: interface.clone() })
        .collect()
}

/// Whether the kernel of the calling thread's network namespace knows threaded NAPI (Linux 5.12) and lets us set it.
#[must_use]
pub fn supported() -> bool {
    Sysfs::mount().and_then(|sysfs| sysfs.open(&path("lo"), OFlag::O_RDONLY)).is_ok()
}

fn path(interface: &str) -> String {
    format!("class/net/{interface}/threaded")
}

/// State of the desired tunnel devices; those whose state cannot be read are absent.
pub(crate) fn read(sysfs: &Sysfs, desired: &Desired) -> BTreeMap<InterfaceName, bool> {
    let wanted = desired.links.iter().filter(|(_, link)| link.threaded_napi);
    let known = wanted.filter_map(|(interface, _)| {
        let mut text = String::new();
        let mut file = sysfs.open(&path(interface.as_str()), OFlag::O_RDONLY).ok()?;
        file.read_to_string(&mut text).ok()?;
        // 2 is threaded with busy polling (Linux 6.18).
        Some((interface.clone(), text.trim() != "0"))
    });
    known.collect()
}

/// Turns it on.
pub(crate) fn apply(sysfs: &Sysfs, change: &NapiChange) -> Result<(), Error> {
    let path = path(change.interface.as_str());
    let write = |()| sysfs.open(&path, OFlag::O_WRONLY)?.write_all(b"1");
    match write(()) {
        // The device has no NAPI instance, or went meanwhile.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOENT)) => {
            tracing::debug!(%error, interface = %change.interface, "threaded NAPI is not to be had");
            Ok(())
        }
        other => other.map_err(|source| Error::File {
            operation: "write",
            path: std::path::Path::new("/sys").join(&path),
            source,
        }),
    }
}
