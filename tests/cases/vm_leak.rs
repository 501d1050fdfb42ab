//! In encrypted modes nothing of the pods is readable on the underlay, from before the first daemon starts until after all of
//! them were killed: while hosts join, leave and change keys, after the kernel's associations, policies or devices were
//! removed, and when a peer has a key that is not its own. What was removed comes back by itself, and never with keys that
//! were in use.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_overlay::keys::PublicKey;
use husk_overlay::manifest::{self, Manifest};
use husk_overlay::name::NodeName;
use husk_tests::kernel::{self, Part};
use husk_tests::load::while_knocking;
use husk_tests::pod::await_answers_among;
use husk_tests::rotation::rotate;
use husk_tests::{Cluster, ClusterBuilder, Host, Leak, Mode, Pod, Prefix, Signal, eventually, xfrm};

/// How soon packets pass again after the harm.
const SOON: Duration = Duration::from_secs(8);

/// How long every state is held under traffic.
const WHILE: Duration = Duration::from_millis(500);

#[test]
fn wireguard_of_the_kernel_tells_nothing() -> Result<()> {
    kernel::require(&[Part::Wireguard])?;
    whatever_happens(Cluster::builder().set("wireguard.device", "kernel"), "husk-wg0")
}

#[test]
fn ipsec_tells_nothing() -> Result<()> {
    kernel::require(&[Part::Esp])?;
    whatever_happens(Cluster::builder().mode(Mode::Ipsec), "husk-ipsec")
}

#[test]
fn vxlan_in_ipsec_tells_nothing() -> Result<()> {
    kernel::require(&[Part::Esp])?;
    whatever_happens(Cluster::builder().mode(Mode::VxlanIpsec), "husk-vx")
}

/// The stage and who is on it.
struct Stage {
    cluster: Cluster,
    device: &'static str,
}

fn whatever_happens(builder: ClusterBuilder, device: &'static str) -> Result<()> {
    let cluster = builder.set("keys.grace", 1).set("keys.hardLifetime", 600).build()?;
    let leak = Leak::watch(&cluster)?;
    let stage = Stage { cluster, device };
    let to = stage.blocks_of_the_second()?;
    stage.start(1)?;
    let a = stage.host(1).add_pod("a")?;
    let from = [a.netns(), stage.host(1).netns()];
    let b = while_knocking(&from, &to, || {
        std::thread::sleep(WHILE);
        stage.start(2)?;
        stage.host(2).add_pod("b")
    })?;
    ensure!(b.addresses() == to, "the knocking went to {to:?}, and the pod has {:?}", b.addresses());
    // The second host speaks first as well: what it has lost must not show in answers only, which come after a packet that
    // found its way.
    while_knocking(&[b.netns(), stage.host(2).netns()], &a.addresses(), || {
        while_knocking(&from, &to, || -> Result<()> {
            await_answers_among(&[&a, &b], SOON).context("joined")?;
            stage.removed_by_hand(&a, &b)?;
            rotate(&stage.cluster, &[1, 2], SOON)?;
            await_answers_among(&[&a, &b], SOON).context("rotated")?;
            stage.forged_key(&a, &b)?;
            stage.left_and_back(&a, &b)?;
            stage.nobody_is_left(&a, &b)
        })
    })?;
    leak.finish(&stage.cluster)?.with_tunnelled(100).map(drop)
}

impl Stage {
    fn host(&self, number: usize) -> &Host {
        self.cluster.host(number)
    }

    /// Where the second host's first pod will be, so that somebody can send there before anything is there.
    fn blocks_of_the_second(&self) -> Result<Vec<IpAddr>> {
        let blocks: [Prefix; 2] = ["10.42.7.0/26".parse()?, "fd42:0:0:7::/122".parse()?];
        let folder = self.cluster.manifests().join("blocks");
        std::fs::create_dir_all(&folder)?;
        for block in blocks {
            let text = manifest::block(block, &NodeName::new("host2")?).to_yaml();
            std::fs::write(folder.join(format!("{}.yaml", manifest::block_name(block))), text)?;
        }
        Ok(blocks.iter().filter_map(|block| block.nth(1)).collect())
    }

