//! The cluster source of the daemon at a real API server, without any daemon: what it reads and writes, who wins a race, and what
//! becomes of it when the API server stops, forgets or goes back in time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use husk_ipam::block;
use husk_node_daemon::kubernetes::objects::{AddressBlock, AddressPool, OverlayNode};
use husk_node_daemon::kubernetes::source::{Options, Wake};
use husk_node_daemon::kubernetes::{KubernetesSource, connect, definitions_yaml};
use husk_node_daemon::source::{Claim, ClusterSource, SourceError};
use husk_overlay::config::{BlockOrigin, IpamConfig};
use husk_overlay::issue::IssueKind;
use husk_overlay::name::NodeName;
use husk_overlay::prefix::{Family, Prefix};
use husk_overlay::record::{DualStack, NodeRecord, Pool, Snapshot};
use husk_tests::kubernetes::{ControlService, Kubernetes, step};
use husk_tests::{Netns, Signal, eventually};
use k8s_openapi::api::core::v1::Node;
use kube::api::{DeleteParams, ListParams, ObjectMeta, PostParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::runtime::Runtime;

/// How long a change may take until every watch has it.
const SOON: Duration = Duration::from_secs(20);

/// Daemons that race each other.
const NODES: usize = 200;

/// Label of nodes that a test made.
const LABEL: &str = "husk.dev/test";

/// Seconds after which a node counts as gone; the shortest that the configuration takes.
const RELEASE_AFTER: u32 = 10;

/// What is done, and the doing.
type Step = (&'static str, fn(&Bench) -> Result<()>);

/// Steps that share a cluster, since each leaves it as the next one finds it.
const STEPS: [Step; 8] = [
    ("records are written once and read by all", records_are_written_once_and_read_by_all),
    ("of two claims one is granted", of_two_claims_one_is_granted),
    ("200 daemons race for blocks and none is allocated twice", two_hundred_daemons_race),
    ("objects that make no sense are issues and hide no other", nonsense_is_an_issue),
    ("cidrs of nodes are blocks where kubernetes allocates them", node_cidrs_are_blocks),
    ("watches survive an API server that stops and a history that is gone", watches_survive_an_outage),
    ("a restored API server is believed and what it forgot can be claimed again", a_restored_api_server_is_believed),
    ("blocks of a node that is gone go back and those of a silent one that lives stay", gone_nodes_give_back),
];

#[test]
fn the_source_at_a_real_api_server() -> Result<()> {
    let kubernetes = Kubernetes::builder().nodes(1).without_kube_proxy().start()?;
    kubernetes.apply(&definitions_yaml()?)?;
    let bench = Bench { kubernetes };
    STEPS.into_iter().try_for_each(|(name, work)| step(name, || work(&bench)))
}

struct Bench {
    kubernetes: Kubernetes,
}

impl Bench {
    fn netns(&self) -> &Netns {
        self.kubernetes.underlay().outside()
    }

    /// Works as a daemon would, on threads that are all in the API server's network.
    fn as_daemons<T: Send>(&self, work: impl FnOnce(&Runtime) -> Result<T> + Send) -> Result<T> {
        self.netns().run(|| {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
            let done = work(&runtime);
            runtime.shutdown_background();
            done
        })?
    }

    fn source(&self, node: &str, origin: BlockOrigin, runtime: &Runtime) -> Result<KubernetesSource> {
        self.waking(node, origin, runtime, Arc::new(|| {}))
    }

    fn waking(&self, node: &str, origin: BlockOrigin, runtime: &Runtime, wake: Wake) -> Result<KubernetesSource> {
        let options = Options {
            kubeconfig: Some(self.kubernetes.admin().kubeconfig().to_owned()),
            node: name(node),
            ipam: IpamConfig { blocks: origin, release_after: RELEASE_AFTER, ..IpamConfig::default() },
            cluster_cidrs: vec![prefix("10.244.0.0/16")],
            patience: SOON,
        };
        Ok(KubernetesSource::open(&options, runtime.handle(), &[Wake::clone(&wake), wake])?)
    }

    /// Makes `Node` objects that no kubelet stands behind. Not with kubectl, which makes five objects a second.
    fn make_nodes<'n>(&self, nodes: impl IntoIterator<Item = &'n str>) -> Result<()> {
        let nodes: Vec<&str> = nodes.into_iter().collect();
        self.ask(async |client| {
            let api: Api<Node> = Api::all(client);
            for name in nodes {
                let labels = Some(BTreeMap::from([(LABEL.to_owned(), name.to_owned())]));
                let metadata = ObjectMeta { name: Some(name.to_owned()), labels, ..ObjectMeta::default() };
                api.create(&PostParams::default(), &Node { metadata, ..Node::default() }).await?;
            }
            Ok(())
        })
    }

    /// Deletes the nodes that a test made.
    fn delete_nodes(&self) -> Result<()> {
        self.ask(async |client| {
            let ours = ListParams::default().labels(LABEL);
            Api::<Node>::all(client).delete_collection(&DeleteParams::default(), &ours).await.map(drop)
        })
    }

    fn remove_everything(&self) -> Result<()> {
        self.ask(async |client| {
            let (parameters, all) = (DeleteParams::default(), ListParams::default());
            Api::<OverlayNode>::all(client.clone()).delete_collection(&parameters, &all).await?;
            Api::<AddressPool>::all(client.clone()).delete_collection(&parameters, &all).await?;
            Api::<AddressBlock>::all(client).delete_collection(&parameters, &all).await.map(drop)
        })
    }

    fn ask<T: Send>(&self, ask: impl AsyncFnOnce(Client) -> kube::Result<T> + Send) -> Result<T> {
        let kubeconfig = self.kubernetes.admin().kubeconfig().to_owned();
        self.as_daemons(|runtime| runtime.block_on(async { Ok(ask(connect(Some(&kubeconfig)).await?).await?) }))
    }

    fn version(&self, object: &str) -> Result<String> {
        self.kubernetes.kubectl(["get", object, "--output", "jsonpath={.metadata.resourceVersion}"])
    }
}

fn name(text: &str) -> NodeName {
    text.parse().expect("a name of a test")
}

fn prefix(text: &str) -> Prefix {
    text.parse().expect("a CIDR of a test")
}

fn record(node: &str, block: &str) -> NodeRecord {
    NodeRecord {
        name: name(node),
        instance: "0123456789abcdef".parse().expect("an instance id"),
        created: "2026-01-31T12:00:00Z".parse().expect("a time"),
        addresses: DualStack { ipv4: Some("192.0.2.1".parse().expect("an address")), ipv6: None },
        underlay_mtu: 1500,
        blocks: [prefix(block)].into(),
        router: [prefix(block).address()].into_iter().collect(),
        vxlan_mac: Some("02:00:5e:10:00:01".parse().expect("a MAC address")),
        wireguard: Vec::new(),
        esp: None,
    }
}

/// Waits for a snapshot of which something holds.
fn until(what: &str, source: &mut KubernetesSource, holds: impl Fn(&Snapshot) -> bool) -> Result<Snapshot> {
    let mut last = Snapshot::default();
    eventually(what, SOON, || {
        last = source.snapshot()?;
        Ok(holds(&last))
    })
    .with_context(|| format!("{last:?}"))?;
    Ok(last)
}

fn records_are_written_once_and_read_by_all(bench: &Bench) -> Result<()> {
    bench.as_daemons(|runtime| {
        let woken = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&woken);
        let wake: Wake = Arc::new(move || {
            count.fetch_add(1, Ordering::SeqCst);
        });
        let mut one = bench.source("host1", BlockOrigin::Pools, runtime)?;
        let mut other = bench.waking("other", BlockOrigin::Pools, runtime, wake)?;
        ensure!(other.snapshot()?.nodes.is_empty());
        let before = woken.load(Ordering::SeqCst);
        one.publish(&record("host1", "10.244.7.0/26"))?;
        let seen = until("the record", &mut other, |snapshot| snapshot.nodes.contains_key(&name("host1")))?;
        ensure!(woken.load(Ordering::SeqCst) > before, "the loop was not woken");
        let published = &seen.nodes[&name("host1")];
        // The API server says when it was made, whatever the node says.
        let mut expected = record("host1", "10.244.7.0/26");
        expected.created = published.created;
        ensure!(
            *published == expected && published.created > record("host1", "10.244.7.0/26").created,
            "{published:?}"
        );
        ensure!(one.snapshot()?.nodes[&name("host1")] == *published, "the own snapshot has it at once");

        let version = bench.version("overlaynode/host1")?;
        one.publish(&record("host1", "10.244.7.0/26"))?;
        ensure!(bench.version("overlaynode/host1")? == version, "the same record made a new version");
        // What others write into it goes.
        let spoilt = r#"{"spec":{"underlayMtu":9000}}"#;
        bench.kubernetes.kubectl(["patch", "overlaynode/host1", "--type=merge", "--patch", spoilt])?;
        one.publish(&record("host1", "10.244.7.0/26"))?;
        until("the record as it was", &mut other, |snapshot| snapshot.nodes[&name("host1")].underlay_mtu == 1500)?;

        one.withdraw(&name("host1"))?;
        until("the record to be gone", &mut other, |snapshot| snapshot.nodes.is_empty())?;
        one.withdraw(&name("host1"))?;
        Ok(())
    })
}

