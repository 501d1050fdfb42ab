//! Rates out of what was counted at two moments.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;

use super::Key;
use crate::report::{Counted, Rates, Top, TopLink, TopPeer, TopPod, Totals};

/// What happened between two moments. `time` is that of the later one.
pub(super) fn top(before: &Counted, now: &Counted, time: Timestamp) -> Top {
    let elapsed = now.at.saturating_sub(before.at);
    let rate = |before: Option<u64>, now: Option<u64>| per_second(before, now, elapsed);
    let of_totals = |before: Option<Totals>, now: Option<Totals>| {
        let of = |value: fn(Totals) -> u64| rate(before.map(value), now.map(value));
        Rates {
            received_per_second: of(|it| it.received),
            sent_per_second: of(|it| it.sent),
            packets_per_second: of(|it| it.received_packets.saturating_add(it.sent_packets)),
            dropped_per_second: of(|it| it.dropped),
        }
    };
    let tunnels: BTreeMap<_, _> = before.tunnels.iter().map(|it| (&it.interface, it.totals)).collect();
    let peers: BTreeMap<_, _> = before.peers.iter().map(|it| (&it.node, it)).collect();
    let pods: BTreeMap<_, _> = before.pods.iter().map(|it| (&it.interface, it.totals)).collect();
    Top {
        time,
        node: now.node.clone(),
        mode: now.mode,
        seconds: elapsed.as_secs_f64(),
        tunnels: now
            .tunnels
            .iter()
            .map(|link| {
                let rates = of_totals(tunnels.get(&link.interface).copied(), Some(link.totals));
                TopLink { counted: link.clone(), rates }
            })
            .collect(),
        peers: now
            .peers
            .iter()
            .map(|peer| {
                let before = peers.get(&peer.node);
                let rates = Rates {
                    received_per_second: rate(before.and_then(|it| it.received), peer.received),
                    sent_per_second: rate(before.and_then(|it| it.sent), peer.sent),
                    ..Rates::default()
                };
                TopPeer { counted: peer.clone(), rates }
            })
            .collect(),
        peer_count: now.peers.len(),
        pods: now
            .pods
            .iter()
            .map(|pod| {
                let rates = of_totals(pods.get(&pod.interface).copied().flatten(), pod.totals);
                TopPod { counted: pod.clone(), rates }
            })
            .collect(),
        pod_count: now.pods.len(),
    }
}

/// None if one of the two is missing, or the counter is another one by now: it went back, as that of a new key does.
fn per_second(before: Option<u64>, now: Option<u64>, elapsed: Duration) -> Option<u64> {
    let step = u128::from(now?.checked_sub(before?)?);
    let micros = elapsed.as_micros();
    u64::try_from((step * 1_000_000).checked_div(micros)?).ok()
}

/// Puts rows into order; what is equal goes by name.
pub(super) fn sort(top: &mut Top, key: Key) {
    let traffic = |rates: Rates| {
        let known = rates.received_per_second.is_some() || rates.sent_per_second.is_some();
        let sum = rates.received_per_second.unwrap_or(0).saturating_add(rates.sent_per_second.unwrap_or(0));
        known.then_some(sum)
    };
    let by_rate = |rates: Rates| match key {
        Key::Traffic => traffic(rates),
        Key::Received => rates.received_per_second,
        Key::Sent => rates.sent_per_second,
        Key::Loss | Key::Rtt | Key::Name => None,
    };
    let of_peer = |peer: &TopPeer| match key {
        Key::Loss => peer.counted.loss_per_mille.map(u128::from),
        Key::Rtt => peer.counted.rtt.map(|rtt| rtt.as_nanos()),
        _ => by_rate(peer.rates).map(u128::from),
    };
    let of_pod = |pod: &TopPod| match key {
        Key::Loss => pod.rates.dropped_per_second,
        _ => by_rate(pod.rates),
    };
    top.peers.sort_by_cached_key(|peer| (Reverse(of_peer(peer)), peer.counted.node.clone()));
    top.pods.sort_by_cached_key(|pod| (Reverse(of_pod(pod)), pod.counted.pod.clone()));
}

