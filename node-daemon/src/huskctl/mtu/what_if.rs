//! `huskctl mtu --what-if`: the calculus for a mode and an underlay that need not exist.

use std::num::NonZeroU16;
use std::str::FromStr;

use husk_overlay::mode::{Mode, ModeError};
use husk_overlay::mtu::{MAXIMUM, check, inner_mtu, ledger};
use husk_overlay::prefix::Family;

use crate::report::WhatIfReport;

/// Smallest underlay MTU in bytes that makes sense: every link that carries IPv4 takes packets of this size (RFC 791,
/// section 3.2).
const MINIMUM: u32 = 68;

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct WhatIf {
    mode: Mode,
    /// Underlay MTU in bytes.
    underlay: u32,
    /// Family of the underlay; none means both.
    family: Option<Family>,
    /// UDP port of UDP encapsulation.
    udp: Option<NonZeroU16>,
}

/// Why a text does not ask for anything.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum WhatIfError {
    #[error("{0:?} is not KEY=VALUE; write for example mode=vxlan-ipsec,underlay=9001")]
    Syntax(String),
    #[error("{0:?} is not known: mode, underlay, family and udp are")]
    UnknownKey(String),
    #[error("{0} is there twice")]
    Repeated(String),
    #[error("{0} is missing; write for example mode=vxlan-ipsec,underlay=9001")]
    Missing(&'static str),
    #[error("mode={0}")]
    Mode(#[from] ModeError),
    #[error("underlay={0:?} is not an MTU: a whole number of bytes from {MINIMUM} to {MAXIMUM} is")]
    Underlay(String),
    #[error("family={0:?} is not a family: ipv4 and ipv6 are")]
    Family(String),
    #[error("udp={0:?} is not a port: a whole number from 1 to 65535 is")]
    Port(String),
    #[error("udp has a meaning only in the modes ipsec and vxlan-ipsec, not in {0}")]
    UdpWithoutEsp(Mode),
}

impl FromStr for WhatIf {
    type Err = WhatIfError;

    fn from_str(text: &str) -> Result<Self, WhatIfError> {
        let (mut mode, mut underlay, mut family, mut udp) = (None, None, None, None);
        for pair in text.split(',') {
            let (key, value) = pair.split_once('=').ok_or_else(|| WhatIfError::Syntax(pair.to_owned()))?;
            let known = match key {
                "mode" => mode.replace(value.parse::<Mode>()?).is_some(),
                "underlay" => underlay.replace(parse_underlay(value)?).is_some(),
                "family" => family.replace(parse_family(value)?).is_some(),
                "udp" => {
                    let port = value.parse::<NonZeroU16>().map_err(|_| WhatIfError::Port(value.to_owned()))?;
                    udp.replace(port).is_some()
                }
                _ => return Err(WhatIfError::UnknownKey(key.to_owned())),
            };
            if known {
                return Err(WhatIfError::Repeated(key.to_owned()));
            }
        }
        let mode = mode.ok_or(WhatIfError::Missing("mode"))?;
        if udp.is_some() && !mode.uses_esp() {
            return Err(WhatIfError::UdpWithoutEsp(mode));
        }
        Ok(Self { mode, underlay: underlay.ok_or(WhatIfError::Missing("underlay"))?, family, udp })
    }
}

fn parse_underlay(value: &str) -> Result<u32, WhatIfError> {
    let bytes = value.parse::<u32>().ok().filter(|bytes| (MINIMUM..=MAXIMUM).contains(bytes));
    bytes.ok_or_else(|| WhatIfError::Underlay(value.to_owned()))
}

fn parse_family(value: &str) -> Result<Family, WhatIfError> {
    match value {
        "ipv4" => Ok(Family::Ipv4),
        "ipv6" => Ok(Family::Ipv6),
        _ => Err(WhatIfError::Family(value.to_owned())),
    }
}

impl WhatIf {
    /// The ledger for every family of the underlay that was asked for.
    pub(super) fn report(&self) -> Vec<WhatIfReport> {
        let stack = self.mode.stack(self.udp.is_some());
        let families = Family::ALL.into_iter().filter(|family| self.family.is_none_or(|wanted| wanted == *family));
        let rows = families.map(|outer| {
            let refused = Family::ALL.into_iter().filter_map(|inner| {
                let left = inner_mtu(&stack, outer, self.underlay).and_then(|mtu| check(inner, mtu));
                left.err().map(|error| (inner, error.to_string()))
            });
            WhatIfReport { mode: self.mode, ledger: ledger(&stack, outer, self.underlay), refused: refused.collect() }
        });
        rows.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> WhatIf {
        text.parse().unwrap()
    }

    fn refused(text: &str) -> String {
        text.parse::<WhatIf>().unwrap_err().to_string()
    }

    #[test]
    fn keys_come_in_any_order_and_family_and_port_may_be_left_out() {
        let plain = WhatIf { mode: Mode::VxlanIpsec, underlay: 9001, family: None, udp: None };
        assert_eq!(parsed("mode=vxlan-ipsec,underlay=9001"), plain);
        let full = WhatIf { family: Some(Family::Ipv6), udp: NonZeroU16::new(4500), ..plain };
        assert_eq!(parsed("udp=4500,underlay=9001,family=ipv6,mode=vxlan-ipsec"), full);
        assert_eq!(parsed("mode=direct,underlay=68").underlay, 68);
        assert_eq!(parsed("mode=direct,underlay=65535").underlay, 65535);
    }

    #[test]
    fn what_is_wrong_is_named_with_what_would_be_right() {
        for (text, expected) in [
            ("", "\"\" is not KEY=VALUE"),
            ("vxlan", "\"vxlan\" is not KEY=VALUE"),
            ("mode=vxlan,underlay=1500,", "\"\" is not KEY=VALUE"),
            ("mode=vxlan,mtu=1500", "\"mtu\" is not known: mode, underlay, family and udp are"),
            ("mode=vxlan, underlay=1500", "\" underlay\" is not known"),
            ("mode=vxlan,mode=vxlan,underlay=1500", "mode is there twice"),
            ("underlay=1500", "mode is missing"),
            ("mode=vxlan", "underlay is missing"),
            ("mode=gre,underlay=1500", "mode=\"gre\" is not a mode: direct, vxlan"),
            ("mode=vxlan,underlay=67", "underlay=\"67\" is not an MTU: a whole number of bytes from 68 to 65535"),
            ("mode=vxlan,underlay=65536", "underlay=\"65536\" is not an MTU"),
            ("mode=vxlan,underlay=-1", "underlay=\"-1\" is not an MTU"),
            ("mode=vxlan,underlay=1500,family=inet6", "family=\"inet6\" is not a family: ipv4 and ipv6 are"),
            ("mode=ipsec,underlay=1500,udp=0", "udp=\"0\" is not a port"),
            ("mode=ipsec,underlay=1500,udp=70000", "udp=\"70000\" is not a port"),
            ("mode=wireguard,underlay=1500,udp=4500", "udp has a meaning only in the modes ipsec and vxlan-ipsec"),
        ] {
            let error = refused(text);
            assert!(error.starts_with(expected), "{text}: {error}");
        }
    }

    #[test]
    fn the_ledger_is_that_of_the_calculus_for_one_family_or_both() {
        let both = parsed("mode=ipsec,underlay=9001").report();
        let left: Vec<_> = both.iter().map(|row| (row.ledger.outer, row.ledger.inner)).collect();
        // README, MTU: AES-GCM in tunnel mode over IPv4 costs 55 bytes at 9001.
        assert_eq!(left[0], (Family::Ipv4, Some(8946)));
        assert_eq!((left.len(), left[1].0), (2, Family::Ipv6));
        assert!(both.iter().all(|row| row.refused.is_empty()));
        let udp = parsed("mode=ipsec,underlay=9001,udp=4500,family=ipv4").report();
        assert_eq!(udp.len(), 1);
        assert!(udp[0].ledger.inner < both[0].ledger.inner);
    }

    #[test]
    fn too_little_is_refused_for_the_family_that_needs_more() {
        let at = |underlay: u32| {
            let rows = parsed(&format!("mode=vxlan,family=ipv4,underlay={underlay}")).report();
            rows[0].refused.keys().copied().collect::<Vec<_>>()
        };
        assert_eq!(at(1330), []);
        assert_eq!(at(1329), [Family::Ipv6]);
        assert_eq!(at(626), [Family::Ipv6]);
        assert_eq!(at(625), [Family::Ipv4, Family::Ipv6]);
        let nothing = parsed("mode=vxlan,family=ipv6,underlay=70").report();
        assert_eq!((nothing[0].ledger.inner, nothing[0].refused.len()), (None, 2));
    }
}