fn of_two_claims_one_is_granted(bench: &Bench) -> Result<()> {
    bench.make_nodes(["a", "b"])?;
    bench.as_daemons(|runtime| {
        let (wanted, mut sources) = (prefix("10.244.9.0/26"), Vec::new());
        for node in ["a", "b"] {
            sources.push((name(node), bench.source(node, BlockOrigin::Pools, runtime)?));
        }
        let start = Barrier::new(sources.len());
        let answers = thread::scope(|scope| {
            let racing: Vec<_> = sources
                .iter_mut()
                .map(|(node, source)| {
                    let start = &start;
                    scope.spawn(move || {
                        source.snapshot()?;
                        start.wait();
                        source.claim(wanted, node)
                    })
                })
                .collect();
            racing.into_iter().map(|it| it.join().expect("no panic")).collect::<Result<Vec<Claim>, SourceError>>()
        })?;
        ensure!(answers.iter().filter(|answer| **answer == Claim::Granted).count() == 1, "{answers:?}");
        let winner = usize::from(answers[0] != Claim::Granted);
        let loser = 1 - winner;
        let owner = sources[winner].0.clone();
        // Who does not own it cannot give it back.
        let not_owner = sources[loser].0.clone();
        sources[loser].1.release(wanted, &not_owner)?;
        until("the owner", &mut sources[loser].1, |snapshot| snapshot.blocks.get(&wanted) == Some(&owner))?;
        sources[winner].1.release(wanted, &owner)?;
        until("the block to be free", &mut sources[loser].1, |snapshot| snapshot.blocks.is_empty())?;
        ensure!(sources[loser].1.claim(wanted, &not_owner)? == Claim::Granted, "a block that was given back");
        // One that Kubernetes does not know could not be told from one that is gone.
        bench.delete_nodes()?;
        until("an issue of the missing Node", &mut sources[loser].1, |snapshot| !snapshot.issues.is_empty())?;
        let refused = sources[loser].1.claim(prefix("10.244.10.0/26"), &not_owner);
        ensure!(refused.as_ref().is_err_and(|error| error.to_string().contains("no Node object")), "{refused:?}");
        bench.remove_everything()
    })
}