    fn start(&self, number: usize) -> Result<()> {
        let host = self.host(number);
        host.start()?;
        host.wait_ready()
    }

    /// What an outsider does by hand; that it is gone already is fine.
    fn harm(&self, number: usize, command: &str) -> Result<()> {
        self.host(number).program("sh").args(["-c", command]).run()?;
        Ok(())
    }

    /// The keys that the kernel of a host has for ESP.
    fn keys(&self, number: usize) -> Result<BTreeSet<String>> {
        Ok(xfrm::states(self.host(number).netns())?.into_iter().filter_map(|state| state.key).collect())
    }

    fn removed_by_hand(&self, a: &Pod, b: &Pod) -> Result<()> {
        let esp = self.cluster.mode().uses_esp();
        let device = format!("ip link del {}", self.device);
        let states = "ip xfrm state flush";
        let both = "ip xfrm policy flush; ip xfrm state flush";
        let steps: &[(usize, &str)] = if esp {
            &[(1, states), (2, "ip xfrm policy flush"), (2, both), (1, &device), (2, "nft delete table inet husk")]
        } else {
            &[(1, &device), (2, &device), (2, "nft delete table inet husk")]
        };
        for (number, command) in steps {
            let before = self.keys(*number)?;
            self.harm(*number, command)?;
            std::thread::sleep(WHILE);
            await_answers_among(&[a, b], SOON).with_context(|| format!("after `{command}` on host{number}"))?;
            if command.contains("state flush") {
                let after = self.keys(*number)?;
                let again = after.intersection(&before).count();
                ensure!(!after.is_empty() && again == 0, "host{number} uses {again} keys again after `{command}`");
            }
        }
        Ok(())
    }

    /// The second host's record gets keys whose private halves nobody has.
    fn forged_key(&self, a: &Pod, b: &Pod) -> Result<()> {
        self.host(2).stop_daemon(Signal::SIGKILL)?;
        let mut record = self.cluster.record(2)?;
        let mut forged = 1..;
        let mut key = || PublicKey::from_bytes([forged.next().unwrap_or(1); 32]);
        for device in &mut record.wireguard {
            device.public_key = key()?;
        }
        for epoch in record.esp.iter_mut().flat_map(|esp| &mut esp.epochs) {
            epoch.public_key = key()?;
            epoch.epoch += 1;
        }
        std::fs::write(self.cluster.record_path(2), Manifest::Node(record).to_yaml())?;
        // For some time the first host may still use what it has; afterwards it can reach nobody.
        std::thread::sleep(WHILE * 4);
        self.start(2)?;
        await_answers_among(&[a, b], SOON).context("after a forged record")
    }

    fn left_and_back(&self, a: &Pod, b: &Pod) -> Result<()> {
        self.host(2).stop_daemon(Signal::SIGTERM)?;
        std::fs::remove_file(self.cluster.record_path(2))?;
        eventually("host1 to forget the peer", SOON, || {
            Ok(!self.host(1).ip(["-4", "route", "show", "proto", "72"])?.contains("dev husk-"))
        })?;
        std::thread::sleep(WHILE);
        self.start(2)?;
        await_answers_among(&[a, b], SOON).context("back again")
    }

    /// All daemons are dead, and one thing after the other goes: each that is left holds.
    fn nobody_is_left(&self, a: &Pod, b: &Pod) -> Result<()> {
        for number in 1..=2 {
            self.host(number).stop_daemon(Signal::SIGKILL)?;
        }
        std::thread::sleep(WHILE);
        await_answers_among(&[a, b], SOON).context("the data plane of dead daemons")?;
        let (table, device) = ("nft delete table inet husk", format!("ip link del {}", self.device));
        let (states, policies) = ("ip xfrm state flush", "ip xfrm policy flush");
        // On the first host the table stands to the end but for the routes, on the second it goes before the policies.
        for (number, command) in
            [(1, states), (2, table), (1, policies), (2, states), (1, &device), (1, table), (2, &device), (2, policies)]
        {
            self.harm(number, command)?;
            std::thread::sleep(WHILE);
        }
        Ok(())
    }
}
