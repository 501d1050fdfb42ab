//! What policy means to the kernel itself: packets of random connections through the rules that are compiled for random clusters
//! arrive where the API's prose lets them.
//!
//! `PROPTEST_CASES` is the number of clusters.

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::IpAddr;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};
use husk_dataplane::policy::{Live, diff};
use husk_overlay::kernel::policy::PolicyTable;
use husk_policy::compile::closed;
use husk_tests::Family;
use husk_tests::policy::frame::{Part, Probe};
use husk_tests::policy::generator::world;
use husk_tests::policy::oracle::{Oracle, Scope};
use husk_tests::policy::wire::Wire;
use husk_tests::policy::{EXTERNALS, Flow, PROTOCOLS, SLOTS, World};
use proptest::prelude::*;
use proptest::test_runner::{TestCaseResult, TestError, TestRunner};

/// Clusters, unless the environment says otherwise.
const CASES: u32 = 1_000;

/// How much slower than usual the machine is said to be: an emulated one sees fewer clusters in the same time.
fn slowness() -> u32 {
    u32::try_from(husk_tests::patience(std::time::Duration::from_secs(1)).as_secs()).unwrap_or(1).max(1)
}

/// Of so many connections one is begun.
const SAMPLE: u64 = 12;

/// Ports of who begins: above those that rules name one by one, so that no packet looks like the answer to another.
const PORTS: std::ops::Range<u16> = 20_000..60_000;

/// Connections that this node has a say in, of protocols that tell who began them: the same ones for the same seed while a cluster shrinks.
fn flows(world: &World, seed: u32) -> Vec<Flow> {
    let ports = world.ports();
    let mut all = Vec::new();
    for (index, icmp) in [(0, 1), (1, 58)] {
        let pods = SLOTS.iter().map(|slot| (slot.addresses[index], slot.local));
        let ends: Vec<(IpAddr, bool)> = pods.chain(EXTERNALS.iter().map(|it| (it[index], false))).collect();
        for (from, input) in &ends {
            for (to, _) in ends.iter().filter(|(_, output)| *input || *output) {
                let mut add = |protocol, port| all.push(Flow { from: *from, to: *to, protocol, port });
                add(icmp, 0);
                for (_, protocol) in PROTOCOLS {
                    // Connection tracking takes nothing to port 0 for valid (net/netfilter/nf_conntrack_proto_sctp.c, for example).
                    ports.iter().filter(|port| **port > 0).for_each(|port| add(protocol, *port));
                }
            }
        }
    }
    let chosen = |flow: &Flow| {
        let mut hasher = DefaultHasher::new();
        (seed, flow).hash(&mut hasher);
        hasher.finish().is_multiple_of(SAMPLE)
    };
    all.retain(chosen);
    all
}

/// The namespaces, and the table in the one that forwards.
struct Ground<'w> {
    wire: &'w mut Wire,
    live: Live,
    numbers: u32,
    port: Option<u16>,
    begun: HashSet<(Flow, u16)>,
}

impl Ground<'_> {
    fn apply(&mut self, table: &PolicyTable) -> Result<()> {
        let actual = self.live.read()?;
        self.live.apply(&diff(Some(table), actual.as_deref()), Some(table))?;
        let left = diff(Some(table), self.live.read()?.as_deref());
        ensure!(left.is_empty(), "the kernel has another table than was asked for: {left:?}");
        Ok(())
    }

    /// The first packet of a connection that was never begun: the kernel may remember those of clusters before, and what is denied
    /// now would not be forgotten.
    fn probe(&mut self, flow: Flow) -> Probe {
        self.numbers += 1;
        loop {
            self.port = Some(self.port.map_or(PORTS.start, |port| port + 1)).filter(|port| PORTS.contains(port));
            let port = self.port.unwrap_or(PORTS.start);
            if self.begun.insert((flow, port)) {
                return Probe { flow, port, part: Part::Begin, number: self.numbers };
            }
        }
    }

    fn check(&mut self, world: &World, seed: u32) -> Result<(TestCaseResult, [u64; 2])> {
        self.apply(&world.table())?;
        let oracle = Oracle::new(world, Scope::Node);
        let probes: Vec<Probe> = flows(world, seed).into_iter().map(|flow| self.probe(flow)).collect();
        let mut counts = [0; 2];
        let mut answers = Vec::new();
        for (probe, arrived) in probes.iter().zip(self.wire.arrivals(&probes)?) {
            let allowed = oracle.allows(&probe.flow);
            if arrived != allowed {
                return Ok((Err(wrong(probe, arrived)), counts));
            }
            counts[usize::from(allowed)] += 1;
            self.numbers += 1;
            let answer = Probe { part: Part::Answer, number: self.numbers, ..*probe };
            // Where no connection is, some answers begin one, and others belong to none.
            let Flow { from, to, protocol, .. } = probe.flow;
            let begins = protocol == 17;
            let back = Flow { from: to, to: from, protocol, port: probe.port };
            answers.push((answer, allowed || (begins && oracle.allows(&back))));
        }
        let (probes, expected): (Vec<Probe>, Vec<bool>) = answers.into_iter().unzip();
        for ((probe, arrived), allowed) in probes.iter().zip(self.wire.arrivals(&probes)?).zip(expected) {
            if arrived != allowed {
                return Ok((Err(wrong(probe, arrived)), counts));
            }
        }
        Ok((Ok(()), counts))
    }
}

fn wrong(probe: &Probe, arrived: bool) -> TestCaseError {
    let what = if arrived { "arrived, and is not allowed" } else { "is allowed, and did not arrive" };
    TestCaseError::fail(format!("{probe:?} {what}"))
}

fn run(wire: &mut Wire) -> Result<()> {
    let mut ground = Ground { wire, live: Live::default(), numbers: 0, port: None, begun: HashSet::new() };
    ground.apply(&closed(&Family::ALL.into()))?;
    ground.wire.forget_soon()?;
    let cases =
        std::env::var("PROPTEST_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or_else(|| CASES / slowness());
    let config = ProptestConfig::with_cases(cases);
    let config = ProptestConfig { failure_persistence: None, max_shrink_iters: 2_000, ..config };
    let (ground, seen, started) = (RefCell::new(ground), Cell::new([0; 2]), Instant::now());
    let outcome = TestRunner::new(config).run(&(world(), any::<u32>().no_shrink()), |(world, seed)| {
        let checked = ground.borrow_mut().check(&world, seed);
        let (result, counts) = checked.map_err(|error| TestCaseError::fail(format!("{error:#}")))?;
        let [denied, allowed] = seen.get();
        seen.set([denied + counts[0], allowed + counts[1]]);
        result
    });
    outcome.map_err(|error| match error {
        TestError::Fail(reason, (world, seed)) => anyhow!("{reason}\nin this cluster (seed {seed}):\n{world:?}"),
        TestError::Abort(reason) => anyhow!("{reason}"),
    })?;
    let [denied, allowed] = seen.get();
    eprintln!("{cases} clusters in {:?}: {allowed} connections were allowed, {denied} denied", started.elapsed());
    ensure!(denied.min(allowed) > (denied + allowed) / 10, "the clusters tell little");
    Ok(())
}

#[test]
fn the_kernel_does_what_the_prose_says() -> Result<()> {
    Wire::start()?.run(run)?.context("packets through the kernel")
}