/// Twice as many blocks as are needed, so that the last daemons have to look hard: two blocks for each, one after the other.
fn two_hundred_daemons_race(bench: &Bench) -> Result<()> {
    let pools = [Pool { name: "p".into(), cidr: prefix("10.244.0.0/16"), block_length: 25, disabled: false }];
    let names: Vec<String> = (0..NODES).map(|index| format!("racer{index}")).collect();
    bench.make_nodes(names.iter().map(String::as_str))?;
    let granted = bench.as_daemons(|runtime| {
        let mut sources = Vec::new();
        for node in &names {
            sources.push((name(node), bench.source(node, BlockOrigin::Pools, runtime)?));
        }
        let (pools, start) = (&pools, Barrier::new(NODES));
        thread::scope(|scope| {
            let racing: Vec<_> = sources
                .iter_mut()
                .map(|(node, source)| {
                    let start = &start;
                    scope.spawn(move || -> Result<Vec<(Prefix, NodeName)>> {
                        source.snapshot()?;
                        start.wait();
                        let mut mine = Vec::new();
                        for _ in 0..2 {
                            let known = source.snapshot()?.blocks;
                            // All begin at the same place: the worst that can happen.
                            let candidates = block::candidates(pools, &known, Family::Ipv4, 0);
                            let claimed = block::claim(candidates, |it| -> Result<block::Claim, SourceError> {
                                Ok(match source.claim(*it, node)? {
                                    Claim::Granted => block::Claim::Created,
                                    Claim::Taken => block::Claim::Taken,
                                })
                            })?;
                            mine.push((claimed.context("no block was left")?, node.clone()));
                        }
                        Ok(mine)
                    })
                })
                .collect();
            let mut all = Vec::new();
            for thread in racing {
                all.extend(thread.join().expect("no panic")?);
            }
            Ok(all)
        })
    })?;
    let unique: BTreeMap<Prefix, NodeName> = granted.iter().cloned().collect();
    ensure!(granted.len() == 2 * NODES, "{} claims were granted", granted.len());
    ensure!(unique.len() == granted.len(), "only {} of {} blocks differ", unique.len(), granted.len());
    let listed = bench.kubernetes.admin().list("addressblocks")?;
    let listed: BTreeSet<(String, String)> = listed
        .iter()
        .map(|it| {
            [&it["spec"]["cidr"], &it["spec"]["node"]].map(|it| it.as_str().unwrap_or_default().to_owned()).into()
        })
        .collect();
    let expected = unique.iter().map(|(block, node)| (block.to_string(), node.to_string())).collect();
    ensure!(listed == expected, "the API server has other owners than were told");
    bench.delete_nodes()?;
    bench.remove_everything()
}

