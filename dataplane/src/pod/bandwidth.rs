//! Limits of what a pod receives and sends: a token bucket filter (tc-tbf(8)) as root queueing discipline, on the host end
//! for what goes to the pod, on the pod's end for what comes from it.
//!
//! The one on the pod's end lies in the pod's namespace, since an interface shapes only what it sends: a pod that is given
//! `CAP_NET_ADMIN` can remove it, as it can any limit there. Both come before their interface is set up: on one that is up,
//! a queueing discipline is exchanged only after everybody has stopped sending, which costs an RCU period
//! (`dev_deactivate` in net/sched/sch_generic.c).

use std::time::Duration;

use husk_overlay::bandwidth::Limit;
use husk_overlay::name::InterfaceName;
use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_EXCL, Nla as _, NlasIterator};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage, TcOption};

use crate::error::Error;
use crate::netlink::Request;

/// Kind of the queueing discipline.
const KIND: &str = "tbf";

/// Attributes of a token bucket filter (include/uapi/linux/pkt_sched.h, `TCA_TBF_*`).
const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;

/// Layout of `struct tc_tbf_qopt` there: two `struct tc_ratespec` of 12 bytes, of which the second, the peak rate, is not
/// used, then limit, buffer and MTU.
const RATESPEC: usize = 12;
const RATESPEC_LINK_LAYER: usize = 1;
const RATESPEC_RATE: usize = 8;
const LIMIT: usize = 2 * RATESPEC;
const BUFFER: usize = LIMIT + 4;
const QOPT: usize = LIMIT + 12;

/// `TC_LINKLAYER_ETHERNET` there: packets cost what they are long, so that no table of costs is needed.
const LINK_LAYER_ETHERNET: u8 = 1;

/// Nanoseconds of a tick, in which the kernel tells the size of a bucket (`PSCHED_SHIFT` in include/net/pkt_sched.h).
const TICK_NANOSECONDS: u128 = 64;

/// Major number of the handle, "hu" in ASCII: what else is on the interface is not ours.
const HANDLE: u16 = 0x6875;

/// How long a packet may wait in a full queue; more are dropped. It is the reference plugin's (`latencyInMillis` in
/// plugins/meta/bandwidth/ifb_creator.go of containernetworking/plugins).
const LATENCY: Duration = Duration::from_millis(25);

/// The parameters of a limit as the kernel counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Bucket {
    /// Bytes per second.
    rate: u64,
    /// Bytes that wait at most, those of the bucket included.
    limit: u32,
    /// Bytes that pass at once.
    burst: u32,
}

impl Bucket {
    fn of(limit: Limit) -> Self {
        let rate = limit.rate() / 8;
        let waiting = u128::from(rate) * LATENCY.as_millis() / 1000 + u128::from(limit.burst_bytes());
        Self { rate, limit: u32::try_from(waiting).unwrap_or(u32::MAX), burst: limit.burst_bytes() }
    }

    /// Time in ticks to fill the bucket; what does not fit into 32 bits is cut off, as the kernel does.
    fn ticks(self) -> u32 {
        let nanoseconds = u128::from(self.burst) * 1_000_000_000 / u128::from(self.rate.max(1));
        u32::try_from((nanoseconds / TICK_NANOSECONDS) & u128::from(u32::MAX)).unwrap_or(u32::MAX)
    }

    fn attributes(self) -> Vec<TcOption> {
        let mut parameters = vec![0; QOPT];
        parameters[RATESPEC_LINK_LAYER] = LINK_LAYER_ETHERNET;
        let rate = u32::try_from(self.rate).unwrap_or(u32::MAX);
        parameters[RATESPEC_RATE..RATESPEC].copy_from_slice(&rate.to_ne_bytes());
        parameters[LIMIT..BUFFER].copy_from_slice(&self.limit.to_ne_bytes());
        parameters[BUFFER..BUFFER + 4].copy_from_slice(&self.ticks().to_ne_bytes());
        let mut attributes = vec![
            (TCA_TBF_PARMS, parameters),
            // Exact, where the number of ticks is rounded.
            (TCA_TBF_BURST, self.burst.to_ne_bytes().to_vec()),
        ];
        if u64::from(rate) < self.rate {
            attributes.push((TCA_TBF_RATE64, self.rate.to_ne_bytes().to_vec()));
        }
        attributes.into_iter().map(|(kind, value)| TcOption::Other(DefaultNla::new(kind, value))).collect()
    }
}

