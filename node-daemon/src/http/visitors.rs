//! How many connections each address has.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Those who are being served. Clones are of the same.
#[derive(Debug, Clone)]
pub(super) struct Visitors {
    most: usize,
    /// Addresses without any are absent: there are no more of them than connections.
    present: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

/// A connection of somebody, until it is dropped.
#[derive(Debug)]
pub(super) struct Visit {
    visitors: Visitors,
    from: IpAddr,
}

impl Visitors {
    /// Nobody yet; no address may have more than `most` connections.
    pub(super) fn new(most: usize) -> Self {
        Self { most, present: Arc::default() }
    }

    /// Takes a connection from an address; none if it has too many.
    pub(super) fn admit(&self, address: IpAddr) -> Option<Visit> {
        let from = site_of(address);
        let mut present = self.present();
        let count = present.entry(from).or_default();
        if *count >= self.most {
            return None;
        }
        *count += 1;
        Some(Visit { visitors: self.clone(), from })
    }

    fn present(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.present.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        let mut present = self.visitors.present();
        if let Some(count) = present.get_mut(&self.from) {
            *count -= 1;
            if *count == 0 {
                present.remove(&self.from);
            }
        }
    }
}

/// What counts as one address: of IPv6 whoever has one has the others of its /64, too (RFC 4291, section 2.5.1).
fn site_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_has_so_many_connections_and_no_more() {
        let visitors = Visitors::new(2);
        let from = |text: &str| visitors.admit(text.parse().unwrap());
        let (one, two) = (from("192.0.2.1").unwrap(), from("::ffff:192.0.2.1").unwrap());
        assert!(from("192.0.2.1").is_none());
        let _other = from("192.0.2.2").unwrap();
        drop(one);
        let three = from("192.0.2.1").unwrap();
        assert!(from("192.0.2.1").is_none());
        let (_a, _b) = (from("2001:db8::1").unwrap(), from("2001:db8::2").unwrap());
        assert!(from("2001:db8::3").is_none() && from("2001:db8:0:1::3").is_some());
        drop((two, three));
        assert_eq!(visitors.present().len(), 2, "who has gone is forgotten");
    }
}