fn nonsense_is_an_issue(bench: &Bench) -> Result<()> {
    let block = |name: &str, cidr: &str| {
        json!({
            "apiVersion": "husk.dev/v1alpha1", "kind": "AddressBlock", "metadata": { "name": name },
            "spec": { "cidr": cidr, "node": "a" },
        })
    };
    let admin = bench.kubernetes.admin();
    // What validation keeps out.
    for (bad, why) in [(block("x", "10.244.0.0"), "spec.cidr"), (block("y", "10.244.0.0/1000"), "spec.cidr")] {
        let refused = admin.apply(&bad.to_string()).err().context("the API server takes nonsense")?;
        ensure!(format!("{refused:#}").contains(why), "{refused:#}");
    }
    // And what it cannot know.
    admin.apply(&block("mine", "10.244.0.0/26").to_string())?;
    admin.apply(&block("10.244.0.64-26", "10.244.0.64/26").to_string())?;
    admin.apply(&block("10.244.999.0-26", "10.244.999.0/26").to_string())?;
    bench.as_daemons(|runtime| {
        let mut source = bench.source("host1", BlockOrigin::Pools, runtime)?;
        let snapshot = source.snapshot()?;
        ensure!(snapshot.blocks == BTreeMap::from([(prefix("10.244.0.64/26"), name("a"))]), "{snapshot:?}");
        let subjects: Vec<&str> = snapshot.issues.iter().map(|issue| issue.subject.as_str()).collect();
        ensure!(subjects == ["AddressBlock 10.244.999.0-26", "AddressBlock mine"], "{:?}", snapshot.issues);
        ensure!(snapshot.issues.iter().all(|issue| issue.kind == IssueKind::BadManifest));
        Ok(())
    })?;
    bench.remove_everything()
}

fn node_cidrs_are_blocks(bench: &Bench) -> Result<()> {
    bench.as_daemons(|runtime| {
        let mut source = bench.source("host1", BlockOrigin::NodeCidrs, runtime)?;
        let own = |snapshot: &Snapshot| snapshot.blocks.values().any(|owner| *owner == name("host1"));
        until("the node's CIDR", &mut source, own)?;
        bench.make_nodes(["host2"])?;
        until("the CIDR of a node that is new", &mut source, |snapshot| snapshot.blocks.len() == 2)?;
        ensure!(source.claim(prefix("10.244.200.0/24"), &name("host1"))? == Claim::Taken, "nothing can be claimed");
        bench.delete_nodes()?;
        until("its CIDR to be gone", &mut source, |snapshot| snapshot.blocks.len() == 1)?;
        Ok(())
    })
}