/// Adds a limit to what an interface sends.
pub(super) fn add(index: u32, interface: &InterfaceName, limit: Limit) -> Result<Request<RouteNetlinkMessage>, Error> {
    let object = format!("{interface} to {} bit/s", limit.rate());
    let Ok(index) = i32::try_from(index) else {
        let reason = format!("the kernel gave it the index {index}, which is none");
        return Err(Error::Malformed { operation: "limit", object, reason });
    };
    let mut message = TcMessage::with_index(index);
    message.header.parent = TcHandle::ROOT;
    message.header.handle = TcHandle { major: HANDLE, minor: 0 };
    message.attributes = vec![TcAttribute::Kind(KIND.to_owned()), TcAttribute::Options(Bucket::of(limit).attributes())];
    Ok(Request {
        operation: "limit",
        object,
        flags: NLM_F_CREATE | NLM_F_EXCL,
        message: RouteNetlinkMessage::NewQueueDiscipline(message),
    })
}

/// Asks for the queueing disciplines of all interfaces.
pub(super) fn list() -> RouteNetlinkMessage {
    RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default())
}

/// How the queueing disciplines of an interface deviate from its limit; none if they do not.
pub(super) fn deviation(
    all: &[RouteNetlinkMessage],
    index: u32,
    interface: &InterfaceName,
    limit: Limit,
) -> Option<String> {
    let ours = all.iter().find_map(|message| match message {
        RouteNetlinkMessage::NewQueueDiscipline(message)
            if u32::try_from(message.header.index) == Ok(index)
                && message.header.parent == TcHandle::ROOT
                && message.header.handle.major == HANDLE =>
        {
            Some(read(message))
        }
        _ => None,
    });
    let wanted = Bucket::of(limit);
    match ours.flatten() {
        None => Some(format!("the limit of {interface} to {} bit/s is missing", limit.rate())),
        // The kernel computes with a rounded inverse of the rate (`psched_ratecfg_precompute`).
        Some((rate, bytes, ticks))
            if rate == wanted.rate
                && bytes == wanted.limit
                && ticks.abs_diff(wanted.ticks()) <= wanted.ticks() / 1000 + 1 =>
        {
            None
        }
        Some((rate, ..)) if rate == wanted.rate => {
            Some(format!("{interface} is limited with another burst than {} bytes", wanted.burst))
        }
        Some((rate, ..)) => {
            Some(format!("{interface} is limited to {} bit/s instead of {}", rate.saturating_mul(8), limit.rate()))
        }
    }
}

/// Rate in bytes per second, limit in bytes and ticks of a token bucket filter; none if it is something else.
fn read(message: &TcMessage) -> Option<(u64, u32, u32)> {
    let options = message.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Options(options) => options.first(),
        _ => None,
    })?;
    let TcOption::Other(options) = options else { return None };
    let mut nested = vec![0; options.value_len()];
    options.emit_value(&mut nested);
    let (mut parameters, mut rate64) = (None, None);
    for attribute in NlasIterator::new(nested.as_slice()).map_while(Result::ok) {
        match attribute.kind() {
            TCA_TBF_PARMS => parameters = attribute.value().first_chunk::<QOPT>().copied(),
            TCA_TBF_RATE64 => rate64 = attribute.value().first_chunk::<8>().copied().map(u64::from_ne_bytes),
            _ => {}
        }
    }
    let parameters = parameters?;
    let number = |at: usize| parameters[at..].first_chunk::<4>().copied().map(u32::from_ne_bytes);
    Some((rate64.unwrap_or(number(RATESPEC_RATE)?.into()), number(LIMIT)?, number(BUFFER)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_is_that_of_the_reference_plugin() {
        let bucket = Bucket::of(Limit::new(80_000_000, 8_000_000).expect("a possible rate"));
        assert_eq!(bucket, Bucket { rate: 10_000_000, limit: 1_250_000, burst: 1_000_000 });
        // A tenth of a second, in ticks of 64 ns.
        assert_eq!(bucket.ticks(), 1_562_500);
    }

    #[test]
    fn rates_beyond_32_bits_have_an_attribute_of_their_own() {
        let kinds = |rate| {
            let attributes = Bucket::of(Limit::new(rate, 0).expect("a possible rate")).attributes();
            attributes.iter().map(TcOption::kind).collect::<Vec<_>>()
        };
        assert_eq!(kinds(u64::from(u32::MAX) * 8), [TCA_TBF_PARMS, TCA_TBF_BURST]);
        assert_eq!(kinds(u64::from(u32::MAX) * 8 + 8), [TCA_TBF_PARMS, TCA_TBF_BURST, TCA_TBF_RATE64]);
    }
}
