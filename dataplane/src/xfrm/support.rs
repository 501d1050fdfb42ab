//! Whether the kernel has what a mode needs, found out by trying it in a network namespace made for that.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use husk_overlay::esp::Aead;
use husk_overlay::kernel::{LinkKind, XfrmParameters, XfrmStateKey};
use husk_overlay::marks;
use husk_overlay::mtu::EspMode;
use husk_overlay::prefix::Family;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use nix::errno::Errno;
use zeroize::Zeroizing;

use super::states::{self, AEAD};
use super::{encapsulation_socket, is_absent};
use crate::error::Error;
use crate::features;
use crate::netlink::{Protocol, Request, Socket};
use crate::netns::Netns;

/// What is asked of the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Needs {
    /// Families of the underlay.
    pub families: BTreeSet<Family>,
    /// Cipher.
    pub cipher: Aead,
    /// Tunnel mode needs xfrm interfaces as well.
    pub mode: EspMode,
    /// ESP in UDP.
    pub udp: bool,
}

/// The same for all that may be missing, since the kernel cannot always say which of them it is.
const REMEDY: &str = "load the modules xfrm_user, esp4, esp6 and gcm, and xfrm_interface for mode ipsec, from the kernel's extra \
                      modules, or use a kernel with CONFIG_XFRM_USER, CONFIG_INET_ESP, CONFIG_INET6_ESP, CONFIG_CRYPTO_GCM, \
                      CONFIG_CRYPTO_AES and CONFIG_XFRM_INTERFACE; or choose another mode";

const OPERATION: &str = "find";
const OBJECT: &str = "the kernel's IPsec";

/// Whether the kernel has all that is needed. Asking makes it load the modules.
///
/// # Errors
/// [`Error::Unsupported`] naming all that is missing; any other error means that there was no answer, for example for want
/// of a privilege.
pub fn support(needs: &Needs) -> Result<(), Error> {
    let missing = Netns::new_unnamed()?.run_in(|| missing(needs))??;
    if missing.is_empty() {
        return Ok(());
    }
    let reason = format!("it has no {}, or the modules cannot be loaded", missing.join(", no "));
    Err(Error::Unsupported { operation: OPERATION, object: OBJECT.to_owned(), reason, remedy: REMEDY })
}

/// What is missing, in words, found in the calling thread's network namespace.
fn missing(needs: &Needs) -> Result<Vec<String>, Error> {
    let mut missing = Vec::new();
    match Socket::open(Protocol::Xfrm) {
        Ok(mut socket) => {
            for family in &needs.families {
                match install(&mut socket, *family, needs) {
                    Ok(()) => {}
                    Err(error) => missing.push(lacking(*family, error)?),
                }
            }
            // Both families lack the same cipher.
            missing.dedup();
        }
        Err(error) if is_absent(&error) => missing.push("xfrm netlink protocol (xfrm_user)".to_owned()),
        Err(error) => return Err(error),
    }
    if needs.mode == EspMode::Tunnel {
        match create_interface() {
            Ok(()) => {}
            Err(error) if error.errno() == Some(Errno::EOPNOTSUPP) => {
                missing.push("xfrm interfaces (xfrm_interface)".to_owned());
            }
            Err(error) => return Err(error),
        }
    }
    for family in needs.families.iter().filter(|_| needs.udp) {
        match encapsulation_socket(SocketAddr::new(addresses(*family).2, 0)) {
            Ok(_) => {}
            Err(error) if error.errno() == Some(Errno::ENOPROTOOPT) => {
                missing.push(format!("ESP in UDP over {family} (CONFIG_XFRM)"));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(missing)
}

/// Two documentation addresses (RFC 5737, RFC 3849), and the one that means any.
fn addresses(family: Family) -> (IpAddr, IpAddr, IpAddr) {
    match family {
        Family::Ipv4 => {
            let last = |last| IpAddr::V4(Ipv4Addr::new(192, 0, 2, last));
            (last(1), last(2), IpAddr::V4(Ipv4Addr::UNSPECIFIED))
        }
        Family::Ipv6 => {
            let last = |last| IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, last));
            (last(1), last(2), IpAddr::V6(Ipv6Addr::UNSPECIFIED))
        }
    }
}

/// Installs an association as Husk would, with a key that protects nothing.
fn install(socket: &mut Socket, family: Family, needs: &Needs) -> Result<(), Error> {
    let (source, destination, _) = addresses(family);
    let parameters = XfrmParameters {
        source,
        mode: needs.mode,
        if_id: 0,
        cipher: needs.cipher,
        replay_window: 32,
        udp: needs.udp.then_some((4500, 4500)),
    };
    let key = XfrmStateKey { destination, spi: 256 };
    let secret = Zeroizing::new(vec![0; needs.cipher.key_length()]);
    let message = states::add(&key, &parameters, &secret);
    let object = format!("an association over {family} for a trial");
    socket.request(Request { operation: "install", object, flags: NLM_F_CREATE | NLM_F_EXCL, message })
}

/// What a refusal says is missing. `ENOSYS` and `ENOENT` come from the choice of the cipher (net/xfrm/xfrm_user.c
/// `attach_aead`, net/ipv4/esp4.c `esp_init_aead`), which is made before that of the protocol, whose absence is
/// `EPROTONOSUPPORT` (net/xfrm/xfrm_state.c `__xfrm_init_state`).
fn lacking(family: Family, error: Error) -> Result<String, Error> {
    match error.errno() {
        Some(Errno::ENOSYS | Errno::ENOENT) => Ok(format!("cipher {AEAD} (gcm, aes)")),
        Some(Errno::EPROTONOSUPPORT | Errno::EAFNOSUPPORT) => {
            let module = if family == Family::Ipv4 { "esp4" } else { "esp6" };
            Ok(format!("ESP over {family} ({module})"))
        }
        _ => Err(error),
    }
}

fn create_interface() -> Result<(), Error> {
    features::create(marks::XFRM_INTERFACE, LinkKind::Xfrm { if_id: marks::XFRM_IF_ID })
}
