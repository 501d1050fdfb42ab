//! CIDRs, ports and their names, as both kinds of policy have them.

use std::net::IpAddr;

use husk_overlay::prefix::Prefix;

use super::place::{Fault, Spot};

/// Longest name of a port (`IANA_SVC_NAME`; RFC 6335, section 5.1).
const LONGEST_PORT_NAME: usize = 15;

/// Bits before the IPv4 address in an IPv6 address that maps it (RFC 4291, section 2.5.5.2).
const MAPPED_BITS: u8 = 96;

/// A CIDR. Kubernetes lets bits be set behind the length; they mean nothing.
pub(super) fn cidr(spot: &Spot<'_>) -> Result<Prefix, Fault> {
    let remedy = "write address/length, for example 10.42.0.0/16 or fd42::/48";
    parse_cidr(spot.text()?).ok_or_else(|| spot.fault("this is no CIDR", remedy))
}

fn parse_cidr(text: &str) -> Option<Prefix> {
    let (address, length) = text.split_once('/')?;
    let address: IpAddr = address.parse().ok()?;
    // `+8` and `08` are numbers to Rust, and no lengths to Kubernetes.
    let digits = length.bytes().all(|byte| byte.is_ascii_digit()) && (length == "0" || !length.starts_with('0'));
    let length: u8 = length.parse().ok().filter(|_| digits)?;
    match address.to_canonical() {
        IpAddr::V4(mapped) if address.is_ipv6() && length >= MAPPED_BITS => {
            Prefix::containing(mapped.into(), length - MAPPED_BITS).ok()
        }
        _ => Prefix::containing(address, length).ok(),
    }
}

/// The number of a port.
pub(super) fn port_number(spot: &Spot<'_>) -> Result<u16, Fault> {
    let number = spot.whole().and_then(|number| u16::try_from(number).ok()).filter(|number| *number > 0);
    number.ok_or_else(|| spot.fault("a port is a whole number from 1 to 65535", "write the number of a port"))
}

/// The name of a port.
pub(super) fn port_name(spot: &Spot<'_>) -> Result<String, Fault> {
    let name = spot.text()?;
    let charset = name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
    let hyphens = name.starts_with('-') || name.ends_with('-') || name.contains("--");
    let letter = name.bytes().any(|byte| byte.is_ascii_lowercase());
    if charset && letter && !hyphens && name.len() <= LONGEST_PORT_NAME {
        return Ok(name.to_owned());
    }
    let reason = format!(
        "the name of a port has up to {LONGEST_PORT_NAME} lower-case letters, digits and single '-' between them, and at least one letter"
    );
    Err(spot.fault(reason, "write the name that a container gives its port, or a number without quotes"))
}
