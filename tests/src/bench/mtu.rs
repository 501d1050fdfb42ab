//! How many bytes of the underlay are payload, packet for packet of full size, beside what fixed overheads would leave.
//!
//! Two hosts with a pod each exchange datagrams of exactly the pod's MTU, and the host's wire is listened to: what is measured is
//! the length of the packets that really carried them. A mode that this kernel lacks is computed, and says so.
//!
//! Others subtract one number whatever the family, the cipher and the size. What that would give is computed with the same layers
//! as Husk's: a number too large wastes bytes of every packet, and one too small makes packets that do not fit.

use std::fmt;

use anyhow::{Context, Result, bail, ensure};
use husk_overlay::mode::Mode;
use husk_overlay::mtu::{inner_mtu, underlay_needed};
use husk_overlay::prefix::Family;
use serde_json::{Value, json};

use super::report::table;
use crate::kernel::{self, Part};
use crate::pod::Served;
use crate::probe::{Datagram, Reach};
use crate::{Cluster, Pod};

/// Headers of a pod's datagram: IPv4 without options (RFC 791) and UDP (RFC 768).
const HEADERS: u32 = 20 + 8;

/// Underlay MTUs in bytes: Ethernet's, and the largest of a well-known cloud's network.
const UNDERLAYS: [u32; 2] = [1500, 9001];

/// Datagrams of a measurement, each of which is echoed.
const DATAGRAMS: usize = 50;

/// A number that somebody subtracts from the underlay's MTU.
struct Constant {
    /// Who.
    name: &'static str,
    /// In a mode that is alike.
    mode: Mode,
    /// Bytes, by the underlay's family.
    ipv4: u32,
    ipv6: u32,
}

/// Flannel: pkg/backend/{vxlan,wireguard,ipsec}. Cilium: pkg/mtu (encryption in the node's own routes, no VXLAN around it). Calico
/// takes the smallest MTU of all encapsulations that are enabled. OpenShift subtracts 100 for Geneve and 46 for IPsec; what its
/// packets would be on the wire is computed with VXLAN, whose header is as long as Geneve's without options.
const CONSTANTS: [Constant; 8] = [
    Constant { name: "Flannel", mode: Mode::Vxlan, ipv4: 50, ipv6: 50 },
    Constant { name: "Calico", mode: Mode::Vxlan, ipv4: 50, ipv6: 70 },
    Constant { name: "Calico with WireGuard enabled too", mode: Mode::Vxlan, ipv4: 60, ipv6: 80 },
    Constant { name: "Flannel", mode: Mode::Wireguard, ipv4: 80, ipv6: 80 },
    Constant { name: "Cilium", mode: Mode::Wireguard, ipv4: 95, ipv6: 95 },
    Constant { name: "Flannel", mode: Mode::Ipsec, ipv4: 77, ipv6: 77 },
    Constant { name: "Cilium", mode: Mode::Ipsec, ipv4: 77, ipv6: 77 },
    Constant { name: "OpenShift", mode: Mode::VxlanIpsec, ipv4: 146, ipv6: 146 },
];

/// What an MTU makes of the underlay.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Yield {
    /// Bytes of a pod's packet of full size.
    inner: u32,
    /// Bytes of the underlay's packet that carries it.
    wire: u32,
    /// The largest that the underlay takes.
    underlay: u32,
}

impl Yield {
    fn computed(mode: Mode, family: Family, underlay: u32, inner: u32) -> Self {
        Self { inner, wire: underlay_needed(&mode.stack(false), family, inner), underlay }
    }

    fn efficiency(self) -> f64 {
        f64::from(self.inner - HEADERS) / f64::from(self.wire)
    }

    /// Bytes by which the packet is too long for the underlay.
    fn excess(self) -> u32 {
        self.wire.saturating_sub(self.underlay)
    }
}

impl fmt::Display for Yield {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.excess() {
            0 => write!(f, "{} ({:.2} %)", self.inner, 100.0 * self.efficiency()),
            excess => write!(f, "{} ({excess} too long)", self.inner),
        }
    }
}

