//! Limits as the kernel has them.

use std::io::ErrorKind;

use husk_overlay::bandwidth::{Bandwidth, Limit};

use super::*;

fn limited(ingress: u64, egress: u64) -> PodSpec {
    let limit = |rate| Some(Limit::new(rate, 0).unwrap());
    PodSpec {
        bandwidth: Some(Bandwidth { ingress: limit(ingress), egress: limit(egress) }),
        ..spec(1, &["10.42.0.1", "fd42::1"])
    }
}

#[test]
fn limits_are_on_both_ends_and_read_back() {
    // The slowest, one with a burst of a tenth of a second, one beyond 32 bits of bytes per second, the fastest.
    for (ingress, egress) in [(1_000, 50_000_000), (40_000_000_000, 1_000_000_000_000_000)] {
        let (host, pod) = (Host::new(), Netns::new_unnamed().unwrap());
        let spec = limited(ingress, egress);
        host.attach(&spec, &pod).unwrap();
        assert_eq!(host.check(&spec, &pod), [""; 0]);
        for (netns, interface) in [(&host.0, "husk00000000001"), (&pod, "eth0")] {
            let shown = run(netns, &format!("tc qdisc show dev {interface}"));
            assert!(shown.starts_with("qdisc tbf 6875: root"), "{shown}");
        }
        host.detach(&spec);
    }
}

#[test]
fn a_pod_without_limits_has_none_and_others_limits_are_no_deviation() {
    let (host, pod) = (Host::new(), Netns::new_unnamed().unwrap());
    let spec = spec(1, &["10.42.0.1"]);
    host.attach(&spec, &pod).unwrap();
    for (netns, interface) in [(&host.0, "husk00000000001"), (&pod, "eth0")] {
        assert!(run(netns, &format!("tc qdisc show dev {interface}")).contains("noqueue"));
    }
    // As the reference plugin does it, chained behind.
    run(&host.0, "tc qdisc add dev husk00000000001 root handle 1: tbf rate 1mbit burst 64kb latency 25ms");
    assert_eq!(host.check(&spec, &pod), [""; 0]);
}

#[test]
fn check_names_what_became_of_a_limit() {
    let spec = limited(10_000_000, 20_000_000);
    let tbf = "root handle 6875: tbf latency 25ms";
    let cases = [
        ("host", "tc qdisc del dev husk00000000001 root".to_owned(), "to 10000000 bit/s is missing"),
        ("pod", "tc qdisc del dev eth0 root".to_owned(), "limit of eth0 to 20000000 bit/s is missing"),
        (
            "host",
            format!("tc qdisc change dev husk00000000001 {tbf} rate 11mbit burst 125000"),
            "11000000 bit/s instead of",
        ),
        ("pod", format!("tc qdisc change dev eth0 {tbf} rate 20mbit burst 900000"), "another burst than 250000 bytes"),
        (
            "pod",
            "tc qdisc replace dev eth0 root handle 1: tbf rate 20mbit burst 250000 latency 25ms".to_owned(),
            "missing",
        ),
    ];
    for (place, damage, expected) in cases {
        let (host, pod) = (Host::new(), Netns::new_unnamed().unwrap());
        host.attach(&spec, &pod).unwrap();
        run(if place == "host" { &host.0 } else { &pod }, &damage);
        let deviations = host.check(&spec, &pod);
        assert!(matches!(deviations.as_slice(), [one] if one.contains(expected)), "{damage}: {deviations:?}");
    }
}

#[test]
fn the_slowest_pod_still_takes_the_largest_packet() {
    let (host, pod) = (Host::new(), Netns::new_unnamed().unwrap());
    let spec = limited(1_000, 1_000);
    host.attach(&spec, &pod).unwrap();
    // The MTU may grow while the pod lives.
    let grown = PodSpec { mtu: 65_535, ..spec };
    host.0.run_in(|| set_mtu(&grown, &pod)).unwrap().unwrap();
    assert_eq!(host.check(&grown, &pod), [""; 0]);
    let inbox = host.0.run_in(|| UdpSocket::bind("192.0.2.1:0").unwrap()).unwrap();
    // What the kernel itself sends of a new interface, some hundred bytes, is taken from the bucket, which fills at 125 bytes a
    // second.
    inbox.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let target = inbox.local_addr().unwrap();
    let datagram = vec![7; 65_535 - 28];
    pod.run_in(|| UdpSocket::bind("10.42.0.1:0").unwrap().send_to(&datagram, target).unwrap()).unwrap();
    // A wait with a time limit is not taken up again by the kernel after a signal (signal(7)).
    let mut buffer = vec![0; 65_535];
    let received = std::iter::repeat_with(|| inbox.recv(&mut buffer))
        .take(100)
        .find(|it| !matches!(it, Err(error) if error.kind() == ErrorKind::Interrupted));
    assert_eq!(received.unwrap().unwrap(), datagram.len());
}