#[cfg(test)]
pub(super) mod tests {
    use husk_overlay::mode::Mode;

    use super::*;
    use crate::report::{CountedLink, CountedPeer, CountedPod, PeerState};

    fn totals(number: u64) -> Totals {
        Totals {
            received: number * 1000,
            sent: number * 2000,
            received_packets: number,
            sent_packets: number,
            dropped: number / 2,
        }
    }

    /// One tunnel, some peers and some pods that have received and sent so much each.
    pub(in crate::huskctl::top) fn counted(milliseconds: u64, peers: &[Option<u64>], pods: &[u64]) -> Counted {
        let peers = peers.iter().enumerate().map(|(number, bytes)| CountedPeer {
            node: format!("node-{number}").parse().unwrap(),
            state: PeerState::Connected,
            received: *bytes,
            sent: bytes.map(|bytes| bytes * 2),
            rtt: Some(Duration::from_micros(100 + number as u64)),
            loss_per_mille: (number == 0).then_some(5),
        });
        let pods = pods.iter().enumerate().map(|(number, count)| CountedPod {
            pod: format!("shop/pod-{number}"),
            interface: format!("husk{number:011x}").parse().unwrap(),
            totals: Some(totals(*count)),
        });
        Counted {
            node: "node-a".parse().unwrap(),
            mode: Mode::Wireguard,
            at: Duration::from_millis(milliseconds),
            tunnels: vec![CountedLink { interface: "husk-wg0".parse().unwrap(), totals: totals(milliseconds) }],
            peers: peers.collect(),
            pods: pods.collect(),
        }
    }

    pub(in crate::huskctl::top) fn example(before: &Counted, now: &Counted) -> Top {
        top(before, now, Timestamp::UNIX_EPOCH)
    }

    #[test]
    fn rates_are_those_of_the_time_that_went_by() {
        let before = counted(1000, &[Some(1000), Some(9000), None], &[10]);
        let now = counted(3000, &[Some(5000), Some(8999), Some(1)], &[30, 5]);
        let top = example(&before, &now);
        let peers: Vec<_> =
            top.peers.iter().map(|it| (it.rates.received_per_second, it.rates.sent_per_second)).collect();
        assert_eq!(
            peers,
            [(Some(2000), Some(4000)), (None, None), (None, None)],
            "what went back or is new is unknown"
        );
        let rates = |received, sent, packets, dropped| Rates {
            received_per_second: Some(received),
            sent_per_second: Some(sent),
            packets_per_second: Some(packets),
            dropped_per_second: Some(dropped),
        };
        assert_eq!(top.pods[0].rates, rates(10_000, 20_000, 20, 5));
        assert_eq!(top.pods[1].rates, Rates::default(), "a pod that has just come");
        assert_eq!(top.tunnels[0].rates, rates(1_000_000, 2_000_000, 2000, 500));
        assert_eq!((top.seconds, top.peer_count, top.pod_count), (2.0, 3, 2));
        let standing = example(&now, &now);
        assert!(standing.peers.iter().all(|it| it.rates == Rates::default()), "no time went by");
    }

    #[test]
    fn the_most_comes_first_and_what_is_unknown_last() {
        let before = counted(0, &[Some(0), Some(0), None, Some(0)], &[0, 0]);
        let now = counted(1000, &[Some(10), Some(30), None, Some(10)], &[1, 2]);
        let order = |key| {
            let mut top = example(&before, &now);
            sort(&mut top, key);
            let names = top.peers.iter().map(|it| it.counted.node.to_string().replace("node-", ""));
            names.collect::<String>()
        };
        assert_eq!(order(Key::Traffic), "1032");
        assert_eq!(order(Key::Name), "0123");
        assert_eq!(order(Key::Rtt), "3210");
        assert_eq!(order(Key::Loss), "0123");
        let mut top = example(&before, &now);
        sort(&mut top, Key::Sent);
        assert_eq!(top.pods[0].counted.pod, "shop/pod-1");
    }
}