/// A mode over an underlay.
#[derive(Debug, Clone)]
struct Row {
    mode: Mode,
    family: Family,
    underlay: u32,
    husk: Yield,
    /// It was seen on the wire; else the kernel lacks the mode, and it is computed.
    measured: bool,
    others: Vec<(&'static str, Yield)>,
}

/// What came of it.
#[derive(Debug, Clone)]
pub struct Report(Vec<Row>);

/// Measures every mode over both families and all underlays; `progress` is told what goes on.
///
/// # Errors
/// When the hosts cannot be made, or a packet of full size is lost, cut into pieces or of another length than computed.
pub fn run(progress: impl Fn(&str)) -> Result<Report> {
    let mut rows = Vec::new();
    for mode in Mode::ALL {
        let possible = !mode.uses_esp() || kernel::has(Part::Esp)?;
        for (family, underlay) in Family::ALL.into_iter().flat_map(|family| UNDERLAYS.map(|mtu| (family, mtu))) {
            progress(&format!("{mode} over {family}, {underlay} bytes"));
            let inner = inner_mtu(&mode.stack(false), family, underlay)?;
            let computed = Yield::computed(mode, family, underlay, inner);
            let husk = if possible { measure(mode, family, underlay)? } else { computed };
            ensure!(husk == computed, "{mode} over {family}: measured {husk:?}, computed {computed:?}");
            let others = CONSTANTS.iter().filter(|it| it.mode == mode).map(|it| {
                let overhead = if family == Family::Ipv4 { it.ipv4 } else { it.ipv6 };
                (it.name, Yield::computed(mode, family, underlay, underlay - overhead))
            });
            rows.push(Row { mode, family, underlay, husk, measured: possible, others: others.collect() });
        }
    }
    Ok(Report(rows))
}

/// Datagrams of full size from pod to pod, and the length of what carried them.
fn measure(mode: Mode, family: Family, underlay: u32) -> Result<Yield> {
    let cluster = Cluster::builder().mode(mode).underlay(family).mtu(usize::try_from(underlay)?).hosts(2).start()?;
    let (client, served): (Pod, Served) =
        (cluster.host(1).add_pod("client")?, Served::start(cluster.host(2), "server")?);
    let inner = client.mtu()?;
    let to = served.server.at(served.pod.address(Family::Ipv4)?);
    let wire = cluster.host(1).capture()?;
    for _ in 0..DATAGRAMS {
        let reach = Datagram::to(to).packet_size(inner).run(client.netns())?;
        ensure!(reach.arrived(), "{mode} over {family}: a datagram of {inner} bytes is lost: {reach:?}");
        ensure!(!matches!(reach, Reach::TooBig { .. }), "{mode} over {family}: {reach:?}");
    }
    let trace = wire.stop()?;
    ensure!(trace.fragments() == 0, "{mode} over {family}: {} fragments", trace.fragments());
    let full: Vec<usize> = trace
        .packets()
        .iter()
        .filter(|it| it.outgoing)
        .map(|it| it.ip_length)
        .filter(|length| *length >= inner)
        .collect();
    ensure!(full.len() >= DATAGRAMS, "{mode} over {family}: {} packets were seen for {DATAGRAMS}", full.len());
    let length = *full.first().context("no packet was seen")?;
    if full.iter().any(|it| *it != length) {
        bail!("{mode} over {family}: packets of one size are carried by packets of several: {full:?}");
    }
    Ok(Yield { inner: u32::try_from(inner)?, wire: u32::try_from(length)?, underlay })
}

impl Report {
    /// The report for programs.
    #[must_use]
    pub fn json(&self) -> Value {
        let of = |it: Yield| json!({ "mtu": it.inner, "wire": it.wire, "efficiency": it.efficiency(), "tooLong": it.excess() });
        let rows = self.0.iter().map(|row| {
            let others = row.others.iter().map(|(name, it)| json!({ "name": name, "yield": of(*it) }));
            json!({
                "mode": row.mode, "family": row.family, "underlayMtu": row.underlay, "measured": row.measured,
                "husk": of(row.husk), "others": others.collect::<Vec<_>>(),
            })
        });
        Value::Array(rows.collect())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "pod MTU, and bytes of a datagram's payload per byte of the underlay's packets, at full size\n")?;
        let mut rows = table(["mode", "underlay", "on the wire", "Husk", "with the constants of others"]);
        for row in &self.0 {
            let others: Vec<String> = row.others.iter().map(|(name, it)| format!("{name} {it}")).collect();
            let seen = if row.measured { "" } else { " computed" };
            rows.add_row([
                row.mode.to_string(),
                format!("{} {}", row.family, row.underlay),
                format!("{}{seen}", row.husk.wire),
                row.husk.to_string(),
                others.join(", "),
            ]);
        }
        writeln!(f, "{rows}\n")?;
        writeln!(f, "too long: such packets do not fit the underlay, and are lost or cut into pieces.")?;
        writeln!(f, "computed: this kernel lacks ESP; hack/bench mtu --vm measures it on one that has it.")?;
        writeln!(f, "Payload: what UDP over IPv4 carries, of the underlay's IP packet; Ethernet is not counted.")?;
        writeln!(f, "OpenShift is computed with VXLAN, whose header is as long as Geneve's without options.")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constants_waste_or_do_not_fit() {
        let of = |name: &str, mode, family| {
            let constant = CONSTANTS.iter().find(|it| it.name == name && it.mode == mode).unwrap();
            let overhead = if family == Family::Ipv4 { constant.ipv4 } else { constant.ipv6 };
            Yield::computed(mode, family, 1500, 1500 - overhead)
        };
        assert_eq!(of("Flannel", Mode::Vxlan, Family::Ipv4).excess(), 0);
        assert_eq!(of("Flannel", Mode::Vxlan, Family::Ipv6).excess(), 20);
        assert_eq!(of("Cilium", Mode::Wireguard, Family::Ipv4).wire, 1465);
        let exact = Yield::computed(Mode::Wireguard, Family::Ipv4, 1500, 1440);
        assert_eq!(exact.to_string(), "1440 (94.13 %)");
        assert!(of("Cilium", Mode::Wireguard, Family::Ipv4).efficiency() < exact.efficiency());
    }
}
