//! Whether the kernel has a kind of device, found out by making one in a network namespace made for that.

use std::net::{IpAddr, Ipv4Addr};

use husk_overlay::kernel::{Link, LinkKind};
use husk_overlay::marks;
use husk_overlay::name::InterfaceName;
use nix::errno::Errno;

use crate::error::Error;
use crate::links::{self, LinkChange};
use crate::netlink::{Protocol, Socket};
use crate::netns::Netns;
use crate::step::perform;

/// Whether the kernel has VXLAN devices. Asking makes it load the module.
///
/// # Errors
/// [`Error::Unsupported`] if it has none; any other error means that there was no answer, for example for want of a privilege.
pub fn vxlan() -> Result<(), Error> {
    let kind = LinkKind::Vxlan { vni: 1, port: 4789, local: IpAddr::V4(Ipv4Addr::LOCALHOST) };
    match Netns::new_unnamed()?.run_in(|| create(marks::VXLAN_INTERFACE, kind))? {
        Err(error) if error.errno() == Some(Errno::EOPNOTSUPP) => Err(Error::Unsupported {
            operation: "find",
            object: "the kernel's VXLAN devices".to_owned(),
            reason: "it has none, or the module vxlan cannot be loaded".to_owned(),
            remedy: "load the module vxlan, use a kernel with CONFIG_VXLAN, or choose another mode",
        }),
        other => other,
    }
}

/// Makes a device in the calling thread's network namespace. An unknown kind is `EOPNOTSUPP` (net/core/rtnetlink.c
/// `rtnl_newlink`).
pub(crate) fn create(name: &str, kind: LinkKind) -> Result<(), Error> {
    let interface = InterfaceName::new(name).expect("a mark is a valid name");
    let link = Link { kind, mtu: 1400, mac: None, threaded_napi: false };
    let steps = links::steps(&LinkChange::Create { interface, link });
    perform(&mut Socket::open(Protocol::Route)?, vec![Ok(steps)]).pop().expect("one change has one result")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_that_no_kernel_has_is_told_from_one_that_this_has() {
        // Where there is none the tiers with tunnels could not run at all.
        vxlan().unwrap();
    }
}