fn watches_survive_an_outage(bench: &Bench) -> Result<()> {
    let kubernetes = &bench.kubernetes;
    bench.as_daemons(|runtime| {
        let mut source = bench.source("host1", BlockOrigin::Pools, runtime)?;
        source.claim(prefix("10.244.1.0/26"), &name("host1"))?;
        source.snapshot()?;
        kubernetes.stop_control(ControlService::ApiServer, Signal::SIGKILL)?;
        let refused = source.claim(prefix("10.244.2.0/26"), &name("host1"));
        ensure!(matches!(refused, Err(SourceError::Unavailable { .. })), "{refused:?}");
        ensure!(source.snapshot()?.blocks.len() == 1, "a short outage changes nothing");
        eventually("the source to call itself unavailable", SOON, || Ok(source.snapshot().is_err()))?;

        // What happens meanwhile is compacted away: a watch that went on from where it was would be told "too old".
        kubernetes.start_control(ControlService::ApiServer)?;
        kubernetes.wait_api_server()?;
        kubernetes.compact_etcd()?;
        eventually("the source to be available again", SOON * 2, || Ok(source.snapshot().is_ok()))?;
        ensure!(source.claim(prefix("10.244.2.0/26"), &name("host1"))? == Claim::Granted);
        kubernetes.kubectl(["delete", "addressblock", "10.244.1.0-26"])?;
        until("what was deleted to be gone", &mut source, |snapshot| {
            snapshot.blocks.keys().eq(&[prefix("10.244.2.0/26")])
        })?;
        Ok(())
    })?;
    bench.remove_everything()
}

fn a_restored_api_server_is_believed(bench: &Bench) -> Result<()> {
    let kubernetes = &bench.kubernetes;
    let (early, late) = (prefix("10.244.1.0/26"), prefix("10.244.2.0/26"));
    bench.as_daemons(|runtime| {
        let mut source = bench.source("host1", BlockOrigin::Pools, runtime)?;
        ensure!(source.claim(early, &name("host1"))? == Claim::Granted);
        let snapshot = kubernetes.snapshot("early")?;
        ensure!(source.claim(late, &name("host1"))? == Claim::Granted);
        // Versions beyond those that the restored server will count from.
        for _ in 0..20 {
            source.publish(&record("host1", "10.244.1.0/26"))?;
            source.withdraw(&name("host1"))?;
        }
        kubernetes.restore(&snapshot)?;
        eventually("the state of the snapshot", SOON * 2, || {
            Ok(source.snapshot().is_ok_and(|it| it.blocks.keys().eq([&early])))
        })?;
        ensure!(source.claim(late, &name("host1"))? == Claim::Granted, "what was forgotten can be had again");
        // And what happens now is seen, although its version is lower than versions seen before.
        kubernetes.kubectl(["delete", "addressblock", "10.244.1.0-26"])?;
        until("a change after the restore", &mut source, |snapshot| snapshot.blocks.keys().eq([&late]))?;
        Ok(())
    })?;
    bench.remove_everything()
}

fn gone_nodes_give_back(bench: &Bench) -> Result<()> {
    let (gone, silent) = (prefix("10.244.1.0/26"), prefix("10.244.2.0/26"));
    bench.as_daemons(|runtime| {
        bench.make_nodes(["gone", "silent"])?;
        for (node, block) in [("gone", gone), ("silent", silent)] {
            let mut source = bench.source(node, BlockOrigin::Pools, runtime)?;
            source.snapshot()?;
            ensure!(source.claim(block, &name(node))? == Claim::Granted);
            source.publish(&record(node, &block.to_string()))?;
        }
        // Its Node object is missing, but it lives: nobody may have its block.
        let mut living = bench.source("silent", BlockOrigin::Pools, runtime)?;
        living.snapshot()?;
        bench.delete_nodes()?;
        let issues = until("an issue of the missing Node", &mut living, |snapshot| !snapshot.issues.is_empty())?.issues;
        ensure!(issues[0].kind == IssueKind::NodeMissing, "{issues:?}");
        let mut source = bench.source("host1", BlockOrigin::Pools, runtime)?;
        // Some daemon looks every half minute, and more often once it suspects something.
        let limit = Duration::from_secs(120);
        eventually("what the node left to be gone", limit, || {
            let snapshot = source.snapshot()?;
            if !snapshot.blocks.contains_key(&silent) || !snapshot.nodes.contains_key(&name("silent")) {
                bail!("the block of a node that lives was given away: {snapshot:?}");
            }
            Ok(!snapshot.blocks.contains_key(&gone) && !snapshot.nodes.contains_key(&name("gone")))
        })?;
        ensure!(source.claim(gone, &name("host1"))? == Claim::Granted, "and the block can be had");
        Ok(())
    })?;
    bench.remove_everything()
}
